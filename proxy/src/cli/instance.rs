//! One agent a network namespace: two would each repair what the other wrote, for ever.
//!
//! Owns the mark of the one that runs, an abstract socket: it is the network namespace's own, needs no place on disk
//! that pods would have to share, and goes with its process however that ends. `kube-lane status` and
//! `kube-lane probe` ask there.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use tracing::warn;

/// The socket's name.
const NAME: &str = "kube-lane";

/// An agent runs in this network namespace.
#[derive(Debug, thiserror::Error)]
#[error("another kube-lane runs on this node ({}): stop it first", process(*.pid))]
pub(super) struct AnotherAgent {
    /// `None`: its process namespace is another.
    pid: Option<i32>,
}

fn process(pid: Option<i32>) -> String {
    pid.map_or_else(|| "in another process namespace".into(), |pid| format!("pid {pid}"))
}

/// Marks this process as the only one that programs its network namespace, as long as the listener is open. Where there
/// can be no mark, a warning says so: a second one would not be noticed, and the status cannot be asked for.
///
/// # Errors
/// When there is an agent already.
pub(super) fn claim() -> Result<Option<UnixListener>, AnotherAgent> {
    let error = match address().and_then(|address| UnixListener::bind_addr(&address)) {
        Ok(listener) => return Ok(Some(listener)),
        Err(error) => error,
    };
    match connect() {
        // The kernel says 0 where the process namespace is another.
        Ok(Some((_, pid))) => Err(AnotherAgent { pid: Some(pid).filter(|pid| *pid != 0) }),
        Ok(None) | Err(_) => {
            warn!(%error, "cannot have the abstract socket `{NAME}`: a second agent would not be noticed");
            Ok(None)
        }
    }
}

/// A connection to the agent that runs in this network namespace, where there is one, to ask it something.
///
/// # Errors
/// When the socket cannot be asked.
pub(super) fn agent() -> io::Result<Option<UnixStream>> {
    Ok(connect()?.map(|(stream, _)| stream))
}

/// Why there is no agent of this container to ask.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoAgent {
    /// Nobody listens.
    #[error(
        "no kube-lane runs here (in this network namespace, as this user): the agent has not started yet, or it has ended"
    )]
    Nobody,
    /// The agent that listens is another container's.
    #[error(
        "the kube-lane that runs on this node is not this container's: its process is in another PID namespace. Stop that \
         one (an older pod, or a systemd unit), so that the agent here can start"
    )]
    Elsewhere,
    /// The socket cannot be asked.
    #[error("cannot ask the agent on the abstract socket `{NAME}`")]
    Socket(#[from] io::Error),
}

/// A connection to the agent of this container. The network namespace is the whole node's, and so is the abstract socket: the
/// PID namespace tells whether the agent that has it is the one that a kubelet asks about.
///
/// # Errors
/// When there is none.
pub(super) fn own_agent() -> Result<UnixStream, NoAgent> {
    match connect()? {
        // The kernel gives 0 for a process that our PID namespace does not hold.
        Some((_, 0)) => Err(NoAgent::Elsewhere),
        Some((stream, _)) => Ok(stream),
        None => Err(NoAgent::Nobody),
    }
}

fn connect() -> io::Result<Option<(UnixStream, i32)>> {
    let stream = match UnixStream::connect_addr(&address()?) {
        Ok(stream) => stream,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(None),
        Err(error) => return Err(error),
    };
    let peer = getsockopt(&stream, sockopt::PeerCredentials)?;
    // Everybody may take an abstract name: it means an agent only where a process could be one.
    Ok((peer.uid() == geteuid().as_raw()).then_some((stream, peer.pid())))
}

fn address() -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(NAME)
}
