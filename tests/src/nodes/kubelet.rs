//! The kubelet of a node: its configuration, its start.
//!
//! Never says which pods run.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use super::machine::Machine;
use crate::controlplane::program;

/// Where kubelet lists its pods in plain HTTP, on a node that no API server lists them for.
pub(super) const READ_ONLY_PORT: u16 = 10255;
/// The folder of static pods, on the node.
pub const MANIFESTS: &str = "/etc/kubernetes/manifests";

/// Starts kubelet. It registers its node with the API server that `kubeconfig` names; without one, it runs static pods
/// alone.
///
/// # Errors
/// When it has not been built, or cannot be started.
pub(super) fn start(machine: &mut Machine, kubeconfig: Option<&Path>) -> Result<()> {
    let configuration = configuration(machine.cgroup(), kubeconfig.is_none());
    machine.write("/var/lib/kubelet/config.yaml", &configuration)?;
    machine.run(&["mkdir", "-p", MANIFESTS])?;
    let program = program("kubelet")?;
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is no text");
    let addresses = [machine.host().v4(), machine.host().v6()].map(|address| address.to_string()).join(",");
    let mut arguments = vec![
        text(&program)?,
        "--config=/var/lib/kubelet/config.yaml".into(),
        format!("--hostname-override={}", machine.name()),
        format!("--node-ip={addresses}"),
    ];
    if let Some(kubeconfig) = kubeconfig {
        arguments.push(format!("--kubeconfig={}", text(kubeconfig)?));
    }
    machine.start("kubelet", &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// kubelet's configuration, with its pods below this cgroup; `alone`: without an API server.
pub fn configuration(cgroup: &str, alone: bool) -> String {
    let free = "1Mi";
    let configuration = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "staticPodPath": MANIFESTS,
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "cgroupDriver": "cgroupfs", "cgroupRoot": format!("/{cgroup}"), "failCgroupV1": false,
        // Under emulation a container takes its time to start.
        "runtimeRequestTimeout": "30m",
        "failSwapOn": false, "oomScoreAdj": 0, "makeIPTablesUtilChains": false,
        // The machine's disk may be full of other things.
        "evictionHard": {"memory.available": free, "nodefs.available": free, "imagefs.available": free},
        "localStorageCapacityIsolation": false,
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        "resolvConf": "",
        "readOnlyPort": if alone { READ_ONLY_PORT } else { 0 },
        // `kubectl exec` and `logs` come from the API server, which only this test reaches.
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
    });
    // JSON is YAML.
    configuration.to_string()
}
