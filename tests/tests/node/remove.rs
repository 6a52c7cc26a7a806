//! Removing kube-lane from a cluster, by the commands of `docs/operations.md`.

use anyhow::{Result, ensure};
use kube_lane_tests::nodes::NodeCluster;

use crate::guide::{self, administrator};
use crate::world::{self, Web};

/// What was installed goes, from the API server and from the kernels of all nodes.
pub(crate) fn everything(nodes: &mut NodeCluster) -> Result<()> {
    world::install(nodes)?;
    Web::new(nodes)?.answers()?;
    uninstall(nodes)?;
    nothing_is_left(nodes)
}

/// Section "Uninstall".
pub(crate) fn uninstall(nodes: &NodeCluster) -> Result<()> {
    administrator(nodes, &guide::commands("operations.md", "apply -k deploy/uninstall", &[])?)?;
    Ok(())
}

/// Neither the API server nor a node has anything of kube-lane.
pub(crate) fn nothing_is_left(nodes: &NodeCluster) -> Result<()> {
    let kinds = "daemonsets,configmaps,serviceaccounts,clusterroles,clusterrolebindings,roles,rolebindings";
    let objects = nodes.kubectl(&[
        "get",
        kinds,
        "--all-namespaces",
        "--selector=app.kubernetes.io/part-of=kube-lane",
        "--output=name",
    ])?;
    ensure!(objects.is_empty(), "left in the API server: {objects}");
    (0..2).try_for_each(|node| nothing_is_left_on(nodes, node))
}

/// The kernel of a node has nothing of kube-lane.
pub(crate) fn nothing_is_left_on(nodes: &NodeCluster, node: usize) -> Result<()> {
    let tables = nodes.machine(node).run(&["nft", "list", "tables"])?;
    ensure!(!tables.contains("kube-lane"), "left on {}: {tables}", nodes.machine(node).name());
    Ok(())
}
