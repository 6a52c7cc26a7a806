//! The socket layer that cannot be had yet: another agent has its place, or no BPF file system is mounted. Or there was one
//! of these, and there is other trouble since.
//!
//! Owns trying again, and saying why it is not there, as long as that is so.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tracing::warn;

use super::nftables::Marks;
use super::socket::Socket;
use crate::backoff::backoff;

/// How long after a failure it is tried again, and the most that grows to where the trouble does not pass by
/// itself.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Opens the socket layer, or says why it cannot be had.
pub type Open = Box<dyn FnMut(&mut Marks) -> Result<Socket, Refusal>>;

/// Why the socket layer cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For people.
    pub words: String,
    /// Others may end it at any moment, and finding out costs little.
    pub is_passing: bool,
    /// That of an earlier run may be attached all the same.
    pub is_left_over: bool,
}

/// A layer to come.
pub struct Awaited {
    pub(super) marks: Marks,
    pub(super) bpf_root: PathBuf,
    open: Open,
    why: Refusal,
    /// How often in a row it was something that does not pass by itself.
    failures: u32,
    due: Instant,
}

impl Awaited {
    /// `why`: why it could not be had just now; `bpf_root`: where it will be pinned.
    pub fn new(marks: Marks, bpf_root: PathBuf, open: Open, why: Refusal) -> Self {
        let awaited = Self { marks, bpf_root, open, why, failures: 0, due: Instant::now() + PAUSE };
        warn!("{}; trying again", awaited.trouble());
        awaited
    }

    /// Tries again, where it could be told all that is programmed.
    pub(super) fn attempt(&mut self, is_programmed: bool) -> Option<Socket> {
        if !is_programmed {
            self.due = Instant::now() + PAUSE;
            return None;
        }
        match (self.open)(&mut self.marks) {
            Ok(socket) => Some(socket),
            Err(why) => {
                self.failures = if why.is_passing { 0 } else { self.failures.saturating_add(1) };
                self.due = Instant::now() + pause(self.failures);
                if self.why != why {
                    self.why = why;
                    warn!("{}; trying again", self.trouble());
                }
                None
            }
        }
    }

    /// Whether that of an earlier run may be attached meanwhile.
    pub(super) fn is_left_over(&self) -> bool {
        self.why.is_left_over
    }

    /// When to try again.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Why it is not there, for people.
    pub(super) fn trouble(&self) -> String {
        format!("the socket layer is not in place, nftables alone answers: {}", self.why.words)
    }
}

/// How long to wait after so many failures in a row.
fn pause(failures: u32) -> Duration {
    backoff(PAUSE, PAUSE_MAX, failures.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_again_and_again_is_tried_less_often() {
        let seconds = |failures: &[u32]| failures.iter().map(|n| pause(*n).as_secs()).collect::<Vec<_>>();
        assert_eq!(seconds(&[0, 1, 2, 3, 4, 5, 6, 7, u32::MAX]), [1, 1, 2, 4, 8, 16, 30, 30, 30]);
    }
}
