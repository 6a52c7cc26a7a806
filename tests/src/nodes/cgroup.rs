//! The cgroup that a node's kubelet takes for the root: one of the same name in every hierarchy, of version 1 and 2.
//!
//! Owns these cgroups. Never enters one: kubelet puts the pods there.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};

/// A node's cgroups; removed when dropped.
#[derive(Debug)]
pub(super) struct Cgroups(String);

impl Cgroups {
    /// Of this name, not yet made.
    pub(super) fn new(name: &str) -> Self {
        Self(name.to_owned())
    }

    /// The name, below the root of every hierarchy.
    pub(super) fn name(&self) -> &str {
        &self.0
    }

    /// The one in the hierarchy of version 2.
    pub(super) fn v2(&self) -> Result<PathBuf> {
        let all = hierarchies()?;
        let v2 = all.into_iter().find(|hierarchy| hierarchy.join("cgroup.controllers").exists());
        Ok(v2.context("no cgroup hierarchy of version 2 is mounted")?.join(&self.0))
    }

    /// Makes them.
    pub(super) fn create(&self) -> Result<()> {
        for hierarchy in hierarchies()? {
            let cgroup = hierarchy.join(&self.0);
            fs::create_dir_all(&cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;
            // A new cpuset is empty, and takes no process until it is filled.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let parent = hierarchy.join(file);
                if parent.exists() {
                    fs::write(cgroup.join(file), fs::read(parent)?)
                        .with_context(|| format!("cannot fill in {file} of {}", cgroup.display()))?;
                }
            }
        }
        Ok(())
    }

    /// Removes them, once the processes in them have ended.
    pub(super) fn remove(&self) {
        for hierarchy in hierarchies().unwrap_or_default() {
            remove(&hierarchy.join(&self.0));
        }
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes the cgroups of nodes whose makers are dead.
pub(super) fn sweep() {
    for hierarchy in hierarchies().unwrap_or_default() {
        for entry in fs::read_dir(hierarchy).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(kube_lane_lab::is_left_over) {
                remove(&entry.path());
            }
        }
    }
}

/// Where the hierarchies are mounted.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let mut found: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (at, kind) = (fields.next()?, fields.next()?);
            matches!(kind, "cgroup" | "cgroup2").then(|| at.into())
        })
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

fn remove(cgroup: &Path) {
    let below = fs::read_dir(cgroup).into_iter().flatten().flatten().map(|entry| entry.path());
    below.filter(|path| path.is_dir()).for_each(|path| remove(&path));
    // The kernel takes a moment to see the last process off.
    for _ in 0..500 {
        if fs::remove_dir(cgroup).is_ok() || !cgroup.exists() {
            break;
        }
        sleep(Duration::from_millis(10));
    }
}
