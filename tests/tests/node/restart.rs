//! A node that restarts when no Service works there yet.

use anyhow::{Result, ensure};
use kube_lane_tests::nodes::NodeCluster;

use crate::world::{self, Web, until};

/// Where the agents remember the API servers, on a node.
const REMEMBERED: &str = "/var/lib/kube-lane/api-servers.json";

/// The restarted node comes up with no rule in the kernel and no container; its pods and Services come back. The agents
/// know the API server's address from nothing but its Service, which they serve themselves, and from their memory.
pub(crate) fn of_a_node(nodes: &mut NodeCluster) -> Result<()> {
    world::install(nodes)?;
    Web::new(nodes)?.answers()?;
    nodes.kubectl(&["--namespace=kube-system", "delete", "configmap", "kubernetes-services-endpoint"])?;
    nodes.kubectl(&["--namespace=kube-system", "rollout", "restart", "daemonset/kube-lane"])?;
    world::rolled_out(nodes, "kube-system", "daemonset/kube-lane")?;
    ensure!(nodes.machine(0).path(REMEMBERED)?.exists(), "no {REMEMBERED}");
    nodes.restart_node(0)?;
    // Until kubelet has reported again, the API server knows the containers of before.
    let web = until(|| Web::new(nodes))?;
    web.answers()?;
    world::rolled_out(nodes, "kube-system", "daemonset/kube-lane")?;
    let server = world::status(nodes, 0)?["agent"]["apiServer"].take();
    let named = server["address"].as_str().unwrap_or_default().contains("10.96.0.1");
    let address = nodes.cluster().control_plane().address().to_string();
    ensure!(named && server["inUse"] == address, "not by its memory: {server:#}");
    Ok(())
}
