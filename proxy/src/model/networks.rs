//! Networks as sets of addresses.
//!
//! Owns the merge into the fewest networks: what the kernel's interval sets take, which refuse overlaps.

use ipnetwork::IpNetwork;

/// The same addresses as the fewest networks: sorted and disjoint, host bits cleared, the two halves of a network
/// joined.
pub(super) fn disjoint(networks: impl Iterator<Item = IpNetwork>) -> Vec<IpNetwork> {
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
