//! Connecting a TCP socket so that no ICMP error gets lost, and whom the kernel has connected it to.
//!
//! On a veth the answer to a SYN can arrive while `connect()` is still at work on the socket. The kernel then only
//! notes an ICMP error and sends the SYN once more after a second; on a real wire, which is slower than the end of
//! `connect()`, the client hears of it at once. So the error is taken from the socket's error queue, where it always
//! is, and refused means refused now.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
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

/// Whether `connect()` itself refuses, before a packet has left. A packet's refusal can only come after: as long as
/// `connect()` has the socket, what arrives for it waits.
pub(crate) fn is_refused_at_once(socket: &Socket, to: SocketAddr) -> io::Result<bool> {
    socket.set_nonblocking(true)?;
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    Ok(socket.connect(&to.into()).is_err_and(refused))
}

/// Whom the kernel has connected the socket with this address to. `getpeername()` is no evidence: eBPF programs have a
/// say in what it answers. For the calling thread's network namespace.
///
/// # Errors
/// When there is no such socket.
pub fn peer_in_kernel(local: SocketAddr) -> io::Result<SocketAddr> {
    let table = if local.is_ipv4() { "tcp" } else { "tcp6" };
    let table = fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
    let peer = table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        (parse(fields.next()?)? == local).then(|| parse(fields.next()?)).flatten()
    });
    peer.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no socket has {local}")))
}

/// An address and a port as `/proc/net/tcp` has them: words of a network-order address, each in the host's order.
fn parse(text: &str) -> Option<SocketAddr> {
    let (words, port) = text.split_once(':')?;
    let mut octets = [0; 16];
    for (at, octets) in octets.chunks_mut(4).enumerate().take(words.len() / 8) {
        let word = u32::from_str_radix(words.get(at * 8..at * 8 + 8)?, 16).ok()?;
        octets.copy_from_slice(&word.to_ne_bytes());
    }
    let [a, b, c, d, ..] = octets;
    let ip = if words.len() == 8 { IpAddr::from([a, b, c, d]) } else { Ipv6Addr::from(octets).into() };
    Some((ip, u16::from_str_radix(port, 16).ok()?).into())
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

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_kernel_says_whom_it_has_connected_a_socket_to() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let to = TcpListener::bind(any).unwrap();
            let stream = TcpStream::connect(to.local_addr().unwrap()).unwrap();
            assert_eq!(peer_in_kernel(stream.local_addr().unwrap()).unwrap(), to.local_addr().unwrap());
        }
    }
}
