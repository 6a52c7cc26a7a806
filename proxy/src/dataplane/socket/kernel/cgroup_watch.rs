//! Notices that cgroups come and go.
//!
//! Owns inotify watches on the folders that these are in, as far as there are any. Never says what there is: its caller
//! looks.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use inotify::{Inotify, WatchMask};

/// Events are at most 16 + 256 bytes.
const BUFFER: usize = 4096;

/// Watches for a few cgroups.
#[derive(Debug)]
pub(super) struct CgroupWatch {
    inotify: Inotify,
    paths: Vec<PathBuf>,
}

impl CgroupWatch {
    /// Watches for these.
    ///
    /// # Errors
    /// Where there are too many instances of inotify.
    pub(super) fn new(paths: Vec<PathBuf>) -> io::Result<Self> {
        let watch = Self { inotify: Inotify::init()?, paths };
        watch.watch();
        Ok(watch)
    }

    /// A descriptor that becomes readable when one may have come or gone.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.inotify.as_fd().try_clone_to_owned()
    }

    /// Whether one may have come or gone since the last call. Who looks after it misses nothing that comes later.
    pub(super) fn stirred(&mut self) -> bool {
        let mut stirred = false;
        let mut buffer = [0; BUFFER];
        while self.inotify.read_events(&mut buffer).is_ok_and(|events| events.count() > 0) {
            stirred = true;
        }
        if stirred {
            self.watch();
        }
        stirred
    }

    fn watch(&self) {
        let entries = WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVE | WatchMask::ONLYDIR;
        for path in &self.paths {
            // The folder that it is in, or the nearest above that is there.
            path.ancestors().skip(1).any(|above| self.inotify.watches().add(above, entries).is_ok());
        }
    }
}
