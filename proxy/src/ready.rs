//! Waiting for a descriptor to become readable.
//!
//! Owns the one promise that tokio wants made about descriptors.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the runtime.
///
/// # Errors
/// When the runtime cannot watch it.
pub fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, is always the same descriptor, and is closed when the `AsyncFd` drops it.
    unsafe { AsyncFd::register(descriptor) }.map_err(io::Error::from)
}
