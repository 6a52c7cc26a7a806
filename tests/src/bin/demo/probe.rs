//! Clients that dial every target in turn, from their own place, until they are stopped.
//!
//! Owns the dialling threads. Never judges an outcome.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use kube_lane_lab::{Dial, Host, Met, Outcome, Proto};

/// Between two dials, while nobody measures.
const PAUSE: Duration = Duration::from_millis(2);

/// How long a client waits for a connection, and again for the answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is dialled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    /// Which of a Service's addresses it is.
    pub(crate) kind: &'static str,
    pub(crate) proto: Proto,
    pub(crate) at: SocketAddr,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Sample {
    /// Index of the client.
    pub(crate) client: usize,
    /// Index of the target.
    pub(crate) target: usize,
    pub(crate) ended: Instant,
    pub(crate) outcome: Outcome,
    /// Whether the socket itself was led there; looked at only of TCP, while nobody measures.
    pub(crate) at_socket: Option<bool>,
}

/// The running clients.
#[derive(Debug)]
pub(crate) struct Probes {
    samples: Receiver<Sample>,
    is_hurried: Arc<AtomicBool>,
    is_stopped: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Probes {
    /// Starts one client on each of these hosts.
    pub(crate) fn start(hosts: Vec<Host>, targets: &Arc<[Target]>) -> Result<Self> {
        let (sender, samples) = channel();
        let mut probes =
            Self { samples, is_hurried: Arc::default(), is_stopped: Arc::default(), clients: Vec::new() };
        for (client, host) in hosts.into_iter().enumerate() {
            let dialling = Dialling {
                client,
                targets: Arc::clone(targets),
                samples: sender.clone(),
                is_hurried: Arc::clone(&probes.is_hurried),
                is_stopped: Arc::clone(&probes.is_stopped),
            };
            let thread = std::thread::Builder::new().name("demo-client".into());
            // Ends early only where no thread can be had in the namespace: then its samples never come.
            probes.clients.push(thread.spawn(move || host.run(move || dialling.run()).unwrap_or_default())?);
        }
        Ok(probes)
    }

    /// Makes the clients dial without a pause, or with one again.
    pub(crate) fn hurry(&self, is_hurried: bool) {
        self.is_hurried.store(is_hurried, Ordering::Relaxed);
    }

    /// The next connection that has ended, if one does within this time.
    pub(crate) fn next(&self, within: Duration) -> Option<Sample> {
        self.samples.recv_timeout(within).ok()
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            let _ = client.join();
        }
    }
}

struct Dialling {
    client: usize,
    targets: Arc<[Target]>,
    samples: Sender<Sample>,
    is_hurried: Arc<AtomicBool>,
    is_stopped: Arc<AtomicBool>,
}

impl Dialling {
    fn run(self) {
        let mut ports = SourcePorts::default();
        loop {
            for (target, &Target { proto, at, .. }) in self.targets.iter().enumerate() {
                if self.is_stopped.load(Ordering::Relaxed) {
                    return;
                }
                let mut dial = Dial::new(proto, at).timeout(PATIENCE);
                if proto == Proto::Udp {
                    dial = dial.from(ports.next(at));
                }
                let is_hurried = self.is_hurried.load(Ordering::Relaxed);
                let (outcome, at_socket) = if proto == Proto::Tcp && !is_hurried {
                    let Met { outcome, at_socket } = dial.meet();
                    (outcome, Some(at_socket))
                } else {
                    (dial.ask(), None)
                };
                let sample =
                    Sample { client: self.client, target, ended: Instant::now(), outcome, at_socket };
                if self.samples.send(sample).is_err() {
                    return;
                }
                if !is_hurried {
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }
}

/// Source ports for UDP, none of them twice: conntrack remembers a flow for half a minute, and a port that comes back
/// is the old flow, led to its old endpoint.
struct SourcePorts(u16);

impl Default for SourcePorts {
    fn default() -> Self {
        Self(10_000)
    }
}

impl SourcePorts {
    fn next(&mut self, to: SocketAddr) -> SocketAddr {
        self.0 = self.0.checked_add(1).unwrap_or(10_000);
        let any: std::net::IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        SocketAddr::new(any, self.0)
    }
}
