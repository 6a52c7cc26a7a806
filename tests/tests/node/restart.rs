//! A node that restarts when no Service works there yet.

use anyhow::Result;
use kube_lane_tests::nodes::NodeCluster;

use crate::world::{self, Web, until};

/// The restarted node comes up with no rule in the kernel and no container; its pods and Services come back.
pub(crate) fn of_a_node(nodes: &mut NodeCluster) -> Result<()> {
    world::install(nodes)?;
    Web::new(nodes)?.answers()?;
    nodes.restart_node(0)?;
    // Until kubelet has reported again, the API server knows the containers of before.
    let web = until(|| Web::new(nodes))?;
    web.answers()?;
    world::rolled_out(nodes, "kube-system", "daemonset/kube-lane")
}
