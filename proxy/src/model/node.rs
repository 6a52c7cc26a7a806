//! What belongs to the node: the addresses that NodePorts answer on and the ServiceCIDRs.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::input::{Family, Node};
use super::plan::NodePlan;

/// Plans the node. `host` are the addresses of its interfaces, for when the Node has none; `primary_address` takes
/// the place of the Node's own of its family (`bindAddress`).
pub(super) fn plan(
    node: Option<&Node>,
    primary_address: Option<IpAddr>,
    host: &[IpAddr],
    service_cidrs: impl Iterator<Item = IpNetwork>,
) -> NodePlan {
    let node = node.map(|node| node.addresses.as_slice()).unwrap_or_default();
    let mut nodeport_addresses = primary(node);
    if let Some(address) = primary_address {
        nodeport_addresses.retain(|other| Family::of(*other) != Family::of(address));
        nodeport_addresses.push(address);
    }
    if nodeport_addresses.is_empty() {
        nodeport_addresses = host.iter().copied().filter(|address| answers(*address)).collect();
    }
    nodeport_addresses.sort_unstable();
    nodeport_addresses.dedup();
    NodePlan { nodeport_addresses, service_cidrs: disjoint(service_cidrs) }
}

/// The node's primary addresses: the first, and the first of the other family.
fn primary(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let Some(first) = addresses.first() else { return Vec::new() };
    let other = addresses.iter().find(|address| Family::of(**address) != Family::of(*first));
    std::iter::once(first).chain(other).copied().collect()
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
