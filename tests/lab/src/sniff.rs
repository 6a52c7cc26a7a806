//! Sniffing: counts the packets that cross a host's links, in the kernel and without loss.
//!
//! Owns one packet socket with a classic BPF filter. The kernel counts what passes the filter, also when the socket's
//! buffer is full; the first packets stay in the buffer for a look at them. One segment of a TCP stream may stand for
//! several packets on a real wire (GSO).

use std::fmt;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use ipnetwork::IpNetwork;
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::error::{Doing, Result};
use crate::host::Host;
use crate::netns::Namespace;

/// Which packets to count; all IP packets unless told otherwise.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    to: Option<IpNetwork>,
    from: Option<IpNetwork>,
    port: Option<u16>,
    proto: Option<u8>,
    interface: Option<String>,
    leaving: Option<bool>,
}

impl Filter {
    /// All IP packets.
    pub fn new() -> Self {
        Self::default()
    }

    /// To an address or network.
    pub fn to(mut self, to: impl Into<IpNetwork>) -> Self {
        self.to = Some(to.into());
        self
    }

    /// From an address or network.
    pub fn from(mut self, from: impl Into<IpNetwork>) -> Self {
        self.from = Some(from.into());
        self
    }

    /// To this TCP, UDP or SCTP port.
    pub fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// Of this IP protocol number.
    pub fn protocol(mut self, number: u8) -> Self {
        self.proto = Some(number);
        self
    }

    /// On this link only.
    pub fn on(mut self, interface: &str) -> Self {
        self.interface = Some(interface.to_owned());
        self
    }

    /// Only where they leave the host.
    pub fn leaving(mut self) -> Self {
        self.leaving = Some(true);
        self
    }

    /// Only where they come in.
    pub fn arriving(mut self) -> Self {
        self.leaving = Some(false);
        self
    }

    /// The classic BPF program, which sees packets from the network header on. Each family is a section that either
    /// accepts or falls through to the next.
    fn program(&self, interface: Option<u32>) -> Vec<SockFilter> {
        let mut program = Vec::new();
        for v4 in [true, false] {
            let fits = |net: &Option<IpNetwork>| net.is_none_or(|net| net.is_ipv4() == v4);
            if fits(&self.to) && fits(&self.from) {
                program.extend(assemble(&self.section(v4, interface)));
            }
        }
        program.push(statement(libc::BPF_RET | libc::BPF_K, 0));
        program
    }

    fn section(&self, v4: bool, interface: Option<u32>) -> Vec<Step> {
        let ethertype = if v4 { libc::ETH_P_IP } else { libc::ETH_P_IPV6 }.cast_unsigned();
        let mut steps = vec![Step::Ancillary(libc::SKF_AD_PROTOCOL), Step::Require(ethertype)];
        if let Some(index) = interface {
            steps.extend([Step::Ancillary(libc::SKF_AD_IFINDEX), Step::Require(index)]);
        }
        match self.leaving {
            Some(true) => {
                steps.extend([Step::Ancillary(libc::SKF_AD_PKTTYPE), Step::Require(OUTGOING)]);
            }
            Some(false) => {
                steps.extend([Step::Ancillary(libc::SKF_AD_PKTTYPE), Step::Forbid(OUTGOING)]);
            }
            None => {}
        }
        let (from, to, proto) = if v4 { (12, 16, 9) } else { (8, 24, 6) };
        for (net, offset) in [(self.from, from), (self.to, to)] {
            if let Some(net) = net {
                steps.extend(address(net, offset));
            }
        }
        if let Some(number) = self.proto {
            steps.extend([Step::Byte(proto), Step::Require(number.into())]);
        }
        if let Some(port) = self.port {
            if v4 {
                steps.extend([Step::V4HeaderLength, Step::HalfAfterHeader(2)]);
            } else {
                steps.push(Step::Half(40 + 2));
            }
            steps.push(Step::Require(port.into()));
        }
        steps
    }
}

/// `PACKET_OUTGOING` of `linux/if_packet.h`.
const OUTGOING: u32 = libc::PACKET_OUTGOING as u32;

/// One step of a filter, on the accumulator.
enum Step {
    /// Loads what the kernel knows of the packet besides its bytes.
    Ancillary(i32),
    Byte(u32),
    Half(u32),
    Word(u32),
    /// Loads the length of the IPv4 header into the index register.
    V4HeaderLength,
    /// Loads two bytes at this offset after the IPv4 header.
    HalfAfterHeader(u32),
    And(u32),
    Require(u32),
    Forbid(u32),
}

/// Compares an address that begins at this offset with a network.
fn address(net: IpNetwork, offset: u32) -> Vec<Step> {
    let (value, mask) = match (net.network(), net.mask()) {
        (IpAddr::V4(value), IpAddr::V4(mask)) => (value.octets().to_vec(), mask.octets().to_vec()),
        (IpAddr::V6(value), IpAddr::V6(mask)) => (value.octets().to_vec(), mask.octets().to_vec()),
        // A network's mask is of its own family.
        _ => return Vec::new(),
    };
    let words = |bytes: Vec<u8>| {
        let words =
            bytes.chunks_exact(4).map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
        words.collect::<Vec<_>>()
    };
    (offset..)
        .step_by(4)
        .zip(words(value).into_iter().zip(words(mask)))
        .filter(|(_, (_, mask))| *mask != 0)
        .flat_map(|(at, (value, mask))| [Step::Word(at), Step::And(mask), Step::Require(value)])
        .collect()
}

/// Accepts when all steps hold, else falls through to whatever follows.
fn assemble(steps: &[Step]) -> Vec<SockFilter> {
    use libc::{
        BPF_ABS, BPF_ALU, BPF_AND, BPF_B, BPF_H, BPF_IND, BPF_K, BPF_LD, BPF_LDX, BPF_MSH, BPF_RET, BPF_W,
    };
    // Enough of a packet to see its addresses and ports.
    const SNAP: u32 = 128;
    let mut program: Vec<_> = steps
        .iter()
        .enumerate()
        .map(|(at, step)| {
            // Over the steps that remain and the acceptance after them; sections have a few dozen steps at most.
            let out = u8::try_from(steps.len() - at).unwrap_or(u8::MAX);
            match *step {
                Step::Ancillary(field) => {
                    statement(BPF_LD | BPF_W | BPF_ABS, (libc::SKF_AD_OFF + field).cast_unsigned())
                }
                Step::Byte(at) => statement(BPF_LD | BPF_B | BPF_ABS, at),
                Step::Half(at) => statement(BPF_LD | BPF_H | BPF_ABS, at),
                Step::Word(at) => statement(BPF_LD | BPF_W | BPF_ABS, at),
                Step::V4HeaderLength => statement(BPF_LDX | BPF_B | BPF_MSH, 0),
                Step::HalfAfterHeader(at) => statement(BPF_LD | BPF_H | BPF_IND, at),
                Step::And(mask) => statement(BPF_ALU | BPF_AND | BPF_K, mask),
                Step::Require(value) => jump_if_equal(value, 0, out),
                Step::Forbid(value) => jump_if_equal(value, out, 0),
            }
        })
        .collect();
    program.push(statement(BPF_RET | BPF_K, SNAP));
    program
}

fn statement(code: u32, k: u32) -> SockFilter {
    SockFilter::new(code as u16, 0, 0, k)
}

fn jump_if_equal(k: u32, jt: u8, jf: u8) -> SockFilter {
    SockFilter::new((libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt, jf, k)
}

/// A packet that was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The IP protocol number.
    pub protocol: u8,
    /// Source address and port; port 0 where the protocol has none.
    pub source: SocketAddr,
    /// Destination address and port; port 0 where the protocol has none.
    pub destination: SocketAddr,
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "protocol {} {} → {}", self.protocol, self.source, self.destination)
    }
}

impl Packet {
    /// Reads an IP packet; `None` for what is none. IPv6 extension headers are taken for a protocol without ports.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (protocol, source, destination, header) = match bytes.first()? >> 4 {
            4 => {
                let ip = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
                (*bytes.get(9)?, IpAddr::V4(ip(12)?), IpAddr::V4(ip(16)?), usize::from(bytes[0] & 15) * 4)
            }
            6 => {
                let ip =
                    |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?));
                (*bytes.get(6)?, IpAddr::V6(ip(8)?), IpAddr::V6(ip(24)?), 40)
            }
            _ => return None,
        };
        let has_ports = [libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_SCTP].contains(&protocol.into());
        let port = |at: usize| match bytes.get(header + at..header + at + 2) {
            Some(&[high, low]) if has_ports => u16::from_be_bytes([high, low]),
            _ => 0,
        };
        Some(Self {
            protocol,
            source: SocketAddr::new(source, port(0)),
            destination: SocketAddr::new(destination, port(2)),
        })
    }
}

/// A running count.
#[derive(Debug)]
pub struct Sniff {
    socket: Socket,
    counted: AtomicU64,
}

impl Host {
    /// Counts packets from now on, on every link of the host unless the filter names one: a forwarded packet is then
    /// seen where it comes in and again where it leaves.
    ///
    /// # Errors
    /// When the packet socket cannot be had, or the link does not exist.
    pub fn sniff(&self, filter: Filter) -> Result<Sniff> {
        Sniff::start(self.namespace(), filter)
    }
}

impl Sniff {
    pub(crate) fn start(namespace: &Namespace, filter: Filter) -> Result<Self> {
        namespace.enter(move || Self::open(&filter))?.doing(|| format!("sniff in {}", namespace.name()))
    }

    fn open(filter: &Filter) -> io::Result<Self> {
        let interface = filter.interface.as_deref().map(if_nametoindex).transpose()?;
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(all)))?;
        socket.set_nonblocking(true)?;
        socket.attach_filter(&filter.program(interface))?;
        // What came between the socket and its filter does not count.
        while socket.recv(&mut [std::mem::MaybeUninit::uninit(); 1]).is_ok() {}
        statistics(socket.as_raw_fd())?;
        Ok(Self { socket, counted: AtomicU64::new(0) })
    }

    /// How many packets passed the filter so far.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn count(&self) -> Result<u64> {
        // Reading sets the kernel's counter back to zero.
        let new = statistics(self.socket.as_raw_fd()).doing(|| "read packet statistics".into())?;
        Ok(self.counted.fetch_add(new, Ordering::Relaxed) + new)
    }

    /// The packets seen since the last call, as far as the socket's buffer had room: for messages, not for counts.
    pub fn packets(&self) -> Vec<Packet> {
        let mut buffer = [0; 256];
        let mut packets = Vec::new();
        while let Ok(length) = (&self.socket).read(&mut buffer) {
            packets.extend(Packet::parse(&buffer[..length]));
        }
        packets
    }
}

/// `PACKET_STATISTICS`: packets that passed the filter since the last call, those for which there was no room included.
fn statistics(socket: RawFd) -> io::Result<u64> {
    let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the pointers are to locals of the type and length that PACKET_STATISTICS writes.
    let status = unsafe {
        libc::getsockopt(
            socket,
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut stats).cast(),
            &raw mut length,
        )
    };
    if status == 0 { Ok(stats.tp_packets.into()) } else { Err(io::Error::last_os_error()) }
}
