//! The address plan, the same in every lab: labs share no wire, so their addresses may be equal.
//!
//! Pure. Node `N` counts from 1 in addresses and from 0 everywhere else, so that no host ends in `.0`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

/// The link of every host but the fabric: to the fabric, or from a pod to its node.
pub const UPLINK: &str = "eth0";
/// The bridge of a node whose pods are attached to one.
pub const BRIDGE: &str = "cni0";

/// Links get their index from the lab: this is the uplink's (and the fabric bridge's), others follow.
pub(crate) const UPLINK_INDEX: u32 = 100;
/// The index of [`BRIDGE`].
pub(crate) const BRIDGE_INDEX: u32 = 50;
/// The hardware address of every node's end of a pod's link.
pub(crate) const POD_GATEWAY_MAC: [u8; 6] = [0xee; 6];
/// Where pods send everything, when their node has no bridge: an address nobody has, known by its MAC.
pub(crate) const POD_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The link-local address that [`POD_GATEWAY_MAC`] gives the node's end (EUI-64).
pub(crate) const POD_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0xecee, 0xeeff, 0xfeee, 0xeeee);

/// What the links of containers that are no pods begin with, on their node.
pub(crate) const CONTAINER_LINK: &str = "ctr";
/// What those of pods begin with.
pub(crate) const POD_LINK: &str = "veth";
/// How many nodes the plan has room for.
pub(crate) const MAX_NODES: u8 = 190;
/// How many pods, ever, a node has room for.
pub(crate) const MAX_PODS: u8 = 250;

/// The fabric's networks: 192.168.77.0/24 and fd00:77::/64.
pub fn fabric_cidrs() -> [IpNetwork; 2] {
    [v4([192, 168, 77, 0], 24), v6([0xfd00, 0x77, 0, 0, 0, 0, 0, 0], 64)]
}

/// The range of all pods: 10.244.0.0/16 and fd00:10:244::/48.
pub fn cluster_cidrs() -> [IpNetwork; 2] {
    [v4([10, 244, 0, 0], 16), v6([0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0], 48)]
}

/// The Service range: 10.96.0.0/16 and fd00:10:96::/112.
pub fn service_cidrs() -> [IpNetwork; 2] {
    [v4([10, 96, 0, 0], 16), v6([0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0], 112)]
}

/// Addresses that no host has, for load balancers and external IPs: 203.0.113.0/24 and 2001:db8:113::/64.
pub fn vip_cidrs() -> [IpNetwork; 2] {
    [v4([203, 0, 113, 0], 24), v6([0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0], 64)]
}

/// Node `index` (from 0): 192.168.77.1, fd00:77::1 and so on.
pub fn node_addresses(index: u8) -> [IpAddr; 2] {
    let [net4, net6] = fabric_cidrs();
    [nth(net4, u16::from(index) + 1), nth(net6, u16::from(index) + 1)]
}

/// The outside host: 192.168.77.200 and fd00:77::c8.
pub fn outside_addresses() -> [IpAddr; 2] {
    fabric_cidrs().map(|net| nth(net, 200))
}

/// The pods of node `index` (from 0): 10.244.1.0/24, fd00:10:244:1::/64 and so on.
pub fn pod_cidrs(index: u8) -> [IpNetwork; 2] {
    let number = index + 1;
    [v4([10, 244, number, 0], 24), v6([0xfd00, 0x10, 0x244, number.into(), 0, 0, 0, 0], 64)]
}

/// The containers of node `index` (from 0) that are no pods: 172.17.1.0/24, fd00:172:17:1::/64 and so on. Only their
/// node has a route there.
pub fn container_cidrs(index: u8) -> [IpNetwork; 2] {
    let number = index + 1;
    [v4([172, 17, number, 0], 24), v6([0xfd00, 0x172, 0x17, number.into(), 0, 0, 0, 0], 64)]
}

/// The `number`th address of a network (below 256 for any network of the plan).
pub fn nth(net: IpNetwork, number: u16) -> IpAddr {
    match net.network() {
        IpAddr::V4(base) => Ipv4Addr::from_bits(base.to_bits() + u32::from(number)).into(),
        IpAddr::V6(base) => Ipv6Addr::from_bits(base.to_bits() + u128::from(number)).into(),
    }
}

/// Every destination of an address's family.
pub(crate) fn anywhere(address: IpAddr) -> IpNetwork {
    if address.is_ipv4() { v4([0; 4], 0) } else { v6([0; 8], 0) }
}

fn v4(octets: [u8; 4], prefix: u8) -> IpNetwork {
    Ipv4Network::new_checked(octets.into(), prefix).map_or(IpNetwork::from(IpAddr::from(octets)), Into::into)
}

fn v6(segments: [u16; 8], prefix: u8) -> IpNetwork {
    Ipv6Network::new_checked(segments.into(), prefix)
        .map_or(IpNetwork::from(IpAddr::from(segments)), Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_reads_as_documented() {
        assert_eq!(node_addresses(0).map(|ip| ip.to_string()), ["192.168.77.1", "fd00:77::1"]);
        assert_eq!(outside_addresses().map(|ip| ip.to_string()), ["192.168.77.200", "fd00:77::c8"]);
        assert_eq!(pod_cidrs(1).map(|net| net.to_string()), ["10.244.2.0/24", "fd00:10:244:2::/64"]);
        assert_eq!(service_cidrs().map(|net| net.to_string()), ["10.96.0.0/16", "fd00:10:96::/112"]);
    }
}
