//! Whose turn it is where agents of several network namespaces share one folder of pins.
//!
//! Owns the rule: the layer stays with the agent that had it, also while that one restarts. The agent that had it is the one
//! whose network namespace has the mark. Never opens the layer.

use std::path::Path;
use std::time::{Duration, Instant};

use tracing::debug;

use super::nftables::Marks;
use super::socket::{Owner, Presence, SocketError, presence};

/// For how long an agent that had the layer may be away: a restart takes less.
const PATIENCE: Duration = Duration::from_secs(30);

/// One agent's attempts to have the folder.
#[derive(Debug, Default)]
pub struct Turn {
    /// Since when the folder of another is found without its agent.
    left_since: Option<Instant>,
    /// How often in a row another agent had it.
    owned: u32,
}

impl Turn {
    /// Takes the folder, unless another agent has it, or had it a moment ago and has left its layer there.
    ///
    /// # Errors
    /// As [`Owner::claim`]; [`SocketError::Left`].
    pub fn claim(&mut self, root: &Path, marks: &mut Marks) -> Result<Owner, SocketError> {
        let owner = match Owner::claim(root) {
            Ok(owner) => owner,
            Err(error) => {
                let is_owned = matches!(error, SocketError::Owned { .. });
                self.owned = if is_owned { self.owned.saturating_add(1) } else { 0 };
                self.left_since = None;
                // Twice in a row: one that only looks whether it is its turn has the folder for less than a moment.
                if self.owned > 1
                    && is_marked(root, marks)
                    && let Err(error) = marks.remove()
                {
                    debug!(%error, "the mark of the socket layer stays");
                }
                return Err(error);
            }
        };
        self.owned = 0;
        if presence(root)? == Presence::Pinned && !is_marked(root, marks) {
            let since = *self.left_since.get_or_insert_with(Instant::now);
            if since.elapsed() < PATIENCE {
                return Err(SocketError::Left { root: root.to_owned(), patience: PATIENCE });
            }
        }
        Ok(owner)
    }
}

/// Whether an agent of this network namespace has pinned there before.
fn is_marked(root: &Path, marks: &mut Marks) -> bool {
    marks.read().ok().flatten().is_some_and(|mark| mark.is_of(root))
}
