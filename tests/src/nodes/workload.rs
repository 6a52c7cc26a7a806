//! Workloads of the tests: a Deployment of agnhost with a Service of type NodePort, and pods to dial from.
//!
//! Owns their manifests. Never waits.

use serde_json::{Value, json};

use super::AGNHOST_IMAGE;

/// The port of the Service that leads to HTTP, and its NodePort.
pub const HTTP: (u16, u16) = (80, 30080);
/// The port of the Service that leads to UDP, and its NodePort.
pub const UDP: (u16, u16) = (81, 30081);

/// What agnhost listens on: HTTP, and UDP.
pub const TARGETS: (u16, u16) = (8080, 8081);

/// A Deployment `name` in namespace `default`, of pods that go on serving for some seconds after they are told to end.
pub fn deployment(name: &str, replicas: u32) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {
                    "containers": [agnhost()],
                    "terminationGracePeriodSeconds": 30,
                    "topologySpreadConstraints": [{
                        "maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {"matchLabels": {"app": name}},
                    }],
                },
            },
        },
    })
}

/// A pod in namespace `default` that serves as those of a [`deployment`] do.
pub fn server(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
        "spec": {"containers": [agnhost()], "terminationGracePeriodSeconds": 30},
    })
}

fn agnhost() -> Value {
    json!({
        "name": "agnhost", "image": AGNHOST_IMAGE, "imagePullPolicy": "Never",
        "args": ["netexec", format!("--http-port={}", TARGETS.0), format!("--udp-port={}", TARGETS.1)],
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": TARGETS.0}, "periodSeconds": 1},
        "lifecycle": {"preStop": {"sleep": {"seconds": 5}}},
    })
}

/// A Service of type NodePort for the pods of a Deployment.
pub fn service(name: &str) -> Value {
    let port = |name: &str, protocol: &str, (port, node_port): (u16, u16), target: u16| json!({"name": name, "protocol": protocol, "port": port, "nodePort": node_port, "targetPort": target});
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "selector": {"app": name},
            "ports": [port("http", "TCP", HTTP, TARGETS.0), port("udp", "UDP", UDP, TARGETS.1)],
        },
    })
}

/// A pod of a node to dial from, in namespace `default`.
pub fn client(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"role": "client"}},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "agnhost", "image": AGNHOST_IMAGE, "imagePullPolicy": "Never", "args": ["pause"],
            }],
        },
    })
}
