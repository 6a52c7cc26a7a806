//! Connecting a TCP socket so that no ICMP error gets lost.
//!
//! On a veth the answer to a SYN can arrive while `connect()` is still at work on the socket. The kernel then only
//! notes an ICMP error and sends the SYN once more after a second; on a real wire, which is slower than the end of
//! `connect()`, the client hears of it at once. So the error is taken from the socket's error queue, where it always
//! is, and refused means refused now.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use socket2::Socket;

/// Has ICMP errors reported that are not fatal by themselves, such as "host unreachable".
pub(crate) fn report_icmp(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    match to {
        SocketAddr::V4(_) => setsockopt(socket, sockopt::Ipv4RecvErr, &true)?,
        SocketAddr::V6(_) => setsockopt(socket, sockopt::Ipv6RecvErr, &true)?,
    }
    Ok(())
}

/// Connects within the timeout, or says which error came first.
pub(crate) fn connect(socket: &Socket, to: SocketAddr, timeout: Duration) -> io::Result<()> {
    report_icmp(socket, to)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => wait(socket, timeout)?,
        other => other?,
    }
    socket.set_nonblocking(false)
}

fn wait(socket: &Socket, timeout: Duration) -> io::Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        // Rounded up, so that the last round waits rather than spins.
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut polled, left) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if let Some(error) = socket.take_error()? {
            return Err(error);
        }
        let events = polled[0].revents().unwrap_or(PollFlags::empty());
        if events.contains(PollFlags::POLLERR) {
            if let Some(error) = queued_error(socket) {
                return Err(error);
            }
        } else if events.contains(PollFlags::POLLOUT) {
            return Ok(());
        }
    }
}

/// The next error that ICMP reported.
fn queued_error(socket: &Socket) -> Option<io::Error> {
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut [], Some(&mut space), flags).ok()?;
    message.cmsgs().ok()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
            Some(io::Error::from_raw_os_error(error.ee_errno.cast_signed()))
        }
        _ => None,
    })
}
