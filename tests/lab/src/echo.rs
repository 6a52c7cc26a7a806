//! Echo servers: they say who they are and whom they saw.
//!
//! Owns the server's half of the echo protocol, which `client` describes. All servers of a lab share one thread; their
//! sockets are made in their host's namespace and stay there.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::client::Proto;
use crate::error::{Doing, Result};
use crate::host::Host;
use crate::sctp;

/// A running echo server. Dropping it closes its sockets before the drop returns; connections end a moment later.
#[derive(Debug)]
#[must_use = "an echo server that is dropped stops"]
pub struct Echo {
    port: u16,
    primary: [IpAddr; 2],
    state: Arc<State>,
    pace: watch::Sender<Pace>,
    stop: Option<oneshot::Sender<()>>,
    stopped: mpsc::Receiver<()>,
}

#[derive(Debug)]
struct State {
    identity: Arc<str>,
    answers: AtomicU64,
    connections: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Pace {
    paused: bool,
    delay: Duration,
}

/// What every task of a server holds.
#[derive(Clone)]
struct Answerer {
    state: Arc<State>,
    pace: watch::Receiver<Pace>,
}

enum Listener {
    Tcp(TcpListener),
    Udp(UdpSocket),
    Sctp(UdpSocket, u16),
}

impl Host {
    /// Serves on a port of every address the host has: answers as the host's name.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn serve(&self, proto: Proto, port: u16) -> Result<Echo> {
        match proto {
            Proto::Tcp => self.serve_at(proto, &[(Ipv6Addr::UNSPECIFIED, port).into()]),
            // A socket for each address, so that each answer leaves from the address that was asked.
            Proto::Udp | Proto::Sctp => {
                let at: Vec<_> = self.addresses().into_iter().map(|ip| (ip, port).into()).collect();
                self.serve_at(proto, &at)
            }
        }
    }

    /// Serves on these addresses only, which share one count. `[::]` includes IPv4.
    ///
    /// # Errors
    /// When an address is not the host's, or its port is taken.
    pub fn serve_at(&self, proto: Proto, at: &[SocketAddr]) -> Result<Echo> {
        let listeners = {
            let at = at.to_vec();
            self.run(move || at.iter().map(|at| listen(proto, *at)).collect::<io::Result<Vec<_>>>())?
                .doing(|| format!("serve {proto} on {}", self.name()))?
        };
        let state = State {
            identity: self.shared_name(),
            answers: AtomicU64::new(0),
            connections: AtomicU64::new(0),
        };
        let (pace, paced) = watch::channel(Pace { paused: false, delay: Duration::ZERO });
        let answerer = Answerer { state: Arc::new(state), pace: paced };
        let (stop, stopping) = oneshot::channel::<()>();
        let (ended, stopped) = mpsc::channel();
        let state = Arc::clone(&answerer.state);
        let mut tasks = JoinSet::new();
        let guard = self.servers().enter();
        for listener in listeners {
            let answerer = answerer.clone();
            match listener {
                Listener::Tcp(listener) => {
                    let listener = net::TcpListener::from_std(listener);
                    let listener = listener.doing(|| "watch a listener".into())?;
                    tasks.spawn(accept(listener, answerer));
                }
                Listener::Udp(socket) => {
                    let socket = net::UdpSocket::from_std(socket).doing(|| "watch a socket".into())?;
                    tasks.spawn(answer_datagrams(socket, answerer));
                }
                Listener::Sctp(socket, port) => {
                    let socket = net::UdpSocket::from_std(socket).doing(|| "watch a socket".into())?;
                    tasks.spawn(answer_inits(socket, port, answerer));
                }
            }
        }
        drop(guard);
        self.servers().spawn(async move {
            // Either told to stop, or the server is gone: the same.
            let _ = stopping.await;
            tasks.shutdown().await;
            drop(ended);
        });
        let port = at.first().map_or(0, SocketAddr::port);
        let primary = [self.v4(), self.v6()];
        Ok(Echo { port, primary, state, pace, stop: Some(stop), stopped })
    }
}

impl Echo {
    /// The host's first IPv4 address, and the port.
    pub fn v4(&self) -> SocketAddr {
        (self.primary[0], self.port).into()
    }

    /// The host's first IPv6 address, and the port.
    pub fn v6(&self) -> SocketAddr {
        (self.primary[1], self.port).into()
    }

    /// How many requests it has answered.
    pub fn count(&self) -> u64 {
        self.state.answers.load(Ordering::Relaxed)
    }

    /// How many connections it has accepted; none for UDP.
    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// Takes requests but answers none until [`resume`](Self::resume).
    pub fn pause(&self) {
        self.pace.send_modify(|pace| pace.paused = true);
    }

    /// Answers again, first what came during the pause.
    pub fn resume(&self) {
        self.pace.send_modify(|pace| pace.paused = false);
    }

    /// Waits this long before each answer from now on.
    pub fn delay(&self, delay: Duration) {
        self.pace.send_modify(|pace| pace.delay = delay);
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        drop(self.stop.take());
        // Ends when the last task has: nothing is ever sent.
        let _ = self.stopped.recv();
    }
}

fn listen(proto: Proto, at: SocketAddr) -> io::Result<Listener> {
    let socket = match proto {
        Proto::Tcp => Socket::new(Domain::for_address(at), Type::STREAM, None)?,
        Proto::Udp => Socket::new(Domain::for_address(at), Type::DGRAM, None)?,
        Proto::Sctp => sctp::socket(at.ip())?,
    };
    socket.set_nonblocking(true)?;
    // A raw socket is of one family anyway.
    if at.is_ipv6() && proto != Proto::Sctp {
        socket.set_only_v6(!at.ip().is_unspecified())?;
    }
    Ok(match proto {
        Proto::Tcp => {
            socket.set_reuse_address(true)?;
            socket.bind(&at.into())?;
            socket.listen(1024)?;
            Listener::Tcp(socket.into())
        }
        Proto::Udp => {
            socket.bind(&at.into())?;
            Listener::Udp(socket.into())
        }
        Proto::Sctp => {
            socket.bind(&SocketAddr::new(at.ip(), 0).into())?;
            Listener::Sctp(socket.into(), at.port())
        }
    })
}

impl Answerer {
    /// The answer to a request, when it is time for it.
    async fn answer(&mut self, request: &str, peer: SocketAddr) -> Vec<u8> {
        let delay = match self.pace.wait_for(|pace| !pace.paused).await {
            Ok(pace) => pace.delay,
            Err(_) => Duration::ZERO,
        };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        self.state.answers.fetch_add(1, Ordering::Relaxed);
        let mut words = request.split_whitespace();
        let tag = words.next().unwrap_or("-");
        let bytes: usize = words.next().and_then(|bytes| bytes.parse().ok()).unwrap_or(0);
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let mut answer = format!("{tag} {} {peer}\n", self.state.identity).into_bytes();
        answer.resize(answer.len() + bytes, b'x');
        answer
    }
}

async fn accept(listener: net::TcpListener, answerer: Answerer) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    answerer.state.connections.fetch_add(1, Ordering::Relaxed);
                    connections.spawn(answer_lines(stream, peer, answerer.clone()));
                }
                // Of one connection that is already gone, or no descriptors left for a while.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer_lines(stream: net::TcpStream, peer: SocketAddr, mut answerer: Answerer) -> io::Result<()> {
    // Longer than any request of ours; a client that sends more is closed.
    const LONGEST: u64 = 1024;
    stream.set_nodelay(true)?;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = String::new();
        (&mut reader).take(LONGEST).read_line(&mut line).await?;
        if !line.ends_with('\n') {
            return Ok(());
        }
        writer.write_all(&answerer.answer(&line, peer).await).await?;
    }
}

async fn answer_datagrams(socket: net::UdpSocket, mut answerer: Answerer) {
    let mut buffer = vec![0; 65536];
    loop {
        // Errors are about datagrams sent earlier, to clients that have gone.
        if let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            let request = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let answer = answerer.answer(&request, peer).await;
            let _ = socket.send_to(&answer, peer).await;
        }
    }
}

async fn answer_inits(socket: net::UdpSocket, port: u16, mut answerer: Answerer) {
    let mut buffer = [0; 2048];
    loop {
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else { continue };
        let init = sctp::Packet::decode(&buffer[..length], peer.is_ipv4());
        // A raw socket receives what goes to other ports, too.
        let Some(init) = init.filter(|init| init.destination == port && init.cookie.is_none()) else {
            continue;
        };
        let seen = SocketAddr::new(peer.ip(), init.source);
        let answer = answerer.answer(&init.initiate_tag.to_string(), seen).await;
        let ack = sctp::Packet {
            source: port,
            destination: init.source,
            verification_tag: init.initiate_tag,
            initiate_tag: 1,
            cookie: Some(answer),
        };
        let _ = socket.send_to(&ack.encode(), SocketAddr::new(peer.ip(), 0)).await;
    }
}
