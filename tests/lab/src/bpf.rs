//! BPF file systems: one for each lab, where the agents of its nodes pin their maps and links.
//!
//! Owns the mount at `/run/kube-lane-lab/<lab>`; unmounted, it takes every pin with it. Loads nothing itself.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use crate::error::{Doing, Result};
use crate::leftovers;

/// Where the file systems are mounted.
pub(crate) const DIR: &str = "/run/kube-lane-lab";

/// Mounts a lab's file system.
pub(crate) fn create(lab: &str) -> Result<PathBuf> {
    let path = Path::new(DIR).join(lab);
    fs::create_dir_all(&path)
        .and_then(|()| {
            mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), None::<&str>).map_err(Into::into)
        })
        .doing(|| format!("mount a BPF file system at {}", path.display()))?;
    Ok(path)
}

/// Removes a lab's file system, and with it what its agents left in the kernel.
pub(crate) fn remove(lab: &str) {
    let path = Path::new(DIR).join(lab);
    if path.exists() {
        leftovers::unmount_from(&path);
        // Only where it is empty: what could not be unmounted stays to be found.
        let _ = fs::remove_dir(&path);
    }
}
