//! Where libnftnl writes one message.
//!
//! Owns the memory. Never decides what is written there, nor who reads it.

use std::slice;

use nftnl::nft_nlmsg_maxsize;

/// Room for the largest message, aligned for `nlmsghdr`. Allocated when it is first written to; handed on from one
/// transaction to the next, since it is far larger than what most of them write.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Box<[u64]>);

impl Scratch {
    /// The beginning; nothing is written to more than `nft_nlmsg_maxsize` bytes from here.
    pub(super) fn start<T>(&mut self) -> *mut T {
        if self.0.is_empty() {
            self.0 = vec![0; (nft_nlmsg_maxsize() as usize).div_ceil(size_of::<u64>())].into();
        }
        self.0.as_mut_ptr().cast()
    }

    /// The message that was written last.
    pub(super) fn message(&mut self) -> &mut [u8] {
        let room = self.0.len() * size_of::<u64>();
        // SAFETY: any bytes make valid `u64`s and the other way round; the length is the same memory's.
        let bytes = unsafe { slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<u8>(), room) };
        let len = bytes.first_chunk().map_or(0, |len| u32::from_ne_bytes(*len) as usize);
        &mut bytes[..len.min(room)]
    }
}
