//! The sets and maps of the table, as data: names, layouts, and what nft needs to print them.
//!
//! Owns what is constant. Never holds anything of a Service. The rules that search these sets are in
//! [`super::rules`].

use nftnl::nftnl_sys::libc;

use crate::model::input::Family;

/// The table's name, in the `ip` and in the `ip6` family.
pub(crate) const TABLE: &str = "kube-lane";

/// How many classes of set size the pick knows: 2^0 … 2^14.
pub(crate) const CLASSES: u32 = 15;

/// The largest number of backends that one port spreads over.
pub(crate) const MAX_SLOTS: usize = 1 << (CLASSES - 1);

/// How many clients of all ports with session affinity one family's table remembers, for each kind of endpoint set.
pub(crate) const AFFINITY_CLIENTS: u32 = 1 << 20;

/// `NFT_SET_CONCAT`: ranges in a concatenation.
const NFT_SET_CONCAT: u32 = 0x80;

/// A set or map of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Set {
    /// (address, protocol, port, slot) → backend: the slots of every VIP.
    Endpoints,
    /// (address, protocol, port, 2^i): present where the VIP has more than 2^i slots.
    More,
    /// The same for clients from outside, of the VIPs that lead them to their Local set.
    EndpointsLocal,
    /// Where `more` is of these.
    MoreLocal,
    /// (protocol, port, slot) → backend: the slots of every NodePort.
    NpEndpoints,
    /// (protocol, port, 2^i): present where the NodePort has more than 2^i slots.
    NpMore,
    /// `endpoints-local` of NodePorts.
    NpEndpointsLocal,
    /// `more-local` of NodePorts.
    NpMoreLocal,
    /// The VIPs that are translated.
    Vips,
    /// Those of them that lead clients from outside to the Local set.
    VipsLocal,
    /// Those of them that are always masqueraded.
    VipsMasq,
    /// The VIPs that are refused: no usable endpoint.
    VipsReject,
    /// The NodePorts that are translated.
    Nps,
    /// Those of them that lead clients from outside to the Local set.
    NpsLocal,
    /// The NodePorts that are refused.
    NpsReject,
    /// The VIPs that not everybody may dial.
    Ranged,
    /// (address, protocol, port, client's network): who may.
    Ranges,
    /// The VIPs of ports with session affinity.
    Affinity,
    /// Those of them that lead all clients to their Local set.
    AffinityLocalOnly,
    /// VIP → the number of its port with session affinity.
    AffinityIds,
    /// The NodePorts of ports with session affinity.
    NpAffinity,
    /// NodePort → the number of its port with session affinity.
    NpAffinityIds,
    /// (port's number, seconds): for how long the port remembers a client.
    AffinityTimeouts,
    /// (port's number, backend) → the number of this member of the port.
    AffinityBackends,
    /// Member → backend.
    AffinityMembers,
    /// The members that are in their port's Cluster set.
    AffinityCluster,
    /// The members that are in their port's Local set.
    AffinityLocal,
    /// (port's number, client) → the member of the Cluster set that the client was led to. Packets fill it.
    AffinityClients,
    /// The same for the Local set.
    AffinityClientsLocal,
    /// The addresses that NodePorts answer on.
    NodeportIps,
    /// Every cluster IP in use: their other ports are refused, and their SNAT follows the detector.
    ClusterIps,
    /// The ServiceCIDRs: what is in one and not in `cluster-ips` is dropped.
    ServiceCidrs,
    /// Where local pods have their addresses (`clusterCIDR`).
    PodCidrs,
    /// (backend, backend) of every local backend: a connection from and to it needs SNAT to come back here.
    Hairpin,
}

/// The sets of one endpoint set of a kind of frontend.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotSets {
    /// Where a frontend is named if it has slots here.
    pub(crate) named: Set,
    /// The slots.
    pub(crate) slots: Set,
    /// How many there are.
    pub(crate) more: Set,
}

/// Those of VIPs: of the first endpoint set, and of the Local set where clients from outside are led to that.
pub(crate) const VIP_SLOTS: [SlotSets; 2] = [
    SlotSets { named: Set::Vips, slots: Set::Endpoints, more: Set::More },
    SlotSets { named: Set::VipsLocal, slots: Set::EndpointsLocal, more: Set::MoreLocal },
];

/// Those of NodePorts.
pub(crate) const NODEPORT_SLOTS: [SlotSets; 2] = [
    SlotSets { named: Set::Nps, slots: Set::NpEndpoints, more: Set::NpMore },
    SlotSets { named: Set::NpsLocal, slots: Set::NpEndpointsLocal, more: Set::NpMoreLocal },
];

/// One component of a key or of a map's data. Each is padded to a multiple of four bytes, as nftables does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    /// An address of the table's family, network byte order.
    Address,
    /// An IANA protocol number, one byte.
    Protocol,
    /// A port, network byte order.
    Port,
    /// A slot number, 2^i or a number of seconds, host byte order (as `numgen` leaves it in its register).
    Slot,
    /// A number of a port with session affinity or of one of its members, host byte order. nft has no type for such
    /// numbers that a rule can also put in a packet's hands, but `classid`, that of `meta priority`.
    Id,
    /// A client: its address, or of an IPv6 address a hash of four bytes.
    Client,
}

impl Set {
    /// All of them, in the order in which they are created.
    pub(crate) const ALL: [Self; 34] = [
        Self::Endpoints,
        Self::More,
        Self::EndpointsLocal,
        Self::MoreLocal,
        Self::NpEndpoints,
        Self::NpMore,
        Self::NpEndpointsLocal,
        Self::NpMoreLocal,
        Self::Vips,
        Self::VipsLocal,
        Self::VipsMasq,
        Self::VipsReject,
        Self::Nps,
        Self::NpsLocal,
        Self::NpsReject,
        Self::Ranged,
        Self::Ranges,
        Self::Affinity,
        Self::AffinityLocalOnly,
        Self::AffinityIds,
        Self::NpAffinity,
        Self::NpAffinityIds,
        Self::AffinityTimeouts,
        Self::AffinityBackends,
        Self::AffinityMembers,
        Self::AffinityCluster,
        Self::AffinityLocal,
        Self::AffinityClients,
        Self::AffinityClientsLocal,
        Self::NodeportIps,
        Self::ClusterIps,
        Self::ServiceCidrs,
        Self::PodCidrs,
        Self::Hairpin,
    ];

    /// Its name in the kernel; none of them is a keyword of nft's grammar.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Endpoints => "endpoints",
            Self::More => "more",
            Self::EndpointsLocal => "endpoints-local",
            Self::MoreLocal => "more-local",
            Self::NpEndpoints => "np-endpoints",
            Self::NpMore => "np-more",
            Self::NpEndpointsLocal => "np-endpoints-local",
            Self::NpMoreLocal => "np-more-local",
            Self::Vips => "vips",
            Self::VipsLocal => "vips-local",
            Self::VipsMasq => "vips-masq",
            Self::VipsReject => "vips-reject",
            Self::Nps => "nps",
            Self::NpsLocal => "nps-local",
            Self::NpsReject => "nps-reject",
            Self::Ranged => "ranged",
            Self::Ranges => "ranges",
            Self::Affinity => "affinity",
            Self::AffinityLocalOnly => "affinity-local-only",
            Self::AffinityIds => "affinity-ids",
            Self::NpAffinity => "np-affinity",
            Self::NpAffinityIds => "np-affinity-ids",
            Self::AffinityTimeouts => "affinity-timeouts",
            Self::AffinityBackends => "affinity-backends",
            Self::AffinityMembers => "affinity-members",
            Self::AffinityCluster => "affinity-cluster",
            Self::AffinityLocal => "affinity-local",
            Self::AffinityClients => "affinity-clients",
            Self::AffinityClientsLocal => "affinity-clients-local",
            Self::NodeportIps => "nodeport-ips",
            Self::ClusterIps => "cluster-ips",
            Self::ServiceCidrs => "service-cidrs",
            Self::PodCidrs => "pod-cidrs",
            Self::Hairpin => "hairpin",
        }
    }

    /// The set of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|set| set.name() == name)
    }

    /// The components of its key.
    pub(crate) fn key(self) -> &'static [Field] {
        use Field::{Address, Client, Id, Port, Protocol, Slot};
        match self {
            Self::Endpoints | Self::More | Self::EndpointsLocal | Self::MoreLocal => {
                &[Address, Protocol, Port, Slot]
            }
            Self::NpEndpoints | Self::NpMore | Self::NpEndpointsLocal | Self::NpMoreLocal => {
                &[Protocol, Port, Slot]
            }
            Self::Vips
            | Self::VipsLocal
            | Self::VipsMasq
            | Self::VipsReject
            | Self::Ranged
            | Self::Affinity
            | Self::AffinityLocalOnly
            | Self::AffinityIds => &[Address, Protocol, Port],
            Self::Nps | Self::NpsLocal | Self::NpsReject | Self::NpAffinity | Self::NpAffinityIds => {
                &[Protocol, Port]
            }
            Self::AffinityTimeouts => &[Id, Slot],
            Self::AffinityBackends => &[Id, Address, Port],
            Self::AffinityMembers | Self::AffinityCluster | Self::AffinityLocal => &[Id],
            Self::AffinityClients | Self::AffinityClientsLocal => &[Id, Client],
            Self::Ranges => &[Address, Protocol, Port, Address],
            Self::NodeportIps | Self::ClusterIps | Self::ServiceCidrs | Self::PodCidrs => &[Address],
            Self::Hairpin => &[Address, Address],
        }
    }

    /// Whether it maps slots to backends.
    fn holds_backends(self) -> bool {
        matches!(self, Self::Endpoints | Self::EndpointsLocal | Self::NpEndpoints | Self::NpEndpointsLocal)
    }

    /// The components of what it maps to; `None` for a plain set.
    pub(crate) fn data(self) -> Option<&'static [Field]> {
        match self {
            _ if self.holds_backends() => Some(&[Field::Address, Field::Port]),
            Self::AffinityMembers => Some(&[Field::Address, Field::Port]),
            Self::AffinityIds | Self::NpAffinityIds | Self::AffinityBackends => Some(&[Field::Id]),
            Self::AffinityClients | Self::AffinityClientsLocal => Some(&[Field::Id]),
            _ => None,
        }
    }

    /// Whether its elements can count the packets that find them: a connection's first one, drawing its backend, led back
    /// to it, or one that is refused.
    pub(crate) fn counts(self) -> bool {
        self.holds_backends() || matches!(self, Self::VipsReject | Self::NpsReject | Self::AffinityBackends)
    }

    /// Whether rules fill it, and not the agent.
    pub(crate) fn is_filled_by_packets(self) -> bool {
        matches!(self, Self::AffinityClients | Self::AffinityClientsLocal)
    }

    /// How many elements it has room for, where rules fill it.
    pub(crate) fn size(self) -> Option<u32> {
        self.is_filled_by_packets().then_some(AFFINITY_CLIENTS)
    }

    /// Whether the elements that begin with one key are asked for together: they are kept in order.
    pub(crate) fn is_searched_by_prefix(self) -> bool {
        matches!(self, Self::Ranges | Self::AffinityTimeouts | Self::AffinityBackends)
    }

    /// Whether a frontend may have many elements in it: slots, and how many there are.
    pub(crate) fn has_slots(self) -> bool {
        self.key().contains(&Field::Slot) && self.key().contains(&Field::Port)
    }

    /// Whether its elements are the starts and ends of ranges, which depend on each other.
    pub(crate) fn is_interval(self) -> bool {
        matches!(self, Self::ServiceCidrs | Self::PodCidrs)
    }

    /// Whether each of its elements is a range: all keys whose last component is in a network.
    pub(crate) fn has_ranges(self) -> bool {
        self == Self::Ranges
    }

    /// `NFT_SET_*` flags.
    pub(crate) fn flags(self) -> u32 {
        let map = if self.data().is_some() { libc::NFT_SET_MAP as u32 } else { 0 };
        let interval =
            if self.is_interval() || self.has_ranges() { libc::NFT_SET_INTERVAL as u32 } else { 0 };
        let concat = if self.has_ranges() { NFT_SET_CONCAT } else { 0 };
        let dynamic =
            if self.is_filled_by_packets() { (libc::NFT_SET_EVAL | libc::NFT_SET_TIMEOUT) as u32 } else { 0 };
        map | interval | concat | dynamic
    }

    /// What nft needs to print the set: the byte order of its key and, since a slot is an integer of no named type,
    /// the expressions that the key is made of (`typeof`).
    pub(crate) fn userdata(self, family: Family) -> Vec<u8> {
        const KEY_TYPEOF: u8 = 3;
        const DATA_TYPEOF: u8 = 4;

        let key = self.key();
        let mut out = byte_order(key, self.data());
        if let Some(data) = self.data() {
            put(&mut out, KEY_TYPEOF, &concat_typeof(key, family));
            put(&mut out, DATA_TYPEOF, &concat_typeof(data, family));
        } else if key.contains(&Field::Slot) {
            put(&mut out, KEY_TYPEOF, &concat_typeof(key, family));
        }
        out
    }
}

impl Field {
    /// nft's number of the data type (`enum datatypes` in nftables' `datatype.h`), for `NFTA_SET_KEY_TYPE`.
    fn type_id(self, family: Family) -> u32 {
        match (self, family) {
            (Self::Address, Family::V4) => 7,
            (Self::Address, Family::V6) => 8,
            (Self::Protocol, _) => 12,
            (Self::Port, _) => 13,
            (Self::Slot, _) => 4,
            (Self::Id, _) => 23,
            (Self::Client, Family::V4) => Self::Address.type_id(family),
            (Self::Client, Family::V6) => Self::Slot.type_id(family),
        }
    }

    /// Bytes it has.
    pub(crate) fn len(self, family: Family) -> usize {
        match self {
            Self::Address => address_len(family),
            Self::Protocol => 1,
            Self::Port => 2,
            Self::Slot | Self::Id | Self::Client => 4,
        }
    }

    /// Bytes it takes in a key, padding included.
    pub(crate) fn padded_len(self, family: Family) -> usize {
        self.len(family).next_multiple_of(4)
    }

    /// The expression that yields it, as nft stores it for `typeof` (`expr_ops_by_type` and the `build_udata` of
    /// each expression in nftables' sources).
    fn typeof_udata(self, family: Family) -> Vec<u8> {
        const EXPR_PAYLOAD: u32 = 7;
        const EXPR_META: u32 = 9;
        const EXPR_NUMGEN: u32 = 23;
        const PROTO_TH: u32 = 11;
        const PROTO_IP: u32 = 12;
        const PROTO_IP6: u32 = 13;
        const TH_DPORT: u32 = 2;
        const IP_DADDR: u32 = 12;
        const IP6_DADDR: u32 = 9;
        const META_PRIORITY: u32 = 2;
        const META_L4PROTO: u32 = 16;
        const NUMGEN_RANDOM: u32 = 1;
        const NUMGEN_MODULUS: u32 = 2;

        let (expression, parts): (u32, &[u32]) = match (self, family) {
            (Self::Address, Family::V4) => (EXPR_PAYLOAD, &[PROTO_IP, IP_DADDR]),
            (Self::Address, Family::V6) => (EXPR_PAYLOAD, &[PROTO_IP6, IP6_DADDR]),
            (Self::Port, _) => (EXPR_PAYLOAD, &[PROTO_TH, TH_DPORT]),
            (Self::Protocol, _) => (EXPR_META, &[META_L4PROTO]),
            (Self::Slot, _) => (EXPR_NUMGEN, &[NUMGEN_RANDOM, NUMGEN_MODULUS, 0]),
            (Self::Id, _) => (EXPR_META, &[META_PRIORITY]),
            (Self::Client, Family::V4) => return Self::Address.typeof_udata(family),
            // nft 1.0.6 cannot say `typeof jhash`. What counts is the type: a number.
            (Self::Client, Family::V6) => return Self::Slot.typeof_udata(family),
        };
        let mut inner = Vec::new();
        for (i, part) in (0u8..).zip(parts) {
            put(&mut inner, i, &part.to_ne_bytes());
        }
        typeof_of(expression, &inner)
    }
}

/// Bytes of an address.
pub(crate) fn address_len(family: Family) -> usize {
    match family {
        Family::V4 => 4,
        Family::V6 => 16,
    }
}

/// The length in bytes of a key or of data, padding included.
pub(crate) fn len_of(fields: &[Field], family: Family) -> usize {
    fields.iter().map(|field| field.padded_len(family)).sum()
}

/// The type number of a concatenation: six bits a component (`concat_subtype_add` in nftables).
pub(crate) fn type_of(fields: &[Field], family: Family) -> u32 {
    fields.iter().fold(0, |id, field| id << 6 | field.type_id(family))
}

/// The part of what nft needs to print a set that says the byte order of its key, and of its data if it has any.
fn byte_order(key: &[Field], data: Option<&[Field]>) -> Vec<u8> {
    const KEY_BYTE_ORDER: u8 = 0;
    const DATA_BYTE_ORDER: u8 = 1;
    const MIXED: u32 = 0;
    const HOST: u32 = 1;
    const BIG_ENDIAN: u32 = 2;

    let order = |fields: &[Field]| match fields {
        [Field::Id] => HOST,
        [_] => BIG_ENDIAN,
        _ => MIXED,
    };
    let mut out = Vec::new();
    put(&mut out, KEY_BYTE_ORDER, &order(key).to_ne_bytes());
    if let Some(data) = data {
        put(&mut out, DATA_BYTE_ORDER, &order(data).to_ne_bytes());
    }
    out
}

/// What nft stores with an anonymous set of protocols, so that it prints their names.
pub(crate) fn protocols_userdata() -> Vec<u8> {
    const HOST_ENDIAN: u32 = 1;
    let mut out = Vec::new();
    put(&mut out, 0, &HOST_ENDIAN.to_ne_bytes());
    put(&mut out, 3, &Field::Protocol.typeof_udata(Family::V4));
    out
}

fn concat_typeof(fields: &[Field], family: Family) -> Vec<u8> {
    const EXPR_CONCAT: u32 = 13;
    if let [field] = fields {
        return field.typeof_udata(family);
    }
    let mut parts = Vec::new();
    for (i, field) in (0u8..).zip(fields) {
        put(&mut parts, i, &field.typeof_udata(family));
    }
    typeof_of(EXPR_CONCAT, &parts)
}

fn typeof_of(expression: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out, 0, &expression.to_ne_bytes());
    put(&mut out, 1, data);
    out
}

/// Appends one attribute of nft's user data: type, length, value; no padding (libnftnl's `nftnl_udata_put`).
/// What is nested here stays far below the 255 bytes that a length can say.
fn put(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    out.push(kind);
    out.push(value.len() as u8);
    out.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The bytes that nft 1.0.6 sends for the same declarations (it adds `0604…0`, its default, to maps).
    #[test]
    fn userdata_is_what_nft_writes() {
        let address = "0014000407000000010c00040c00000001040c000000";
        let protocol = "010e00040900000001060004100000 00".replace(' ', "");
        let port = |i: u8| format!("{i:02x}14000407000000010c00040b000000010402000000");
        let slot = "031a000417000000011200040100000001040200000002 0400000000".replace(' ', "");
        assert_eq!(
            hex(&Set::Endpoints.userdata(Family::V4)),
            format!(
                "000400000000010400000000036000040d0000000158{address}{protocol}{}{slot}\
                 043400040d000000012c{address}{}",
                port(2),
                port(1)
            )
        );
        assert_eq!(hex(&Set::NodeportIps.userdata(Family::V6)), "000402000000");
        assert_eq!(hex(&Set::Vips.userdata(Family::V4)), "000400000000");
        assert_eq!(hex(&protocols_userdata()), "000401000000030e0004090000000106000410000000");
    }

    #[test]
    fn key_types_are_those_of_nft() {
        assert_eq!(type_of(Set::Endpoints.key(), Family::V4), 0x1c_c344);
        assert_eq!(type_of(Set::Endpoints.key(), Family::V6), 0x20_c344);
        assert_eq!(type_of(Set::NpMore.key(), Family::V4), 0xc344);
        assert_eq!(type_of(Set::Hairpin.key(), Family::V4), 0x1c7);
        assert_eq!(type_of(Set::Ranges.key(), Family::V4), 0x1c_c347);
        assert_eq!(Set::Ranges.flags(), 0x84);
        assert_eq!(len_of(Set::Endpoints.key(), Family::V6), 28);
        assert_eq!(len_of(&[Field::Address, Field::Port], Family::V4), 8);
    }
}
