//! What holds for all Services of the node.

use core::mem::{align_of, offset_of};

use crate::Address;

/// The value of [`maps::SETTINGS`](crate::maps::SETTINGS). Each word is written by one store; to change more than
/// [`Settings::answered`], that is 0 meanwhile, and for a grace period before.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Who is answered where.
    pub answered: Answered,
    /// The cookie of the host's network namespace.
    pub host: u64,
    /// Where IPv4 pods have their addresses: counts with [`Answered::SOURCE`].
    pub pods4: Network4,
    /// The same for IPv6.
    pub pods6: Network6,
    /// Who is a pod.
    pub pods: PodCgroups,
}

/// The cgroups that pods run below. Each word counts by itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodCgroups {
    /// None of them is nearer to the root of all cgroups, which is level 0.
    pub level: u64,
    /// What the kernel calls them; 0: none.
    pub ids: [u64; POD_CGROUPS],
}

/// How many cgroups there can be that pods run below.
pub const POD_CGROUPS: usize = 4;

impl PodCgroups {
    /// No process is a pod's.
    pub const NONE: Self = Self { level: 0, ids: [0; POD_CGROUPS] };

    /// Whether a cgroup is one of them; `id` is not 0.
    #[inline]
    pub const fn has(&self, id: u64) -> bool {
        let [a, b, c, d] = self.ids;
        a == id || b == id || c == id || d == id
    }
}

/// An IPv4 network: an address is in it whose `address & mask` is `network`. All in network byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network4 {
    /// The network's address.
    pub network: u32,
    /// The network's mask.
    pub mask: u32,
}

impl Network4 {
    /// Whether the IPv4 address is in it.
    #[inline]
    pub const fn has(&self, address: Address) -> bool {
        let [.., word] = address.words();
        word & self.mask == self.network
    }
}

/// An IPv6 network, likewise.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network6 {
    /// The network's address.
    pub network: [u32; 4],
    /// The network's mask.
    pub mask: [u32; 4],
}

impl Network6 {
    /// Whether the IPv6 address is in it.
    #[inline]
    pub const fn has(&self, address: Address) -> bool {
        let ([a, b, c, d], [e, f, g, h]) = (address.words(), self.network);
        let [i, j, k, l] = self.mask;
        (a & i) ^ e | (b & j) ^ f | (c & k) ^ g | (d & l) ^ h == 0
    }
}

/// Where a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Client {
    /// In a network namespace that is not the host's, and below one of [`Settings::pods`].
    Pod = 0,
    /// In the host's network namespace.
    Host = 1,
    /// In any other: a container beside Kubernetes, for instance.
    Other = 2,
}

/// Who is answered where, one bit each. What is not answered is left to nftables.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered(pub u64);

impl Answered {
    /// Nobody anywhere.
    pub const NOTHING: Self = Self(0);
    /// A pod's socket that is bound to an address outside the pods' network of its family is left alone at cluster IPs.
    /// Shifted by [`Answered::family`].
    pub const SOURCE: u64 = 1 << 6;
    /// NodePorts are looked up, too.
    pub const NODEPORTS: u64 = 1 << 16;
    /// NodePorts answer the host's own sockets on 127.0.0.0/8, too.
    pub const LOOPBACK_NODEPORTS: u64 = 1 << 17;
    /// There are cgroups to be left alone.
    pub const LEFT_ALONE: u64 = 1 << 18;

    /// How far the bits of a family are shifted.
    #[inline]
    pub const fn family(is_ipv6: bool) -> u32 {
        if is_ipv6 { 8 } else { 0 }
    }

    /// The bit of a client at a kind of frontend in a family. Where [`Client::Other`] is answered, so is
    /// [`Client::Pod`]: they are not told apart.
    #[inline]
    pub const fn bit(client: Client, external: bool, is_ipv6: bool) -> u64 {
        1 << (client as u32 + 3 * external as u32 + Self::family(is_ipv6))
    }

    /// Whether a bit is set.
    #[inline]
    pub const fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }
}

const _: () = {
    assert!(size_of::<Answered>() == 8);
    assert!(size_of::<Network4>() == 8 && align_of::<Network4>() == 4);
    assert!(size_of::<Network6>() == 32 && align_of::<Network6>() == 4);
    assert!(size_of::<PodCgroups>() == 8 + 8 * POD_CGROUPS && align_of::<PodCgroups>() == 8);
    assert!(offset_of!(PodCgroups, ids) == 8);
    assert!(size_of::<Settings>() == 96 && align_of::<Settings>() == 8);
    assert!(offset_of!(Settings, answered) == 0);
    assert!(offset_of!(Settings, host) == 8);
    assert!(offset_of!(Settings, pods4) == 16);
    assert!(offset_of!(Settings, pods6) == 24);
    assert!(offset_of!(Settings, pods) == 56);
};

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, no padding (see the asserts above): every byte is initialised, every value valid.
unsafe impl aya::Pod for Settings {}

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn networks_have_their_addresses_alone() {
        let word = |address: Ipv4Addr| u32::from_ne_bytes(address.octets());
        let pods4 = Network4 {
            network: word(Ipv4Addr::new(10, 244, 0, 0)),
            mask: word(Ipv4Addr::new(255, 255, 0, 0)),
        };
        assert!(pods4.has(address("10.244.0.0")) && pods4.has(address("10.244.255.255")));
        assert!(!pods4.has(address("10.245.0.0")) && !pods4.has(address("10.243.255.255")));

        let words = |address: Ipv6Addr| Address::from(IpAddr::V6(address)).words();
        let pods6 = Network6 {
            network: words("fd00:10::".parse().unwrap()),
            mask: words("ffff:ffff:ffff::".parse().unwrap()),
        };
        assert!(pods6.has(address("fd00:10::")) && pods6.has(address("fd00:10:0:ffff::1")));
        assert!(!pods6.has(address("fd00:10:1::")) && !pods6.has(address("fd00:11::")));
    }
}
