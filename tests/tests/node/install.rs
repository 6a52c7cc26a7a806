//! Installing kube-lane on a cluster that has no proxy.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube_lane_lab::{Host, topology};
use kube_lane_tests::nodes::NodeCluster;

use crate::guide::{self, administrator};
use crate::world::{self, REPLICAS, Web, dial, until};

/// `kubectl apply -k`, and a Deployment is reached by everyone; the API server, too, at its Service.
pub(crate) fn serves(nodes: &mut NodeCluster) -> Result<()> {
    world::install(nodes)?;
    a_first_service(nodes)?;
    let web = Web::new(nodes)?;
    web.answers()?;
    every_replica_is_picked(&web)?;
    for host in web.pods.iter().chain(&web.nodes) {
        reaches_the_api_server(host)?;
    }
    Ok(())
}

/// What docs/install.md shows after the installation.
fn a_first_service(nodes: &NodeCluster) -> Result<()> {
    let node = nodes.machine(0).host().v4().to_string();
    let said = administrator(nodes, &guide::commands("install.md", "kubectl expose", &[("NODE", &node)])?)?;
    let answered = said.lines().next_back().unwrap_or_default();
    ensure!(answered.starts_with("hello-"), "a pod of Deployment hello did not answer curl:\n{said}");
    ensure!(said.contains("default/hello"), "status does not tell of Service hello:\n{said}");
    Ok(())
}

fn every_replica_is_picked(web: &Web) -> Result<()> {
    // With a few more dials than needed, an even choice leaves one out once in 10^9 runs.
    let mut answered = std::collections::BTreeSet::new();
    let (proto, to) = web.at_cluster_ips()[0];
    for _ in 0..60 {
        if let Some(by) = web.pods[0].dial_with(dial(proto, to))?.by() {
            answered.insert(by.to_owned());
        }
    }
    ensure!(answered.len() == REPLICAS as usize, "of {REPLICAS} replicas only {answered:?} answer");
    Ok(())
}

/// Service default/kubernetes leads to the API server, which has an IPv4 address.
fn reaches_the_api_server(host: &Host) -> Result<()> {
    let [v4, _] = topology::service_cidrs();
    let to = SocketAddr::from((topology::nth(v4, 1), 443));
    until(|| {
        let connected = host.run(move || TcpStream::connect_timeout(&to, Duration::from_secs(5)))?;
        connected.with_context(|| format!("{} dials {to}", host.name()))
    })?;
    Ok(())
}
