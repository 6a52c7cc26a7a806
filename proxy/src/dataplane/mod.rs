//! What programs the kernel: each dataplane lowers plans to elements (pure) and commits them.
//!
//! Owns kernel state of ours and nothing else. Never decides policy: it programs what the plan says, or reports the
//! Service it could not program.

mod awaited;
mod bpf_path;
pub mod conntrack;
#[cfg(test)]
#[path = "../../tests/planner/history.rs"]
mod history;
mod inspection;
mod layers;
mod netlink;
pub mod nftables;
pub mod socket;
mod turn;
mod withdrawal;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::awaited::{Awaited, Open, Refusal};
pub use self::inspection::{Counts, Inspection};
pub use self::layers::{AtConnect, InFront, Layers};
pub use self::turn::Turn;
pub use self::withdrawal::Withdrawal;
use crate::model::input::{Family, Protocol, ServiceKey};
use crate::model::plan::{FrontendAddress, NodePlan, Plan};

/// What one commit should change.
#[derive(Debug, Default)]
pub struct Batch {
    /// The node's own elements, where they changed.
    pub node: Option<NodePlan>,
    /// The Services that changed and what each is now; `None`: it is gone. No key twice.
    pub services: Vec<(ServiceKey, Option<Arc<Plan>>)>,
    /// All sources have synced: whatever the kernel holds beyond what was ever applied is stale, remove it.
    pub sweep: bool,
}

/// What a commit did. Counts are exact, for tests and metrics.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Services that could not be programmed and why; what they had before is still in force, but for those in `partly`.
    pub failed: Vec<(ServiceKey, String)>,
    /// Those of them that are in force with the ports of one family alone, and these: the other has no table.
    pub partly: Vec<(ServiceKey, Option<Arc<Plan>>)>,
    /// What is in force was compared with what was read back of the kernel: at the start, and after trouble.
    pub full: bool,
    /// Elements added to the kernel.
    pub added: usize,
    /// Elements removed from the kernel.
    pub removed: usize,
    /// Netlink messages (or system calls) it took.
    pub messages: usize,
    /// Bytes of those messages.
    pub bytes: usize,
    /// Elements listed to read the kernel back.
    pub listed: usize,
    /// Elements asked for by their keys to read it back, whether or not they were there.
    pub asked: usize,
    /// Frontends of an earlier run that led somewhere, and that the sweep found to be nobody's.
    pub swept: Vec<(Family, Protocol, FrontendAddress)>,
    /// What the socket layer did with the batch; `None` where there is none, or where it lags behind.
    pub socket: Option<AtSocket>,
}

/// What a commit did in the maps of the socket layer.
#[derive(Clone, Copy, Debug, Default)]
pub struct AtSocket {
    /// Words stored, and elements of hashes written.
    pub writes: usize,
    /// How long it took, once nftables had the batch.
    pub took: Duration,
}

impl Batch {
    /// The Services of the batch as they are in force: without those that the kernel refused, and of some a part.
    pub fn programmed<'a>(
        &'a self,
        outcome: &'a Outcome,
    ) -> impl Iterator<Item = &'a (ServiceKey, Option<Arc<Plan>>)> + Clone {
        self.services.iter().filter(|(key, _)| !outcome.refused(key)).chain(&outcome.partly)
    }

    /// What of the batch is in force.
    pub fn in_force(&self, outcome: &Outcome) -> Self {
        let services = self.programmed(outcome).cloned().collect();
        Self { node: self.node.clone(), services, sweep: self.sweep }
    }
}

impl Outcome {
    /// The kernel refused this Service, or a part of it.
    pub fn refused(&self, service: &ServiceKey) -> bool {
        self.failed.iter().any(|(failed, _)| failed == service)
    }

    /// Adds what another commit did.
    pub fn absorb(&mut self, other: Self) {
        self.failed.extend(other.failed);
        self.partly.extend(other.partly);
        self.full |= other.full;
        self.added += other.added;
        self.removed += other.removed;
        self.messages += other.messages;
        self.bytes += other.bytes;
        self.listed += other.listed;
        self.asked += other.asked;
        self.swept.extend(other.swept);
        if let Some(other) = other.socket {
            let socket = self.socket.get_or_insert_default();
            socket.writes += other.writes;
            socket.took += other.took;
        }
    }
}

/// A dataplane: `apply` what changed, `cleanup` everything of ours.
pub trait Dataplane {
    /// Why a whole commit failed.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Commits a batch. One Service that the kernel refuses is left out and reported in the outcome.
    ///
    /// # Errors
    /// When nothing could be committed at all; the caller retries later with the same batch.
    fn apply(&mut self, batch: &Batch) -> Result<Outcome, Self::Error>;

    /// Whether somebody else changed our state since the last call, so that it must be read back and repaired.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn repair(&mut self) -> Result<Option<Outcome>, Self::Error>;

    /// When [`Dataplane::catch_up`] has something to do, whether or not there is a batch.
    fn due(&self) -> Option<Instant> {
        None
    }

    /// Does what a layer in front could not do with its batch.
    fn catch_up(&mut self) {}

    /// What is known of a Service beyond its plan, for people.
    fn inspect(&mut self, _plan: &Plan) -> Inspection {
        Inspection::default()
    }

    /// The cgroups that a layer in front leaves alone, and whether each exists.
    fn left_alone(&self) -> Vec<(PathBuf, bool)> {
        Vec::new()
    }

    /// What is wrong with a layer in front, for people: a line each.
    fn troubles(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Acts beside a dataplane on what that is told.
pub trait Follower: Send {
    /// A batch is about to be committed; some of it may be in force soon.
    fn committing(&mut self, _batch: &Batch) {}

    /// The batch was committed, but for the Services that failed.
    fn committed(&mut self, batch: &Batch, outcome: &Outcome);

    /// What somebody else changed was put right: meanwhile packets may have met nothing of ours.
    fn repaired(&mut self) {}
}
