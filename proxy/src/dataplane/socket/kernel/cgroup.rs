//! The cgroup that the programs are attached to: the root of the host's cgroup v2 hierarchy, where every socket of the
//! node is below it, or the one that `--cgroup-root` names.
//!
//! Owns finding it. Changes nothing in it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::SocketError;

/// Where distributions mount the hierarchy: alone, or beside the controllers of cgroup v1.
const USUAL: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// An open cgroup.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
    folder: File,
    /// What the kernel calls it.
    id: u64,
}

impl Cgroup {
    /// The one at `path`, or the host's root.
    pub(super) fn find(path: Option<&Path>) -> Result<Self, SocketError> {
        let path = match path {
            Some(path) if is_cgroup2(path)? => path.to_owned(),
            Some(path) => return Err(SocketError::NoCgroup2(path.to_owned())),
            None => find_root()?,
        };
        let open = || {
            let folder = File::open(&path)?;
            let id = folder.metadata()?.ino();
            Ok((folder, id))
        };
        match open() {
            Ok((folder, id)) => Ok(Self { path, folder, id }),
            Err(source) => Err(SocketError::Cgroup { path, source }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// How far below the root of all cgroups it is, as far as can be seen from here: it may be farther.
    pub(super) fn level(&self) -> usize {
        let path = fs::canonicalize(&self.path).unwrap_or_default();
        path.ancestors().position(|path| !has_parent(path)).unwrap_or_default()
    }

    /// What the kernel calls it: as in the information on a link.
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// What the kernel calls the cgroup at `path`; `None` where there is none (yet).
pub(super) fn id_of(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|folder| folder.ino())
}

fn is_cgroup2(path: &Path) -> Result<bool, SocketError> {
    match statfs(path) {
        Ok(kind) => Ok(kind.filesystem_type() == CGROUP2_SUPER_MAGIC),
        Err(error) => Err(SocketError::Cgroup { path: path.to_owned(), source: error.into() }),
    }
}

fn find_root() -> Result<PathBuf, SocketError> {
    let usual = USUAL.iter().map(PathBuf::from).find(|path| is_cgroup2(path).unwrap_or(false));
    let root = match usual {
        Some(root) => root,
        None => {
            mounted().map_err(|source| SocketError::Cgroup { path: "/proc/self/mounts".into(), source })?
        }
    };
    // A container that has a cgroup namespace of its own sees its own cgroup as the root: programs there would meet the
    // sockets of the agent alone.
    if has_parent(&root) { Err(SocketError::NotTheHosts(root)) } else { Ok(root) }
}

/// Every cgroup but the root of all has this file.
fn has_parent(cgroup: &Path) -> bool {
    cgroup.join("cgroup.events").exists()
}

fn mounted() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let of_cgroup2 = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (at, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(at))
    });
    of_cgroup2.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 is mounted"))
}
