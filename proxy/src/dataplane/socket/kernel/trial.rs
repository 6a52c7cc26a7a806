//! A folder beside the pins, for a moment: whether what an agent does there may be done.
//!
//! Owns that folder, and removes it with all that is in it. Never touches the pins.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::SocketError;
use super::pins::{Pins, pin_error, remove_folder};
use super::sys;

/// A folder where pins are tried out. It goes when this is dropped.
#[derive(Debug)]
pub(super) struct Trial(PathBuf);

impl Trial {
    /// Makes the folder below `bpf_root`, or below what exists of that, and locks it as an agent locks its own.
    pub(super) fn begin(bpf_root: &Path) -> Result<Self, SocketError> {
        Pins::new(bpf_root).check()?;
        let parent = bpf_root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        // Processes of several containers may have one number. No dot: the BPF file system allows none.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let folder = parent.join(format!("kube-lane-check-{}-{now}", std::process::id()));
        fs::create_dir(&folder).map_err(|error| pin_error(&folder, error))?;
        let trial = Self(folder);
        let lock = || File::open(&trial.0)?.try_lock().map_err(io::Error::from);
        lock().map_err(|error| pin_error(&trial.0, error))?;
        Ok(trial)
    }

    /// Pins a map or a link, moves the pin, opens what is pinned, and removes it.
    pub(super) fn pin(&self, object: BorrowedFd<'_>) -> Result<(), SocketError> {
        let [new, path] = ["new", "pin"].map(|name| self.0.join(name));
        let steps = || {
            sys::pin(object, &new)?;
            fs::rename(&new, &path)?;
            sys::pinned(&path)?;
            fs::remove_file(&path)
        };
        steps().map_err(|error| pin_error(&path, error))
    }

    /// Pins a map, as [`Trial::pin`].
    pub(super) fn pin_map(&self) -> Result<(), SocketError> {
        let map = sys::smallest_map().map_err(|error| pin_error(&self.0, error))?;
        self.pin(map.as_fd())
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // It has been reported if this may not be done.
        let _ = remove_folder(&self.0);
    }
}
