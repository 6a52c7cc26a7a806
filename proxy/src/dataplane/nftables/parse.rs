//! What the kernel says of sets and their elements, parsed by libnftnl.
//!
//! Owns the unsafe calls that parse set messages. Never decides what is asked, nor what it means.

use std::ffi::CStr;

use nftnl::nftnl_sys::{self as sys, libc};

use super::element::{Data, Key};
use super::message::{COMMENT_UDATA, RawSet, protocol_family};
use super::schema::{TABLE, address_len};
use crate::model::input::Family;

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
    /// Its elements count the packets that find them.
    pub(crate) counts: bool,
}

/// Parses one message of a dump of sets; only those of our table.
pub(crate) fn parse_set(message: &[u8]) -> Option<SetInfo> {
    let raw = RawSet::alloc();
    let header = aligned_header(message)?;
    // SAFETY: `message` holds a whole netlink message, which `aligned_header` has checked.
    if unsafe { sys::nftnl_set_nlmsg_parse(header, raw.as_ptr()) } < 0 {
        return None;
    }
    let text = |attribute: u32| {
        // SAFETY: libnftnl yields null or a C string that lives as long as the set.
        unsafe {
            let text = sys::nftnl_set_get_str(raw.as_ptr(), attribute as u16);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    // SAFETY: the set is valid; an attribute that is not there reads as 0.
    let number = |attribute: u32| unsafe { sys::nftnl_set_get_u32(raw.as_ptr(), attribute as u16) };
    (text(sys::NFTNL_SET_TABLE)? == TABLE).then_some(())?;
    Some(SetInfo {
        name: text(sys::NFTNL_SET_NAME)?,
        flags: number(sys::NFTNL_SET_FLAGS),
        key_len: number(sys::NFTNL_SET_KEY_LEN),
        data_len: number(sys::NFTNL_SET_DATA_LEN),
        // SAFETY: the set is valid.
        counts: unsafe { sys::nftnl_set_is_set(raw.as_ptr(), sys::NFTNL_SET_EXPR as u16) },
    })
}

/// An element as the kernel says it.
pub(crate) struct Held<'a> {
    /// Of which table, and the name of its set.
    pub(crate) family: Family,
    pub(crate) set: &'a str,
    /// Its key; `None` where it is longer than any of ours (somebody else's doing).
    pub(crate) key: Option<Key>,
    /// What it maps to, likewise.
    pub(crate) data: Option<Data>,
    /// Its comment.
    pub(crate) comment: Option<&'a [u8]>,
    /// How many packets have found it; 0 where it does not count.
    pub(crate) packets: u64,
}

/// Parses a message about elements, and calls `each` with every one.
pub(crate) fn parse_elements(message: &[u8], mut each: impl FnMut(Held<'_>)) {
    let raw = RawSet::alloc();
    let Some(header) = aligned_header(message) else { return };
    // SAFETY: as in `parse_set`.
    if unsafe { sys::nftnl_set_elems_nlmsg_parse(header, raw.as_ptr()) } < 0 {
        return;
    }
    // SAFETY: the iterator lives no longer than the set; what `get` yields is copied or used before either goes.
    unsafe {
        let family = sys::nftnl_set_get_u32(raw.as_ptr(), sys::NFTNL_SET_FAMILY as u16);
        let is_it = |candidate: &Family| protocol_family(*candidate) as u32 == family;
        let Some(family) = Family::ALL.into_iter().find(is_it) else { return };
        let set = sys::nftnl_set_get_str(raw.as_ptr(), sys::NFTNL_SET_NAME as u16);
        let set = if set.is_null() { "" } else { CStr::from_ptr(set).to_str().unwrap_or_default() };
        // Only addresses come in ranges.
        let tail = address_len(family);
        let elements = sys::nftnl_set_elems_iter_create(raw.as_ptr());
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
            let key = get(sys::NFTNL_SET_ELEM_KEY).and_then(|key| Key::from_kernel(key, last, tail, end));
            let data = get(sys::NFTNL_SET_ELEM_DATA).and_then(Data::from_kernel);
            let comment = get(sys::NFTNL_SET_ELEM_USERDATA).and_then(comment_of);
            let mut len = 0u32;
            let counter = sys::nftnl_set_elem_get(element, sys::NFTNL_SET_ELEM_EXPR as u16, &mut len);
            let counter = counter.cast::<sys::nftnl_expr>();
            let packets = if counter.is_null() {
                0
            } else {
                sys::nftnl_expr_get_u64(counter, sys::NFTNL_EXPR_CTR_PACKETS as u16)
            };
            each(Held { family, set, key, data, comment, packets });
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
