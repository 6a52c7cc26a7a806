//! The rounds: one thread dials and accepts, so that nothing else runs while `connect()` is timed.
//!
//! Owns the clock. Nothing is timed but the system call itself.

use std::fs;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kube_lane_lab::peer_in_kernel;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt,
};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::super::api;
use super::{Site, Way};

/// Connections of each kind in a round.
pub(super) const DIALS: usize = 400;
/// How long one connection is kept in a round, and how many rounds there are.
const STREAM: (Duration, usize) = (Duration::from_millis(400), 5);
const CHUNK: usize = 64 * 1024;
/// The programs of a node's cgroup see no thread that is above it.
const OUTSIDE: &str = "../..";

/// Whom a client dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum To {
    /// The pods, from a cgroup that no program is attached to.
    Pod,
    /// The pods, past the programs of the node's cgroup.
    PodPastPrograms,
    /// The first Service.
    First,
    /// The last one.
    Last,
}

/// What connecting took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Dialled {
    pub(super) to: To,
    /// The least median of a round, in microseconds.
    pub(super) best_us: f64,
    /// The median of each round.
    pub(super) medians_us: Vec<f64>,
}

/// What a connection that is kept carries, at its best round.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Stream {
    pub(super) bytes_per_second: f64,
    /// Processor time of both ends and of the kernel between them.
    pub(super) cpu_ns_per_kib: f64,
}

/// Dials everything that the sites have, in turn; by site.
pub(super) fn connects(sites: &[&Site], rounds: usize) -> Result<Vec<Vec<Dialled>>> {
    let mut all: Vec<Vec<Dialled>> = sites.iter().map(|site| site.targets()).collect();
    for round in 0..rounds {
        for at in 0..sites.len() {
            // Each round begins with another site.
            let at = (at + round) % sites.len();
            for dialled in &mut all[at] {
                let median = sites[at].round(dialled.to)?;
                dialled.medians_us.push(median);
                dialled.best_us = dialled.best_us.min(median);
            }
        }
    }
    Ok(all)
}

/// Keeps a connection through the last Service of each site (where there is none: to a pod) busy, in turn.
pub(super) fn streams(sites: &[&Site]) -> Result<Vec<Stream>> {
    let mut best = vec![Stream { bytes_per_second: 0.0, cpu_ns_per_kib: f64::INFINITY }; sites.len()];
    for _ in 0..STREAM.1 {
        for (site, best) in sites.iter().zip(&mut best) {
            let one = site.stream()?;
            if one.bytes_per_second > best.bytes_per_second {
                *best = one;
            }
        }
    }
    Ok(best)
}

/// Whether a dial reaches one of the listeners, in ebpf at the socket. For the calling thread's namespace.
pub(super) fn answers(to: SocketAddr, listeners: &[TcpListener], at_socket: bool) -> io::Result<bool> {
    const LIMIT: Duration = Duration::from_millis(50);
    let Ok(stream) = TcpStream::connect_timeout(&to, LIMIT) else { return Ok(false) };
    accept(listeners)?;
    Ok(!at_socket || peer_in_kernel(stream.local_addr()?)? != to)
}

impl Site {
    fn targets(&self) -> Vec<Dialled> {
        let all: &[To] = match self.way {
            Way::Bare => &[To::Pod],
            Way::Ebpf => &[To::Pod, To::PodPastPrograms, To::First, To::Last],
            _ => &[To::Pod, To::First, To::Last],
        };
        let none = |to: &To| Dialled { to: *to, best_us: f64::INFINITY, medians_us: vec![] };
        all.iter().map(none).collect()
    }

    /// What is dialled in turn: where it is pods, all of them, since a Service leads to all of them as well.
    fn addresses(&self, to: To) -> Result<Vec<SocketAddr>> {
        Ok(match to {
            To::Pod | To::PodPastPrograms => {
                self.listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?
            }
            To::First => vec![api::vip(0)],
            To::Last => vec![api::vip(self.services - 1)],
        })
    }

    /// The median of one round, in microseconds.
    fn round(&self, to: To) -> Result<f64> {
        let addresses = self.addresses(to)?;
        let listeners = self.listeners.iter().map(TcpListener::try_clone).collect::<Result<Vec<_>, _>>()?;
        let threads = self.threads(to);
        self.client.run(move || -> Result<f64> {
            fs::write(&threads, "0").with_context(|| format!("cannot enter {}", threads.display()))?;
            pin(1)?;
            let mut took = Vec::with_capacity(DIALS);
            for address in addresses.iter().cycle().take(DIALS) {
                took.push(timed(*address, &listeners)?);
            }
            took.sort_unstable();
            Ok(took[DIALS / 2].as_secs_f64() * 1e6)
        })?
    }

    /// The cgroup that a client is in, by the file that threads enter it with.
    fn threads(&self, to: To) -> PathBuf {
        let own = self.client.cgroup();
        let cgroup = if to == To::Pod { own.join(OUTSIDE) } else { own.to_owned() };
        cgroup.join("cgroup.threads")
    }

    fn stream(&self) -> Result<Stream> {
        let addresses = self.addresses(if self.way == Way::Bare { To::Pod } else { To::Last })?;
        let to = *addresses.first().context("nobody serves")?;
        let mut client = self.client.run(move || TcpStream::connect(to))??;
        let mut server = accept(&self.listeners)?;
        server.set_nonblocking(false)?;
        let (length, _) = STREAM;
        let write = move || -> Result<Duration> {
            pin(0)?;
            let (chunk, end) = ([0; CHUNK], Instant::now() + length);
            while Instant::now() < end {
                client.write_all(&chunk)?;
            }
            spent()
        };
        let read = move || -> Result<(usize, Duration)> {
            pin(1)?;
            let (mut chunk, mut bytes) = ([0; CHUNK], 0);
            loop {
                match server.read(&mut chunk)? {
                    0 => return Ok((bytes, spent()?)),
                    some => bytes += some,
                }
            }
        };
        std::thread::scope(|scope| {
            let begun = Instant::now();
            let (writer, reader) = (scope.spawn(write), scope.spawn(read));
            let (Ok(wrote), Ok(read)) = (writer.join(), reader.join()) else { bail!("a thread panicked") };
            let (sent, (bytes, received)) = (wrote?, read?);
            let kib = bytes as f64 / 1024.0;
            Ok(Stream {
                bytes_per_second: bytes as f64 / begun.elapsed().as_secs_f64(),
                cpu_ns_per_kib: (sent + received).as_nanos() as f64 / kib,
            })
        })
    }
}

/// Connects once, and how long the system call took.
fn timed(to: SocketAddr, listeners: &[TcpListener]) -> Result<Duration> {
    let client = tcp_socket(to)?;
    let address = SockaddrStorage::from(to);
    let begun = Instant::now();
    connect(client.as_raw_fd(), &address)?;
    let took = begun.elapsed();
    drop(accept(listeners)?);
    Ok(took)
}

/// A blocking socket that is reset when closed, so that its port is free again at once.
fn tcp_socket(to: SocketAddr) -> Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
    Ok(socket)
}

/// Takes the connection that has just been made.
fn accept(listeners: &[TcpListener]) -> io::Result<TcpStream> {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        for listener in listeners {
            match listener.accept() {
                Ok((stream, _)) => return Ok(stream),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        if Instant::now() > deadline {
            return Err(ErrorKind::TimedOut.into());
        }
    }
}

/// Keeps the calling thread on one processor, where the machine has it.
fn pin(processor: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(processor % std::thread::available_parallelism()?)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Processor time of the calling thread so far.
fn spent() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
