//! What kube-lane runs in the kernel: the hooks. Each one reads its context, asks the other modules and returns.
//!
//! Owns no policy: every decision is a value that the agent put into a map. A program that cannot do its work lets
//! the socket pass untouched, to meet nftables.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "atomic_xadd: this target has no AtomicU64::fetch_add")]

mod maps;
mod stats;

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use kube_lane_common::{Address, FrontendKey, Port, TCP};

/// What a `cgroup/connect4` program returns to let the call go on (0: EPERM).
const PASS: i32 = 1;

/// Runs at every IPv4 `connect()` in the cgroup.
#[cgroup_sock_addr(connect4)]
fn connect4(context: SockAddrContext) -> i32 {
    // SAFETY: the kernel gives a valid `bpf_sock_addr`, and the verifier checks every field that is read.
    let dialled = unsafe { &*context.sock_addr };
    if dialled.protocol == u32::from(TCP) {
        let address = Address::from_user_ip4(dialled.user_ip4);
        stats::connect(&FrontendKey::new(address, Port::from_user_port(dialled.user_port), TCP));
    }
    PASS
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
