//! What kube-lane runs in the kernel: the hooks. Each one reads its context, asks the other modules and returns.
//!
//! Owns no policy: every decision is a value that the agent put into a map. A program that cannot do its work lets
//! the socket pass untouched, to meet nftables.
//!
//! | file | owns |
//! |---|---|
//! | `client` | who asks, and whether a socket may be answered |
//! | `select` | from what is dialled to a backend |
//! | `rewrite` | the context, and what a TCP socket remembers |
//! | `datagram` | UDP, and what a UDP socket remembers |
//! | `stats` | counters |
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "atomic_xadd: this target has no AtomicU64::fetch_add")]

mod client;
mod datagram;
mod maps;
mod rewrite;
mod select;
mod stats;

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::bpf_set_retval;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use kube_lane_common::{Reverse, TCP, UDP};

use crate::rewrite::{Family, V4, V6};
use crate::select::Answer;

/// What a program returns to let the call go on.
const PASS: i32 = 1;
/// What a program returns to end the call: with EPERM, or the error that it has set.
const END: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// Not 0: programs may say with which error a call ends. The agent sets this at load; without it nobody is refused
/// here, and the verifier never sees the helper.
#[unsafe(no_mangle)]
static CAN_REFUSE: Global<u8> = Global::new(0);

#[cgroup_sock_addr(connect4)]
fn connect4(context: SockAddrContext) -> i32 {
    connect::<V4>(&context)
}

#[cgroup_sock_addr(connect6)]
fn connect6(context: SockAddrContext) -> i32 {
    connect::<V6>(&context)
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(context: SockAddrContext) -> i32 {
    rewrite::peer_name::<V4>(&context);
    PASS
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(context: SockAddrContext) -> i32 {
    rewrite::peer_name::<V6>(&context);
    PASS
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(context: SockAddrContext) -> i32 {
    send::<V4>(&context)
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(context: SockAddrContext) -> i32 {
    send::<V6>(&context)
}

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(context: SockAddrContext) -> i32 {
    datagram::receive::<V4>(&context);
    PASS
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(context: SockAddrContext) -> i32 {
    datagram::receive::<V6>(&context);
    PASS
}

#[inline(always)]
fn connect<F: Family>(context: &SockAddrContext) -> i32 {
    let protocol = rewrite::protocol(context);
    if protocol == u32::from(TCP) {
        rewrite::forget(context);
        // What it dials has to tell it from others of its port: two frontends may lead to one backend.
        if rewrite::has_port(context) {
            return PASS;
        }
        return connect_tcp::<F>(context).unwrap_or(PASS);
    }
    if protocol == u32::from(UDP) {
        // Left to nftables: conntrack heals a connected socket when its backend goes.
        datagram::forget(context);
    }
    PASS
}

#[inline(always)]
fn connect_tcp<F: Family>(context: &SockAddrContext) -> Option<i32> {
    let key = rewrite::key::<F>(context, TCP);
    let asked = select::asked(context, &key, F::bound)?;
    match select::answer(asked, &key)? {
        Answer::Refused(port) => Some(refuse(port)),
        Answer::Backend(id, backend) => {
            rewrite::remember(context, Reverse::new(key, backend.address, backend.port))?;
            stats::connection(id);
            rewrite::set::<F>(context, backend.address, backend.port);
            Some(PASS)
        }
    }
}

#[inline(always)]
fn send<F: Family>(context: &SockAddrContext) -> i32 {
    if rewrite::protocol(context) == u32::from(UDP) { datagram::send::<F>(context) } else { PASS }
}

/// Ends the call with ECONNREFUSED.
#[inline(always)]
fn refuse(port: u32) -> i32 {
    if CAN_REFUSE.load() == 0 {
        return PASS;
    }
    stats::refused(port);
    // SAFETY: the helper takes any error.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    END
}

/// Never runs: a program that could panic calls a function that exists nowhere. `cargo xtask build` refuses such an
/// object, and aya does not load it.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe extern "C" {
        safe fn kube_lane_program_may_panic() -> !;
    }
    kube_lane_program_may_panic()
}

/// Helpers that GPL-only programs alone may call are not used, but the kernel prints the licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";
