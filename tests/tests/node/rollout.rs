//! Rollouts under load: of kube-lane itself, and of the Deployment that it serves.

use anyhow::{Context as _, Result};
use kube_lane_tests::nodes::{KUBE_LANE_IMAGE, NodeCluster};
use serde_json::json;

use crate::guide::{self, administrator_in};
use crate::traffic::{Connections, Traffic};
use crate::world::{self, Web};

/// How often the Deployment rolls.
const ROLLS: usize = 20;

/// The DaemonSet gets another image, and the former one again; no connection fails, new or kept.
pub(crate) fn of_kube_lane(nodes: &mut NodeCluster) -> Result<()> {
    let folder = world::install(nodes)?;
    let web = Web::new(nodes)?;
    let traffic = Traffic::start(&web, Connections::NewAndKept)?;
    let (name, tag) = KUBE_LANE_IMAGE.rsplit_once(':').context("an image without a tag")?;
    let next = format!("{tag}-next");
    for node in 0..2 {
        let image = format!("{name}:{next}");
        let tag = ["ctr", "--namespace", "k8s.io", "images", "tag", "--force", KUBE_LANE_IMAGE, &image];
        nodes.machine(node).run(&tag)?;
    }
    let overlay = json!({"resources": ["../my-cluster"], "images": [{"name": name, "newTag": next}]});
    guide::beside_the_clone(nodes, "next", &overlay.to_string())?;
    // docs/upgrade.md
    let upgrade = guide::commands("upgrade.md", "kube-lane version", &[("deploy/", "next/")])?;
    administrator_in(nodes, &folder, &upgrade)?;
    traffic.goes_on()?;
    administrator_in(nodes, &folder, "kubectl -n kube-system rollout undo ds/kube-lane")?;
    world::rolled_out(nodes, "kube-system", "daemonset/kube-lane")?;
    traffic.goes_on()?;
    let table = traffic.stop()?;
    world::report(&format!("kube-lane upgraded and back:\n{table}"));
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
