//! `deploy/static-pod`: valid for an API server, and run by hand as a kubelet without one runs it.

use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;
use kube_lane_lab::{Lab, Proto};
use kube_lane_tests::cluster::Cluster;
use kube_lane_tests::objects::{Endpoint, Port, node, service, slices};
use serde_json::{Value, json};

use crate::container::{Kubelet, end, probes_succeed};
use crate::wait::{LIMIT, answered, until};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/static-pod")
}

fn file() -> PathBuf {
    folder().join("kube-lane.yaml")
}

/// A kubelet that has an API server shows static pods there (mirror pods).
#[test]
fn the_static_pod_is_valid() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-system"}});
    until(|| cluster.get(&namespace).map(drop).map_err(|error| error.to_string()));
    // The folder makes the pod for mode ebpf.
    for (flag, path) in [("-f", file()), ("-k", folder())] {
        let apply = ["apply", "--server-side", "--dry-run=server", "--validate=strict", flag];
        let said = cluster.kubectl(&[&apply[..], &[path.to_str().unwrap()]].concat()).unwrap();
        assert_eq!(said, "pod/kube-lane serverside-applied (server dry run)\n", "{}", path.display());
    }
}

#[test]
fn the_static_pod_serves_without_an_api_server() {
    let lab = Lab::builder().build().unwrap();
    let node0 = lab.node(0);
    let (server, client) = (node0.add_pod("server").unwrap(), node0.add_pod("client").unwrap());
    let _echo = server.serve(Proto::Tcp, 8080).unwrap();
    let ports = [Port::new("TCP", 80, 8080)];
    let mut objects = vec![node(node0.name(), &[node0.v4(), node0.v6()])];
    objects.push(service("echo", &["10.96.1.1".parse().unwrap()], &ports));
    objects.extend(slices("echo", &ports, &[Endpoint::ready(server.v4(), node0.name())]));
    let documents: Vec<String> = objects.iter().map(Value::to_string).collect();

    let kubelet = Kubelet::new(node0);
    kubelet.write("etc/services", "echo.yaml", documents.join("\n---\n").as_bytes());
    let pod: Pod = serde_saphyr::from_str(&fs::read_to_string(file()).unwrap()).unwrap();
    let pod = pod.spec.unwrap();
    let container = &pod.containers[0];
    let log = kubelet.folder("log").join("log");
    let mut agent = kubelet.start(&pod, container, None, &log);
    agent.wait_synced(LIMIT).unwrap();
    let vip = "10.96.1.1:80".parse().unwrap();
    answered(&client, Proto::Tcp, vip, Some("server"));
    probes_succeed(&kubelet, container, &mut agent);
    // The one warning: nothing tells the pods' range, since there is no configuration file.
    let log = agent.log();
    let complaints: Vec<_> =
        log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect();
    assert!(complaints.len() == 1 && complaints[0].contains("clusterCIDR"), "{complaints:#?}");
    end(agent);

    // With the optional configuration file there is nothing to warn of.
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "mode": "nftables", "clusterCIDR": "10.244.0.0/16",
    });
    kubelet.write("etc", "config.conf", config.to_string().as_bytes());
    let log = kubelet.folder("log").join("configured");
    let mut agent = kubelet.start(&pod, container, None, &log);
    agent.wait_synced(LIMIT).unwrap();
    answered(&client, Proto::Tcp, vip, Some("server"));
    let log = agent.log();
    assert!(!log.contains(" WARN ") && !log.contains(" ERROR "), "{log}");
}
