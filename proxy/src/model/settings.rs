//! What the configuration tells the planner.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::claims::Claim;
use super::input::{Family, Origin, Protocol};

/// What does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The own Node's name: an endpoint with this `nodeName` is local.
    pub node_name: Arc<str>,
    /// The origins that there are; [`Planner::synced`](super::planner::Planner::synced) waits for each of them.
    pub origins: Vec<Origin>,
    /// Takes the place of the Node's primary address of its family (`bindAddress`).
    pub node_address: Option<IpAddr>,
    /// Where the addresses of local pods are known from.
    pub pod_cidrs: PodCidrs,
    /// Which of the node's addresses NodePorts answer on.
    pub nodeport_addresses: NodePortAddresses,
    /// The agent's own servers: no NodePort and no health check takes their ports away.
    pub own_ports: Vec<OwnPort>,
}

/// Where one of the agent's own servers is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnPort {
    /// What it serves.
    pub server: &'static str,
    /// Its address.
    pub address: SocketAddr,
}

impl OwnPort {
    /// Whether a NodePort or a health check with this claim would be at the same address. On loopback there are none.
    pub(super) fn is_at(&self, claim: &Claim) -> bool {
        let Claim::NodePort(Protocol::Tcp, family, port) = *claim else { return false };
        let ip = self.address.ip();
        // `[::]` takes IPv4 connections, too.
        let both = self.address.is_ipv6() && ip.is_unspecified();
        port == self.address.port() && !ip.is_loopback() && (both || Family::of(ip) == family)
    }
}

/// Where the addresses of local pods are known from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PodCidrs {
    /// From nowhere: pods are told by their interface, or not at all.
    #[default]
    Unknown,
    /// The configuration (`clusterCIDR`); the first of each family counts.
    Cluster(Vec<IpNetwork>),
    /// `spec.podCIDRs` of the own Node; the first of each family counts.
    Node,
}

/// Which of the node's addresses NodePorts answer on (`nodePortAddresses`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePortAddresses {
    /// The Node's primary address of each family.
    pub primary: bool,
    /// Those of its interfaces' addresses that are in one of these networks.
    pub within: Vec<IpNetwork>,
}

impl NodePortAddresses {
    /// The Node's primary addresses alone.
    pub const PRIMARY: Self = Self { primary: true, within: Vec::new() };
}

impl Default for NodePortAddresses {
    fn default() -> Self {
        Self::PRIMARY
    }
}
