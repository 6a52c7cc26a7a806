//! Programs of another kube-lane at our cgroup, or above it: of those that would answer a connect(), one alone does.
//!
//! Owns noticing them. They are told from anybody's by where they are pinned: their names an agent has no right to ask
//! for. Never takes them away.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use kube_lane_common::programs;
use tracing::debug;

use super::cgroup::Cgroup;
use super::install;
use super::pins::{Pins, Version};
use super::sys;

/// How many folders of the BPF file system are looked into.
const FOLDERS: usize = 1024;

/// Those that were found.
#[derive(Debug, Default)]
pub(super) struct Others {
    /// The programs beside ours at the hook of connect4, of whomever.
    ids: Vec<u32>,
    /// What they are was looked up when they had just come: they may not have been pinned yet.
    early: bool,
    /// The folders of pins of other kube-lanes that have one of them.
    roots: Vec<PathBuf>,
}

impl Others {
    /// Looks for them. Two or three system calls while nothing changes. `own`: where our programs are pinned.
    pub(super) fn look(&mut self, cgroup: &Cgroup, own: &Version, pins: &Pins) {
        let hook = install::attach_type(programs::CONNECT4);
        // Where nobody can be asked, nothing is known.
        let mut ids = sys::programs_at(cgroup.as_fd(), hook).unwrap_or_default();
        let ours = own.pinned_link(programs::CONNECT4).and_then(|link| link.info().ok());
        ids.retain(|id| ours.is_none_or(|ours| ours.program != *id));
        ids.sort_unstable();
        let have_changed = ids != self.ids;
        if have_changed || self.early {
            self.roots = roots(pins, &ids);
            self.ids = ids;
        }
        self.early = have_changed;
    }

    /// What there is, for people.
    pub(super) fn told(&self) -> Option<String> {
        let roots: Vec<_> = self.roots.iter().map(|root| root.display().to_string()).collect();
        (!roots.is_empty()).then(|| roots.join(", "))
    }
}

/// The folders of pins on the same file system that have one of these programs, which are not ours.
fn roots(own: &Pins, ids: &[u32]) -> Vec<PathBuf> {
    let Some(top) = own.file_system().filter(|_| !ids.is_empty()) else { return Vec::new() };
    let beside = own.root().parent().filter(|beside| *beside != top && beside.starts_with(&top));
    let mut roots = folders(&top, beside, FOLDERS);
    roots.retain(|folder| {
        let versions = Pins::new(folder).versions();
        versions.is_ok_and(|versions| versions.iter().any(|version| has(version, ids)))
    });
    roots.sort_unstable();
    roots
}

/// The folders of a file system, `most` of them: those in `beside` come first, then those near the top.
fn folders(top: &Path, beside: Option<&Path>, most: usize) -> Vec<PathBuf> {
    let mut folders: Vec<_> = beside.into_iter().chain([top]).map(Path::to_owned).collect();
    let mut looked = 0;
    while let Some(folder) = folders.get(looked) {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let new = below.map(|entry| entry.path()).filter(|path| Some(&**path) != beside);
        let left = most.saturating_sub(folders.len());
        let mut new: Vec<_> = new.take(left + 1).collect();
        let is_cut = new.len() > left;
        new.truncate(left);
        folders.append(&mut new);
        if is_cut {
            debug!("another kube-lane's pins are looked for in {most} folders of {} alone", top.display());
            break;
        }
        looked += 1;
    }
    folders
}

/// Whether one of these programs is pinned there.
fn has(version: &Version, ids: &[u32]) -> bool {
    let link = version.pinned_link(programs::CONNECT4).and_then(|link| link.info().ok());
    link.is_some_and(|info| ids.contains(&info.program))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_folders_are_those_beside_ours_and_near_the_top() {
        let top = std::env::temp_dir().join(format!("kube-lane-others-{}", std::process::id()));
        let path = |below: &str| top.join(below);
        for folder in ["a/deep", "b/deep", "run/ours/v1", "run/theirs/v1"] {
            fs::create_dir_all(path(folder)).unwrap();
        }
        let look = |most| {
            let mut folders = folders(&top, Some(&path("run")), most);
            folders.sort_unstable();
            folders
        };
        let few = ["", "a", "b", "run", "run/ours", "run/theirs"].map(path);
        assert_eq!(look(few.len()), few);
        let all = ["a/deep", "b/deep", "run/ours/v1", "run/theirs/v1"].map(path);
        let mut all = [&few[..], &all].concat();
        all.sort_unstable();
        assert_eq!(look(all.len()), all);
        assert_eq!(look(100), all);
        fs::remove_dir_all(&top).unwrap();
    }
}
