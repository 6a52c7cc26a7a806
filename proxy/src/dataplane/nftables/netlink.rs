//! The netlink socket to nf_tables: sends transactions, reads refusals, dumps what the kernel holds.
//!
//! Owns the socket. Never decides what to send, and never lists anything unless asked to read the truth back.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use nftnl::Chain;
use nftnl::nftnl_sys::libc;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{MsgFlags, recv};

use super::element::Place;
use super::fingerprint::{Fingerprint, RULE_USERDATA};
use super::message::{Transaction, Wanted, protocol_family, questions, request};
use super::readings::Readings;
use super::rules;
use super::schema::TABLE;
use super::scratch::Scratch;
pub(crate) use crate::dataplane::netlink::{HEADER, Header, attribute, messages, set_option};
use crate::model::input::Family;

/// A transaction of ours is bounded well below this; netlink takes a message of at most the send buffer's size.
const SEND_BUFFER: libc::c_int = 64 << 20;
/// Room for a refusal of every message of a transaction.
const RECEIVE_BUFFER: libc::c_int = 16 << 20;
/// What one read can bring: the kernel fills a dump's parts up to 32 KiB.
const READ_WORDS: usize = 8192;
/// Elements that are asked for at once. Each answer takes a kilobyte of the room for them at most.
const QUESTIONS: usize = 1000;
/// `NFTA_TABLE_NAME`, `NFTA_TABLE_USERDATA`.
pub(super) const TABLE_NAME: u16 = 1;
pub(super) const TABLE_USERDATA: u16 = 6;
/// Size of `struct nfgenmsg`.
const FAMILY_HEADER: usize = 4;
/// `NLMSGERR_ATTR_MSG`.
const ATTR_MSG: u16 = 1;

/// The kernel's answer to one message that it refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// The message's sequence number.
    pub(crate) seq: u32,
    /// Why.
    pub(crate) errno: Errno,
    /// The kernel's own words, where it has some.
    pub(crate) text: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.text {
            Some(text) => write!(f, "{} ({text})", self.errno),
            None => fmt::Display::fmt(&self.errno, f),
        }
    }
}

/// Why a transaction did not take effect. Nothing of it did.
#[derive(Debug)]
pub(crate) enum CommitError {
    /// The kernel refused these messages.
    Refused(Vec<Refusal>),
    /// It is larger than netlink takes: send it in parts.
    TooLarge,
    /// The socket failed.
    Io(io::Error),
}

/// A netlink socket.
pub(crate) struct Netlink {
    socket: mnl::Socket,
    seq: u32,
    read: Box<[u64]>,
    /// For the next transaction.
    scratch: Scratch,
    /// Elements count.
    counting: bool,
}

impl Netlink {
    /// Opens the socket; `counting`: elements are to count.
    ///
    /// # Errors
    /// When the kernel has no nf_netlink, or the process may not open it.
    pub(crate) fn open(counting: bool) -> io::Result<Self> {
        let socket = mnl::Socket::new(mnl::Bus::Netfilter)?;
        let (read, scratch) = (vec![0; READ_WORDS].into(), Scratch::default());
        let netlink = Self { socket, seq: 1, read, scratch, counting };
        // libmnl leaves it open across an exec, and the agent executes itself anew when its configuration changes.
        // SAFETY: the socket is open, and `netlink` outlives the borrow.
        let descriptor = unsafe { BorrowedFd::borrow_raw(netlink.fd()) };
        fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        // The forced sizes need CAP_NET_ADMIN, as everything here does.
        netlink.option(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, SEND_BUFFER)?;
        netlink.option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER)?;
        // Refusals with the kernel's words and without a copy of the message.
        netlink.option(libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1)?;
        netlink.option(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)?;
        Ok(netlink)
    }

    /// The socket's netlink address: what the kernel says who made a change.
    pub(crate) fn port(&self) -> u32 {
        self.socket.portid()
    }

    /// Whether elements count.
    pub(crate) fn counting(&self) -> bool {
        self.counting
    }

    fn fd(&self) -> RawFd {
        // SAFETY: the socket is open; mnl_socket_get_fd only reads it.
        unsafe { mnl::mnl_sys::mnl_socket_get_fd(self.socket.as_raw_socket()) }
    }

    fn option(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
        set_option(self.fd(), level, name, value)
    }

    /// Starts a transaction.
    pub(crate) fn begin<Owner: Copy>(&mut self) -> Transaction<Owner> {
        Transaction::new(self.seq, std::mem::take(&mut self.scratch), self.counting)
    }

    /// Sends a transaction; returns when the kernel has taken or refused it, with what removed elements had counted.
    ///
    /// # Errors
    /// [`CommitError`]; the kernel's state is then as before.
    pub(crate) fn commit<Owner: Copy>(
        &mut self,
        transaction: &mut Transaction<Owner>,
    ) -> Result<Readings, CommitError> {
        transaction.finish();
        self.send(transaction)
    }

    /// As [`Self::commit`], but the kernel only checks the transaction, as `nft --check` has it done: nothing of it takes
    /// effect.
    ///
    /// # Errors
    /// [`CommitError`].
    pub(crate) fn check<Owner: Copy>(
        &mut self,
        transaction: &mut Transaction<Owner>,
    ) -> Result<(), CommitError> {
        self.send(transaction).map(drop)
    }

    fn send<Owner: Copy>(&mut self, transaction: &mut Transaction<Owner>) -> Result<Readings, CommitError> {
        let (bytes, next) = transaction.bytes();
        self.seq = next;
        let sent = self.socket.send(bytes);
        self.scratch = transaction.release();
        match sent {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => return Err(CommitError::TooLarge),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Err(CommitError::TooLarge),
            Err(error) => return Err(CommitError::Io(error)),
        }
        // nf_tables works through a batch inside of the send: every answer is waiting by now.
        let (refusals, readings) = self.drain().map_err(CommitError::Io)?;
        if refusals.is_empty() { Ok(readings) } else { Err(CommitError::Refused(refusals)) }
    }

    fn drain(&mut self) -> io::Result<(Vec<Refusal>, Readings)> {
        let (mut refusals, mut readings) = (Vec::new(), Readings::default());
        let mut overrun = false;
        loop {
            match self.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(bytes) => messages(bytes, |message| match refusal(message) {
                    Some(refusal) => refusals.push(refusal),
                    None => readings.take(message),
                }),
                // More answers than room. Of refusals those that were kept are reported, the others when these are left
                // out; a reading shows that nothing was refused, and the others' counts are lost.
                Err(Errno::ENOBUFS) => overrun = true,
                Err(Errno::EAGAIN) if overrun && refusals.is_empty() && readings.is_empty() => {
                    return Err(Errno::ENOBUFS.into());
                }
                Err(Errno::EAGAIN) => return Ok((refusals, readings)),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn receive(&mut self, flags: MsgFlags) -> Result<&[u8], Errno> {
        let fd = self.fd();
        let len = recv(fd, bytes_of(&mut self.read), flags)?;
        Ok(&bytes_of(&mut self.read)[..len])
    }

    /// Reads what is wanted; calls `each` with every message.
    ///
    /// # Errors
    /// `ENOENT` where the table, the set or an element does not exist; `EINTR` where it changed meanwhile and must be
    /// read again.
    pub(crate) fn read(
        &mut self,
        family: Family,
        wanted: Wanted<'_>,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), Errno> {
        let seq = self.seq;
        self.seq = self.seq.wrapping_add(1);
        let request = request(wanted, family, seq, &mut self.scratch);
        self.request(&request, seq, &mut each)
    }

    /// Asks for elements one by one; calls `each` with the message about every one that is there.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub(crate) fn ask_for(
        &mut self,
        places: &[Place],
        mut each: impl FnMut(&Place, &[u8]),
    ) -> Result<(), Errno> {
        for places in places.chunks(QUESTIONS) {
            let first = self.seq;
            self.seq = self.seq.wrapping_add(places.len() as u32);
            let requests = questions(places, first, &mut self.scratch);
            self.send_bytes(&requests)?;
            let (mut answers, mut failed) = (0, None);
            // The kernel answers inside of the send.
            loop {
                match self.receive(MsgFlags::MSG_DONTWAIT) {
                    Ok(bytes) => messages(bytes, |message| {
                        let number = Header::of(message).map(|header| header.seq.wrapping_sub(first));
                        let Some(place) = number.and_then(|i| places.get(i as usize)) else { return };
                        answers += 1;
                        match refusal(message).map(|refusal| refusal.errno) {
                            None => each(place, message),
                            Some(Errno::ENOENT) => {}
                            Some(errno) => failed = Some(errno),
                        }
                    }),
                    Err(Errno::EAGAIN) => break,
                    Err(Errno::EINTR | Errno::ENOBUFS) => {}
                    Err(errno) => return Err(errno),
                }
            }
            if let Some(errno) = failed.or((answers < places.len()).then_some(Errno::ENOBUFS)) {
                return Err(errno);
            }
        }
        Ok(())
    }

    fn send_bytes(&self, bytes: &[u8]) -> Result<(), Errno> {
        let errno = |error: io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        self.socket.send(bytes).map(drop).map_err(errno)
    }

    /// The number of the kernel's current ruleset generation.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub(crate) fn generation(&mut self) -> Result<u32, Errno> {
        /// `NFTA_GEN_ID`.
        const GEN_ID: u16 = 1;
        let mut id = None;
        self.ask(libc::NFT_MSG_GETGEN, libc::NLM_F_ACK, 0, &mut |message| {
            let found = attribute(message.get(HEADER + FAMILY_HEADER..).unwrap_or_default(), GEN_ID);
            id = found.and_then(|value| value.first_chunk()).map(|bytes| u32::from_be_bytes(*bytes)).or(id);
        })?;
        id.ok_or(Errno::EPROTO)
    }

    /// The names of the chains of a table.
    ///
    /// # Errors
    /// `EINTR` where they changed meanwhile and must be read again.
    pub(crate) fn chains(&mut self, family: Family) -> Result<Vec<String>, Errno> {
        /// `NFTA_CHAIN_TABLE`, `NFTA_CHAIN_NAME`.
        const CHAIN_TABLE: u16 = 1;
        const CHAIN_NAME: u16 = 3;
        let mut names = Vec::new();
        let family = protocol_family(family) as u8;
        self.ask(libc::NFT_MSG_GETCHAIN, libc::NLM_F_DUMP, family, &mut |message| {
            let attributes = message.get(HEADER + FAMILY_HEADER..).unwrap_or_default();
            let text = |kind| attribute(attributes, kind)?.strip_suffix(b"\0");
            if text(CHAIN_TABLE) == Some(TABLE.as_bytes()) {
                names.extend(text(CHAIN_NAME).map(|name| String::from_utf8_lossy(name).into_owned()));
            }
        })?;
        Ok(names)
    }

    /// Whether a chain has these rules, and has them from us.
    ///
    /// # Errors
    /// `EINTR` where they changed meanwhile and must be read again.
    pub(crate) fn has_rules(
        &mut self,
        family: Family,
        chain: &Chain<'_>,
        spec: &rules::Chain,
    ) -> Result<bool, Errno> {
        let mut held = Vec::new();
        self.read(family, Wanted::Rules(&spec.name), |message| {
            let attributes = message.get(HEADER + FAMILY_HEADER..).unwrap_or_default();
            held.push(attribute(attributes, RULE_USERDATA).and_then(Fingerprint::from_userdata));
        })?;
        let is_right =
            |(held, rule): (_, &Vec<_>)| held == Some(Fingerprint::of(chain, rule, &mut self.scratch));
        Ok(held.len() == spec.rules.len() && held.into_iter().zip(&spec.rules).all(is_right))
    }

    /// The userdata of a table, empty where it has none; `None`: there is no such table.
    ///
    /// # Errors
    /// `EINTR` where tables changed meanwhile and must be read again.
    pub(crate) fn table(&mut self, name: &CStr, family: Family) -> Result<Option<Vec<u8>>, Errno> {
        let mut found = None;
        let family = protocol_family(family) as u8;
        self.ask(libc::NFT_MSG_GETTABLE, libc::NLM_F_DUMP, family, &mut |message| {
            let attributes = message.get(HEADER + FAMILY_HEADER..).unwrap_or_default();
            if attribute(attributes, TABLE_NAME) == Some(name.to_bytes_with_nul()) {
                found = Some(attribute(attributes, TABLE_USERDATA).unwrap_or_default().to_vec());
            }
        })?;
        Ok(found)
    }

    /// Sends a request without attributes and reads its answer.
    fn ask(&mut self, kind: i32, flags: i32, family: u8, each: &mut impl FnMut(&[u8])) -> Result<(), Errno> {
        let seq = self.seq;
        self.seq = self.seq.wrapping_add(1);
        let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16;
        let mut request = Vec::with_capacity(HEADER + FAMILY_HEADER);
        request.extend(((HEADER + FAMILY_HEADER) as u32).to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
        request.extend(seq.to_ne_bytes());
        request.extend([0; 4]);
        request.extend([family, 0, 0, 0]);
        self.request(&request, seq, each)
    }

    /// Sends a request and reads its answer up to its end (`NLMSG_DONE` or the acknowledgement).
    fn request(&mut self, request: &[u8], seq: u32, each: &mut impl FnMut(&[u8])) -> Result<(), Errno> {
        self.send_bytes(request)?;
        let mut interrupted = false;
        loop {
            let bytes = match self.receive(MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            let mut end = None;
            messages(bytes, |message| {
                let Some(header) = Header::of(message) else { return };
                if header.seq != seq {
                    return;
                }
                interrupted |= header.flags & libc::NLM_F_DUMP_INTR as u16 != 0;
                match i32::from(header.kind) {
                    libc::NLMSG_DONE => end = Some(Ok(())),
                    libc::NLMSG_ERROR => {
                        end = Some(refusal(message).map_or(Ok(()), |refusal| Err(refusal.errno)));
                    }
                    _ => each(message),
                }
            });
            match end {
                Some(Ok(())) if interrupted => return Err(Errno::EINTR),
                Some(result) => return result,
                None => {}
            }
        }
    }
}

/// A refusal, if the message is one (an `NLMSG_ERROR` that is no acknowledgement).
fn refusal(message: &[u8]) -> Option<Refusal> {
    let header = Header::of(message)?;
    let code = message.get(HEADER..)?.first_chunk().map(|code| i32::from_ne_bytes(*code))?;
    if i32::from(header.kind) != libc::NLMSG_ERROR || code == 0 {
        return None;
    }
    // Behind the code: the header of the refused message, then attributes (its body is left out).
    let words = message.get(HEADER + 4 + HEADER..).and_then(|attributes| attribute(attributes, ATTR_MSG));
    let text = words.map(|text| String::from_utf8_lossy(text).trim_end_matches('\0').to_owned());
    Some(Refusal { seq: header.seq, errno: Errno::from_raw(-code), text })
}

fn bytes_of(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: any bytes make valid `u64`s and the other way round; the length is the same memory's.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}
