//! What all netlink sockets of ours share: messages and attributes taken apart, socket options.
//!
//! Owns no socket and no meaning.

use std::io;
use std::os::fd::RawFd;

use nix::errno::Errno;

/// The size of `struct nlmsghdr`.
pub(crate) const HEADER: usize = size_of::<libc::nlmsghdr>();

/// A message's header.
pub(crate) struct Header {
    /// `nlmsg_type`.
    pub(crate) kind: u16,
    /// `nlmsg_flags`.
    pub(crate) flags: u16,
    /// `nlmsg_seq`.
    pub(crate) seq: u32,
}

impl Header {
    /// Reads the header of a message.
    pub(crate) fn of(message: &[u8]) -> Option<Self> {
        let u16_at = |at: usize| message.get(at..)?.first_chunk().map(|b| u16::from_ne_bytes(*b));
        let seq = message.get(8..)?.first_chunk().map(|b| u32::from_ne_bytes(*b))?;
        Some(Self { kind: u16_at(4)?, flags: u16_at(6)?, seq })
    }
}

/// Calls `each` with every message in the bytes of one read.
pub(crate) fn messages(mut bytes: &[u8], mut each: impl FnMut(&[u8])) {
    while let Some(len) = bytes.first_chunk().map(|len| u32::from_ne_bytes(*len) as usize) {
        let Some(message) = bytes.get(..len).filter(|_| len >= HEADER) else { return };
        each(message);
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
}

/// The value of the first attribute of this kind.
pub(crate) fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    /// `NLA_TYPE_MASK`.
    const TYPE_MASK: u16 = 0x3fff;
    loop {
        let len = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let found = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & TYPE_MASK;
        let value = bytes.get(4..len)?;
        if found == kind {
            return Some(value);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
}

/// Sets an integer option of a socket.
pub(crate) fn set_option(
    fd: RawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: `value` is an integer, as these options want it, and outlives the call.
    let result = unsafe {
        libc::setsockopt(
            fd,
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop).map_err(io::Error::from)
}
