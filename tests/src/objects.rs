//! Kubernetes objects as JSON, for the API server and for manifest folders alike.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

/// One port of a Service and of its slices.
#[derive(Clone, Debug)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: &'static str,
    /// What clients dial.
    pub port: u16,
    /// The NodePort, where there is one.
    pub node_port: Option<u16>,
    /// What the endpoints listen on.
    pub target: u16,
}

impl Port {
    /// A port without a NodePort, named after its protocol.
    pub fn new(protocol: &'static str, port: u16, target: u16) -> Self {
        Self { name: protocol.to_lowercase(), protocol, port, node_port: None, target }
    }

    /// The same with a NodePort.
    #[must_use]
    pub fn node_port(mut self, node_port: u16) -> Self {
        self.node_port = Some(node_port);
        self
    }
}

/// A Service in namespace `default`; type NodePort where a port has one, else ClusterIP.
pub fn service(name: &str, cluster_ips: &[IpAddr], ports: &[Port]) -> Value {
    let families: Vec<_> = cluster_ips.iter().map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" }).collect();
    let policy = if cluster_ips.len() > 1 { "RequireDualStack" } else { "SingleStack" };
    let kind = if ports.iter().any(|port| port.node_port.is_some()) { "NodePort" } else { "ClusterIP" };
    let ports: Vec<_> = ports
        .iter()
        .map(|port| {
            let mut spec = json!({
                "name": port.name, "protocol": port.protocol, "port": port.port, "targetPort": port.target,
            });
            if let Some(node_port) = port.node_port {
                spec["nodePort"] = node_port.into();
            }
            spec
        })
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": kind, "clusterIP": cluster_ips.first(), "clusterIPs": cluster_ips,
            "ipFamilies": families, "ipFamilyPolicy": policy, "ports": ports,
        },
    })
}

/// An endpoint: where it is, on which node, and its conditions.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// Its node.
    pub node: String,
    /// `conditions`.
    pub conditions: Value,
}

impl Endpoint {
    /// A ready one.
    pub fn ready(address: IpAddr, node: &str) -> Self {
        let conditions = json!({"ready": true, "serving": true, "terminating": false});
        Self { address, node: node.to_owned(), conditions }
    }
}

/// A slice `<service>-<suffix>` in namespace `default`; all endpoints are of one family.
pub fn slice(service: &str, suffix: &str, v6: bool, ports: &[Port], endpoints: &[Endpoint]) -> Value {
    let ports: Vec<_> = ports
        .iter()
        .map(|port| json!({"name": port.name, "protocol": port.protocol, "port": port.target}))
        .collect();
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|endpoint| {
            json!({
                "addresses": [endpoint.address], "nodeName": endpoint.node, "conditions": endpoint.conditions,
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{suffix}"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": if v6 { "IPv6" } else { "IPv4" }, "ports": ports, "endpoints": endpoints,
    })
}

/// The slices of a Service: one a family that has endpoints.
pub fn slices(service: &str, ports: &[Port], endpoints: &[Endpoint]) -> Vec<Value> {
    [(false, "v4"), (true, "v6")]
        .into_iter()
        .filter_map(|(v6, suffix)| {
            let of_family: Vec<_> =
                endpoints.iter().filter(|endpoint| endpoint.address.is_ipv6() == v6).cloned().collect();
            (!of_family.is_empty()).then(|| slice(service, suffix, v6, ports, &of_family))
        })
        .collect()
}

/// A Node with these InternalIPs.
pub fn node(name: &str, addresses: &[IpAddr]) -> Value {
    let addresses: Vec<_> =
        addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"addresses": addresses},
    })
}

/// A manifest folder. Files are replaced atomically, as an agent that watches the folder expects it.
#[derive(Debug)]
pub struct Folder {
    dir: tempfile::TempDir,
}

impl Folder {
    /// An empty folder, removed when dropped.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> Result<Self> {
        Ok(Self { dir: tempfile::Builder::new().prefix("kube-lane-manifests-").tempdir()? })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where it is, for a command line.
    pub fn arg(&self) -> String {
        self.dir.path().to_string_lossy().into_owned()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.json"))
    }

    /// Puts objects into the file of this name, in place of what it had.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&self, name: &str, objects: &[Value]) -> Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        let new = self.dir.path().join(format!(".{name}.new"));
        fs::write(&new, serde_json::to_vec(&list)?)?;
        fs::rename(new, self.file(name))?;
        Ok(())
    }

    /// Removes the file of this name.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.file(name))?)
    }
}
