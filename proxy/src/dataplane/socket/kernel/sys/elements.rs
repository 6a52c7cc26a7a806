//! Elements of hash maps: one that is looked up and removed in one, and many by each call. A call costs more than what
//! it does with an element.
//!
//! Decides nothing. Calls for many elements came with Linux 5.6, before others that the layer cannot do without.

use std::io;
use std::os::fd::BorrowedFd;

use aya::Pod;
use nix::libc;

use super::{Attribute, Element, RawDescriptor, bpf, command, element, raw};

/// How many elements a call reads, unless a bucket of the map has more.
const MANY: usize = 1 << 12;

/// `BPF_MAP_*_BATCH`.
#[repr(C)]
struct Batch {
    /// Where the call before ended, and where this one did: a bucket of the map. 0: at the first.
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: RawDescriptor,
    element_flags: u64,
    flags: u64,
}

// SAFETY: see the struct; the functions below make the pointers, to memory for `count` elements and for a bucket.
unsafe impl Attribute for Batch {}

/// All elements of a hash map of which no value needs padding. What comes or goes meanwhile is among them or not.
pub(in super::super) fn all<K: Pod, V: Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    const { assert!(size_of::<V>().is_multiple_of(8)) };
    let (mut keys, mut values) = (Vec::<K>::with_capacity(MANY), Vec::<V>::with_capacity(MANY));
    let mut elements = Vec::new();
    let mut bucket = None;
    loop {
        let mut next = 0_u32;
        let mut attribute = Batch {
            from: bucket.as_ref().map_or(0, |bucket: &u32| (&raw const *bucket).addr() as u64),
            to: (&raw mut next).addr() as u64,
            keys: keys.as_mut_ptr().addr() as u64,
            values: values.as_mut_ptr().addr() as u64,
            count: u32::try_from(keys.capacity().min(values.capacity())).unwrap_or(u32::MAX),
            map: raw(map),
            element_flags: 0,
            flags: 0,
        };
        let result = bpf(command::MAP_LOOKUP_BATCH, &mut attribute);
        let ended = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                let twice = 2 * keys.capacity().max(values.capacity());
                (keys, values) = (Vec::with_capacity(twice), Vec::with_capacity(twice));
                continue;
            }
            Err(error) => return Err(error),
        };
        let count = attribute.count as usize;
        // SAFETY: the kernel has written so many of either, and any bytes make one (see `Pod`).
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        elements.extend(keys.drain(..).zip(values.drain(..)));
        if ended {
            return Ok(elements);
        }
        bucket = Some(next);
    }
}

/// Writes elements, whatever is there. After an error some of them are written.
pub(in super::super) fn put_all<K: Pod, V: Pod>(map: BorrowedFd<'_>, elements: &[(K, V)]) -> io::Result<()> {
    let (keys, values): (Vec<K>, Vec<V>) = elements.iter().copied().unzip();
    for (keys, values) in keys.chunks(MANY).zip(values.chunks(MANY)) {
        let mut attribute = Batch {
            from: 0,
            to: 0,
            keys: keys.as_ptr().addr() as u64,
            values: values.as_ptr().addr() as u64,
            count: keys.len() as u32,
            map: raw(map),
            element_flags: 0,
            flags: 0,
        };
        bpf(command::MAP_UPDATE_BATCH, &mut attribute)?;
    }
    Ok(())
}

/// Looks an element of a hash map up and removes it, in one: what a program writes before is in the answer, what it
/// writes after stays. `None` where there is none.
pub(in super::super) fn take<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, zero: V) -> io::Result<Option<V>> {
    let mut value = zero;
    let mut attribute = element(map, key, &raw mut value);
    match bpf(command::MAP_LOOKUP_AND_DELETE_ELEM, &mut attribute) {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes an element where there is none: what is there meanwhile stays.
pub(in super::super) fn put_back<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    mut value: V,
) -> io::Result<()> {
    /// `BPF_NOEXIST`.
    const ONLY_NEW: u64 = 1;
    let mut attribute = Element { flags: ONLY_NEW, ..element(map, key, &raw mut value) };
    match bpf(command::MAP_UPDATE_ELEM, &mut attribute) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other.map(drop),
    }
}
