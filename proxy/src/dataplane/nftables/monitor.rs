//! Notices that somebody else changed our tables: `nft flush ruleset`, a hand-edited element, a deleted table.
//!
//! Owns the subscription to nf_tables' notifications. Never repairs anything: [`super::Nftables`] does.
//!
//! A subscriber makes the kernel write a notification for each element of a transaction, which makes bulk loads several
//! times slower: it is not subscribed while one runs, and the ruleset's generation tells whether anything was missed.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nftnl::nftnl_sys::libc;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use super::netlink::{Header, attribute, messages, set_option};
use super::schema::TABLE;

/// `NFNLGRP_NFTABLES`.
const GROUP: libc::c_int = 7;
/// Offset of `nlmsg_pid` in `struct nlmsghdr`.
const PORT_OFFSET: u32 = 12;
/// The attribute that names the table, in the messages of every kind of object.
const ATTR_TABLE: u16 = 1;
/// Where attributes start: behind `nlmsghdr` and `nfgenmsg`.
const ATTRIBUTES: usize = 20;

/// A subscription to the changes that others make.
pub(crate) struct Monitor {
    socket: OwnedFd,
    subscribed: bool,
}

impl Monitor {
    /// Opens the socket; changes made through the socket with netlink address `own_port` are not reported.
    ///
    /// # Errors
    /// When the socket cannot be had.
    pub(crate) fn open(own_port: u32) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkNetFilter,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        ignore_own(&socket, own_port)?;
        Ok(Self { socket, subscribed: false })
    }

    /// A descriptor that becomes readable when there is something to [`Self::drain`].
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.socket.try_clone()
    }

    /// Whether notifications come.
    pub(crate) fn is_subscribed(&self) -> bool {
        self.subscribed
    }

    /// Asks for notifications, or for none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn subscribe(&mut self, on: bool) -> io::Result<()> {
        let option = if on { libc::NETLINK_ADD_MEMBERSHIP } else { libc::NETLINK_DROP_MEMBERSHIP };
        set_option(self.socket.as_raw_fd(), libc::SOL_NETLINK, option, GROUP)?;
        self.subscribed = on;
        Ok(())
    }

    /// Reads what has come; tells whether our tables were changed, or may have been (notifications were lost).
    ///
    /// # Errors
    /// When the socket fails.
    pub(crate) fn drain(&mut self) -> io::Result<bool> {
        let mut buffer = vec![0u8; 64 << 10];
        let mut changed = false;
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => messages(&buffer[..len], |message| changed |= concerns_us(message)),
                Err(Errno::EAGAIN) => return Ok(changed),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => changed = true,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn concerns_us(message: &[u8]) -> bool {
    let subsystem = Header::of(message).map_or(0, |header| i32::from(header.kind) >> 8);
    let table = message.get(ATTRIBUTES..).and_then(|attributes| attribute(attributes, ATTR_TABLE));
    subsystem == libc::NFNL_SUBSYS_NFTABLES
        && table.and_then(|name| name.strip_suffix(b"\0")) == Some(TABLE.as_bytes())
}

/// Lets the kernel drop the notifications of our own transactions, so that they wake nobody: classic BPF on the
/// first header's `nlmsg_pid` (all messages of one datagram come from one transaction).
fn ignore_own(socket: &OwnedFd, port: u32) -> io::Result<()> {
    const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS: big-endian
    const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        step(LOAD_WORD, 0, 0, PORT_OFFSET),
        step(JUMP_EQUAL, 0, 1, port.to_be()),
        step(RETURN, 0, 0, 0),
        step(RETURN, 0, 0, u32::MAX),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: `program` points to a filter that outlives the call; the kernel checks and copies it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop).map_err(io::Error::from)
}
