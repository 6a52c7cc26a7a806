//! What belongs to the node: the addresses that NodePorts answer on, where pods are, the ServiceCIDRs, and what
//! Services' plans depend on.

use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::input::{Family, Node};
use super::networks::disjoint;
use super::plan::NodePlan;
use super::settings::{NodePortAddresses, PodCidrs, Settings};

/// What the plans of Services read of the node.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) zone: Option<Arc<str>>,
    /// The node's own addresses, the primary ones where it is known.
    pub(super) addresses: Vec<IpAddr>,
}

/// The facts as they are now. `host` are the addresses of the node's interfaces.
pub(super) fn facts(settings: &Settings, node: Option<&Node>, host: &[IpAddr]) -> Facts {
    Facts { zone: node.and_then(|node| node.zone.clone()), addresses: sorted(primary(settings, node, host)) }
}

/// Plans the node. `host` are the addresses of its interfaces.
pub(super) fn plan(
    settings: &Settings,
    node: Option<&Node>,
    host: &[IpAddr],
    service_cidrs: impl Iterator<Item = IpNetwork>,
) -> NodePlan {
    let NodePortAddresses { primary: on_primary, within: networks } = &settings.nodeport_addresses;
    let mut nodeport_addresses = if *on_primary { primary(settings, node, host) } else { Vec::new() };
    if !networks.is_empty() {
        let more = within(networks, &nodeport_addresses, host);
        nodeport_addresses.extend(more);
    }
    let pod_networks = match &settings.pod_cidrs {
        PodCidrs::Unknown => &[],
        PodCidrs::Cluster(networks) => networks.as_slice(),
        PodCidrs::Node => node.map(|node| node.pod_cidrs.as_slice()).unwrap_or_default(),
    };
    NodePlan {
        nodeport_addresses: sorted(nodeport_addresses),
        pod_cidrs: first_of_each_family(pod_networks),
        service_cidrs: disjoint(service_cidrs),
    }
}

fn sorted(mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    addresses.sort_unstable();
    addresses.dedup();
    addresses
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

/// The host's addresses in these networks; of a family that has neither a network nor a primary address, all.
fn within(networks: &[IpNetwork], primary: &[IpAddr], host: &[IpAddr]) -> Vec<IpAddr> {
    let chosen = |address: &IpAddr| {
        let has_primary = primary.iter().any(|other| other.is_ipv4() == address.is_ipv4());
        let mut of_family =
            networks.iter().filter(|network| network.is_ipv4() == address.is_ipv4()).peekable();
        of_family.peek().is_none() && !has_primary || of_family.any(|network| network.contains(*address))
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
