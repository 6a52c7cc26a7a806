//! One agent a network namespace: two would each repair what the other wrote, for ever.
//!
//! Owns the mark of the one that runs, an abstract socket: it is the network namespace's own, needs no place on disk
//! that pods would have to share, and goes with its process however that ends. `kube-lane status` asks there.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use tracing::warn;

/// The socket's name.
const NAME: &str = "kube-lane";

/// Another agent runs in this network namespace.
#[derive(Debug, thiserror::Error)]
#[error(
    "another kube-lane runs on this node (pid {pid}): stop it first, since two would fight over the same tables"
)]
pub(super) struct AnotherAgent {
    pid: i32,
}

/// Marks this process as the agent of its network namespace, as long as the listener is open. Where there can be no
/// mark, a warning says so: a second agent would not be noticed, and the status cannot be asked for.
///
/// # Errors
/// When there is an agent already.
pub(super) fn claim() -> Result<Option<UnixListener>, AnotherAgent> {
    let error = match address().and_then(|address| UnixListener::bind_addr(&address)) {
        Ok(listener) => return Ok(Some(listener)),
        Err(error) => error,
    };
    match running() {
        Ok(Some(pid)) => Err(AnotherAgent { pid }),
        Ok(None) | Err(_) => {
            warn!(%error, "cannot have the abstract socket `{NAME}`: a second agent would not be noticed");
            Ok(None)
        }
    }
}

/// The process id of the agent that runs in this network namespace, where there is one; 0: of another process
/// namespace.
///
/// # Errors
/// When the socket cannot be asked.
pub(super) fn running() -> io::Result<Option<i32>> {
    Ok(connect()?.map(|(_, pid)| pid))
}

/// A connection to that agent, to ask it something.
///
/// # Errors
/// As [`running`].
pub(super) fn agent() -> io::Result<Option<UnixStream>> {
    Ok(connect()?.map(|(stream, _)| stream))
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
