//! Whose the folder of the pins is: two agents there would each take the other's programs away, for ever.
//!
//! Owns the lock on the folder (`flock`). It goes with its process, however that ends, and is the same from every network
//! and mount namespace that has this BPF file system.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use procfs::{Lock, LockType};

use super::SocketError;
use super::pins::{Pins, pin_error};

/// How often the folder may be another than the one that was opened: whoever had it removes it with what is in it.
const ATTEMPTS: usize = 10;

/// The folder, which nobody else has while this lives.
#[derive(Debug)]
pub struct Owner {
    root: PathBuf,
    folder: File,
}

impl Owner {
    /// Makes the folder where there is none, and takes it.
    ///
    /// # Errors
    /// [`SocketError::NoBpfFileSystem`]; [`SocketError::Owned`], which says who has it.
    pub fn claim(root: &Path) -> Result<Self, SocketError> {
        Pins::new(root).check()?;
        let failed = |error| pin_error(root, error);
        for _ in 0..ATTEMPTS {
            fs::create_dir_all(root).map_err(failed)?;
            let folder = match File::open(root) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                folder => folder.map_err(failed)?,
            };
            match folder.try_lock() {
                Ok(()) if is_at(&folder, root) => return Ok(Self { root: root.to_owned(), folder }),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(SocketError::Owned { root: root.to_owned(), pid: holder(&folder) });
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
        Err(failed(io::ErrorKind::ResourceBusy.into()))
    }

    /// The folder.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Takes the folder that is there now, where somebody has replaced or removed the one that was.
    pub(super) fn hold(&mut self) -> Result<(), SocketError> {
        if !is_at(&self.folder, &self.root) {
            *self = Self::claim(&self.root)?;
        }
        Ok(())
    }
}

impl Drop for Owner {
    /// Closing is not enough: a process that is just being forked off has the folder open, too, until it runs its program.
    fn drop(&mut self) {
        // Fails where there is nothing to unlock.
        let _ = self.folder.unlock();
    }
}

fn is_at(folder: &File, path: &Path) -> bool {
    let number = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    folder.metadata().ok().map(number) == fs::metadata(path).ok().map(number)
}

/// The process that has the lock on a folder; `None` where it is in another process namespace, or has just gone.
fn holder(folder: &File) -> Option<i32> {
    let metadata = folder.metadata().ok()?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    let at = (major(device), minor(device), inode);
    let is_of_folder = |lock: &Lock| {
        lock.lock_type == LockType::FLock && (lock.devmaj.into(), lock.devmin.into(), lock.inode) == at
    };
    procfs::locks().ok()?.into_iter().find(is_of_folder)?.pid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_a_lock_is_found() {
        let folder = std::env::temp_dir().join(format!("kube-lane-owner-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let open = || File::open(&folder).unwrap();
        let first = open();
        first.lock().unwrap();
        assert!(matches!(open().try_lock(), Err(TryLockError::WouldBlock)));
        assert_eq!(holder(&open()), Some(std::process::id().cast_signed()));
        first.unlock().unwrap();
        assert_eq!(holder(&open()), None);
        fs::remove_dir(&folder).unwrap();
    }
}
