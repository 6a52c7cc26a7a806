//! The nftables expressions that the rules are made of, as data, and their form for libnftnl.
//!
//! Owns the mapping from [`Expr`] to `nftnl_expr`. Never decides what a rule says: [`super::rules`] does.

use std::ffi::{CStr, CString};
use std::num::NonZeroU32;
use std::ptr::NonNull;

use nftnl::expr::Expression;
use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{ProtoFamily, Rule};

use super::schema::Set;

/// A register, by the offset of its first byte in the register file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reg(pub(crate) u32);

impl Reg {
    /// The number the kernel knows it by: a 16-byte register (`NFT_REG_1` …) where one starts here, else a 4-byte
    /// one (`NFT_REG32_00` …), as nft chooses them.
    fn raw(self) -> u32 {
        if self.0.is_multiple_of(16) {
            libc::NFT_REG_1 as u32 + self.0 / 16
        } else {
            libc::NFT_REG32_00 as u32 + self.0 / 4
        }
    }
}

/// What a lookup searches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LookupIn {
    /// A set or map of the table.
    Table(Set),
    /// The anonymous set `{ tcp, udp, sctp }` that the rule brings with it.
    Protocols,
}

/// One expression of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expr {
    /// Loads bytes of the network header.
    Network { offset: u32, len: u32, reg: Reg },
    /// Loads the destination port.
    DestinationPort { reg: Reg },
    /// Loads the name of the interface that the packet came in through (`iifname`); empty for what this host sends.
    InInterface { reg: Reg },
    /// Loads the number of the interface that the packet came in through (`iif`); 0 where there is none.
    InInterfaceNumber { reg: Reg },
    /// Loads the name of the interface that the packet goes out by (`oifname`).
    OutInterface { reg: Reg },
    /// Loads what kind of address the source is to this host (`fib saddr type`).
    SourceType { reg: Reg },
    /// Loads the transport protocol (`meta l4proto`).
    Protocol { reg: Reg },
    /// Loads the transport protocol of the connection (`ct protocol`).
    TrackedProtocol { reg: Reg },
    /// Loads the destination address that the connection was opened to (`ct original ip daddr`).
    OriginalAddress { v6: bool, reg: Reg },
    /// Loads the destination port that the connection was opened to (`ct original proto-dst`).
    OriginalPort { reg: Reg },
    /// `numgen random mod modulus offset offset`.
    Random { modulus: u32, offset: u32, reg: Reg },
    /// Searches a set or map; without a match (inverted: with one) the rule ends here.
    Lookup { set: LookupIn, key: Reg, data: Option<Reg>, invert: bool },
    /// Loads these bytes.
    Immediate { bytes: Vec<u8>, reg: Reg },
    /// Puts what is in these registers into a map, or makes it live for its timeout in seconds again if the key is there.
    Update { map: Set, key: Reg, data: Reg, timeout: NonZeroU32 },
    /// Takes what is under this key out of a map. The kernel wants a register with data here too.
    Delete { map: Set, key: Reg, data: Reg },
    /// Loads the packet's priority (`meta priority`).
    Priority { reg: Reg },
    /// Sets the packet's priority to what is in the register.
    SetPriority { reg: Reg },
    /// `jhash` of so many bytes from a register on, modulo the largest number.
    Hash { source: Reg, len: u32, reg: Reg },
    /// Loads a word of the connection's state.
    Connection { word: ConnectionWord, reg: Reg },
    /// Keeps these bits of the register.
    Mask { reg: Reg, bits: u32 },
    /// Goes on where the bytes from this register on are these (inverted: are not).
    Compare { reg: Reg, bytes: Vec<u8>, invert: bool },
    /// DNAT to the address and port in these registers.
    Dnat { v6: bool, address: Reg, port: Reg },
    /// `masquerade fully-random`.
    Masquerade,
    /// ICMP port unreachable.
    Reject { v6: bool },
    /// A verdict.
    Verdict(Verdict),
}

/// A word of the connection's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectionWord {
    /// `ct state`.
    State,
    /// `ct status`.
    Status,
}

/// How a rule ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// `drop`.
    Drop,
    /// `accept`.
    Accept,
    /// `return`.
    Return,
    /// `jump`.
    Jump(String),
    /// `goto`.
    Goto(String),
}

/// `NF_CT_STATE_INVALID_BIT`: the bit of `ct state invalid`.
pub(crate) const STATE_INVALID: u32 = 1;
/// `NF_CT_STATE_BIT(IP_CT_NEW)`: the bit of `ct state new`.
pub(crate) const STATE_NEW: u32 = 1 << 3;
/// `IPS_DST_NAT`: the bit of `ct status dnat`.
pub(crate) const STATUS_DNAT: u32 = 1 << 5;
/// The name of every anonymous set: the kernel puts a number in.
pub(crate) const ANONYMOUS_SET: &CStr = c"__set%d";

/// `RTN_LOCAL`: the kind of an address that is this host's own.
pub(crate) const ADDRESS_LOCAL: u32 = 2;

/// `NFT_FIB_RESULT_ADDRTYPE`.
const FIB_ADDRESS_TYPE: u32 = 3;
/// `NFTA_FIB_F_SADDR`.
const FIB_SOURCE: u32 = 1;
/// `IP_CT_DIR_ORIGINAL`.
const DIRECTION_ORIGINAL: u8 = 0;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
const RANDOM_FULLY: u32 = 1 << 4;
/// `NFT_DYNSET_OP_DELETE`.
const DYNSET_DELETE: u32 = 2;
/// `NFT_HASH_JENKINS`.
const HASH_JENKINS: u32 = 0;
/// Any number will do: two clients with one hash are led to one backend, which each of them may draw.
const HASH_SEED: u32 = 0x6b6c;
/// `NFT_LOOKUP_F_INV`.
const LOOKUP_INVERT: u32 = 1;

/// An expression as a part of a rule in a batch.
pub(crate) struct InRule<'a> {
    /// What it says.
    pub(crate) expression: &'a Expr,
    /// The number of the anonymous set that the rule brings with it.
    pub(crate) anonymous_set: u32,
}

/// An expression under construction. The rule that it is added to frees it.
struct Builder(NonNull<sys::nftnl_expr>);

impl Builder {
    fn new(kind: &CStr) -> Self {
        // SAFETY: `kind` is a valid C string; the result is checked for null.
        match NonNull::new(unsafe { sys::nftnl_expr_alloc(kind.as_ptr()) }) {
            Some(expr) => Self(expr),
            // Memory ran out, or libnftnl is too old for the expression: neither can be mended from here, and the
            // `nftnl` crate does the same.
            None => std::process::abort(),
        }
    }

    fn u32(self, attribute: u32, value: u32) -> Self {
        // SAFETY: the pointer came from `nftnl_expr_alloc` and is owned by `self`.
        unsafe { sys::nftnl_expr_set_u32(self.0.as_ptr(), attribute as u16, value) };
        self
    }

    fn u8(self, attribute: u32, value: u8) -> Self {
        // SAFETY: as in `u32`.
        unsafe { sys::nftnl_expr_set_u8(self.0.as_ptr(), attribute as u16, value) };
        self
    }

    fn u64(self, attribute: u32, value: u64) -> Self {
        // SAFETY: as in `u32`.
        unsafe { sys::nftnl_expr_set_u64(self.0.as_ptr(), attribute as u16, value) };
        self
    }

    fn bytes(self, attribute: u32, value: &[u8]) -> Self {
        let len = value.len() as u32;
        // SAFETY: as in `u32`; libnftnl copies the bytes.
        unsafe { sys::nftnl_expr_set(self.0.as_ptr(), attribute as u16, value.as_ptr().cast(), len) };
        self
    }

    fn text(self, attribute: u32, value: &CStr) -> Self {
        // SAFETY: as in `u32`; libnftnl copies the string.
        unsafe { sys::nftnl_expr_set_str(self.0.as_ptr(), attribute as u16, value.as_ptr()) };
        self
    }
}

/// A counter, for whoever frees it.
pub(crate) fn counter() -> NonNull<sys::nftnl_expr> {
    Builder::new(c"counter").0
}

/// A name of ours as a C string; our names hold no NUL.
pub(crate) fn c_name(name: &str) -> CString {
    CString::new(name).unwrap_or_default()
}

impl Expression for InRule<'_> {
    fn to_expr(&self, _rule: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        self.expression.build(self.anonymous_set).0
    }
}

impl Expr {
    fn build(&self, anonymous_set: u32) -> Builder {
        match self {
            Self::Network { offset, len, reg } => {
                payload(libc::NFT_PAYLOAD_NETWORK_HEADER, *offset, *len, *reg)
            }
            Self::DestinationPort { reg } => payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, *reg),
            Self::InInterface { reg } => meta(libc::NFT_META_IIFNAME, *reg),
            Self::InInterfaceNumber { reg } => meta(libc::NFT_META_IIF, *reg),
            Self::OutInterface { reg } => meta(libc::NFT_META_OIFNAME, *reg),
            Self::SourceType { reg } => Builder::new(c"fib")
                .u32(sys::NFTNL_EXPR_FIB_RESULT, FIB_ADDRESS_TYPE)
                .u32(sys::NFTNL_EXPR_FIB_FLAGS, FIB_SOURCE)
                .u32(sys::NFTNL_EXPR_FIB_DREG, reg.raw()),
            Self::Protocol { reg } => meta(libc::NFT_META_L4PROTO, *reg),
            Self::TrackedProtocol { reg } => connection(libc::NFT_CT_PROTOCOL, *reg),
            Self::OriginalAddress { v6, reg } => {
                let key = if *v6 { libc::NFT_CT_DST_IP6 } else { libc::NFT_CT_DST_IP };
                connection(key, *reg).u8(sys::NFTNL_EXPR_CT_DIR, DIRECTION_ORIGINAL)
            }
            Self::OriginalPort { reg } => {
                connection(libc::NFT_CT_PROTO_DST, *reg).u8(sys::NFTNL_EXPR_CT_DIR, DIRECTION_ORIGINAL)
            }
            Self::Random { modulus, offset, reg } => Builder::new(c"numgen")
                .u32(sys::NFTNL_EXPR_NG_TYPE, libc::NFT_NG_RANDOM as u32)
                .u32(sys::NFTNL_EXPR_NG_MODULUS, *modulus)
                .u32(sys::NFTNL_EXPR_NG_OFFSET, *offset)
                .u32(sys::NFTNL_EXPR_NG_DREG, reg.raw()),
            Self::Lookup { set, key, data, invert } => match set {
                LookupIn::Table(set) => lookup(&c_name(set.name()), *key, *data, *invert),
                LookupIn::Protocols => lookup(ANONYMOUS_SET, *key, *data, *invert)
                    .u32(sys::NFTNL_EXPR_LOOKUP_SET_ID, anonymous_set),
            },
            Self::Immediate { bytes, reg } => Builder::new(c"immediate")
                .u32(sys::NFTNL_EXPR_IMM_DREG, reg.raw())
                .bytes(sys::NFTNL_EXPR_IMM_DATA, bytes),
            Self::Priority { reg } => meta(libc::NFT_META_PRIORITY, *reg),
            Self::SetPriority { reg } => Builder::new(c"meta")
                .u32(sys::NFTNL_EXPR_META_KEY, libc::NFT_META_PRIORITY as u32)
                .u32(sys::NFTNL_EXPR_META_SREG, reg.raw()),
            Self::Hash { source, len, reg } => Builder::new(c"hash")
                .u32(sys::NFTNL_EXPR_HASH_SREG, source.raw())
                .u32(sys::NFTNL_EXPR_HASH_DREG, reg.raw())
                .u32(sys::NFTNL_EXPR_HASH_LEN, *len)
                .u32(sys::NFTNL_EXPR_HASH_MODULUS, u32::MAX)
                .u32(sys::NFTNL_EXPR_HASH_SEED, HASH_SEED)
                .u32(sys::NFTNL_EXPR_HASH_TYPE, HASH_JENKINS),
            Self::Update { map, key, data, timeout } => {
                dynset(libc::NFT_DYNSET_OP_UPDATE as u32, *map, *key, *data)
                    .u64(sys::NFTNL_EXPR_DYNSET_TIMEOUT, u64::from(timeout.get()) * 1000)
            }
            Self::Delete { map, key, data } => dynset(DYNSET_DELETE, *map, *key, *data),
            Self::Connection { word: ConnectionWord::State, reg } => connection(libc::NFT_CT_STATE, *reg),
            Self::Connection { word: ConnectionWord::Status, reg } => connection(libc::NFT_CT_STATUS, *reg),
            Self::Mask { reg, bits } => Builder::new(c"bitwise")
                .u32(sys::NFTNL_EXPR_BITWISE_SREG, reg.raw())
                .u32(sys::NFTNL_EXPR_BITWISE_DREG, reg.raw())
                .u32(sys::NFTNL_EXPR_BITWISE_LEN, 4)
                .bytes(sys::NFTNL_EXPR_BITWISE_MASK, &bits.to_ne_bytes())
                .bytes(sys::NFTNL_EXPR_BITWISE_XOR, &[0; 4]),
            Self::Compare { reg, bytes, invert } => {
                let operation = if *invert { libc::NFT_CMP_NEQ } else { libc::NFT_CMP_EQ };
                Builder::new(c"cmp")
                    .u32(sys::NFTNL_EXPR_CMP_SREG, reg.raw())
                    .u32(sys::NFTNL_EXPR_CMP_OP, operation as u32)
                    .bytes(sys::NFTNL_EXPR_CMP_DATA, bytes)
            }
            Self::Dnat { v6, address, port } => {
                let family = if *v6 { ProtoFamily::Ipv6 } else { ProtoFamily::Ipv4 };
                Builder::new(c"nat")
                    .u32(sys::NFTNL_EXPR_NAT_TYPE, libc::NFT_NAT_DNAT as u32)
                    .u32(sys::NFTNL_EXPR_NAT_FAMILY, family as u32)
                    .u32(sys::NFTNL_EXPR_NAT_REG_ADDR_MIN, address.raw())
                    .u32(sys::NFTNL_EXPR_NAT_REG_PROTO_MIN, port.raw())
            }
            Self::Masquerade => Builder::new(c"masq").u32(sys::NFTNL_EXPR_MASQ_FLAGS, RANDOM_FULLY),
            Self::Reject { v6 } => {
                // Port unreachable: ICMP code 3 (RFC 792), ICMPv6 code 4 (RFC 4443).
                Builder::new(c"reject")
                    .u32(sys::NFTNL_EXPR_REJECT_TYPE, libc::NFT_REJECT_ICMP_UNREACH as u32)
                    .u8(sys::NFTNL_EXPR_REJECT_CODE, if *v6 { 4 } else { 3 })
            }
            Self::Verdict(verdict) => immediate(verdict),
        }
    }
}

fn payload(base: i32, offset: u32, len: u32, reg: Reg) -> Builder {
    Builder::new(c"payload")
        .u32(sys::NFTNL_EXPR_PAYLOAD_BASE, base as u32)
        .u32(sys::NFTNL_EXPR_PAYLOAD_OFFSET, offset)
        .u32(sys::NFTNL_EXPR_PAYLOAD_LEN, len)
        .u32(sys::NFTNL_EXPR_PAYLOAD_DREG, reg.raw())
}

fn meta(key: i32, reg: Reg) -> Builder {
    Builder::new(c"meta").u32(sys::NFTNL_EXPR_META_KEY, key as u32).u32(sys::NFTNL_EXPR_META_DREG, reg.raw())
}

fn connection(key: i32, reg: Reg) -> Builder {
    Builder::new(c"ct").u32(sys::NFTNL_EXPR_CT_KEY, key as u32).u32(sys::NFTNL_EXPR_CT_DREG, reg.raw())
}

fn lookup(set: &CStr, key: Reg, data: Option<Reg>, invert: bool) -> Builder {
    let mut lookup = Builder::new(c"lookup")
        .u32(sys::NFTNL_EXPR_LOOKUP_SREG, key.raw())
        .text(sys::NFTNL_EXPR_LOOKUP_SET, set);
    if let Some(data) = data {
        lookup = lookup.u32(sys::NFTNL_EXPR_LOOKUP_DREG, data.raw());
    }
    if invert { lookup.u32(sys::NFTNL_EXPR_LOOKUP_FLAGS, LOOKUP_INVERT) } else { lookup }
}

fn dynset(operation: u32, map: Set, key: Reg, data: Reg) -> Builder {
    Builder::new(c"dynset")
        .u32(sys::NFTNL_EXPR_DYNSET_OP, operation)
        .text(sys::NFTNL_EXPR_DYNSET_SET_NAME, &c_name(map.name()))
        .u32(sys::NFTNL_EXPR_DYNSET_SREG_KEY, key.raw())
        .u32(sys::NFTNL_EXPR_DYNSET_SREG_DATA, data.raw())
}

fn immediate(verdict: &Verdict) -> Builder {
    let (code, chain) = match verdict {
        Verdict::Drop => (libc::NF_DROP, None),
        Verdict::Accept => (libc::NF_ACCEPT, None),
        Verdict::Return => (libc::NFT_RETURN, None),
        Verdict::Jump(chain) => (libc::NFT_JUMP, Some(chain)),
        Verdict::Goto(chain) => (libc::NFT_GOTO, Some(chain)),
    };
    let immediate = Builder::new(c"immediate")
        .u32(sys::NFTNL_EXPR_IMM_DREG, libc::NFT_REG_VERDICT as u32)
        .u32(sys::NFTNL_EXPR_IMM_VERDICT, code as u32);
    match chain {
        Some(chain) => immediate.text(sys::NFTNL_EXPR_IMM_CHAIN, &c_name(chain)),
        None => immediate,
    }
}
