//! The socket layer that cannot be had yet: another agent has its place.
//!
//! Owns trying again, and saying why it is not there, as long as that is so.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tracing::warn;

use super::nftables::Marks;
use super::socket::Socket;

/// How often it is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// Opens the socket layer, or says why it cannot be had, for people.
pub type Open = Box<dyn FnMut(&mut Marks) -> Result<Socket, String>>;

/// A layer to come.
pub struct Awaited {
    pub(super) marks: Marks,
    pub(super) bpf_root: PathBuf,
    open: Open,
    why: String,
    due: Instant,
}

impl Awaited {
    /// `why`: why it could not be had just now, for people; `bpf_root`: where it will be pinned.
    pub fn new(marks: Marks, bpf_root: PathBuf, open: Open, why: String) -> Self {
        let awaited = Self { marks, bpf_root, open, why, due: Instant::now() + PAUSE };
        warn!("{}; trying again", awaited.trouble());
        awaited
    }

    /// Tries again, where it could be told all that is programmed.
    pub(super) fn attempt(&mut self, is_programmed: bool) -> Option<Socket> {
        self.due = Instant::now() + PAUSE;
        if !is_programmed {
            return None;
        }
        let why = (self.open)(&mut self.marks).map_err(|why| std::mem::replace(&mut self.why, why));
        why.inspect_err(|before| {
            if *before != self.why {
                warn!("{}; trying again", self.trouble());
            }
        })
        .ok()
    }

    /// When to try again.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Why it is not there, for people.
    pub(super) fn trouble(&self) -> String {
        format!("the socket layer is not in place, nftables alone answers: {}", self.why)
    }
}
