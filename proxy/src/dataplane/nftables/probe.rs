//! Whether this kernel takes our ruleset, found by trying it where nobody is affected.
//!
//! Owns a network namespace for a moment. Never touches that of the node.

use std::{io, thread};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use super::{Detector, Nftables, NftablesError, Settings};
use crate::dataplane::{Batch, Dataplane};

/// Why the kernel does not take it.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There can be no network namespace to try it in.
    #[error("there is no network namespace to try it in: {0} (that takes CAP_SYS_ADMIN, as root has it)")]
    Namespace(#[from] Errno),
    /// A thread cannot be had.
    #[error(transparent)]
    Thread(#[from] io::Error),
    /// The kernel refuses it.
    #[error(transparent)]
    Refused(#[from] NftablesError),
    /// The attempt ended without an answer.
    #[error("the attempt broke off")]
    BrokeOff,
}

/// Programs the whole constant ruleset in a network namespace that goes with this call.
///
/// # Errors
/// When the kernel refuses it, or it cannot be tried.
pub fn try_ruleset() -> Result<(), ProbeError> {
    let attempt = || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let settings = Settings {
            detector: Detector::InterfacePrefix("pod".into()),
            masquerade_all: true,
            ..Settings::default()
        };
        Nftables::open(settings)?.apply(&Batch::default())?;
        Ok(())
    };
    // The namespace is the thread's.
    let thread = thread::Builder::new().name("probe".into()).spawn(attempt)?;
    thread.join().map_err(|_| ProbeError::BrokeOff)?
}
