//! Ctrl-C: a binary that has labs removes them before it ends.
//!
//! Owns the signal thread while its guard lives. Tests do without: the next lab sweeps what they leave.

use std::thread::JoinHandle;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::error::{Doing, Result};
use crate::{cgroup, leftovers};

/// Removes every lab of this process on SIGINT, SIGTERM or SIGHUP, then exits with 128 + the signal's number; until
/// the guard is dropped.
///
/// # Errors
/// When the signals cannot be watched.
pub fn on_interrupt() -> Result<OnInterrupt> {
    let doing = || "watch for signals".into();
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).doing(doing)?;
    let handle = signals.handle();
    let thread = std::thread::Builder::new().name("lab-signals".into()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            leftovers::remove_own();
            cgroup::abandon();
            std::process::exit(128 + signal);
        }
    });
    Ok(OnInterrupt { handle, thread: Some(thread.doing(doing)?) })
}

/// Keeps the watch of [`on_interrupt`].
#[derive(Debug)]
#[must_use = "the watch ends when this is dropped"]
pub struct OnInterrupt {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Drop for OnInterrupt {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
