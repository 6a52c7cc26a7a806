//! One agent a network namespace: two would each repair what the other wrote, for ever.
//!
//! Owns the mark of the one that runs, an abstract socket: it is the network namespace's own, needs no place on disk
//! that pods would have to share, and goes with its process however that ends.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

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

/// Marks this process as the agent of its network namespace, until it ends. Where there can be no mark, a warning says
/// so: a second agent would not be noticed.
///
/// # Errors
/// When there is an agent already.
pub(super) fn claim() -> Result<(), AnotherAgent> {
    let marked = address().and_then(|address| UnixListener::bind_addr(&address)).and_then(|listener| {
        thread::Builder::new().name("instance".into()).spawn(move || answer(&listener)).map(drop)
    });
    let Err(error) = marked else { return Ok(()) };
    match running() {
        Ok(Some(pid)) => Err(AnotherAgent { pid }),
        Ok(None) | Err(_) => {
            warn!(%error, "cannot have the abstract socket `{NAME}`: a second agent would not be noticed");
            Ok(())
        }
    }
}

/// Takes what comes, so that nobody who asks has to wait: that there is a socket says all.
fn answer(listener: &UnixListener) {
    for stream in listener.incoming() {
        if stream.is_err() {
            thread::sleep(Duration::from_secs(1));
        }
    }
}

/// The process id of the agent that runs in this network namespace, where there is one; 0: of another process
/// namespace.
///
/// # Errors
/// When the socket cannot be asked.
pub(super) fn running() -> io::Result<Option<i32>> {
    let stream = match UnixStream::connect_addr(&address()?) {
        Ok(stream) => stream,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(None),
        Err(error) => return Err(error),
    };
    let peer = getsockopt(&stream, sockopt::PeerCredentials)?;
    // Everybody may take an abstract name: it means an agent only where a process could be one.
    Ok((peer.uid() == geteuid().as_raw()).then(|| peer.pid()))
}

fn address() -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(NAME)
}
