//! Where maps and links are pinned, so that they outlive the agent: `<bpf-root>/<layout>/maps/<map>` and
//! `<bpf-root>/<layout>/links/<program>`.
//!
//! Owns these paths, and what an agent of another layout left there. A folder `maps-new` is a set of maps that was never
//! taken into use: whoever finds one removes it.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use kube_lane_common::{LAYOUT, maps, programs};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::SocketError;
use super::sys::{self, Link};

/// The folder of the pins of a node's agents.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
}

/// The pins of one layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Version {
    path: PathBuf,
}

impl Pins {
    /// Those below `root`, which need not exist.
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The folder.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Whether there is a place for pins.
    pub(super) fn check(&self) -> Result<(), SocketError> {
        if self.is_on_bpf_file_system()? {
            Ok(())
        } else {
            Err(SocketError::NoBpfFileSystem(self.root.clone()))
        }
    }

    /// The root of the BPF file system that they are on.
    pub(super) fn file_system(&self) -> Option<PathBuf> {
        let is_on = |path: &&Path| statfs(*path).is_ok_and(|kind| kind.filesystem_type() == BPF_FS_MAGIC);
        self.root.ancestors().skip_while(|path| !path.exists()).take_while(is_on).last().map(Path::to_owned)
    }

    fn is_on_bpf_file_system(&self) -> Result<bool, SocketError> {
        let existing = self.root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let kind = statfs(existing).map_err(|error| pin_error(existing, error.into()))?;
        Ok(kind.filesystem_type() == BPF_FS_MAGIC)
    }

    /// This build's layout.
    pub(super) fn version(&self) -> Version {
        Version { path: self.root.join(LAYOUT) }
    }

    /// Makes the folders of this build's layout. They are on a BPF file system, or this says so.
    pub(super) fn create(&self) -> Result<Version, SocketError> {
        self.check()?;
        let version = self.version();
        for folder in [version.maps().0, version.links()] {
            fs::create_dir_all(&folder).map_err(|source| pin_error(&folder, source))?;
        }
        let unused = version.new_maps().0;
        remove_folder(&unused).map_err(|source| pin_error(&unused, source))?;
        Ok(version)
    }

    /// The layouts that have a folder here, this build's first.
    pub(super) fn versions(&self) -> Result<Vec<Version>, SocketError> {
        // Elsewhere nothing is a pin of ours.
        if !self.is_on_bpf_file_system()? {
            return Ok(Vec::new());
        }
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|source| pin_error(&self.root, source))?,
        };
        let mut versions = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|source| pin_error(&self.root, source))?;
            // The root may hold what others pin: a layout is a `v` and a number.
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix('v'));
            if number.is_some_and(|number| number.parse::<u32>().is_ok()) {
                versions.push(Version { path: entry.path() });
            }
        }
        versions.sort_by_key(|version| (!version.path.ends_with(LAYOUT), version.path.clone()));
        Ok(versions)
    }

    /// Detaches all programs of every layout.
    pub(super) fn detach(&self) -> Result<(), SocketError> {
        self.versions()?.iter().try_for_each(Version::detach)
    }

    /// Removes the folder.
    pub(super) fn remove_if_empty(&self) {
        // Others may use it, too, or it is the mount point.
        let _ = fs::remove_dir(&self.root);
    }
}

/// A folder of pinned maps.
#[derive(Clone, Debug)]
pub(super) struct MapFolder(PathBuf);

impl MapFolder {
    /// The folder itself.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Where a map is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Pins a map of another folder here, too.
    pub(super) fn share(&self, other: &Self, name: &str) -> Result<(), SocketError> {
        let path = self.map(name);
        sys::pinned(&other.map(name))
            .and_then(|map| sys::pin(map.as_fd(), &path))
            .map_err(|source| SocketError::Pin { path, source })
    }
}

impl Version {
    /// The maps in use.
    pub(super) fn maps(&self) -> MapFolder {
        MapFolder(self.path.join("maps"))
    }

    fn new_maps(&self) -> MapFolder {
        // No dot: the BPF file system keeps names with one for itself.
        MapFolder(self.path.join("maps-new"))
    }

    fn links(&self) -> PathBuf {
        self.path.join("links")
    }

    /// Where the link of a program is pinned.
    pub(super) fn link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    /// The link of a program, where one is pinned; what is no cgroup's link is none.
    pub(super) fn pinned_link(&self, program: &str) -> Option<Link> {
        Link::pinned(&self.link(program)).ok()
    }

    /// Makes the folder for maps that are not in use yet.
    pub(super) fn begin_new_maps(&self) -> Result<MapFolder, SocketError> {
        let folder = self.new_maps();
        fs::create_dir(&folder.0).map_err(|source| pin_error(&folder.0, source))?;
        Ok(folder)
    }

    /// The new maps take the place of those that were. Between the two steps there are none: an agent that starts then
    /// makes new ones.
    pub(super) fn finish_new_maps(&self) -> Result<(), SocketError> {
        let folder = self.maps().0;
        remove_folder(&folder)
            .and_then(|()| fs::rename(self.new_maps().0, &folder))
            .map_err(|source| SocketError::Pin { path: folder, source })
    }

    /// Detaches all programs. What a pinned link does not say is detached by the kernel with the last trace of it.
    pub(super) fn detach(&self) -> Result<(), SocketError> {
        for program in programs::TCP.into_iter().chain(programs::UDP) {
            self.detach_program(program)?;
        }
        Ok(())
    }

    /// Detaches a program, where it is attached.
    pub(super) fn detach_program(&self, program: &str) -> Result<(), SocketError> {
        let path = self.link(program);
        let error = |source| SocketError::Pin { path: path.clone(), source };
        if let Some(link) = self.pinned_link(program) {
            link.detach().map_err(error)?;
        }
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(error(source)),
            _ => Ok(()),
        }
    }

    /// Detaches all programs, and removes the maps and the folders.
    pub(super) fn remove(&self) -> Result<(), SocketError> {
        self.detach()?;
        remove_folder(&self.links())
            .and_then(|()| remove_folder(&self.new_maps().0))
            .and_then(|()| remove_folder(&self.maps().0))
            .and_then(|()| fs::remove_dir(&self.path))
            .map_err(|source| SocketError::Pin { path: self.path.clone(), source })
    }

    /// Takes over from another layout what outlives it: links, so that a program is replaced where it is, and what
    /// sockets remember. Then removes the rest of it.
    pub(super) fn succeed(&self, older: &Self) -> Result<(), SocketError> {
        for program in programs::TCP.into_iter().chain(programs::UDP) {
            let (from, to) = (older.link(program), self.link(program));
            if from.exists() && !to.exists() {
                fs::rename(&from, &to).map_err(|source| SocketError::Pin { path: to, source })?;
            }
        }
        for map in [maps::REVERSE, maps::UDP_PEERS] {
            let (from, to) = (older.maps().map(map), self.maps().map(map));
            if from.exists() && !to.exists() {
                fs::rename(&from, &to).map_err(|source| SocketError::Pin { path: to, source })?;
            }
        }
        older.remove()
    }
}

pub(super) fn pin_error(path: &Path, source: io::Error) -> SocketError {
    SocketError::Pin { path: path.to_owned(), source }
}

/// Removes a folder and the pins in it, where it exists.
pub(super) fn remove_folder(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(folder)
}
