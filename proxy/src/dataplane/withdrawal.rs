//! The socket layer that an earlier run may have left, for an agent that does without: nobody would follow changes there.
//!
//! Owns taking it away, and saying so as long as that cannot be done: its mark tells of it also where its pins cannot be
//! seen. Never touches what another agent has.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::nftables::{Mark, Marks};
use super::socket::{self, Removal, SocketError};
use crate::causes::with_causes;

/// How often it is tried again.
const PAUSE: Duration = Duration::from_secs(1);
/// What helps.
const REMEDY: &str = "mount the node's BPF file system, as deploy/ebpf does, also with mode nftables, and it is taken away; \
                      or stop this agent and run `kube-lane cleanup` on the node";

/// What an earlier run left.
pub struct Withdrawal {
    marks: Marks,
    /// Where this agent would pin it.
    bpf_root: PathBuf,
    /// Why it cannot be taken away, and when that is tried again.
    trouble: Option<(String, Instant)>,
}

impl Withdrawal {
    /// Takes away what there is. `bpf_root`: where this agent would pin it; the mark may name another place.
    pub fn begin(marks: Marks, bpf_root: &Path) -> Self {
        let mut withdrawal = Self { marks, bpf_root: bpf_root.to_owned(), trouble: None };
        withdrawal.attempt();
        withdrawal
    }

    /// Tries again what could not be done.
    pub(super) fn attempt(&mut self) {
        let was_trouble = self.trouble.is_some();
        let why = self.withdraw();
        match &why {
            Some(why) if !was_trouble => warn!("{}", words(why)),
            None if was_trouble => info!("no socket layer of an earlier run is left"),
            _ => {}
        }
        self.trouble = why.map(|why| (why, Instant::now() + PAUSE));
    }

    /// When to try again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.trouble.as_ref().map(|(_, due)| *due)
    }

    /// What is wrong, for people.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.as_ref().map(|(why, _)| words(why))
    }

    /// Why something may be left.
    fn withdraw(&mut self) -> Option<String> {
        let mark = match self.marks.read() {
            Ok(mark) => mark,
            Err(error) => return Some(with_causes(&error)),
        };
        let Some(mark) = mark else {
            return match socket::withdraw(&self.bpf_root, false) {
                Ok(removal) => {
                    say(removal);
                    None
                }
                // It is the other's, in another network namespace.
                Err(SocketError::Owned { .. }) => None,
                Err(error) => Some(with_causes(&error)),
            };
        };
        let marked = mark.bpf_root();
        let result = match (&mark, &marked) {
            (Mark::Untold, _) => socket::withdraw(&self.bpf_root, false),
            (_, Some(marked)) => socket::withdraw(marked, true),
            (_, None) => Ok(Removal::Unseen),
        };
        match result {
            Ok(Removal::Unseen) => {
                Some(format!("it is pinned at {mark}, which is on no BPF file system that is mounted here"))
            }
            Ok(Removal::Nothing) if mark == Mark::Untold => Some(format!("it is pinned at {mark}")),
            Ok(removal) => {
                say(removal);
                self.marks.remove().err().map(|error| with_causes(&error))
            }
            Err(error) => Some(with_causes(&error)),
        }
    }
}

fn say(removal: Removal) {
    if removal == Removal::Done {
        info!("removed the socket layer of an earlier run");
    }
}

fn words(why: &str) -> String {
    format!("a socket layer of an earlier run may lead clients to endpoints that are gone: {why}; {REMEDY}")
}
