//! The cgroups that are left alone.
//!
//! Owns their map. They are looked for again and again, since a cgroup that is made anew has another id.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::SocketError;
use super::cgroup::{self, Cgroup};
use super::maps::Maps;

/// The cgroups, by path.
#[derive(Debug)]
pub(super) struct LeftAlone {
    paths: Vec<PathBuf>,
    /// As the map has them; `None`: not known.
    ids: Option<BTreeSet<u64>>,
}

impl LeftAlone {
    /// `paths` are relative to `cgroup`.
    pub(super) fn new(cgroup: &Cgroup, paths: &[PathBuf]) -> Self {
        Self { paths: paths.iter().map(|path| cgroup.path().join(path)).collect(), ids: None }
    }

    /// All of them, and whether each exists.
    pub(super) fn all(&self) -> Vec<(PathBuf, bool)> {
        self.paths.iter().map(|path| (path.clone(), cgroup::id_of(path).is_some())).collect()
    }

    /// Brings a map up to date of which nothing is known.
    pub(super) fn begin_again(&mut self, maps: &mut Maps) -> Result<(), SocketError> {
        self.ids = None;
        self.follow(maps)
    }

    /// Brings the map up to date.
    pub(super) fn follow(&mut self, maps: &mut Maps) -> Result<(), SocketError> {
        let wanted: BTreeSet<_> = self.paths.iter().filter_map(|path| cgroup::id_of(path)).collect();
        let had = match self.ids.take() {
            Some(ids) => ids,
            None => maps.left_alone()?,
        };
        wanted.difference(&had).try_for_each(|id| maps.leave_alone(*id, true))?;
        had.difference(&wanted).try_for_each(|id| maps.leave_alone(*id, false))?;
        self.ids = Some(wanted);
        Ok(())
    }
}
