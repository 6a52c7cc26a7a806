//! The socket layer: cgroup programs that answer at `connect()` what has the same outcome in nftables.
//!
//! Owns the eBPF object, its maps and its links. Never decides policy, and is never needed: what it leaves alone
//! meets nftables, which is complete without it.

pub mod answers;
#[cfg(test)]
mod answers_tests;
mod kernel;
pub mod lower;
pub mod write;

pub use self::kernel::{
    Applied, Failure, Feature, OBJECT, Options, Owner, Presence, Removal, Room, Socket, SocketError,
    available, cleanup, presence, probe, withdraw,
};
