//! The netlink socket to the kernel's connection tracking: reads flows, deletes flows.
//!
//! Owns the socket and the form of its messages. Never decides which flow goes.
//!
//! The kernel (5.8 and newer) sends only the flows that match a filter, though it walks its whole table for them: by
//! protocol, port and IPv4 address. An older one ignores the filter and sends all. Callers judge each flow themselves.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

use super::tracker::{Filter, Flow};
use crate::dataplane::netlink::{HEADER, Header, attribute, messages, set_option};
use crate::model::input::{Family, Protocol};
use crate::model::plan::AddressPort;

/// What one read can bring: the kernel fills a dump's parts up to 32 KiB.
const READ: usize = 64 << 10;
/// `struct nfgenmsg`.
const FAMILY_HEADER: usize = 4;
/// Deletions in one message to the kernel: their acknowledgements fit the socket's buffer.
pub(super) const DELETIONS: usize = 64;

/// `enum cntl_msg_types`.
const GET: u16 = 1;
const DELETE: u16 = 2;
const GET_STATS: u16 = 5;

/// `enum ctattr_type` and those below it.
mod cta {
    pub(super) const TUPLE_ORIG: u16 = 1;
    pub(super) const TUPLE_REPLY: u16 = 2;
    pub(super) const STATUS: u16 = 3;
    pub(super) const ID: u16 = 12;
    pub(super) const ZONE: u16 = 18;
    pub(super) const FILTER: u16 = 25;

    pub(super) const TUPLE_IP: u16 = 1;
    pub(super) const TUPLE_PROTO: u16 = 2;

    pub(super) const IP_V4_SRC: u16 = 1;
    pub(super) const IP_V4_DST: u16 = 2;
    pub(super) const IP_V6_SRC: u16 = 3;
    pub(super) const IP_V6_DST: u16 = 4;

    pub(super) const PROTO_NUM: u16 = 1;
    pub(super) const PROTO_SRC_PORT: u16 = 2;
    pub(super) const PROTO_DST_PORT: u16 = 3;

    pub(super) const FILTER_ORIG_FLAGS: u16 = 1;
}

/// `CTA_FILTER_F_*` of the kernel's `nf_internals.h`: which fields of the tuple must match.
const MATCH_IP_DST: u32 = 1 << 1;
const MATCH_PROTO_NUM: u32 = 1 << 3;
const MATCH_DST_PORT: u32 = 1 << 5;

/// `IPS_DST_NAT`.
const DST_NAT: u32 = 1 << 5;

/// A flow and how to name it to the kernel.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) flow: Flow,
    /// The attributes that name this entry and no later one of the same addresses.
    name: Box<[u8]>,
}

/// The socket.
#[derive(Debug)]
pub(super) struct Ctnetlink {
    socket: OwnedFd,
    seq: u32,
    read: Box<[u8]>,
}

impl Ctnetlink {
    /// Opens the socket of the current network namespace.
    ///
    /// # Errors
    /// When the socket cannot be had.
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // Acknowledgements without a copy of the message.
        set_option(socket.as_raw_fd(), libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)?;
        Ok(Self { socket, seq: 1, read: vec![0; READ].into() })
    }

    /// Reads the flows that match, and perhaps others; calls `each` with the flows of every read; tells how many the kernel sent.
    ///
    /// # Errors
    /// `EINTR` where the table changed so that flows may have been missed; what `each` saw is then no whole.
    pub(super) fn dump(
        &mut self,
        filter: &Filter,
        mut each: impl FnMut(&mut dyn Iterator<Item = Entry>),
    ) -> Result<u64, Errno> {
        let request = self.message(GET, libc::NLM_F_DUMP, filter.family, &filter.attributes());
        let seq = self.seq;
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())?;
        let (mut read, mut interrupted) = (0, false);
        loop {
            let bytes = self.receive()?;
            let mut found = Vec::new();
            let mut end = None;
            messages(bytes, |message| {
                let Some(header) = Header::of(message).filter(|header| header.seq == seq) else { return };
                interrupted |= header.flags & libc::NLM_F_DUMP_INTR as u16 != 0;
                match i32::from(header.kind) {
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => end = Some(error_code(message)),
                    _ => {
                        read += 1;
                        found.extend(entry(message));
                    }
                }
            });
            each(&mut found.into_iter());
            match end {
                Some(Ok(())) if interrupted => return Err(Errno::EINTR),
                Some(result) => return result.map(|()| read),
                None => {}
            }
        }
    }

    /// Deletes at most [`DELETIONS`] flows; tells how many of them were still there.
    ///
    /// # Errors
    /// The first refusal; the others are deleted.
    pub(super) fn delete(&mut self, entries: &[Entry]) -> Result<u64, Errno> {
        let mut request = Vec::new();
        let first = self.seq.wrapping_add(1);
        for Entry { flow, name } in entries {
            request.extend(self.message(DELETE, libc::NLM_F_ACK, Family::of(flow.to.ip), name));
        }
        if entries.is_empty() {
            return Ok(0);
        }
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())?;
        let (mut answers, mut deleted, mut refusal) = (0, 0, None);
        while answers < entries.len() {
            let bytes = self.receive()?;
            messages(bytes, |message| {
                let ours = |header: &Header| (header.seq.wrapping_sub(first) as usize) < entries.len();
                if !Header::of(message).is_some_and(|header| ours(&header)) {
                    return;
                }
                answers += 1;
                match error_code(message) {
                    Ok(()) => deleted += 1,
                    Err(Errno::ENOENT) => {}
                    Err(errno) => refusal = refusal.or(Some(errno)),
                }
            });
        }
        refusal.map_or(Ok(deleted), Err)
    }

    /// Asks something that costs nothing: whoever is asked first is loaded first.
    ///
    /// # Errors
    /// When the kernel has no connection tracking, or not for this process.
    pub(super) fn touch(&mut self) -> Result<(), Errno> {
        let request = self.message(GET_STATS, libc::NLM_F_ACK, Family::V4, &[]);
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())?;
        loop {
            let mut end = None;
            messages(self.receive()?, |message| {
                if Header::of(message).is_some_and(|header| i32::from(header.kind) == libc::NLMSG_ERROR) {
                    end = Some(error_code(message));
                }
            });
            if let Some(result) = end {
                return result;
            }
        }
    }

    fn receive(&mut self) -> Result<&[u8], Errno> {
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.read, MsgFlags::empty()) {
                // A signal, not the kernel's table.
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
                Ok(len) => return Ok(&self.read[..len]),
            }
        }
    }

    /// A message with the next sequence number.
    fn message(&mut self, kind: u16, flags: libc::c_int, family: Family, attributes: &[u8]) -> Vec<u8> {
        self.seq = self.seq.wrapping_add(1);
        let length = HEADER + FAMILY_HEADER + attributes.len();
        let mut message = Vec::with_capacity(length);
        message.extend((length as u32).to_ne_bytes());
        message.extend(((libc::NFNL_SUBSYS_CTNETLINK as u16) << 8 | kind).to_ne_bytes());
        message.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
        message.extend(self.seq.to_ne_bytes());
        message.extend([0; 4]);
        let family = match family {
            Family::V4 => libc::AF_INET,
            Family::V6 => libc::AF_INET6,
        };
        message.extend([family as u8, libc::NFNETLINK_V0 as u8, 0, 0]);
        message.extend(attributes);
        message
    }
}

/// What an `NLMSG_ERROR` or `NLMSG_DONE` says.
fn error_code(message: &[u8]) -> Result<(), Errno> {
    match message.get(HEADER..).and_then(|code| code.first_chunk()).map(|code| i32::from_ne_bytes(*code)) {
        None | Some(0..) => Ok(()),
        Some(code) => Err(Errno::from_raw(code.saturating_neg())),
    }
}

impl Filter {
    fn attributes(&self) -> Vec<u8> {
        let Self { family: _, protocol, address, port } = *self;
        let mut flags = MATCH_PROTO_NUM;
        let mut ip = Vec::new();
        // The kernel (6.18 still) compares IPv6 addresses the wrong way round, and sends all flows but those that match.
        if let Some(IpAddr::V4(address)) = address {
            flags |= MATCH_IP_DST;
            push(&mut ip, cta::IP_V4_DST, &address.octets());
        }
        let mut proto = Vec::new();
        push(&mut proto, cta::PROTO_NUM, &[protocol.number()]);
        if let Some(port) = port {
            flags |= MATCH_DST_PORT;
            push(&mut proto, cta::PROTO_DST_PORT, &port.to_be_bytes());
        }
        let mut tuple = Vec::new();
        push(&mut tuple, NESTED | cta::TUPLE_IP, &ip);
        push(&mut tuple, NESTED | cta::TUPLE_PROTO, &proto);
        let mut filter = Vec::new();
        push(&mut filter, cta::FILTER_ORIG_FLAGS, &flags.to_ne_bytes());
        let mut attributes = Vec::new();
        push(&mut attributes, NESTED | cta::TUPLE_ORIG, &tuple);
        push(&mut attributes, NESTED | cta::FILTER, &filter);
        attributes
    }
}

/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;

fn push(attributes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    attributes.extend(((4 + value.len()) as u16).to_ne_bytes());
    attributes.extend(kind.to_ne_bytes());
    attributes.extend(value);
    attributes.resize(attributes.len().next_multiple_of(4), 0);
}

/// A flow from a message; `None` where it is of no protocol of ours.
fn entry(message: &[u8]) -> Option<Entry> {
    let attributes = message.get(HEADER + FAMILY_HEADER..)?;
    let [original, reply] =
        [cta::TUPLE_ORIG, cta::TUPLE_REPLY].map(|direction| attribute(attributes, direction));
    let original = original?;
    let protocol = protocol(original)?;
    let to = address(original, [cta::IP_V4_DST, cta::IP_V6_DST], cta::PROTO_DST_PORT)?;
    let from = address(reply?, [cta::IP_V4_SRC, cta::IP_V6_SRC], cta::PROTO_SRC_PORT)?;
    let status = u32::from_be_bytes(*attribute(attributes, cta::STATUS)?.first_chunk()?);
    let mut name = Vec::new();
    push(&mut name, NESTED | cta::TUPLE_ORIG, original);
    for kind in [cta::ZONE, cta::ID] {
        if let Some(value) = attribute(attributes, kind) {
            push(&mut name, kind, value);
        }
    }
    let flow = Flow { protocol, to, from, translated: status & DST_NAT != 0 };
    Some(Entry { flow, name: name.into() })
}

fn protocol(tuple: &[u8]) -> Option<Protocol> {
    let number = *attribute(attribute(tuple, cta::TUPLE_PROTO)?, cta::PROTO_NUM)?.first()?;
    Protocol::ALL.into_iter().find(|protocol| protocol.number() == number)
}

fn address(tuple: &[u8], [v4, v6]: [u16; 2], port: u16) -> Option<AddressPort> {
    let (ip, proto) = (attribute(tuple, cta::TUPLE_IP)?, attribute(tuple, cta::TUPLE_PROTO)?);
    let octets_v4 = attribute(ip, v4).and_then(|octets| octets.first_chunk::<4>());
    let octets_v6 = attribute(ip, v6).and_then(|octets| octets.first_chunk::<16>());
    let ip =
        octets_v4.map(|octets| IpAddr::from(*octets)).or(octets_v6.map(|octets| IpAddr::from(*octets)))?;
    let port = u16::from_be_bytes(*attribute(proto, port)?.first_chunk()?);
    Some(AddressPort { ip, port })
}
