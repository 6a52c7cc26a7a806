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

/// The longest key: IPv6 address, protocol, port, IPv6 address; behind it the last address, where it is a range.
const KEY_MAX: usize = 56;
/// The longest data: IPv6 address, port.
const DATA_MAX: usize = 20;
/// The longest comment that nft takes back is 128 bytes (`NFTNL_UDATA_COMMENT_MAXLEN`), its NUL included.
const COMMENT_MAX: usize = 127;

/// The key of an element.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    /// The key; in a range, the first key, and behind it the last component of the last key.
    bytes: [u8; KEY_MAX],
    len: u8,
    /// How long the last component of the last key is; 0: the key is no range.
    end_len: u8,
    /// It is where a range ends: the first address behind it (`NFT_SET_ELEM_INTERVAL_END`).
    pub(crate) interval_end: bool,
}

/// What a key maps to: a backend, or a number of a port with session affinity.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Data {
    bytes: [u8; DATA_MAX],
    len: u8,
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
    /// The key that the kernel reports; `last` is the last key of an element that is a range. `None` where the key is
    /// longer than any key of ours, or the range is none of `tail` bytes, the length of the last component.
    pub(crate) fn from_kernel(
        bytes: &[u8],
        last: Option<&[u8]>,
        tail: usize,
        interval_end: bool,
    ) -> Option<Self> {
        let mut key = Self { len: u8::try_from(bytes.len()).ok()?, interval_end, ..Self::empty() };
        key.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        let Some(last) = last else { return Some(key) };
        let (head, end) = last.split_at_checked(last.len().checked_sub(tail)?)?;
        (last.len() == bytes.len() && bytes.starts_with(head)).then_some(())?;
        key.up_to(end)
    }

    fn empty() -> Self {
        Self { bytes: [0; KEY_MAX], len: 0, end_len: 0, interval_end: false }
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

    /// The same VIP with the network of its clients behind it, as `ranges` has it. An element of a set with ranges has a
    /// last key also where it is one address: nft takes an element without one for the start of a range, which ends at
    /// the next element.
    pub(crate) fn clients(self, network: IpNetwork) -> Self {
        let first = self.push_address(network.network());
        match network.broadcast() {
            IpAddr::V4(last) => first.up_to(&last.octets()),
            IpAddr::V6(last) => first.up_to(&last.octets()),
        }
        .unwrap_or(first)
    }

    /// The range from this key to the one that ends with these bytes; `None` where they are too many.
    fn up_to(mut self, end: &[u8]) -> Option<Self> {
        let behind = usize::from(self.len);
        self.bytes.get_mut(behind..behind + end.len())?.copy_from_slice(end);
        self.end_len = u8::try_from(end.len()).ok()?;
        Some(self)
    }

    /// A number of a port with session affinity, or of one of its members.
    pub(crate) fn id(id: u32) -> Self {
        Self::empty().push(&id.to_ne_bytes())
    }

    /// The same number with a backend behind it.
    pub(crate) fn with_backend(self, backend: SocketAddr) -> Self {
        self.push_address(backend.ip()).push(&backend.port().to_be_bytes())
    }

    /// The last of the keys that it stands for; `None`: it stands for itself alone.
    pub(crate) fn last(&self) -> Option<Vec<u8>> {
        let (len, end_len) = (usize::from(self.len), usize::from(self.end_len));
        let end = self.bytes.get(len..len + end_len).filter(|end| !end.is_empty())?;
        let head = self.as_bytes().get(..len - end_len)?;
        Some([head, end].concat())
    }

    /// Whether its first components are those of the other.
    pub(crate) fn starts_with(&self, other: &Self) -> bool {
        self.as_bytes().starts_with(other.as_bytes())
    }

    /// The number that it begins with.
    pub(crate) fn to_id(self) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.as_bytes().first_chunk()?))
    }

    /// The backend behind a number.
    pub(crate) fn to_backend(self) -> Option<AddressPort> {
        Data::from_kernel(self.as_bytes().get(size_of::<u32>()..)?)?.to_backend().map(AddressPort::from)
    }

    /// The bytes, padding included.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl Data {
    /// A backend's address and port.
    pub(crate) fn backend(backend: SocketAddr) -> Self {
        Self::of(Key::empty().with_backend(backend))
    }

    /// A number of a port with session affinity, or of one of its members.
    pub(crate) fn id(id: u32) -> Self {
        Self::of(Key::id(id))
    }

    fn of(key: Key) -> Self {
        let mut bytes = [0; DATA_MAX];
        bytes[..usize::from(key.len)].copy_from_slice(key.as_bytes());
        Self { bytes, len: key.len }
    }

    /// From what the kernel says; `None` where it is longer than any data of ours.
    pub(crate) fn from_kernel(bytes: &[u8]) -> Option<Self> {
        let mut held = [0; DATA_MAX];
        held.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self { bytes: held, len: u8::try_from(bytes.len()).ok()? })
    }

    /// The backend that it says.
    pub(crate) fn to_backend(self) -> Option<SocketAddr> {
        let (address, port): (IpAddr, &[u8]) = match self.as_bytes() {
            [a, b, c, d, port @ ..] if port.len() == 4 => (Ipv4Addr::new(*a, *b, *c, *d).into(), port),
            bytes => {
                let (address, port) = bytes.split_first_chunk::<16>()?;
                (Ipv6Addr::from(*address).into(), port)
            }
        };
        let port = port.first_chunk::<2>()?;
        Some(SocketAddr::new(address, u16::from_be_bytes(*port)))
    }

    /// The number that it says.
    pub(crate) fn to_id(self) -> Option<u32> {
        Some(u32::from_ne_bytes(self.as_bytes().try_into().ok()?))
    }

    /// The bytes, padding included.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
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
        if let Some(last) = self.last() {
            f.write_str("-")?;
            last.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        }
        if self.interval_end { f.write_str(" end") } else { Ok(()) }
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.to_backend(), self.to_id()) {
            (Some(backend), _) => fmt::Display::fmt(&backend, f),
            (None, Some(id)) => fmt_id(id, f),
            (None, None) => fmt::Debug::fmt(self.as_bytes(), f),
        }
    }
}

/// As nft prints a number of the type `classid`.
fn fmt_id(id: u32, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "{:x}:{:x}", id >> 16, id & 0xffff)
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
                (Field::Address, bytes) => fmt_address(bytes, f)?,
                (Field::Id, [a, b, c, d]) => fmt_id(u32::from_ne_bytes([*a, *b, *c, *d]), f)?,
                (Field::Protocol, [number, ..]) => write!(f, "{number}")?,
                (Field::Port, [high, low, ..]) => write!(f, "{}", u16::from_be_bytes([*high, *low]))?,
                (Field::Slot, [a, b, c, d]) => write!(f, "{}", u32::from_ne_bytes([*a, *b, *c, *d]))?,
                (_, bytes) => write!(f, "{bytes:?}")?,
            }
        }
        if let Some(last) = self.key.last() {
            let [first, last] = [self.key.as_bytes(), &last].map(|key| {
                let address = key.len().saturating_sub(address_len(self.family));
                &key[address..]
            });
            fmt_end(first, last, f)?;
        }
        f.write_str(" }")
    }
}

/// What follows the first address of a range: nothing behind a single address, the length of a network's prefix, or the last
/// address.
fn fmt_end(first: &[u8], last: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Some((first, end)) = to_address(first).zip(to_address(last)) else { return Ok(()) };
    let network = |prefix: &u8| {
        IpNetwork::new(first, *prefix).is_ok_and(|net| net.network() == first && net.broadcast() == end)
    };
    match (0..=128).find(network) {
        _ if first == end => Ok(()),
        Some(prefix) => write!(f, "/{prefix}"),
        None => write!(f, "-{end}"),
    }
}

fn to_address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into());
    let v6 = || Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into());
    v4().or_else(v6)
}

fn fmt_address(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match to_address(bytes) {
        Some(address) => write!(f, "{address}"),
        None => write!(f, "{bytes:?}"),
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
            ("203.0.113.1:80", "10.0.0.0/9", "10.0.0.0/9", "0a7fffff"),
            ("203.0.113.1:80", "10.0.0.1/32", "10.0.0.1", "0a000001"),
            ("203.0.113.1:80", "0.0.0.0/0", "0.0.0.0/0", "ffffffff"),
            ("[fd00::1]:80", "fd01::/127", "fd01::/127", "00000001"),
            ("[fd00::1]:80", "::/0", "::/0", "ffffffff"),
        ];
        for (vip, network, text, end) in cases {
            let vip: SocketAddr = vip.parse().unwrap();
            let key = Key::vip(vip, Protocol::Tcp).clients(network.parse().unwrap());
            let family = Family::of(vip.ip());
            let place = Place { family, set: Set::Ranges, key };
            assert_eq!(place.to_string(), format!("ranges {{ {} . 6 . 80 . {text} }}", vip.ip()));
            let last = key.last().unwrap();
            assert!(format!("{key:?}").ends_with(end), "{key:?}");
            let tail = address_len(family);
            assert_eq!(Key::from_kernel(key.as_bytes(), Some(&last), tail, false), Some(key));
        }
    }

    #[test]
    fn a_range_that_is_no_network_is_known_by_both_its_ends() {
        let key = Key::vip("203.0.113.1:80".parse().unwrap(), Protocol::Tcp);
        let [first, last] =
            ["198.51.100.7/32", "203.0.113.200/32"].map(|net| key.clients(net.parse().unwrap()));
        let odd = Key::from_kernel(first.as_bytes(), Some(last.as_bytes()), 4, false).unwrap();
        assert_eq!(odd.last().as_deref(), Some(last.as_bytes()));
        assert_ne!(odd, first);
        let place = Place { family: Family::V4, set: Set::Ranges, key: odd };
        assert_eq!(place.to_string(), "ranges { 203.0.113.1 . 6 . 80 . 198.51.100.7-203.0.113.200 }");
        let half = Key::from_kernel(first.as_bytes(), None, 4, false).unwrap();
        assert_ne!(half, first, "an element without an end is another element");
        assert_eq!(Key::from_kernel(&[0; 60], None, 4, false), None);
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
