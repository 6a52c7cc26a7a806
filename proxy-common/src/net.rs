//! Addresses, ports and the key of a frontend, all in network byte order: as a socket gives them.

use core::mem::{align_of, offset_of};
use core::net::{IpAddr, SocketAddr};

/// The IANA protocol number of TCP.
pub const TCP: u8 = 6;
/// The IANA protocol number of UDP.
pub const UDP: u8 = 17;

/// An IPv6 address, or an IPv4 address in its v4-mapped form (`::ffff:a.b.c.d`), in network byte order.
///
/// One form for both families: an IPv6 socket that dials a v4-mapped address asks for the same frontend.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address([u32; 4]);

impl Address {
    /// From `bpf_sock_addr::user_ip4`, which is in network byte order.
    #[inline]
    pub const fn from_user_ip4(word: u32) -> Self {
        Self([0, 0, 0xffff_u32.to_be(), word])
    }

    /// From `bpf_sock_addr::user_ip6`, which is in network byte order.
    #[inline]
    pub const fn from_user_ip6(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// The address in four words, in network byte order; the last one is an IPv4 address's.
    #[inline]
    pub const fn words(self) -> [u32; 4] {
        self.0
    }

    /// Whether it is an IPv4 address.
    #[inline]
    pub const fn is_v4(self) -> bool {
        let [first, second, third, _] = self.0;
        first == 0 && second == 0 && third == 0xffff_u32.to_be()
    }

    /// The unspecified address of its family: where NodePorts are looked up.
    #[inline]
    pub const fn unspecified(self) -> Self {
        if self.is_v4() { Self::from_user_ip4(0) } else { Self([0; 4]) }
    }

    /// Whether it is the unspecified address of its family: of a destination, the host itself; of a source, none.
    #[inline]
    pub const fn is_unspecified(self) -> bool {
        let [first, second, third, last] = self.0;
        first | second | last == 0 && (third == 0 || third == 0xffff_u32.to_be())
    }

    /// Whether it is in `127.0.0.0/8`, or `::1`.
    #[inline]
    pub const fn is_loopback(self) -> bool {
        let [first, second, third, last] = self.0;
        if self.is_v4() {
            u32::from_be(last) >> 24 == 127
        } else {
            first | second | third == 0 && last == 1_u32.to_be()
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        let [a, b, c, d] = address.0.map(|word| u128::from(u32::from_be(word)));
        core::net::Ipv6Addr::from_bits(a << 96 | b << 64 | c << 32 | d).to_canonical()
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let bits = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        }
        .to_bits();
        Self([96, 64, 32, 0].map(|shift| ((bits >> shift) as u32).to_be()))
    }
}

/// A port in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port(u16);

impl Port {
    /// From a port in host byte order.
    #[inline]
    pub const fn from_host(port: u16) -> Self {
        Self(port.to_be())
    }

    /// From `bpf_sock_addr::user_port`: 16 bits in network byte order, the upper half unused.
    #[inline]
    pub const fn from_user_port(port: u32) -> Self {
        Self(port as u16)
    }

    /// For `bpf_sock_addr::user_port`.
    #[inline]
    pub const fn to_user_port(self) -> u32 {
        self.0 as u32
    }

    /// In host byte order.
    #[inline]
    pub const fn to_host(self) -> u16 {
        u16::from_be(self.0)
    }
}

/// What a client dials: the key of every map that is looked up by destination.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// The destination address.
    pub address: Address,
    /// The destination port.
    pub port: Port,
    /// The IANA protocol number.
    pub protocol: u8,
    /// Always 0: a hash map compares every byte of its keys.
    padding: u8,
}

impl FrontendKey {
    /// The key of an address, a port and an IANA protocol number.
    #[inline]
    pub const fn new(address: Address, port: Port, protocol: u8) -> Self {
        Self { address, port, protocol, padding: 0 }
    }

    /// A number that another key hardly has, for [`Frontend`](crate::Frontend).
    #[inline]
    pub const fn fingerprint(&self) -> u32 {
        let [a, b, c, d] = self.address.0;
        let end = (self.port.0 as u32) << 8 | self.protocol as u32;
        let mut hash = mix(0x9e37_79b9, a);
        hash = mix(hash, b);
        hash = mix(hash, c);
        hash = mix(hash, d);
        hash = mix(hash, end);
        hash ^ (hash >> 15)
    }

    /// The key of a TCP frontend.
    pub fn tcp(at: SocketAddr) -> Self {
        Self::new(at.ip().into(), Port::from_host(at.port()), TCP)
    }
}

/// One step of Murmur3's 32-bit hash.
const fn mix(hash: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}

const _: () = {
    assert!(size_of::<Address>() == 16 && align_of::<Address>() == 4);
    assert!(size_of::<Port>() == 2);
    assert!(size_of::<FrontendKey>() == 20 && align_of::<FrontendKey>() == 4);
    assert!(offset_of!(FrontendKey, address) == 0);
    assert!(offset_of!(FrontendKey, port) == 16);
    assert!(offset_of!(FrontendKey, protocol) == 18);
    assert!(offset_of!(FrontendKey, padding) == 19);
};

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, no padding but the named field (see the asserts above): every byte is initialised.
unsafe impl aya::Pod for FrontendKey {}
#[cfg(feature = "user")]
// SAFETY: `repr(transparent)` over integers: every byte is initialised, every value valid.
unsafe impl aya::Pod for Address {}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::net::{Ipv4Addr, Ipv6Addr};
    use std::vec::Vec;

    use super::*;

    fn bytes(address: Address) -> Vec<u8> {
        address.0.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn ipv6_keeps_its_octets() {
        let address: Ipv6Addr = "2001:db8:1:2:3:4:5:6".parse().unwrap();
        assert_eq!(bytes(IpAddr::V6(address).into()), address.octets());
    }

    #[test]
    fn ipv4_is_v4_mapped() {
        let address = Ipv4Addr::new(10, 96, 0, 1);
        assert_eq!(bytes(IpAddr::V4(address).into()), address.to_ipv6_mapped().octets());
        assert_eq!(Address::from(IpAddr::V4(address)), IpAddr::V6(address.to_ipv6_mapped()).into());
    }

    #[test]
    fn addresses_of_the_host_itself_are_known() {
        let address = |text: &str| Address::from(text.parse::<IpAddr>().unwrap());
        for own in ["127.0.0.1", "127.255.255.255", "::1"] {
            assert!(address(own).is_loopback(), "{own}");
        }
        for other in ["0.0.0.0", "::", "126.0.0.1", "128.0.0.1", "::2", "1::1", "::7f00:1"] {
            assert!(!address(other).is_loopback(), "{other}");
        }
        for nothing in ["0.0.0.0", "::"] {
            assert!(address(nothing).is_unspecified(), "{nothing}");
            assert_eq!(address(nothing).unspecified(), address(nothing));
        }
        for some in ["0.0.0.1", "127.0.0.1", "::1", "1::", "0:0:1::", "::1:0:0:0"] {
            assert!(!address(some).is_unspecified(), "{some}");
        }
    }

    #[test]
    fn a_socket_and_a_plan_give_the_same_key() {
        let at: SocketAddr = "10.96.0.1:443".parse().unwrap();
        let user_ip4 = u32::from_ne_bytes([10, 96, 0, 1]);
        let user_port = u32::from(u16::from_ne_bytes([0x01, 0xbb]));
        let key = FrontendKey::new(Address::from_user_ip4(user_ip4), Port::from_user_port(user_port), TCP);
        assert_eq!(key, FrontendKey::tcp(at));
    }

    #[test]
    fn ports_lie_in_network_byte_order() {
        assert_eq!(Port::from_host(443).0.to_ne_bytes(), [0x01, 0xbb]);
    }
}
