//! What a configuration of kube-proxy's iptables mode means otherwise here.
//!
//! Owns the words alone, which are said once at the start.

use super::layers::Layers;

/// What differs from kube-proxy with the file that it had; `None`: it was not in mode iptables. `kubeadm` writes an empty
/// mode, which is that one.
pub(super) fn note(layers: &Layers) -> Option<String> {
    let (path, file) = layers.of_kube_proxy()?;
    let is_iptables = match file.mode.as_deref() {
        Some("" | "iptables") => true,
        None => layers.has_base(),
        Some(_) => false,
    };
    if !is_iptables {
        return None;
    }
    let merged = layers.merged();
    let mut differences = Vec::new();
    if merged.node_port_addresses.as_deref().unwrap_or_default().is_empty() {
        differences.push(
            "NodePorts answer on the node's primary addresses, there on all of them (nodePortAddresses: \
             [\"0.0.0.0/0\", \"::/0\"])",
        );
    }
    if file.iptables.localhost_node_ports != Some(false) {
        differences.push("NodePorts do not answer on 127.0.0.1, there they do (iptables.localhostNodePorts)");
    }
    if merged.kube_lane.drop_invalid != Some(true) {
        differences.push(
            "forwarded packets that conntrack calls INVALID are let through, there they are dropped \
             (--drop-invalid drops them here)",
        );
    }
    Some(format!(
        "{} is a configuration of kube-proxy's mode iptables, which kube-lane differs from: {}; docs/migrate.md tells \
         more",
        path.display(),
        differences.join("; ")
    ))
}
