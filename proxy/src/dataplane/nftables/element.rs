//! One element of a set or map: its key, its data, its comment, byte for byte as the kernel holds them.
//!
//! Owns the layouts of keys and data. Never decides which elements there are: [`super::lower`] does.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::schema::{Field, Set, address_len};
use crate::model::input::{Family, Protocol};
use crate::model::plan::{AddressPort, FrontendAddress};

/// The longest key: IPv6 address, protocol, port, IPv6 address.
const KEY_MAX: usize = 40;
/// The longest data: IPv6 address, port.
const DATA_MAX: usize = 20;
/// The longest comment that nft takes back is 128 bytes (`NFTNL_UDATA_COMMENT_MAXLEN`), its NUL included.
const COMMENT_MAX: usize = 127;

/// The key of an element.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    bytes: [u8; KEY_MAX],
    len: u8,
    /// It stands for every key that differs from it in its last so many bits alone.
    free_bits: u8,
    /// It is where a range ends: the first address behind it (`NFT_SET_ELEM_INTERVAL_END`).
    pub(crate) interval_end: bool,
}

/// What a key maps to.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Data {
    /// A backend: address and port, so many bytes of them.
    Backend([u8; DATA_MAX], u8),
    /// `jump` to a chain.
    Jump(Arc<str>),
    /// `goto` a chain.
    Goto(Arc<str>),
}

/// Where an element lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    /// Of which table.
    pub(crate) family: Family,
    /// Which set.
    pub(crate) set: Set,
    /// Under which key.
    pub(crate) key: Key,
}

/// An element as it should be in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    /// Set and key.
    pub(crate) place: Place,
    /// What it maps to, in a map.
    pub(crate) data: Option<Data>,
    /// Which Service port it belongs to; shared elements have none.
    pub(crate) comment: Option<Arc<str>>,
}

impl Key {
    /// From what the kernel says: the key, and where it is a range the last key of it. `None` where it is longer than
    /// any key of ours. A range that is no network can only be somebody else's doing; it is known, and removed, by
    /// its first key.
    pub(crate) fn from_kernel(bytes: &[u8], last: Option<&[u8]>, interval_end: bool) -> Option<Self> {
        let mut key = Self { len: u8::try_from(bytes.len()).ok()?, interval_end, ..Self::empty() };
        key.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        if let Some(last) = last {
            key.free_bits = (0..=128).find(|bits| key.range(*bits).last().as_bytes() == last).unwrap_or(0);
        }
        Some(key)
    }

    fn empty() -> Self {
        Self { bytes: [0; KEY_MAX], len: 0, free_bits: 0, interval_end: false }
    }

    /// Appends a component, padded with zeros to a multiple of four bytes.
    fn push(mut self, component: &[u8]) -> Self {
        let at = usize::from(self.len);
        self.bytes[at..at + component.len()].copy_from_slice(component);
        self.len += component.len().next_multiple_of(4) as u8;
        self
    }

    fn push_address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.push(&address.octets()),
            IpAddr::V6(address) => self.push(&address.octets()),
        }
    }

    /// One address.
    pub(crate) fn address(address: IpAddr) -> Self {
        Self::empty().push_address(address)
    }

    /// (address, address), as `hairpin` has it.
    pub(crate) fn to_itself(address: IpAddr) -> Self {
        Self::address(address).push_address(address)
    }

    /// (address, port).
    pub(crate) fn backend(backend: SocketAddr) -> Self {
        Self::address(backend.ip()).push(&backend.port().to_be_bytes())
    }

    /// (address, protocol, port).
    pub(crate) fn vip(address: SocketAddr, protocol: Protocol) -> Self {
        Self::address(address.ip()).push(&[protocol.number()]).push(&address.port().to_be_bytes())
    }

    /// (protocol, port).
    pub(crate) fn nodeport(port: u16, protocol: Protocol) -> Self {
        Self::empty().push(&[protocol.number()]).push(&port.to_be_bytes())
    }

    /// The same key with a slot number (or a 2^i) behind it.
    pub(crate) fn slot(self, slot: u32) -> Self {
        self.push(&slot.to_ne_bytes())
    }

    /// The same VIP with the network of its clients behind it, as `ranges` has it.
    pub(crate) fn clients(self, network: IpNetwork) -> Self {
        let bits = match network {
            IpNetwork::V4(_) => 32,
            IpNetwork::V6(_) => 128,
        };
        self.push_address(network.network()).range(bits - network.prefix())
    }

    fn range(mut self, free_bits: u8) -> Self {
        self.free_bits = free_bits;
        self
    }

    /// The last of the keys that it stands for.
    pub(crate) fn last(self) -> Self {
        let mut last = self.range(0);
        let mut left = self.free_bits;
        for byte in last.bytes[..usize::from(self.len)].iter_mut().rev() {
            let here = left.min(8);
            *byte |= 0xffu8.checked_shr(u32::from(8 - here)).unwrap_or(0);
            left -= here;
        }
        last
    }

    /// Whether it stands for more than one key.
    pub(crate) fn is_range(&self) -> bool {
        self.free_bits > 0
    }

    /// Whether its first components are those of the other.
    pub(crate) fn starts_with(&self, other: &Self) -> bool {
        self.as_bytes().starts_with(other.as_bytes())
    }

    /// The backend that it is, where it is one.
    pub(crate) fn to_backend(self) -> Option<AddressPort> {
        Data::from_kernel(self.as_bytes())?.to_backend().map(AddressPort::from)
    }

    /// The bytes, padding included.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl Data {
    /// A backend's address and port.
    pub(crate) fn backend(backend: SocketAddr) -> Self {
        let key = Key::backend(backend);
        let mut bytes = [0; DATA_MAX];
        bytes[..usize::from(key.len)].copy_from_slice(key.as_bytes());
        Self::Backend(bytes, key.len)
    }

    /// From what the kernel says; `None` where it is longer than any data of ours.
    pub(crate) fn from_kernel(bytes: &[u8]) -> Option<Self> {
        let mut held = [0; DATA_MAX];
        held.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self::Backend(held, u8::try_from(bytes.len()).ok()?))
    }

    /// The backend that it says.
    pub(crate) fn to_backend(&self) -> Option<SocketAddr> {
        let (address, port): (IpAddr, &[u8]) = match self.as_bytes()? {
            [a, b, c, d, port @ ..] if port.len() == 4 => (Ipv4Addr::new(*a, *b, *c, *d).into(), port),
            bytes => {
                let (address, port) = bytes.split_first_chunk::<16>()?;
                (Ipv6Addr::from(*address).into(), port)
            }
        };
        let port = port.first_chunk::<2>()?;
        Some(SocketAddr::new(address, u16::from_be_bytes(*port)))
    }

    /// The address, where it says nothing else.
    pub(crate) fn to_address(&self) -> Option<IpAddr> {
        let bytes = self.as_bytes()?;
        let v4 = || Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into());
        let v6 = || Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into());
        v4().or_else(v6)
    }

    /// The bytes of a backend, padding included; `None` for a verdict.
    pub(crate) fn as_bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Backend(bytes, len) => bytes.get(..usize::from(*len)),
            Self::Jump(_) | Self::Goto(_) => None,
        }
    }
}

impl Element {
    /// An element as it was found.
    pub(crate) fn copied(place: Place, data: Option<Data>, comment: Option<&[u8]>) -> Self {
        Self { place, data, comment: comment.map(|text| String::from_utf8_lossy(text).into()) }
    }
}

impl Place {
    /// The frontend that it says is translated, in the sets that hold those.
    pub(crate) fn frontend(&self) -> Option<(Family, Protocol, FrontendAddress)> {
        let key = self.key.as_bytes();
        let (ip, rest): (Option<IpAddr>, _) = match (self.set, self.family) {
            (Set::Vips, Family::V4) => {
                key.split_first_chunk::<4>().map(|(ip, rest)| (Some((*ip).into()), rest))?
            }
            (Set::Vips, Family::V6) => {
                key.split_first_chunk::<16>().map(|(ip, rest)| (Some((*ip).into()), rest))?
            }
            (Set::Nps, _) => (None, key),
            _ => return None,
        };
        let [number, _, _, _, port @ ..] = rest else { return None };
        let protocol = Protocol::ALL.into_iter().find(|protocol| protocol.number() == *number)?;
        let port = u16::from_be_bytes(*port.first_chunk()?);
        let vip = |ip| FrontendAddress::Vip(AddressPort { ip, port });
        Some((self.family, protocol, ip.map_or(FrontendAddress::NodePort(port), vip)))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.as_bytes() {
            write!(f, "{byte:02x}")?;
        }
        if self.is_range() {
            write!(f, " + {} bits", self.free_bits)?;
        }
        if self.interval_end { f.write_str(" end") } else { Ok(()) }
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.to_backend()) {
            (_, Some(backend)) => fmt::Display::fmt(&backend, f),
            (Self::Backend(bytes, _), None) => fmt::Debug::fmt(bytes, f),
            (Self::Jump(chain), _) => write!(f, "jump {chain}"),
            (Self::Goto(chain), _) => write!(f, "goto {chain}"),
        }
    }
}

impl fmt::Display for Place {
    /// As an operator reads it: `endpoints { 10.96.0.1 . 6 . 80 . 0 }`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {{ ", self.set.name())?;
        let mut rest = self.key.as_bytes();
        for (i, field) in self.set.key().iter().enumerate() {
            let (component, behind) = rest.split_at(field.padded_len(self.family).min(rest.len()));
            rest = behind;
            if i > 0 {
                f.write_str(" . ")?;
            }
            match (field, component) {
                (Field::Address, [a, b, c, d]) => write!(f, "{}", Ipv4Addr::new(*a, *b, *c, *d))?,
                (Field::Address, bytes) => match <[u8; 16]>::try_from(bytes) {
                    Ok(octets) => write!(f, "{}", Ipv6Addr::from(octets))?,
                    Err(_) => write!(f, "{bytes:?}")?,
                },
                (Field::Protocol, [number, ..]) => write!(f, "{number}")?,
                (Field::Port, [high, low, ..]) => write!(f, "{}", u16::from_be_bytes([*high, *low]))?,
                (Field::Slot, [a, b, c, d]) => write!(f, "{}", u32::from_ne_bytes([*a, *b, *c, *d]))?,
                (_, bytes) => write!(f, "{bytes:?}")?,
            }
        }
        if self.key.is_range() {
            write!(f, "/{}", address_len(self.family) * 8 - usize::from(self.key.free_bits))?;
        }
        f.write_str(" }")
    }
}

/// The elements of a set of ranges, for sorted disjoint networks of one family: one stands where a range starts, an end
/// element at the first address that no range covers any more. Networks without a gap between them are one range: of an
/// end and a start at one address, the kernel cannot always tell which is meant.
pub(crate) fn ranges(set: Set, family: Family, networks: &[IpNetwork]) -> Vec<Element> {
    let mut elements = Vec::new();
    let mut push = |address: IpAddr, interval_end| {
        let key = Key { interval_end, ..Key::address(address) };
        elements.push(Element { place: Place { family, set, key }, data: None, comment: None });
    };
    let mut networks = networks.iter().filter(|network| Family::of(network.ip()) == family).peekable();
    if networks.peek().is_some_and(|first| !first.network().is_unspecified()) {
        push(unspecified(family), true);
    }
    let mut behind_last = None;
    while let Some(network) = networks.next() {
        if behind_last != Some(network.network()) {
            push(network.network(), false);
        }
        // A range that reaches the last address has no end element.
        behind_last = successor(network.broadcast());
        let next = networks.peek().map(|next| next.network());
        if let Some(behind) = behind_last.filter(|behind| Some(*behind) != next) {
            push(behind, true);
        }
    }
    elements
}

fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn successor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => address.to_bits().checked_add(1).map(|bits| Ipv4Addr::from_bits(bits).into()),
        IpAddr::V6(address) => address.to_bits().checked_add(1).map(|bits| Ipv6Addr::from_bits(bits).into()),
    }
}

/// A comment that nft can print and take back: `namespace/name:port`, in its middle cut short and marked with a
/// hash where it is too long (a Service's may reach 191 bytes).
pub(crate) fn comment(text: &str) -> Arc<str> {
    let printable = |c: char| if c == '"' || c.is_control() { '?' } else { c };
    if text.len() <= COMMENT_MAX && text.chars().all(|c| printable(c) == c) {
        return text.into();
    }
    let mut head: String = text.chars().map(printable).collect();
    if head.len() > COMMENT_MAX {
        let mut end = COMMENT_MAX - "~".len() - 16;
        while !head.is_char_boundary(end) {
            end -= 1;
        }
        head.truncate(end);
        head.push('~');
        head.push_str(&format!("{:016x}", fnv1a(text.as_bytes())));
    }
    head.into()
}

/// FNV-1a, 64 bits: stable across builds and machines.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_padded_and_ports_big_endian() {
        let key = Key::vip("10.96.0.1:80".parse().unwrap(), Protocol::Tcp).slot(3);
        let mut expected = vec![10, 96, 0, 1, 6, 0, 0, 0, 0, 80, 0, 0];
        expected.extend(3u32.to_ne_bytes());
        assert_eq!(key.as_bytes(), expected);
        let place = Place { family: Family::V4, set: Set::Endpoints, key };
        assert_eq!(place.to_string(), "endpoints { 10.96.0.1 . 6 . 80 . 3 }");
    }

    #[test]
    fn data_reads_back() {
        for backend in ["10.0.0.1:8080", "[fd00::1]:53"] {
            let backend: SocketAddr = backend.parse().unwrap();
            assert_eq!(Data::backend(backend).to_backend(), Some(backend));
        }
    }

    #[test]
    fn a_network_of_clients_reads_back() {
        let cases = [
            ("203.0.113.1:80", "10.0.0.0/9", "ranges { 203.0.113.1 . 6 . 80 . 10.0.0.0/9 }", "0a7fffff"),
            ("203.0.113.1:80", "10.0.0.1/32", "ranges { 203.0.113.1 . 6 . 80 . 10.0.0.1 }", "0a000001"),
            ("203.0.113.1:80", "0.0.0.0/0", "ranges { 203.0.113.1 . 6 . 80 . 0.0.0.0/0 }", "ffffffff"),
            ("[fd00::1]:80", "fd01::/127", "ranges { fd00::1 . 6 . 80 . fd01::/127 }", "00000001"),
            ("[fd00::1]:80", "::/0", "ranges { fd00::1 . 6 . 80 . ::/0 }", "ffffffff"),
        ];
        for (vip, network, text, last) in cases {
            let vip: SocketAddr = vip.parse().unwrap();
            let key = Key::vip(vip, Protocol::Tcp).clients(network.parse().unwrap());
            let place = Place { family: Family::of(vip.ip()), set: Set::Ranges, key };
            assert_eq!(place.to_string(), text);
            let end = key.last();
            assert!(format!("{end:?}").ends_with(last), "{end:?}");
            assert_eq!(Key::from_kernel(key.as_bytes(), Some(end.as_bytes()), false), Some(key));
        }
    }

    #[test]
    fn ranges_end_where_nothing_is_covered() {
        let networks: Vec<IpNetwork> =
            ["10.0.0.0/8", "11.0.0.0/9", "255.0.0.0/8"].map(|n| n.parse().unwrap()).to_vec();
        let keys: Vec<_> = ranges(Set::PodCidrs, Family::V4, &networks)
            .iter()
            .map(|e| format!("{:?}", e.place.key))
            .collect();
        assert_eq!(keys, ["00000000 end", "0a000000", "0b800000 end", "ff000000"]);
        assert!(ranges(Set::PodCidrs, Family::V6, &networks).is_empty());
        assert_eq!(ranges(Set::PodCidrs, Family::V4, &["0.0.0.0/0".parse().unwrap()]).len(), 1);
    }

    #[test]
    fn long_comments_keep_their_identity() {
        let name = |last: &str| format!("{}/{}{last}:{}", "n".repeat(63), "s".repeat(62), "p".repeat(63));
        let (a, b) = (comment(&name("a")), comment(&name("b")));
        assert_eq!(a.len(), COMMENT_MAX);
        assert_ne!(a, b);
        assert_eq!(&*comment("default/web:http"), "default/web:http");
        assert_eq!(&*comment("odd\"name"), "odd?name");
    }
}
