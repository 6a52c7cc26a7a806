//! The socket layer: cgroup programs that answer at `connect()` what has the same outcome in nftables.
//!
//! Owns the eBPF object, its maps and its links. Never decides policy, and is never needed: what it leaves alone
//! meets nftables, which is complete without it.

mod addresses;
mod adopt;
mod affinity;
pub mod answers;
#[cfg(test)]
mod answers_tests;
mod cgroup;
mod error;
mod grace;
mod hash;
#[cfg(test)]
mod history_tests;
mod ids;
mod image;
mod install;
mod installed;
mod layer;
mod left_alone;
pub mod lower;
#[cfg(test)]
mod lower_tests;
mod maps;
mod members;
#[cfg(test)]
mod memory_tests;
mod pins;
mod port;
mod probe;
mod room;
mod settings;
mod sys;
pub mod write;

pub use self::error::SocketError;
pub use self::layer::{Applied, Options, Socket, cleanup, withdraw};
pub use self::probe::{Feature, probe};
pub use self::room::Room;

/// The programs, as `cargo xtask build` embeds them; `None` in an agent that plain `cargo build` made.
pub static OBJECT: Option<&[u8]> = embedded();

#[cfg(bpf_object)]
const fn embedded() -> Option<&'static [u8]> {
    Some(aya::include_bytes_aligned!(env!("KUBE_LANE_BPF_OBJECT_PATH")))
}

#[cfg(not(bpf_object))]
const fn embedded() -> Option<&'static [u8]> {
    None
}

/// [`OBJECT`], or why there is none.
///
/// # Errors
/// [`SocketError::NotBuiltIn`].
pub fn available() -> Result<&'static [u8], SocketError> {
    OBJECT.ok_or(SocketError::NotBuiltIn)
}
