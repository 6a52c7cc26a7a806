//! UDP: datagrams of sockets that are not connected.
//!
//! Owns what a socket remembers of where it sent to, so that a client that sends many datagrams to a frontend meets one
//! backend, and is told the frontend as the source of what that answers. The kernel holds the socket's lock while any
//! of this runs.

use aya_ebpf::programs::SockAddrContext;
use kube_lane_common::{Backend, FrontendKey, Peer, Peers, Reverse, UDP};

use crate::maps::UDP_PEERS;
use crate::rewrite::{self, Family};
use crate::select::{self, Answer};
use crate::{PASS, client, stats};

/// A datagram that names its destination.
#[inline(always)]
pub(crate) fn send<F: Family>(context: &SockAddrContext) -> i32 {
    try_send::<F>(context).unwrap_or(PASS)
}

#[inline(always)]
fn try_send<F: Family>(context: &SockAddrContext) -> Option<i32> {
    // Such a socket names a destination where the kernel does it for one that is connected to a v4-mapped address.
    if rewrite::is_connected(context) {
        return None;
    }
    client::rules()?;
    let key = rewrite::key::<F>(context, UDP);
    let Some(asked) = select::asked(context, &key, F::sender) else {
        note_direct(peers(context)?, key);
        return None;
    };
    let peers = peers(context)?;
    let place = place(peers, &key)?;
    let known = peers.0.get(place)?;
    if known.backend == Peer::LEFT {
        return None;
    }
    // An id may have been used again since.
    let backend = select::member(known.backend, asked.set)
        .filter(|backend| known.reverse.address == backend.address && known.reverse.port == backend.port);
    let backend = match backend {
        Some(backend) => backend,
        None => match select::answer(asked, &key)? {
            // By ICMP, of which a socket that is not connected hears nothing.
            Answer::Refused(_) => return None,
            Answer::Backend(id, backend) => {
                let is_shared = is_anothers(peers, &key, backend);
                let peer = peers.0.get_mut(place)?;
                if is_shared {
                    peer.reverse.frontend = key;
                    peer.backend = Peer::LEFT;
                    return None;
                }
                *peer = Peer { reverse: Reverse::new(key, backend.address, backend.port), backend: id };
                stats::connection(id);
                backend
            }
        },
    };
    rewrite::set::<F>(context, backend.address, backend.port);
    Some(PASS)
}

/// What the socket remembers; `None` where the kernel has no memory for it.
#[inline(always)]
fn peers(context: &SockAddrContext) -> Option<&'static mut Peers> {
    // SAFETY: the socket is the context's; the kernel gives null or a pointer to its storage, which nothing else uses
    // while it holds the socket's lock.
    unsafe { UDP_PEERS.get_or_insert_ptr_mut(context, None).as_mut() }
}

/// The socket sends to an address by its own name. A frontend that led the socket there is left to nftables from now on,
/// as is one that would lead there later: nftables tells the answers apart by giving a flow another source port.
#[inline(always)]
fn note_direct(peers: &mut Peers, key: FrontendKey) {
    for peer in &mut peers.0 {
        let Reverse { frontend, address, port, .. } = peer.reverse;
        if address == key.address && port == key.port && frontend != key {
            *peer = Peer {
                reverse: Reverse::new(frontend, frontend.address, frontend.port),
                backend: Peer::LEFT,
            };
        }
    }
    if let Some(peer) = place(peers, &key).and_then(|place| peers.0.get_mut(place)) {
        *peer = Peer { reverse: Reverse::new(key, key.address, key.port), backend: Peer::LEFT };
    }
}

/// The index of what is remembered of the frontend, or of where to.
#[inline(always)]
fn place(peers: &Peers, key: &FrontendKey) -> Option<usize> {
    peers.0.iter().position(|peer| peer.backend == 0 || peer.reverse.frontend == *key)
}

/// Whether another frontend of the socket led to this backend.
#[inline(always)]
fn is_anothers(peers: &Peers, key: &FrontendKey, backend: &Backend) -> bool {
    peers.0.iter().any(|peer| {
        let reverse = &peer.reverse;
        reverse.address == backend.address && reverse.port == backend.port && reverse.frontend != *key
    })
}

/// A datagram whose receiver asks where it is from.
#[inline(always)]
pub(crate) fn receive<F: Family>(context: &SockAddrContext) {
    // SAFETY: as in `try_send`.
    let Some(peers) = (unsafe { UDP_PEERS.get_ptr_mut(context).as_ref() }) else { return };
    let (address, port) = (F::address(context), rewrite::port(context));
    let peer = peers.0.iter().find(|peer| peer.reverse.address == address && peer.reverse.port == port);
    if let Some(peer) = peer {
        rewrite::set::<F>(context, peer.reverse.frontend.address, peer.reverse.frontend.port);
    }
}

/// The socket is being connected: from now on it hears one peer alone, and knows it by the name that it dials.
#[inline(always)]
pub(crate) fn forget(context: &SockAddrContext) {
    // SAFETY: the socket is the context's.
    if unsafe { !UDP_PEERS.get_ptr_mut(context).is_null() } {
        // Fails where they have gone already.
        // SAFETY: as above.
        let _ = unsafe { UDP_PEERS.delete(rewrite::socket(context)) };
    }
}
