//! The socket layer: cgroup programs that answer at `connect()` what has the same outcome in nftables.
//!
//! Owns the eBPF object, its maps and its links. Never decides policy, and is never needed: what it leaves alone
//! meets nftables, which is complete without it.

pub mod answers;
#[cfg(test)]
mod answers_tests;
mod loader;
pub mod write;

use std::path::PathBuf;

use thiserror::Error;

pub use self::loader::SocketPrograms;

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

/// What went wrong in the socket layer.
#[derive(Debug, Error)]
pub enum SocketError {
    /// This agent was built without eBPF programs.
    #[error(
        "this kube-lane was built without its eBPF programs (`cargo xtask build` makes one that has them)"
    )]
    NotBuiltIn,
    /// The object is malformed, or the kernel refuses one of its maps.
    #[error("cannot load the eBPF object")]
    Object(#[source] Box<aya::EbpfError>),
    /// The object does not have what this agent asks for: they are of different builds.
    #[error("the eBPF object has no {0}")]
    Missing(&'static str),
    /// The kernel refuses a program: its verifier says why.
    #[error("the kernel refuses the program {name}")]
    Load {
        /// The program.
        name: &'static str,
        /// What the kernel says.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// The cgroup cannot be opened.
    #[error("cannot open the cgroup {}", path.display())]
    Cgroup {
        /// The cgroup.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: std::io::Error,
    },
    /// The program cannot be attached: not a cgroup v2, no permission, or a program there that allows no other.
    #[error("cannot attach the program {name} to the cgroup {}", path.display())]
    Attach {
        /// The program.
        name: &'static str,
        /// The cgroup.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// A map cannot be read or written.
    #[error("map {name}")]
    Map {
        /// The map.
        name: &'static str,
        /// What the kernel says.
        #[source]
        source: Box<aya::maps::MapError>,
    },
}
