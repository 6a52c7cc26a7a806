//! The addresses of the host's interfaces, followed live: NodePorts answer there where the configuration says so, and
//! while the own Node is unknown; the socket layer leaves Services' addresses alone that are among them.
//!
//! Owns the subscription to address changes. Never decides which addresses count: the model does.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::model::input::Event;
use crate::ready;

/// Sends the addresses now and whenever they change, until the receiver is dropped.
///
/// # Errors
/// When the subscription cannot be had.
pub fn spawn(events: mpsc::Sender<Vec<Event>>) -> io::Result<JoinHandle<()>> {
    let socket = subscribe()?;
    Ok(tokio::spawn(async move {
        if let Err(error) = follow(socket, events).await {
            warn!(%error, "changes of the host's addresses are no longer noticed");
        }
    }))
}

async fn follow(socket: AsyncFd<OwnedFd>, events: mpsc::Sender<Vec<Event>>) -> io::Result<()> {
    let mut last = None;
    loop {
        let addresses = addresses()?;
        if last.as_ref() != Some(&addresses) {
            if events.send(vec![Event::HostAddresses(addresses.clone())]).await.is_err() {
                return Ok(());
            }
            last = Some(addresses);
        }
        tokio::select! {
            ready = socket.readable() => {
                let mut ready = ready?;
                drain(socket.get_ref())?;
                ready.clear_ready();
            }
            () = events.closed() => return Ok(()),
        }
    }
}

fn subscribe() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    let groups = (libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR) as u32;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    ready::readable(socket)
}

/// What was said does not matter, only that something was: the addresses are listed afresh.
fn drain(socket: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0; 8192];
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
            Err(Errno::EAGAIN) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn addresses() -> io::Result<Vec<IpAddr>> {
    let mut addresses: Vec<IpAddr> = getifaddrs()?
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| address.ip().into());
            v4.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().into()))
        })
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}
