//! The cgroups that pods run below: what else runs in a network namespace of its own is no pod.
//!
//! Owns finding them. They are looked for again and again: kubelet makes them, and one that is made anew has another id.

use std::path::{Path, PathBuf};

use kube_lane_common::{POD_CGROUPS, PodCgroups};

use super::cgroup::{self, Cgroup};

/// The cgroups, by path.
#[derive(Debug)]
pub(super) struct PodPaths {
    root: PathBuf,
    /// How far below the root of all cgroups `root` is, at least.
    level: usize,
    /// Relative to `root`.
    paths: Vec<PathBuf>,
    found: PodCgroups,
}

impl PodPaths {
    /// `paths` are relative to `cgroup`; of those that there are, the first [`POD_CGROUPS`] count.
    pub(super) fn new(cgroup: &Cgroup, paths: &[PathBuf]) -> Self {
        let (root, level) = (cgroup.path().to_owned(), cgroup.level());
        let mut new = Self { root, level, paths: paths.to_vec(), found: PodCgroups::NONE };
        new.look();
        new
    }

    /// Looks for them; returns whether they are others than before.
    pub(super) fn look(&mut self) -> bool {
        let id = |path: &PathBuf| Some((path.components().count(), cgroup::id_of(&self.root.join(path))?));
        let there: Vec<_> = self.paths.iter().filter_map(id).take(POD_CGROUPS).collect();
        let mut found = PodCgroups::NONE;
        found.ids.iter_mut().zip(&there).for_each(|(id, (_, is))| *id = *is);
        let nearest = there.iter().map(|(depth, _)| self.level + depth).min();
        found.level = nearest.unwrap_or_default() as u64;
        std::mem::replace(&mut self.found, found) != found
    }

    /// What was found.
    pub(super) fn found(&self) -> PodCgroups {
        self.found
    }

    /// Which of them there are, and which not, for people.
    pub(super) fn named(&self) -> String {
        let (there, absent): (Vec<_>, Vec<_>) =
            self.paths.iter().partition(|path| cgroup::id_of(&self.root.join(path)).is_some());
        let list = |paths: Vec<&PathBuf>| {
            let name = |path: &PathBuf| Path::new("/").join(path).display().to_string();
            paths.into_iter().map(name).collect::<Vec<_>>().join(", ")
        };
        if absent.is_empty() { list(there) } else { format!("{}; not there: {}", list(there), list(absent)) }
    }

    /// Where nothing was found, for people.
    pub(super) fn missing(&self) -> Option<String> {
        let paths =
            || self.paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        (self.found == PodCgroups::NONE)
            .then(|| format!("below {} there is no cgroup of pods, such as {}", self.root.display(), paths()))
    }
}
