//! What belongs to the node: the addresses that NodePorts answer on and the ServiceCIDRs.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::input::{Family, Node};
use super::plan::NodePlan;
use super::planner::{NodePortAddresses, PodCidrs, Settings};

/// Plans the node. `host` are the addresses of its interfaces.
pub(super) fn plan(
    settings: &Settings,
    node: Option<&Node>,
    host: &[IpAddr],
    service_cidrs: impl Iterator<Item = IpNetwork>,
) -> NodePlan {
    let mut nodeport_addresses = match &settings.nodeport_addresses {
        NodePortAddresses::Primary => primary(settings, node, host),
        NodePortAddresses::Within(networks) => within(networks, host),
    };
    nodeport_addresses.sort_unstable();
    nodeport_addresses.dedup();
    let pod_networks = match &settings.pod_cidrs {
        PodCidrs::Unknown => &[],
        PodCidrs::Cluster(networks) => networks.as_slice(),
        PodCidrs::Node => node.map(|node| node.pod_cidrs.as_slice()).unwrap_or_default(),
    };
    NodePlan {
        nodeport_addresses,
        pod_cidrs: first_of_each_family(pod_networks),
        service_cidrs: disjoint(service_cidrs),
    }
}

fn first_of_each_family(networks: &[IpNetwork]) -> Vec<IpNetwork> {
    let first = |family| networks.iter().find(move |network| Family::of(network.ip()) == family);
    Family::ALL.into_iter().filter_map(first).copied().collect()
}

/// The node's primary addresses: the Node's first, and its first of the other family; the configured one in place of the
/// Node's of its family; while there are none, all of the host's.
fn primary(settings: &Settings, node: Option<&Node>, host: &[IpAddr]) -> Vec<IpAddr> {
    let given = node.map(|node| node.addresses.as_slice()).unwrap_or_default();
    let family_of_first = given.first().copied().map(Family::of);
    let other = given.iter().find(|address| Some(Family::of(**address)) != family_of_first);
    let mut primary: Vec<_> = given.first().into_iter().chain(other).copied().collect();
    if let Some(address) = settings.node_address {
        primary.retain(|other| Family::of(*other) != Family::of(address));
        primary.push(address);
    }
    if primary.is_empty() {
        host.iter().copied().filter(|address| answers(*address)).collect()
    } else {
        primary
    }
}

/// The host's addresses in these networks; of a family that has no network, all.
fn within(networks: &[IpNetwork], host: &[IpAddr]) -> Vec<IpAddr> {
    let chosen = |address: &IpAddr| {
        let mut of_family =
            networks.iter().filter(|network| network.is_ipv4() == address.is_ipv4()).peekable();
        of_family.peek().is_none() || of_family.any(|network| network.contains(*address))
    };
    host.iter().copied().filter(|address| answers(*address) && chosen(address)).collect()
}

/// Whether NodePorts can answer on an interface's address: never on loopback, as in kube-proxy's nftables mode, and
/// not where an address means nothing without its interface.
fn answers(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_loopback(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    }
}

/// The same addresses as the fewest networks: sorted and disjoint, host bits cleared, the two halves of a network
/// joined.
fn disjoint(networks: impl Iterator<Item = IpNetwork>) -> Vec<IpNetwork> {
    let mut sorted: Vec<_> = networks.map(|network| resize(network, network.prefix())).collect();
    // By address, the wider first: what follows a network is either inside it or beyond it.
    sorted.sort_unstable_by_key(|network| (network.ip(), network.prefix()));
    let mut merged: Vec<IpNetwork> = Vec::new();
    for mut network in sorted {
        if merged.last().is_some_and(|last| last.contains(network.ip())) {
            continue;
        }
        while let Some(parent) = merged.last().and_then(|last| parent_of(*last, network)) {
            merged.pop();
            network = parent;
        }
        merged.push(network);
    }
    merged
}

/// The network whose two halves these are.
fn parent_of(low: IpNetwork, high: IpNetwork) -> Option<IpNetwork> {
    let prefix = low.prefix().checked_sub(1)?;
    let parent = resize(low, prefix);
    let halves = low.prefix() == high.prefix() && low != high && parent == resize(high, prefix);
    halves.then_some(parent)
}

/// The network of this prefix length around another's first address.
fn resize(network: IpNetwork, prefix: u8) -> IpNetwork {
    IpNetwork::new(network.ip(), prefix)
        .and_then(|wide| IpNetwork::new(wide.network(), prefix))
        .unwrap_or(network)
}
