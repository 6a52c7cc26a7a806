//! Netlink messages of one transaction, built by libnftnl.
//!
//! Owns the unsafe calls that build and parse set messages. Never decides what a transaction contains, never sends.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::ptr::NonNull;
use std::slice;

use mnl::mnl_sys::mnl_attr_put_strz;
use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{MsgType, NlMsg, ProtoFamily, Rule, Table};

use super::element::{Data, Element, Key, Place};
use super::expr::{ANONYMOUS_SET, Expr, LookupIn, c_name, counter};
use super::fingerprint::{Fingerprint, rule};
use super::rules::Chain;
use super::schema::{Field, Set, TABLE, len_of, protocols_userdata, type_of};
use super::scratch::Scratch;
use crate::model::input::{Family, Protocol};

/// Elements in one message: an element is at most some 250 bytes, and the attribute that holds them all says its
/// length in 16 bits.
pub(crate) const ELEMENTS_PER_MESSAGE: usize = 200;

/// Where the numbers of anonymous sets begin; those of named sets are below. Each ties a set to the rule that is sent
/// after it. No set of a batch may have another's: where two do, which one a rule gets depends on the kernel.
const ANONYMOUS_SETS: u32 = 0x1_0000;

/// Type, length, value of a comment (`NFTNL_UDATA_SET_ELEM_COMMENT`).
pub(super) const COMMENT_UDATA: u8 = 0;

/// The messages of one transaction: all of it takes effect, or nothing.
pub(crate) struct Transaction<Owner> {
    buffer: Vec<u8>,
    /// Whose each message is, by its number in the transaction.
    owners: Vec<Owner>,
    scratch: Scratch,
    first_seq: u32,
    /// The name of the tables that it writes the constant part of.
    table: &'static str,
    /// Elements count: sets that can are made so, and what an element counted is told when it goes.
    pub(super) counting: bool,
}

impl<Owner: Copy> Transaction<Owner> {
    /// An empty transaction; its messages are numbered from `first_seq`. `counting`: elements are to count.
    pub(crate) fn new(first_seq: u32, scratch: Scratch, counting: bool) -> Self {
        let (buffer, owners) = (Vec::new(), Vec::new());
        let mut transaction = Self { buffer, owners, scratch, first_seq, table: TABLE, counting };
        transaction.frame(sys::nftnl_batch_begin);
        transaction
    }

    /// The constant part goes into tables of this name, in place of ours.
    pub(super) fn into_tables(self, table: &'static str) -> Self {
        Self { table, ..self }
    }

    /// The table of a family.
    pub(super) fn table(&self, family: Family) -> Table {
        Table::new(c_name(self.table), protocol_family(family))
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Messages so far.
    pub(crate) fn messages(&self) -> usize {
        self.owners.len()
    }

    /// Whose the message with this sequence number is.
    pub(crate) fn owner(&self, seq: u32) -> Option<Owner> {
        // The first number is the frame's own.
        let index = seq.wrapping_sub(self.first_seq).checked_sub(1)?;
        self.owners.get(index as usize).copied()
    }

    /// Ends the transaction: without its end, the kernel checks it and takes nothing of it.
    pub(crate) fn finish(&mut self) {
        self.frame(sys::nftnl_batch_end);
    }

    /// Its bytes, and the first sequence number behind it.
    pub(crate) fn bytes(&self) -> (&[u8], u32) {
        (&self.buffer, self.next_seq().wrapping_add(1))
    }

    /// Hands the buffer of single messages over to the next transaction.
    pub(crate) fn release(&mut self) -> Scratch {
        std::mem::take(&mut self.scratch)
    }

    fn next_seq(&self) -> u32 {
        self.first_seq.wrapping_add(1).wrapping_add(self.owners.len() as u32)
    }

    fn frame(&mut self, build: unsafe extern "C" fn(*mut libc::c_char, u32) -> *mut libc::nlmsghdr) {
        let seq = if self.buffer.is_empty() { self.first_seq } else { self.next_seq() };
        // SAFETY: the scratch buffer has room for the largest message and is aligned for its header.
        unsafe { build(self.scratch.start(), seq) };
        self.take_scratch();
    }

    /// Appends the message in the scratch buffer.
    fn take_scratch(&mut self) {
        self.buffer.extend_from_slice(self.scratch.message());
        self.buffer.resize(self.buffer.len().next_multiple_of(4), 0);
    }

    /// Adds or deletes a table, chain or rule.
    pub(crate) fn object(&mut self, object: &impl NlMsg, change: MsgType, owner: Owner) {
        let seq = self.next_seq();
        // SAFETY: `write` asks for `nft_nlmsg_maxsize` bytes, which the scratch buffer has.
        unsafe { object.write(self.scratch.start(), seq, change) };
        // SAFETY: `write` has put a header there. The acknowledgement that `nftnl` asks for would be one reply a
        // message; refusals come without being asked for.
        unsafe {
            let header = self.scratch.start::<libc::nlmsghdr>();
            (*header).nlmsg_flags &= !(libc::NLM_F_ACK as u16);
        }
        self.owners.push(owner);
        self.take_scratch();
    }

    /// Creates a set or map; without effect where it exists with the same layout.
    pub(crate) fn set(&mut self, set: Set, family: Family, owner: Owner) {
        let raw = self.constant_set(&c_name(set.name()), family);
        raw.u32(sys::NFTNL_SET_FLAGS, set.flags());
        raw.u32(sys::NFTNL_SET_ID, set as u32 + 1);
        raw.u32(sys::NFTNL_SET_KEY_TYPE, type_of(set.key(), family));
        raw.u32(sys::NFTNL_SET_KEY_LEN, len_of(set.key(), family) as u32);
        if let Some(data) = set.data() {
            raw.u32(sys::NFTNL_SET_DATA_TYPE, type_of(data, family));
            raw.u32(sys::NFTNL_SET_DATA_LEN, len_of(data, family) as u32);
        }
        if let Some(size) = set.size() {
            raw.u32(sys::NFTNL_SET_DESC_SIZE, size);
        }
        if set.has_ranges() {
            let lengths: Vec<_> = set.key().iter().map(|field| field.len(family) as u8).collect();
            raw.bytes(sys::NFTNL_SET_DESC_CONCAT, &lengths);
        }
        raw.bytes(sys::NFTNL_SET_USERDATA, &set.userdata(family));
        if self.counting && set.counts() {
            raw.counter();
        }
        self.build_set(&raw, family, owner);
    }

    fn constant_set(&self, name: &CStr, family: Family) -> RawSet {
        let raw = RawSet::named(name, family);
        raw.text(sys::NFTNL_SET_TABLE, &c_name(self.table));
        raw
    }

    pub(super) fn build_set(&mut self, raw: &RawSet, family: Family, owner: Owner) {
        let header = self.header(libc::NFT_MSG_NEWSET, family, libc::NLM_F_CREATE);
        // SAFETY: `header` starts the scratch buffer, which has room for the largest message.
        unsafe { sys::nftnl_set_nlmsg_build_payload(header, raw.0.as_ptr()) };
        self.owners.push(owner);
        self.take_scratch();
    }

    /// Removes all rules of a chain.
    pub(super) fn empty_chain(&mut self, name: &str, family: Family, owner: Owner) {
        let table = self.table(family);
        // A rule without a handle stands for all of the chain.
        self.object(&Rule::new(&nftnl::Chain::new(c_name(name), &table)), MsgType::Del, owner);
    }

    pub(super) fn delete_chain(&mut self, name: &str, family: Family, owner: Owner) {
        let table = table(family);
        self.object(&nftnl::Chain::new(c_name(name), &table), MsgType::Del, owner);
    }

    /// Adds the rules of a chain, in place of all that it has. With the first rule that needs it comes an anonymous
    /// set.
    pub(crate) fn rules(&mut self, chain: &nftnl::Chain<'_>, spec: &Chain, family: Family, owner: Owner) {
        self.empty_chain(&spec.name, family, owner);
        for expressions in &spec.rules {
            let fingerprint = Fingerprint::of(chain, expressions, &mut self.scratch);
            let needs_protocols = |e: &Expr| matches!(e, Expr::Lookup { set: LookupIn::Protocols, .. });
            let anonymous_set = ANONYMOUS_SETS + self.messages() as u32;
            if expressions.iter().any(needs_protocols) {
                self.protocols(anonymous_set, family, owner);
            }
            let start = self.buffer.len();
            self.object(&rule(chain, expressions, anonymous_set), MsgType::Add, owner);
            self.buffer.extend(fingerprint.attribute());
            let len = (self.buffer.len() - start) as u32;
            self.buffer[start..][..size_of::<u32>()].copy_from_slice(&len.to_ne_bytes());
        }
    }

    /// The anonymous set `{ tcp, udp, sctp }` for the rule that comes next.
    fn protocols(&mut self, id: u32, family: Family, owner: Owner) {
        let members = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        let raw = self.constant_set(ANONYMOUS_SET, family);
        raw.u32(sys::NFTNL_SET_FLAGS, (libc::NFT_SET_ANONYMOUS | libc::NFT_SET_CONSTANT) as u32);
        raw.u32(sys::NFTNL_SET_ID, id);
        raw.u32(sys::NFTNL_SET_KEY_TYPE, type_of(&[Field::Protocol], family));
        raw.u32(sys::NFTNL_SET_KEY_LEN, 1);
        raw.u32(sys::NFTNL_SET_DESC_SIZE, members.len() as u32);
        raw.bytes(sys::NFTNL_SET_USERDATA, &protocols_userdata());
        self.build_set(&raw, family, owner);
        for protocol in members {
            raw.add(RawElement::new(&[protocol.number()]));
        }
        self.build_elements(libc::NFT_MSG_NEWSETELEM, &raw, family, owner);
    }

    /// Adds elements, all of one set.
    pub(crate) fn add<'a>(
        &mut self,
        set: Set,
        family: Family,
        elements: impl Iterator<Item = &'a Element>,
        owner: Owner,
    ) {
        let raw = RawSet::new(set.name(), family);
        for element in elements {
            let added = RawElement::of(&element.place.key);
            if let Some(data) = element.data {
                added.data(data);
            }
            if let Some(comment) = &element.comment {
                added.comment(comment);
            }
            raw.add(added);
        }
        self.build_elements(libc::NFT_MSG_NEWSETELEM, &raw, family, owner);
    }

    /// Removes elements, all of one set. The kernel tells what they had counted.
    pub(crate) fn remove<'a>(
        &mut self,
        set: Set,
        family: Family,
        places: impl Iterator<Item = &'a Place>,
        owner: Owner,
    ) {
        let raw = RawSet::new(set.name(), family);
        for place in places {
            raw.add(RawElement::of(&place.key));
        }
        let flags = if self.counting && set.counts() { libc::NLM_F_ECHO } else { 0 };
        self.build_elements_with(libc::NFT_MSG_DELSETELEM, flags, &raw, family, owner);
    }

    pub(super) fn build_elements(&mut self, kind: i32, raw: &RawSet, family: Family, owner: Owner) {
        let flags = if kind == libc::NFT_MSG_NEWSETELEM { libc::NLM_F_CREATE | libc::NLM_F_EXCL } else { 0 };
        self.build_elements_with(kind, flags, raw, family, owner);
    }

    pub(super) fn build_elements_with(
        &mut self,
        kind: i32,
        flags: i32,
        raw: &RawSet,
        family: Family,
        owner: Owner,
    ) {
        let header = self.header(kind, family, flags);
        // SAFETY: as in `build_set`; the number of elements is bounded so that they fit.
        unsafe { sys::nftnl_set_elems_nlmsg_build_payload(header, raw.0.as_ptr()) };
        self.owners.push(owner);
        self.take_scratch();
    }

    /// Asks the kernel to remove a set or map, or (`NFT_MSG_DELSETELEM`) all that is in it; where elements count, it
    /// tells what these had counted.
    pub(super) fn whole_set(&mut self, kind: i32, name: &str, family: Family, owner: Owner) {
        let echo = self.counting && kind == libc::NFT_MSG_DELSETELEM;
        let header = self.header(kind, family, if echo { libc::NLM_F_ECHO } else { 0 });
        let raw = RawSet::new(name, family);
        // SAFETY: as in `build_set`.
        unsafe { sys::nftnl_set_nlmsg_build_payload(header, raw.0.as_ptr()) };
        self.owners.push(owner);
        self.take_scratch();
    }

    fn header(&mut self, kind: i32, family: Family, flags: i32) -> *mut libc::nlmsghdr {
        let seq = self.next_seq();
        // SAFETY: the scratch buffer has room for the largest message and is aligned for its header.
        unsafe {
            sys::nftnl_nlmsg_build_hdr(
                self.scratch.start(),
                kind as u16,
                protocol_family(family) as u16,
                flags as u16,
                seq,
            )
        }
    }
}

/// The table of a family.
pub(crate) fn table(family: Family) -> Table {
    Table::new(c_name(TABLE), protocol_family(family))
}

/// nftables' number of a family.
pub(crate) fn protocol_family(family: Family) -> ProtoFamily {
    match family {
        Family::V4 => ProtoFamily::Ipv4,
        Family::V6 => ProtoFamily::Ipv6,
    }
}

/// A comment of at most 127 bytes as `nft` has it in userdata, be it an element's or a table's.
pub(super) fn comment(text: &str) -> Vec<u8> {
    let mut userdata = Vec::with_capacity(text.len() + 3);
    userdata.extend([COMMENT_UDATA, (text.len() + 1) as u8]);
    userdata.extend_from_slice(text.as_bytes());
    userdata.push(0);
    userdata
}

/// What a request asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted<'a> {
    /// All sets of the table.
    Sets,
    /// All rules of a chain.
    Rules(&'a str),
    /// All elements of a set.
    Elements(&'a str),
    /// The elements of a set under these keys, at most [`ELEMENTS_PER_MESSAGE`].
    These(&'a str, &'a [Key]),
}

/// A request: its bytes.
pub(crate) fn request(wanted: Wanted<'_>, family: Family, seq: u32, scratch: &mut Scratch) -> Vec<u8> {
    /// `NFTA_RULE_TABLE`, `NFTA_RULE_CHAIN`.
    const RULE_TABLE: u16 = 1;
    const RULE_CHAIN: u16 = 2;
    const DUMP: i32 = libc::NLM_F_DUMP;
    let mut transaction = Transaction::<()>::new(seq, std::mem::take(scratch), false);
    transaction.buffer.clear();
    let (kind, flags, raw) = match wanted {
        Wanted::Sets => (libc::NFT_MSG_GETSET, DUMP, RawSet::all(family)),
        Wanted::Rules(_) => (libc::NFT_MSG_GETRULE, DUMP, RawSet::all(family)),
        Wanted::Elements(set) => (libc::NFT_MSG_GETSETELEM, DUMP, RawSet::new(set, family)),
        Wanted::These(set, keys) => {
            let raw = RawSet::new(set, family);
            keys.iter().for_each(|key| raw.add(RawElement::of(key)));
            (libc::NFT_MSG_GETSETELEM, libc::NLM_F_ACK, raw)
        }
    };
    let header = transaction.header(kind, family, flags);
    // SAFETY: as in `Transaction::build_set`; the names outlive the calls.
    unsafe {
        (*header).nlmsg_seq = seq;
        match wanted {
            Wanted::Sets => sys::nftnl_set_nlmsg_build_payload(header, raw.0.as_ptr()),
            Wanted::Rules(chain) => {
                let (table, chain) = (c_name(TABLE), c_name(chain));
                mnl_attr_put_strz(header, RULE_TABLE, table.as_ptr());
                mnl_attr_put_strz(header, RULE_CHAIN, chain.as_ptr());
            }
            Wanted::Elements(_) | Wanted::These(..) => {
                sys::nftnl_set_elems_nlmsg_build_payload(header, raw.0.as_ptr());
            }
        }
    }
    transaction.take_scratch();
    *scratch = transaction.release();
    transaction.buffer
}

/// Requests for one element each, numbered from `seq` on: a request for several ends at the first that is not there.
pub(crate) fn questions(places: &[Place], seq: u32, scratch: &mut Scratch) -> Vec<u8> {
    /// Offsets of `nlmsg_flags` and of `nlmsg_seq` in `struct nlmsghdr`.
    const FLAGS: usize = 6;
    const SEQ: usize = 8;
    let (mut bytes, mut patterns) = (Vec::new(), BTreeMap::new());
    for (place, i) in places.iter().zip(0..) {
        let pattern = patterns.entry((place.family, place.set)).or_insert_with(|| {
            let key = slice::from_ref(&place.key);
            let mut pattern = request(Wanted::These(place.set.name(), key), place.family, 0, scratch);
            // The element is answer enough.
            pattern[FLAGS..SEQ].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
            pattern
        });
        // They differ in their numbers, and in the keys that they end with.
        let key = place.key.as_bytes();
        let behind = pattern.len();
        pattern[SEQ..][..size_of::<u32>()].copy_from_slice(&seq.wrapping_add(i).to_ne_bytes());
        pattern[behind - key.len()..].copy_from_slice(key);
        bytes.extend_from_slice(pattern);
    }
    bytes
}

/// An owned `nftnl_set`; the elements added to it are freed with it.
pub(super) struct RawSet(NonNull<sys::nftnl_set>);

impl RawSet {
    pub(super) fn alloc() -> Self {
        // SAFETY: no preconditions; the result is checked for null.
        match NonNull::new(unsafe { sys::nftnl_set_alloc() }) {
            Some(set) => Self(set),
            // Memory ran out; see `expr::Builder::new`.
            None => std::process::abort(),
        }
    }

    fn all(family: Family) -> Self {
        let set = Self::alloc();
        set.u32(sys::NFTNL_SET_FAMILY, protocol_family(family) as u32);
        set.text(sys::NFTNL_SET_TABLE, &c_name(TABLE));
        set
    }

    fn named(name: &CStr, family: Family) -> Self {
        let set = Self::all(family);
        set.text(sys::NFTNL_SET_NAME, name);
        set
    }

    pub(super) fn new(name: &str, family: Family) -> Self {
        Self::named(&c_name(name), family)
    }

    pub(super) fn u32(&self, attribute: u32, value: u32) {
        // SAFETY: the set is valid.
        unsafe { sys::nftnl_set_set_u32(self.0.as_ptr(), attribute as u16, value) };
    }

    fn text(&self, attribute: u32, value: &CStr) {
        // SAFETY: the set is valid; libnftnl copies the string.
        unsafe { sys::nftnl_set_set_str(self.0.as_ptr(), attribute as u16, value.as_ptr()) };
    }

    pub(super) fn bytes(&self, attribute: u32, value: &[u8]) {
        // SAFETY: the set is valid; libnftnl copies the bytes.
        unsafe {
            sys::nftnl_set_set_data(
                self.0.as_ptr(),
                attribute as u16,
                value.as_ptr().cast(),
                value.len() as u32,
            );
        }
    }

    /// Makes each of its elements count the packets that find it.
    pub(super) fn counter(&self) {
        // SAFETY: both are valid; the set owns the expression from here on, which libnftnl takes as it is, whatever its
        // length.
        unsafe {
            sys::nftnl_set_set_data(
                self.0.as_ptr(),
                sys::NFTNL_SET_EXPR as u16,
                counter().as_ptr().cast_const().cast(),
                0,
            );
        }
    }

    /// The set itself, for as long as this lives.
    pub(super) fn as_ptr(&self) -> *mut sys::nftnl_set {
        self.0.as_ptr()
    }

    pub(super) fn add(&self, element: RawElement) {
        // SAFETY: both are valid; the set owns the element from here on.
        unsafe { sys::nftnl_set_elem_add(self.0.as_ptr(), element.0.as_ptr()) };
    }
}

impl Drop for RawSet {
    fn drop(&mut self) {
        // SAFETY: allocated by `alloc`, freed once.
        unsafe { sys::nftnl_set_free(self.0.as_ptr()) };
    }
}

/// A `nftnl_set_elem` on its way into a set, which frees it.
pub(super) struct RawElement(NonNull<sys::nftnl_set_elem>);

impl RawElement {
    fn new(key: &[u8]) -> Self {
        // SAFETY: no preconditions; the result is checked for null.
        let element = match NonNull::new(unsafe { sys::nftnl_set_elem_alloc() }) {
            Some(element) => Self(element),
            // Memory ran out; see `expr::Builder::new`.
            None => std::process::abort(),
        };
        element.bytes(sys::NFTNL_SET_ELEM_KEY, key);
        element
    }

    pub(super) fn of(key: &Key) -> Self {
        let element = Self::new(key.as_bytes());
        if let Some(last) = key.last() {
            element.bytes(sys::NFTNL_SET_ELEM_KEY_END, &last);
        }
        if key.interval_end {
            // SAFETY: the element is valid.
            unsafe {
                sys::nftnl_set_elem_set_u32(
                    element.0.as_ptr(),
                    sys::NFTNL_SET_ELEM_FLAGS as u16,
                    libc::NFT_SET_ELEM_INTERVAL_END as u32,
                );
            }
        }
        element
    }

    pub(super) fn bytes(&self, attribute: u32, value: &[u8]) {
        // SAFETY: the element is valid; libnftnl copies the bytes.
        unsafe {
            sys::nftnl_set_elem_set(
                self.0.as_ptr(),
                attribute as u16,
                value.as_ptr().cast(),
                value.len() as u32,
            );
        }
    }

    /// What it maps to.
    fn data(&self, data: Data) {
        self.bytes(sys::NFTNL_SET_ELEM_DATA, data.as_bytes());
    }

    /// At most 127 bytes, as [`super::element::comment`] makes them.
    fn comment(&self, text: &str) {
        self.bytes(sys::NFTNL_SET_ELEM_USERDATA, &comment(text));
    }
}
