//! The cgroups that are left alone.
//!
//! Owns their map. They are looked for whenever one may have come or gone, since a cgroup that is made anew has another
//! id, and again and again.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use tracing::warn;

use super::SocketError;
use super::cgroup::{self, Cgroup};
use super::cgroup_watch::CgroupWatch;
use super::maps::Maps;

/// The cgroups, by path.
#[derive(Debug)]
pub(super) struct LeftAlone {
    paths: Vec<PathBuf>,
    /// `None`: there are none, or they cannot be watched.
    watch: Option<CgroupWatch>,
    /// As the map has them; `None`: not known.
    ids: Option<BTreeSet<u64>>,
}

impl LeftAlone {
    /// `paths` are relative to `cgroup`.
    pub(super) fn new(cgroup: &Cgroup, paths: &[PathBuf]) -> Self {
        let paths: Vec<_> = paths.iter().map(|path| cgroup.path().join(path)).collect();
        let watch = (!paths.is_empty()).then(|| CgroupWatch::new(paths.clone()));
        let watch = watch.and_then(|watch| {
            let cannot =
                |error: &io::Error| warn!(%error, "cgroups to leave alone are looked for each second only");
            watch.inspect_err(cannot).ok()
        });
        Self { paths, watch, ids: None }
    }

    /// A descriptor that becomes readable when one may have come or gone.
    pub(super) fn descriptor(&self) -> io::Result<Option<OwnedFd>> {
        self.watch.as_ref().map(CgroupWatch::descriptor).transpose()
    }

    /// Whether one may have come or gone since the last call.
    pub(super) fn stirred(&mut self) -> bool {
        self.watch.as_mut().is_some_and(CgroupWatch::stirred)
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
