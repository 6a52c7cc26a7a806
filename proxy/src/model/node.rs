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
    /// All that the node has: its interfaces' and its Node's. Sorted.
    pub(super) held: Vec<IpAddr>,
}

/// The facts as they are now. `host` are the addresses of the node's interfaces.
pub(super) fn facts(settings: &Settings, node: Option<&Node>, host: &[IpAddr]) -> Facts {
    let given = node.map(|node| node.addresses.as_slice()).unwrap_or_default();
    let held = [given, host].concat();
    Facts {
        zone: node.and_then(|node| node.zone.clone()),
        addresses: sorted(primary(settings, node, host)),
        held: sorted(meant_alike(&held).collect()),
    }
}

/// Plans the node. `host` are the addresses of its interfaces; `served`, whether there are Services of each family.
pub(super) fn plan(
    settings: &Settings,
    node: Option<&Node>,
    host: &[IpAddr],
    service_cidrs: impl Iterator<Item = IpNetwork>,
    served: [bool; 2],
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
    let pod_cidrs = first_of_each_family(pod_networks);
    let untold = |family: &Family| {
        served[*family as usize] && pod_cidrs.iter().all(|network| Family::of(network.ip()) != *family)
    };
    let untold = Family::ALL.into_iter().filter(untold);
    let warnings = untold.filter_map(|family| no_pod_cidr(&settings.pod_cidrs, node, family)).collect();
    NodePlan {
        nodeport_addresses: sorted(nodeport_addresses),
        interface_addresses: sorted(meant_alike(host).collect()),
        pod_cidrs,
        service_cidrs: disjoint(service_cidrs),
        warnings,
    }
}

/// What it means that the pods' addresses are known in another family alone; `None`: they are not known by now, or are
/// not asked for.
fn no_pod_cidr(pod_cidrs: &PodCidrs, node: Option<&Node>, family: Family) -> Option<String> {
    let missing = match pod_cidrs {
        PodCidrs::Cluster(_) => "clusterCIDR (--cluster-cidr) has",
        PodCidrs::Node if node.is_some() => "spec.podCIDRs of the Node have",
        PodCidrs::Node | PodCidrs::Unknown => return None,
    };
    Some(format!(
        "{missing} no {family} network, and there are {family} Services: over {family}, pods cannot be told from other \
         clients, so clients from outside the cluster keep their own address on the way to a ClusterIP, and pods meet \
         externalTrafficPolicy Local like those"
    ))
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
    if primary.is_empty() { meant_alike(host).collect() } else { primary }
}

/// The host's addresses in these networks; of a family that has neither a network nor a primary address, all.
fn within(networks: &[IpNetwork], primary: &[IpAddr], host: &[IpAddr]) -> Vec<IpAddr> {
    let chosen = |address: &IpAddr| {
        let has_primary = primary.iter().any(|other| other.is_ipv4() == address.is_ipv4());
        let mut of_family =
            networks.iter().filter(|network| network.is_ipv4() == address.is_ipv4()).peekable();
        of_family.peek().is_none() && !has_primary || of_family.any(|network| network.contains(*address))
    };
    meant_alike(host).filter(chosen).collect()
}

/// The interfaces' addresses that mean this node to every client. Loopback addresses do not (NodePorts never answer
/// there, as in kube-proxy's nftables mode), nor do IPv6 link-local addresses, which mean nothing without an interface.
fn meant_alike(host: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    host.iter().copied().filter(|address| match address {
        IpAddr::V4(address) => !address.is_loopback(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    })
}
