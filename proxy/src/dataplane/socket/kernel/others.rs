//! Programs of another kube-lane at our cgroup, or above it: of those that would answer a connect(), one alone does.
//!
//! Owns noticing them. They are told from anybody's by where they are pinned: their names an agent has no right to ask
//! for. Never takes them away.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;

use kube_lane_common::programs;

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
    let mut roots = Vec::new();
    let mut folders = own.file_system().filter(|_| !ids.is_empty()).into_iter().collect::<Vec<_>>();
    let mut left = FOLDERS;
    while let Some(folder) = folders.pop() {
        let versions = Pins::new(&folder).versions();
        if versions.is_ok_and(|versions| versions.iter().any(|version| has(version, ids))) {
            roots.push(folder);
            continue;
        }
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let below = entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path());
        let before = folders.len();
        folders.extend(below.take(left));
        left -= folders.len() - before;
    }
    roots.sort_unstable();
    roots
}

/// Whether one of these programs is pinned there.
fn has(version: &Version, ids: &[u32]) -> bool {
    let link = version.pinned_link(programs::CONNECT4).and_then(|link| link.info().ok());
    link.is_some_and(|info| ids.contains(&info.program))
}
