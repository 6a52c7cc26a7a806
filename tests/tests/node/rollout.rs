//! Rollouts under load: of kube-lane itself, and of the Deployment that it serves.

use anyhow::Result;
use kube_lane_tests::nodes::{KUBE_LANE_IMAGE, NodeCluster};
use serde_json::json;

use crate::traffic::{Connections, Traffic};
use crate::world::{self, Web};

/// How often the Deployment rolls.
const ROLLS: usize = 20;

/// The DaemonSet gets another image; no connection fails, new or kept.
pub(crate) fn of_kube_lane(nodes: &mut NodeCluster) -> Result<()> {
    world::install(nodes)?;
    let web = Web::new(nodes)?;
    let traffic = Traffic::start(&web, Connections::NewAndKept)?;
    let next = format!("{KUBE_LANE_IMAGE}-next");
    for node in 0..2 {
        let tag = ["ctr", "--namespace", "k8s.io", "images", "tag", "--force", KUBE_LANE_IMAGE, &next];
        nodes.machine(node).run(&tag)?;
    }
    let image = format!("kube-lane={next}");
    nodes.kubectl(&["--namespace", "kube-system", "set", "image", "daemonset/kube-lane", &image])?;
    world::rolled_out(nodes, "kube-system", "daemonset/kube-lane")?;
    traffic.goes_on()?;
    let table = traffic.stop()?;
    world::report(&format!("rolling update of kube-lane:\n{table}"));
    Ok(())
}

/// The Deployment rolls again and again, its pods ending gracefully; no new connection fails.
pub(crate) fn of_a_deployment(nodes: &mut NodeCluster) -> Result<()> {
    world::install(nodes)?;
    let web = Web::new(nodes)?;
    let traffic = Traffic::start(&web, Connections::New)?;
    for roll in 0..ROLLS {
        let template =
            json!({"spec": {"template": {"metadata": {"annotations": {"roll": roll.to_string()}}}}});
        nodes.kubectl(&["patch", "deployment", "web", "--patch", &template.to_string()])?;
        world::rolled_out(nodes, "default", "deployment/web")?;
    }
    traffic.goes_on()?;
    let table = traffic.stop()?;
    world::report(&format!("{ROLLS} rollouts of a Deployment:\n{table}"));
    Ok(())
}
