//! Netlink messages of one transaction, built by libnftnl.
//!
//! Owns the unsafe calls that build and parse set messages. Never decides what a transaction contains, never sends.

use std::ffi::CStr;
use std::ptr::NonNull;
use std::time::Duration;

use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{MsgType, NlMsg, ProtoFamily, Rule, Table, nft_nlmsg_maxsize};

use super::element::{Data, Element, Key, Place};
use super::expr::{ANONYMOUS_SET, Expr, InRule, LookupIn, c_name};
use super::rules::Chain;
use super::schema::{Field, Set, TABLE, len_of, protocols_userdata, type_of};
use crate::model::input::{Family, Protocol};

/// Elements in one message: an element is at most some 250 bytes, and the attribute that holds them all says its
/// length in 16 bits.
pub(crate) const ELEMENTS_PER_MESSAGE: usize = 200;

/// Where the numbers of anonymous sets begin; those of named sets are below. Each ties a set to the rule that is sent
/// after it. No set of a batch may have another's: where two do, which one a rule gets depends on the kernel.
const ANONYMOUS_SETS: u32 = 0x1_0000;

/// Type, length, value of a comment (`NFTNL_UDATA_SET_ELEM_COMMENT`).
const COMMENT_UDATA: u8 = 0;

/// The messages of one transaction: all of it takes effect, or nothing.
pub(crate) struct Transaction<Owner> {
    buffer: Vec<u8>,
    /// Whose each message is, by its number in the transaction.
    owners: Vec<Owner>,
    scratch: Scratch,
    first_seq: u32,
}

/// Where libnftnl writes one message: room for the largest, aligned for `nlmsghdr`. Allocated when it is first written
/// to; handed on from one transaction to the next, since it is far larger than what most of them write.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Box<[u64]>);

impl Scratch {
    fn start<T>(&mut self) -> *mut T {
        if self.0.is_empty() {
            self.0 = vec![0; (nft_nlmsg_maxsize() as usize).div_ceil(size_of::<u64>())].into();
        }
        self.0.as_mut_ptr().cast()
    }
}

impl<Owner: Copy> Transaction<Owner> {
    /// An empty transaction; its messages are numbered from `first_seq`.
    pub(crate) fn new(first_seq: u32, scratch: Scratch) -> Self {
        let mut transaction = Self { buffer: Vec::new(), owners: Vec::new(), scratch, first_seq };
        transaction.frame(sys::nftnl_batch_begin);
        transaction
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

    /// Ends the transaction; yields its bytes and the first sequence number behind it.
    pub(crate) fn finish(&mut self) -> (&[u8], u32) {
        self.frame(sys::nftnl_batch_end);
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
        // SAFETY: a message of `nlmsg_len` bytes, which libnftnl has just written, starts the scratch buffer; `u64`s
        // may be read as bytes.
        let message = unsafe {
            let start = self.scratch.0.as_ptr();
            let len = (*start.cast::<libc::nlmsghdr>()).nlmsg_len as usize;
            std::slice::from_raw_parts(start.cast::<u8>(), len.min(self.scratch.0.len() * size_of::<u64>()))
        };
        self.buffer.extend_from_slice(message);
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
        let raw = RawSet::new(set.name(), family);
        raw.u32(sys::NFTNL_SET_FLAGS, set.flags());
        raw.u32(sys::NFTNL_SET_ID, set as u32 + 1);
        raw.u32(sys::NFTNL_SET_KEY_TYPE, type_of(set.key(), family));
        raw.u32(sys::NFTNL_SET_KEY_LEN, len_of(set.key(), family) as u32);
        if let Some(data) = set.data() {
            raw.u32(sys::NFTNL_SET_DATA_TYPE, type_of(data, family));
            raw.u32(sys::NFTNL_SET_DATA_LEN, len_of(data, family) as u32);
        } else if set.has_verdicts() {
            raw.u32(sys::NFTNL_SET_DATA_TYPE, libc::NFT_DATA_VERDICT);
        }
        if set.has_ranges() {
            let lengths: Vec<_> = set.key().iter().map(|field| field.len(family) as u8).collect();
            raw.bytes(sys::NFTNL_SET_DESC_CONCAT, &lengths);
        }
        raw.bytes(sys::NFTNL_SET_USERDATA, &set.userdata(family));
        self.build_set(&raw, family, owner);
    }

    pub(super) fn build_set(&mut self, raw: &RawSet, family: Family, owner: Owner) {
        let header = self.header(libc::NFT_MSG_NEWSET, family, libc::NLM_F_CREATE);
        // SAFETY: `header` starts the scratch buffer, which has room for the largest message.
        unsafe { sys::nftnl_set_nlmsg_build_payload(header, raw.0.as_ptr()) };
        self.owners.push(owner);
        self.take_scratch();
    }

    /// Adds the rules of a chain, in place of all that it has. With the first rule that needs it comes an anonymous
    /// set.
    pub(crate) fn rules(&mut self, chain: &nftnl::Chain<'_>, spec: &Chain, family: Family, owner: Owner) {
        // A rule without a handle stands for all of the chain.
        self.object(&Rule::new(chain), MsgType::Del, owner);
        for expressions in &spec.rules {
            let needs_protocols = |e: &Expr| matches!(e, Expr::Lookup { set: LookupIn::Protocols, .. });
            let anonymous_set = ANONYMOUS_SETS + self.messages() as u32;
            if expressions.iter().any(needs_protocols) {
                self.protocols(anonymous_set, family, owner);
            }
            let mut rule = Rule::new(chain);
            for expression in expressions {
                rule.add_expr(&InRule { expression, anonymous_set });
            }
            self.object(&rule, MsgType::Add, owner);
        }
    }

    /// The anonymous set `{ tcp, udp, sctp }` for the rule that comes next.
    fn protocols(&mut self, id: u32, family: Family, owner: Owner) {
        let members = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        let raw = RawSet::named(ANONYMOUS_SET, family);
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
            if let Some(data) = &element.data {
                added.data(data);
            }
            if let Some(comment) = &element.comment {
                added.comment(comment);
            }
            raw.add(added);
        }
        self.build_elements(libc::NFT_MSG_NEWSETELEM, &raw, family, owner);
    }

    /// Removes elements, all of one set.
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
        self.build_elements(libc::NFT_MSG_DELSETELEM, &raw, family, owner);
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

    /// Asks the kernel to remove a set or map, or (`NFT_MSG_DELSETELEM`) all that is in it.
    pub(super) fn whole_set(&mut self, kind: i32, name: &str, family: Family, owner: Owner) {
        let header = self.header(kind, family, 0);
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

/// A request for all sets of a table, or for all elements of one: its bytes.
pub(crate) fn dump_request(kind: i32, family: Family, set: Option<&str>, seq: u32) -> Vec<u8> {
    let mut transaction = Transaction::<()>::new(seq, Scratch::default());
    transaction.buffer.clear();
    let header = transaction.header(kind, family, libc::NLM_F_DUMP);
    let raw = match set {
        Some(set) => RawSet::new(set, family),
        None => RawSet::all(family),
    };
    // SAFETY: as in `Transaction::build_set`.
    unsafe {
        (*header).nlmsg_seq = seq;
        match set {
            Some(_) => sys::nftnl_set_elems_nlmsg_build_payload(header, raw.0.as_ptr()),
            None => sys::nftnl_set_nlmsg_build_payload(header, raw.0.as_ptr()),
        }
    }
    transaction.take_scratch();
    transaction.buffer
}

/// What the kernel says of a set: its name, flags, and the lengths of its key and data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SetInfo {
    /// Its name.
    pub(crate) name: String,
    /// `NFT_SET_*`.
    pub(crate) flags: u32,
    /// Bytes of a key.
    pub(crate) key_len: u32,
    /// Bytes of data; 0 for a set.
    pub(crate) data_len: u32,
}

/// Parses one message of a dump of sets; only those of our table.
pub(crate) fn parse_set(message: &[u8]) -> Option<SetInfo> {
    let raw = RawSet::alloc();
    let header = aligned_header(message)?;
    // SAFETY: `message` holds a whole netlink message, which `aligned_header` has checked.
    if unsafe { sys::nftnl_set_nlmsg_parse(header, raw.0.as_ptr()) } < 0 {
        return None;
    }
    let text = |attribute: u32| {
        // SAFETY: libnftnl yields null or a C string that lives as long as the set.
        unsafe {
            let text = sys::nftnl_set_get_str(raw.0.as_ptr(), attribute as u16);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    // SAFETY: the set is valid; an attribute that is not there reads as 0.
    let number = |attribute: u32| unsafe { sys::nftnl_set_get_u32(raw.0.as_ptr(), attribute as u16) };
    (text(sys::NFTNL_SET_TABLE)? == TABLE).then_some(())?;
    Some(SetInfo {
        name: text(sys::NFTNL_SET_NAME)?,
        flags: number(sys::NFTNL_SET_FLAGS),
        key_len: number(sys::NFTNL_SET_KEY_LEN),
        data_len: number(sys::NFTNL_SET_DATA_LEN),
    })
}

/// An element as the kernel says it.
pub(crate) struct Held<'a> {
    /// Its key; `None` where it is longer than any of ours (somebody else's doing).
    pub(crate) key: Option<Key>,
    /// What it maps to, likewise.
    pub(crate) data: Option<Data>,
    /// Its comment.
    pub(crate) comment: Option<&'a [u8]>,
    /// For how long it lives after it was added or refreshed; zero: for ever.
    pub(crate) timeout: Duration,
    /// How long from now it lives.
    pub(crate) expires: Duration,
}

/// Parses one message of a dump of elements, and calls `each` with every one.
pub(crate) fn parse_elements(message: &[u8], mut each: impl FnMut(Held<'_>)) {
    let raw = RawSet::alloc();
    let Some(header) = aligned_header(message) else { return };
    // SAFETY: as in `parse_set`.
    if unsafe { sys::nftnl_set_elems_nlmsg_parse(header, raw.0.as_ptr()) } < 0 {
        return;
    }
    // SAFETY: the iterator lives no longer than the set; what `get` yields is copied or used before either goes.
    unsafe {
        let elements = sys::nftnl_set_elems_iter_create(raw.0.as_ptr());
        if elements.is_null() {
            return;
        }
        loop {
            let element = sys::nftnl_set_elems_iter_next(elements);
            if element.is_null() {
                break;
            }
            let get = |attribute: u32| {
                let mut len = 0u32;
                let start = sys::nftnl_set_elem_get(element, attribute as u16, &mut len).cast::<u8>();
                (!start.is_null()).then(|| std::slice::from_raw_parts(start, len as usize))
            };
            // `nftnl_set_elem_get_u32` would read through null where an element has no flags.
            let flags = get(sys::NFTNL_SET_ELEM_FLAGS).and_then(|flags| flags.first_chunk());
            let flags = flags.map_or(0, |flags| u32::from_ne_bytes(*flags));
            let end = flags & libc::NFT_SET_ELEM_INTERVAL_END as u32 != 0;
            let last = get(sys::NFTNL_SET_ELEM_KEY_END);
            let key = get(sys::NFTNL_SET_ELEM_KEY).and_then(|key| Key::from_kernel(key, last, end));
            let verdict = || {
                let code = get(sys::NFTNL_SET_ELEM_VERDICT)?.first_chunk().map(|c| i32::from_ne_bytes(*c))?;
                let chain = sys::nftnl_set_elem_get_str(element, sys::NFTNL_SET_ELEM_CHAIN as u16);
                let chain = (!chain.is_null()).then(|| CStr::from_ptr(chain).to_string_lossy().into())?;
                Some(if code == libc::NFT_JUMP { Data::Jump(chain) } else { Data::Goto(chain) })
            };
            let data = get(sys::NFTNL_SET_ELEM_DATA).and_then(Data::from_kernel).or_else(verdict);
            let comment = get(sys::NFTNL_SET_ELEM_USERDATA).and_then(comment_of);
            let duration = |attribute: u32| {
                let bytes = get(attribute).and_then(|bytes| bytes.first_chunk());
                bytes.map_or(Duration::ZERO, |bytes| Duration::from_millis(u64::from_ne_bytes(*bytes)))
            };
            let (timeout, expires) =
                (duration(sys::NFTNL_SET_ELEM_TIMEOUT), duration(sys::NFTNL_SET_ELEM_EXPIRATION));
            each(Held { key, data, comment, timeout, expires });
        }
        sys::nftnl_set_elems_iter_destroy(elements);
    }
}

/// The text in an element's user data, without its NUL.
fn comment_of(userdata: &[u8]) -> Option<&[u8]> {
    match userdata {
        [COMMENT_UDATA, len, text @ ..] => text.get(..usize::from(*len).checked_sub(1)?),
        _ => None,
    }
}

/// The header of a message, where the message is whole and aligned as libmnl needs it.
fn aligned_header(message: &[u8]) -> Option<*const libc::nlmsghdr> {
    let header = message.as_ptr().cast::<libc::nlmsghdr>();
    if !header.is_aligned() || message.len() < size_of::<libc::nlmsghdr>() {
        return None;
    }
    // SAFETY: aligned, and the slice is long enough for a header.
    let len = unsafe { (*header).nlmsg_len } as usize;
    (len <= message.len()).then_some(header)
}

/// An owned `nftnl_set`; the elements added to it are freed with it.
pub(super) struct RawSet(NonNull<sys::nftnl_set>);

impl RawSet {
    fn alloc() -> Self {
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
        if key.is_range() {
            element.bytes(sys::NFTNL_SET_ELEM_KEY_END, key.last().as_bytes());
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
    pub(super) fn data(&self, data: &Data) {
        let (code, chain) = match data {
            Data::Jump(chain) => (libc::NFT_JUMP, chain),
            Data::Goto(chain) => (libc::NFT_GOTO, chain),
            Data::Backend(..) => {
                return self.bytes(sys::NFTNL_SET_ELEM_DATA, data.as_bytes().unwrap_or_default());
            }
        };
        let element = self.0.as_ptr();
        // SAFETY: the element is valid; libnftnl copies the string.
        unsafe {
            sys::nftnl_set_elem_set_u32(element, sys::NFTNL_SET_ELEM_VERDICT as u16, code as u32);
            sys::nftnl_set_elem_set_str(element, sys::NFTNL_SET_ELEM_CHAIN as u16, c_name(chain).as_ptr());
        }
    }

    /// How long it lives when added, and from now.
    pub(super) fn lifetime(&self, timeout: Duration, expires: Duration) {
        let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        // SAFETY: the element is valid.
        unsafe {
            let set = |attribute: u32, value| {
                sys::nftnl_set_elem_set_u64(self.0.as_ptr(), attribute as u16, value);
            };
            set(sys::NFTNL_SET_ELEM_TIMEOUT, milliseconds(timeout));
            set(sys::NFTNL_SET_ELEM_EXPIRATION, milliseconds(expires));
        }
    }

    /// At most 127 bytes, as [`super::element::comment`] makes them.
    fn comment(&self, text: &str) {
        let mut userdata = Vec::with_capacity(text.len() + 3);
        userdata.extend([COMMENT_UDATA, (text.len() + 1) as u8]);
        userdata.extend_from_slice(text.as_bytes());
        userdata.push(0);
        self.bytes(sys::NFTNL_SET_ELEM_USERDATA, &userdata);
    }
}
