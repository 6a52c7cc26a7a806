//! Connections to the Deployment while something changes: new ones all the time, and ones that are kept.
//!
//! Owns the loads of a scenario and the table of what they met.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use kube_lane_lab::{Host, Load, Proto, Report};

use crate::world::{Web, dial, until};

/// Clients of one kind.
const CLIENTS: usize = 2;
/// Between one request of a client and the next: a busy machine has other things to do.
const PAUSE: Duration = Duration::from_millis(50);

/// Which connections a scenario makes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Connections {
    /// A new one for each request.
    New,
    /// The same, and besides one of each client that is kept from start to stop.
    NewAndKept,
}

/// Loads of which each is one kind of connection.
pub(crate) struct Traffic(Vec<(String, Load)>);

/// What the loads of a scenario met.
pub(crate) struct Table(Vec<(String, Report)>);

impl Traffic {
    /// Starts it, from a pod, a node and outside, over TCP and UDP, and waits until each kind has been answered.
    pub(crate) fn start(web: &Web, connections: Connections) -> Result<Self> {
        let mut loads = vec![];
        let mut start =
            |from: &str, host: &Host, kind: &str, (proto, to): (Proto, SocketAddr)| -> Result<()> {
                let name = format!("{from} to {kind}, {proto}");
                let new = Load::start(host, dial(proto, to).fresh_port(), CLIENTS, PAUSE)?;
                loads.push((format!("{name}, new"), new));
                if connections == Connections::NewAndKept {
                    let kept = Load::start_kept(host, dial(proto, to), CLIENTS, PAUSE)?;
                    loads.push((format!("{name}, kept"), kept));
                }
                Ok(())
            };
        // One of each family: TCP over IPv4 and UDP over IPv6 at the nodes' addresses, the other way round at the
        // Service's.
        let cluster_ips = web.at_cluster_ips();
        let node_ports = web.at_node_ports();
        for way in [cluster_ips[2], cluster_ips[1]] {
            start("pod", &web.pods[0], "ClusterIP", way)?;
            start("node", &web.nodes[web.nodes.len() - 1], "ClusterIP", way)?;
        }
        for way in [node_ports[0], node_ports[3]] {
            start("outside", &web.outside, "NodePort", way)?;
        }
        let this = Self(loads);
        this.goes_on()?;
        Ok(this)
    }

    /// Waits until every kind has been answered some more times.
    pub(crate) fn goes_on(&self) -> Result<()> {
        for (name, load) in &self.0 {
            let before = load.report().tally.answers();
            until(|| {
                let report = load.report();
                ensure!(report.tally.answers() >= before + 5, "{name}: no more answers: {report}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Stops it; an error where any connection failed or was lost.
    pub(crate) fn stop(self) -> Result<Table> {
        let table = Table(self.0.into_iter().map(|(name, load)| (name, load.stop())).collect());
        let failures: usize = table.0.iter().map(|(_, report)| report.tally.failures()).sum();
        ensure!(failures == 0, "{failures} connections failed\n{table}");
        Ok(table)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| connections | opened | requests | lost |\n|---|--:|--:|--:|")?;
        for (name, report) in &self.0 {
            let lost = report.tally.failures();
            writeln!(f, "| {name} | {} | {} | {lost} |", report.dialled, report.tally.answers() + lost)?;
        }
        for (name, report) in self.0.iter().filter(|(_, report)| report.tally.failures() > 0) {
            writeln!(f, "{name}: {report}")?;
        }
        Ok(())
    }
}
