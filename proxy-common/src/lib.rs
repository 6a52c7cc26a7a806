//! Types that both the agent and the eBPF programs read: layouts only, no behaviour of either side.
//!
//! Every type here is `#[repr(C)]` with its padding spelled out and its size and offsets asserted, and holds integers
//! only: no `bool`, `enum`, `Option` or `usize`, since neither side checks what the other wrote.
#![no_std]

mod net;

pub use net::{Address, FrontendKey, Port, TCP};

/// What the maps of the eBPF object are called.
pub mod maps {
    /// Hash, [`FrontendKey`](crate::FrontendKey) → `u64`: TCP connects to each address that the agent put there.
    pub const CONNECTS: &str = "CONNECTS";
}

/// What the programs of the eBPF object are called.
pub mod programs {
    /// Runs at every IPv4 `connect()` of the cgroup and those below it.
    pub const CONNECT4: &str = "connect4";
}
