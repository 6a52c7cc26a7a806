//! Clients: new connections, flows that stay open, and what they meet.
//!
//! Owns the client's half of the echo protocol (the server's is in `echo`): a request is one line or datagram
//! `<tag> <bytes>`, the answer `<tag> <identity> <client address seen>` and a newline, followed by that many bytes.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use crate::agnhost;
use crate::connect::{connect, is_refused_at_once, peer_in_kernel, report_icmp};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::sctp;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP, as far as an INIT and its answer: no association is made. A host without an SCTP server says
    /// "unreachable"; on one with a server, its other ports are silent.
    Sctp,
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// What a client met.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// An echo server answered.
    Answered {
        /// The server's identity: the name of its host.
        by: String,
        /// The client's address as the server saw it.
        seen: SocketAddr,
    },
    /// ECONNREFUSED: a TCP reset, or ICMP port unreachable.
    Refused,
    /// EHOSTUNREACH, ENETUNREACH, ENOPROTOOPT, EPROTO: another ICMP error, or no route at the client itself.
    Unreachable,
    /// Nothing came in time.
    TimedOut,
    /// The connection ended before the answer.
    Reset,
    /// Any other error, in the system's words.
    Failed(String),
}

impl Outcome {
    /// Who answered.
    pub fn by(&self) -> Option<&str> {
        match self {
            Self::Answered { by, .. } => Some(by),
            _ => None,
        }
    }

    /// The client's address as the server saw it.
    pub fn seen(&self) -> Option<SocketAddr> {
        match self {
            Self::Answered { seen, .. } => Some(*seen),
            _ => None,
        }
    }
}

impl From<io::Error> for Outcome {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as Kind;
        // ICMP's "protocol unreachable", and ICMPv6's parameter problem.
        if matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EPROTO)) {
            return Self::Unreachable;
        }
        match error.kind() {
            Kind::ConnectionRefused => Self::Refused,
            Kind::HostUnreachable | Kind::NetworkUnreachable => Self::Unreachable,
            Kind::TimedOut | Kind::WouldBlock => Self::TimedOut,
            Kind::ConnectionReset | Kind::BrokenPipe | Kind::UnexpectedEof => Self::Reset,
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered { by, seen } => write!(f, "answered by {by}, which saw {seen}"),
            Self::Refused => f.write_str("refused"),
            Self::Unreachable => f.write_str("unreachable"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Reset => f.write_str("reset"),
            Self::Failed(error) => write!(f, "failed: {error}"),
        }
    }
}

/// What a client met, and where that was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Met {
    /// What it met.
    pub outcome: Outcome,
    /// The socket itself was connected elsewhere than dialled, or refused before a packet left; else whatever happened
    /// happened to packets.
    pub at_socket: bool,
}

/// How often each outcome came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Answers by identity.
    pub answered: BTreeMap<String, usize>,
    /// [`Outcome::Refused`].
    pub refused: usize,
    /// [`Outcome::Unreachable`].
    pub unreachable: usize,
    /// [`Outcome::TimedOut`].
    pub timed_out: usize,
    /// [`Outcome::Reset`].
    pub reset: usize,
    /// [`Outcome::Failed`], by message.
    pub failed: BTreeMap<String, usize>,
}

impl Tally {
    /// Counts one outcome.
    pub fn add(&mut self, outcome: Outcome) {
        *match outcome {
            Outcome::Answered { by, .. } => self.answered.entry(by).or_default(),
            Outcome::Refused => &mut self.refused,
            Outcome::Unreachable => &mut self.unreachable,
            Outcome::TimedOut => &mut self.timed_out,
            Outcome::Reset => &mut self.reset,
            Outcome::Failed(error) => self.failed.entry(error).or_default(),
        } += 1;
    }

    /// How many were answered, by whomever.
    pub fn answers(&self) -> usize {
        self.answered.values().sum()
    }

    /// How many were not answered.
    pub fn failures(&self) -> usize {
        self.refused + self.unreachable + self.timed_out + self.reset + self.failed.values().sum::<usize>()
    }
}

impl FromIterator<Outcome> for Tally {
    fn from_iter<I: IntoIterator<Item = Outcome>>(outcomes: I) -> Self {
        let mut tally = Self::default();
        outcomes.into_iter().for_each(|outcome| tally.add(outcome));
        tally
    }
}

/// What the servers are that a client dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// An [`Echo`](crate::Echo) server of the lab.
    Echo,
    /// `agnhost netexec`, the server of Kubernetes' own tests: HTTP over TCP, or its commands in datagrams.
    Agnhost,
}

/// One new connection (or connected UDP socket) to be made.
#[derive(Clone, Copy, Debug)]
pub struct Dial {
    proto: Proto,
    to: SocketAddr,
    from: Option<SocketAddr>,
    fresh_port: bool,
    timeout: Duration,
    server: Server,
}

impl Dial {
    /// From any address and port, waiting for one second in each step.
    pub fn new(proto: Proto, to: SocketAddr) -> Self {
        let timeout = Duration::from_secs(1);
        Self { proto, to, from: None, fresh_port: false, timeout, server: Server::Echo }
    }

    /// To servers of this kind; else they are [`Server::Echo`].
    pub fn server(mut self, server: Server) -> Self {
        self.server = server;
        self
    }

    /// From this address, and from this port unless it is 0.
    pub fn from(mut self, from: SocketAddr) -> Self {
        self.from = Some(from);
        self
    }

    /// UDP from a port that no dial has had for a while. The kernel picks ports at random, and connection tracking leads
    /// a port that it knows to the endpoint of before: such a dial is no new connection.
    pub fn fresh_port(mut self) -> Self {
        self.fresh_port = true;
        self
    }

    /// How long to wait for the connection, and again for each answer.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Dials from the calling thread's namespace, asks once, and closes. A TCP connection is reset rather than
    /// closed, so that its port is free again at once.
    pub fn ask(&self) -> Outcome {
        Flow::open(self).map_or_else(|outcome| outcome, |mut flow| flow.ask())
    }

    /// Opens a connection from the calling thread's namespace that stays open until it is dropped.
    ///
    /// # Errors
    /// What it met instead.
    pub fn flow(&self) -> std::result::Result<Flow, Outcome> {
        Flow::open(self)
    }

    /// The same as [`ask`](Self::ask), of TCP, and where the outcome was decided.
    pub fn meet(&self) -> Met {
        match Flow::open(self) {
            Ok(mut flow) => {
                let outcome = flow.ask();
                match flow.local().and_then(peer_in_kernel) {
                    Ok(peer) => Met { outcome, at_socket: peer != self.to },
                    Err(error) => Met { outcome: error.into(), at_socket: false },
                }
            }
            Err(outcome) => {
                let at_once =
                    || is_refused_at_once(&Socket::new(self.domain(), Type::STREAM, None)?, self.to);
                let at_socket = outcome == Outcome::Refused && at_once().unwrap_or_default();
                Met { outcome, at_socket }
            }
        }
    }

    fn domain(&self) -> Domain {
        Domain::for_address(self.to)
    }

    fn connect(&self) -> io::Result<Transport> {
        let domain = self.domain();
        let transport = match self.proto {
            Proto::Tcp => {
                let socket = Socket::new(domain, Type::STREAM, None)?;
                socket.set_linger(Some(Duration::ZERO))?;
                socket.set_tcp_nodelay(true)?;
                socket.set_reuse_address(true)?;
                self.bind(&socket, self.from)?;
                connect(&socket, self.to, self.timeout)?;
                socket.set_read_timeout(Some(self.timeout))?;
                socket.set_write_timeout(Some(self.timeout))?;
                let stream = TcpStream::from(socket);
                // Applications are to see what they dialled, whoever they were led to.
                let peer = stream.peer_addr()?;
                if peer != self.to {
                    return Err(io::Error::other(format!("getpeername says {peer}")));
                }
                Transport::Tcp(BufReader::new(stream))
            }
            Proto::Udp => {
                let socket = Socket::new(domain, Type::DGRAM, None)?;
                if self.fresh_port {
                    bind_fresh_port(&socket, self.to)?;
                } else {
                    self.bind(&socket, self.from)?;
                }
                report_icmp(&socket, self.to)?;
                socket.connect(&self.to.into())?;
                Transport::Udp(socket.into())
            }
            Proto::Sctp => {
                let socket = sctp::socket(self.to.ip())?;
                let portless = |address: SocketAddr| SocketAddr::new(address.ip(), 0);
                self.bind(&socket, self.from.map(portless))?;
                report_icmp(&socket, self.to)?;
                socket.connect(&portless(self.to).into())?;
                let port = self.from.map(|from| from.port()).filter(|port| *port != 0);
                Transport::Sctp(sctp::Client::new(socket, self.to, port.unwrap_or_else(ephemeral_port)))
            }
        };
        Ok(transport)
    }

    fn bind(&self, socket: &Socket, from: Option<SocketAddr>) -> io::Result<()> {
        let Some(from) = from else { return Ok(()) };
        // `connect()` gives it a port, as it does to a socket that is not bound.
        if from.port() == 0 && self.proto == Proto::Tcp {
            setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
        }
        socket.bind(&from.into())
    }
}

/// Binds a socket to an ephemeral port that no other socket has.
fn bind_fresh_port(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    loop {
        match socket.bind(&SocketAddr::new(any, ephemeral_port()).into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            bound => return bound,
        }
    }
}

/// A port that was not given for a while: the kernel gives none to raw sockets.
fn ephemeral_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    32768 + NEXT.fetch_add(1, Ordering::Relaxed) % 28000
}

/// A connection that stays open (of UDP: a connected socket).
#[derive(Debug)]
pub struct Flow {
    transport: Transport,
    timeout: Duration,
    server: Server,
    tag: u32,
}

#[derive(Debug)]
enum Transport {
    Tcp(BufReader<TcpStream>),
    Udp(UdpSocket),
    Sctp(sctp::Client),
}

impl Flow {
    pub(crate) fn open(dial: &Dial) -> std::result::Result<Self, Outcome> {
        Ok(Self { transport: dial.connect()?, timeout: dial.timeout, server: dial.server, tag: 0 })
    }

    /// Asks the server who it is and whom it sees.
    pub fn ask(&mut self) -> Outcome {
        self.fetch(0)
    }

    /// The same, with an answer of at least this many bytes (of UDP: in one datagram; of SCTP: without them).
    pub fn fetch(&mut self, bytes: usize) -> Outcome {
        self.exchange(bytes).map_or_else(Outcome::from, |(by, seen)| Outcome::Answered { by, seen })
    }

    /// The client's own address.
    ///
    /// # Errors
    /// When the socket does not say.
    pub fn local(&self) -> io::Result<SocketAddr> {
        match &self.transport {
            Transport::Tcp(stream) => stream.get_ref().local_addr(),
            Transport::Udp(socket) => socket.local_addr(),
            Transport::Sctp(client) => client.local(),
        }
    }

    fn exchange(&mut self, bytes: usize) -> io::Result<(String, SocketAddr)> {
        match self.server {
            Server::Echo => self.exchange_with_echo(bytes),
            Server::Agnhost => self.exchange_with_agnhost(),
        }
    }

    fn exchange_with_agnhost(&mut self) -> io::Result<(String, SocketAddr)> {
        let deadline = Instant::now() + self.timeout;
        let mut ask = |what: &str| match &mut self.transport {
            Transport::Tcp(stream) => agnhost::get(stream, what),
            Transport::Udp(socket) => {
                send(socket, what.as_bytes())?;
                read_datagram(socket, deadline)
            }
            Transport::Sctp(_) => Err(io::ErrorKind::Unsupported.into()),
        };
        let by = ask("hostname")?;
        let seen = ask("clientip")?;
        let seen = seen.parse().map_err(|_| io::Error::other(format!("no client address: {seen:?}")))?;
        Ok((by, seen))
    }

    fn exchange_with_echo(&mut self, bytes: usize) -> io::Result<(String, SocketAddr)> {
        self.tag += 1;
        let request = format!("{} {bytes}\n", self.tag);
        let deadline = Instant::now() + self.timeout;
        match &mut self.transport {
            Transport::Tcp(stream) => stream.get_mut().write_all(request.as_bytes())?,
            Transport::Udp(socket) => send(socket, request.as_bytes())?,
            Transport::Sctp(client) => send(client.socket(), &client.init(self.tag))?,
        }
        loop {
            let answer = match &mut self.transport {
                Transport::Tcp(stream) => read_stream(stream, bytes)?,
                Transport::Udp(socket) => read_datagram(socket, deadline)?,
                Transport::Sctp(client) => read_cookie(client, self.tag, deadline)?,
            };
            let (tag, by, seen) = parse(&answer)?;
            // Not an answer that came too late for an earlier request.
            if tag == self.tag {
                return Ok((by, seen));
            }
        }
    }
}

fn read_stream(stream: &mut BufReader<TcpStream>, bytes: usize) -> io::Result<String> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    if !line.ends_with('\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let read = io::copy(&mut stream.take(bytes as u64), &mut io::sink())?;
    if read < bytes as u64 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(line) }
}

/// Sends a datagram. One that the own host's rules reject is "not permitted" to the sender, who hears of the ICMP error
/// besides: that is what matters.
fn send(socket: &UdpSocket, datagram: &[u8]) -> io::Result<()> {
    match socket.send(datagram) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(socket.take_error()?.unwrap_or(error))
        }
        other => other.map(drop),
    }
}

fn read_datagram(socket: &UdpSocket, deadline: Instant) -> io::Result<String> {
    await_until(socket, deadline)?;
    let mut buffer = vec![0; 65536];
    let length = socket.recv(&mut buffer)?;
    buffer.truncate(length);
    String::from_utf8(buffer).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn read_cookie(client: &sctp::Client, tag: u32, deadline: Instant) -> io::Result<String> {
    loop {
        await_until(client.socket(), deadline)?;
        if let Some(cookie) = client.receive(tag)? {
            return String::from_utf8(cookie).map_err(|_| io::ErrorKind::InvalidData.into());
        }
    }
}

/// Has the next read wait until then at most.
fn await_until(socket: &UdpSocket, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    socket.set_read_timeout(Some(left))
}

fn parse(answer: &str) -> io::Result<(u32, String, SocketAddr)> {
    let mut words = answer.lines().next().unwrap_or_default().split(' ');
    let mut parse =
        || Some((words.next()?.parse().ok()?, words.next()?.to_owned(), words.next()?.parse().ok()?));
    parse().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not the answer of an echo server"))
}

impl Host {
    /// Makes one new connection, asks, and closes it.
    ///
    /// # Errors
    /// When no thread can be started; what the connection meets is the [`Outcome`].
    pub fn dial(&self, proto: Proto, to: SocketAddr) -> Result<Outcome> {
        self.dial_with(Dial::new(proto, to))
    }

    /// The same with a source or a timeout of choice.
    ///
    /// # Errors
    /// As [`dial`](Self::dial).
    pub fn dial_with(&self, dial: Dial) -> Result<Outcome> {
        self.run(move || dial.ask())
    }

    /// Makes new connections one after the other, and counts who answered.
    ///
    /// # Errors
    /// As [`dial`](Self::dial).
    pub fn dial_many(&self, proto: Proto, to: SocketAddr, times: usize) -> Result<Tally> {
        let dial = Dial::new(proto, to);
        self.run(move || (0..times).map(|_| dial.ask()).collect())
    }

    /// Opens a connection that stays open until it is dropped.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn flow(&self, dial: Dial) -> Result<Flow> {
        self.run(move || Flow::open(&dial))?.map_err(|outcome| Error::Flow { to: dial.to, outcome })
    }
}
