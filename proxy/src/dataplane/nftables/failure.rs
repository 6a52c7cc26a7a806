//! What it means that a transaction failed: whom it concerns, and whether the truth must be read back.
//!
//! Owns the words for it. Never decides what is done then.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use super::NftablesError;
use super::netlink::{CommitError, Refusal};

pub(super) const TOO_LARGE: &str = "it does not fit a netlink message";

/// Whose a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    /// The constant part.
    Ruleset,
    /// The node's own elements, and the sweep.
    Node,
    /// Several Services of the part: which of them is asked only where one is refused.
    Part,
    /// The Service at this position of the part.
    Service(usize),
}

/// Why a batch was not committed to its end.
#[derive(Debug)]
pub(super) enum Failure {
    /// The kernel holds something else than was programmed; in words, what.
    Disagreement(String),
    /// Nothing can be done at all.
    Error(NftablesError),
}

impl From<NftablesError> for Failure {
    fn from(error: NftablesError) -> Self {
        Self::Error(error)
    }
}

/// Which Services of a part were refused, and why, in words.
pub(super) fn blame(
    refusals: Vec<Refusal>,
    owners: &[Option<Owner>],
) -> Result<BTreeMap<usize, String>, Failure> {
    let mut refused = BTreeMap::new();
    for (refusal, owner) in refusals.iter().zip(owners) {
        match owner {
            Some(Owner::Service(position)) if !disagrees(refusal) => {
                refused.entry(*position).or_insert_with(|| refusal.to_string());
            }
            _ => return Err(failure(CommitError::Refused(refusals))),
        }
    }
    Ok(refused)
}

/// Why a transaction failed of which no Service can be left out.
pub(super) fn failure(error: CommitError) -> Failure {
    match error {
        CommitError::Refused(refusals) if refusals.iter().any(disagrees) => {
            Failure::Disagreement(words(&refusals))
        }
        error => Failure::Error(fatal(error, NftablesError::Node)),
    }
}

/// A transaction's failure as the caller's; `refused` makes it of the kernel's words.
pub(super) fn fatal(error: CommitError, refused: fn(String) -> NftablesError) -> NftablesError {
    match error {
        CommitError::Refused(refusals) => refused(words(&refusals)),
        CommitError::TooLarge => refused(TOO_LARGE.into()),
        CommitError::Io(error) => NftablesError::Socket(error),
    }
}

/// Whether a refusal says that an element was not there to be removed, or was there already.
pub(super) fn disagrees(refusal: &Refusal) -> bool {
    matches!(refusal.errno, Errno::ENOENT | Errno::EEXIST | Errno::EBUSY)
}

/// Refusals in words; the first few say it all.
pub(super) fn words(refusals: &[Refusal]) -> String {
    let words: BTreeSet<_> = refusals.iter().map(ToString::to_string).take(3).collect();
    words.into_iter().collect::<Vec<_>>().join("; ")
}
