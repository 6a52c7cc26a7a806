//! The context of a hook: what it says of the socket, and the address in it that a program may replace.
//!
//! Owns the two families' fields. The verifier lets each hook read its own family's alone, by loads as wide as the
//! field, hence a type for each family and nothing but volatile accesses.

use aya_ebpf::bindings::{BPF_TCP_ESTABLISHED, bpf_sock};
use aya_ebpf::programs::SockAddrContext;
use kube_lane_common::{Address, FrontendKey, Port, Reverse};

use crate::maps::REVERSE;

/// Loads a field of the context.
macro_rules! load {
    ($context:expr, $($field:tt)+) => {
        // SAFETY: the kernel gives a valid `bpf_sock_addr`, and the verifier checks each field that is read.
        unsafe { core::ptr::read_volatile(&raw const (*$context.sock_addr).$($field)+) }
    };
}

/// Stores to a field of the context.
macro_rules! store {
    ($context:expr, $($field:tt)+) => {
        |value| {
            // SAFETY: as for loads; a field that this program may not write makes it unloadable.
            unsafe { core::ptr::write_volatile(&raw mut (*$context.sock_addr).$($field)+, value) }
        }
    };
}

/// Loads a field of the socket.
macro_rules! load_socket {
    ($context:expr, $($field:tt)+) => {
        // SAFETY: the context's socket is never null, and the verifier checks each field that is read.
        unsafe { core::ptr::read_volatile(&raw const (*socket($context)).$($field)+) }
    };
}

/// The fields of a hook that is called for one family.
pub(crate) trait Family {
    /// The address in the context: the destination, or where hooks tell it, the peer.
    fn address(context: &SockAddrContext) -> Address;
    /// Replaces it by one of this family; an IPv6 context takes v4-mapped ones, too.
    fn set_address(context: &SockAddrContext, address: Address);
    /// The address that the socket is bound to; unspecified: none.
    fn bound(context: &SockAddrContext) -> Address;
    /// In `sendmsg` alone: the source that the datagram is to have, be it bound or its own; unspecified: none.
    fn sender(context: &SockAddrContext) -> Address;
}

/// `AF_INET` hooks.
pub(crate) struct V4;
/// `AF_INET6` hooks.
pub(crate) struct V6;

impl Family for V4 {
    #[inline(always)]
    fn address(context: &SockAddrContext) -> Address {
        Address::from_user_ip4(load!(context, user_ip4))
    }

    #[inline(always)]
    fn set_address(context: &SockAddrContext, address: Address) {
        let [.., word] = address.words();
        store!(context, user_ip4)(word);
    }

    #[inline(always)]
    fn bound(context: &SockAddrContext) -> Address {
        Address::from_user_ip4(load_socket!(context, src_ip4))
    }

    #[inline(always)]
    fn sender(context: &SockAddrContext) -> Address {
        Address::from_user_ip4(load!(context, msg_src_ip4))
    }
}

impl Family for V6 {
    #[inline(always)]
    fn address(context: &SockAddrContext) -> Address {
        Address::from_user_ip6([
            load!(context, user_ip6[0]),
            load!(context, user_ip6[1]),
            load!(context, user_ip6[2]),
            load!(context, user_ip6[3]),
        ])
    }

    #[inline(always)]
    fn set_address(context: &SockAddrContext, address: Address) {
        let [first, second, third, fourth] = address.words();
        store!(context, user_ip6[0])(first);
        store!(context, user_ip6[1])(second);
        store!(context, user_ip6[2])(third);
        store!(context, user_ip6[3])(fourth);
    }

    #[inline(always)]
    fn bound(context: &SockAddrContext) -> Address {
        Address::from_user_ip6([
            load_socket!(context, src_ip6[0]),
            load_socket!(context, src_ip6[1]),
            load_socket!(context, src_ip6[2]),
            load_socket!(context, src_ip6[3]),
        ])
    }

    #[inline(always)]
    fn sender(context: &SockAddrContext) -> Address {
        Address::from_user_ip6([
            load!(context, msg_src_ip6[0]),
            load!(context, msg_src_ip6[1]),
            load!(context, msg_src_ip6[2]),
            load!(context, msg_src_ip6[3]),
        ])
    }
}

/// The context's socket.
#[inline(always)]
pub(crate) fn socket(context: &SockAddrContext) -> *mut bpf_sock {
    load!(context, __bindgen_anon_1.sk)
}

/// The IANA protocol number. An MPTCP socket dials by a TCP socket of its own, which is the one that is seen here.
#[inline(always)]
pub(crate) fn protocol(context: &SockAddrContext) -> u32 {
    load!(context, protocol)
}

/// Whether the socket is tied to a device, as by `SO_BINDTODEVICE` or a VRF.
#[inline(always)]
pub(crate) fn has_device(context: &SockAddrContext) -> bool {
    load_socket!(context, bound_dev_if) != 0
}

/// Whether the socket has a port already: `bind()` gave it one. `connect()` gives one only to others, and takes it back
/// with the connection.
#[inline(always)]
pub(crate) fn has_port(context: &SockAddrContext) -> bool {
    load_socket!(context, src_port) != 0
}

/// Whether the UDP socket is connected. The kernel then passes on datagrams of its peer alone.
#[inline(always)]
pub(crate) fn is_connected(context: &SockAddrContext) -> bool {
    load_socket!(context, state) == BPF_TCP_ESTABLISHED
}

/// The port in the context, beside [`Family::address`].
#[inline(always)]
pub(crate) fn port(context: &SockAddrContext) -> Port {
    Port::from_user_port(load!(context, user_port))
}

/// What is dialled.
#[inline(always)]
pub(crate) fn key<F: Family>(context: &SockAddrContext, protocol: u8) -> FrontendKey {
    FrontendKey::new(F::address(context), port(context), protocol)
}

/// Replaces address and port.
#[inline(always)]
pub(crate) fn set<F: Family>(context: &SockAddrContext, address: Address, port: Port) {
    F::set_address(context, address);
    store!(context, user_port)(port.to_user_port());
}

/// Leaves with the socket what it dialled and where that leads; `None` where the kernel has no memory for it.
#[inline(always)]
pub(crate) fn remember(context: &SockAddrContext, mut reverse: Reverse) -> Option<()> {
    // SAFETY: the socket is the context's.
    let stored = unsafe { REVERSE.get_or_insert_ptr_mut(context, Some(&mut reverse)) };
    (!stored.is_null()).then_some(())
}

/// Drops what an earlier `connect()` left with the socket: where it goes now, its peer is what it dials.
#[inline(always)]
pub(crate) fn forget(context: &SockAddrContext) {
    // SAFETY: the socket is the context's.
    if unsafe { !REVERSE.get_ptr_mut(context).is_null() } {
        // Fails where it has gone already.
        // SAFETY: as above.
        let _ = unsafe { REVERSE.delete(socket(context)) };
    }
}

/// Has `getpeername()` tell what was dialled, where that is what led to the peer.
#[inline(always)]
pub(crate) fn peer_name<F: Family>(context: &SockAddrContext) {
    // SAFETY: the socket is the context's; the kernel gives null or a pointer to its storage, which lives as long as it.
    let Some(reverse) = (unsafe { REVERSE.get_ptr_mut(context).as_ref() }) else { return };
    if reverse.port == port(context) && reverse.address == F::address(context) {
        set::<F>(context, reverse.frontend.address, reverse.frontend.port);
    }
}
