//! The eBPF object: `proxy-ebpf`, built by a toolchain of its own.
//!
//! Owns whether there is one. Never loads it: `install` does.

use super::SocketError;

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
