//! A folder of a BPF file system, under a name that means the same folder in every mount namespace.
//!
//! Owns the way from a path to that name and back. A container mounts the node's BPF file system at another place than
//! the node does, or only a part of it. Never looks at what a folder holds.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use nix::sys::stat::{major, minor};
use procfs::process::Process;

/// Where nodes mount their BPF file system.
const USUAL: &str = "/sys/fs/bpf";

/// A folder of a BPF file system. Its text is `0:35 /kube-lane`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BpfPath {
    /// The number of the file system, which no other mounted file system has.
    device: (u64, u64),
    /// The path from the root of the file system.
    folder: PathBuf,
}

/// A mount of a BPF file system in this mount namespace.
#[derive(Clone, Debug)]
struct Mount {
    device: (u64, u64),
    /// The folder of the file system that is mounted.
    root: PathBuf,
    /// Where it is mounted.
    at: PathBuf,
}

impl BpfPath {
    /// The folder at `path`, which need not exist; `None` where `path` is on no BPF file system.
    pub fn of(path: &Path) -> Option<Self> {
        Self::among(&mounts(), path)
    }

    /// The path of the folder in this mount namespace; `None` where no mount here shows the folder.
    pub fn here(&self) -> Option<PathBuf> {
        let mounts = mounts().into_iter().filter(|mount| mount.device == self.device);
        mounts.filter_map(|mount| mount.path(&self.folder)).find(|path| is_on(path, self.device))
    }

    /// The folder that another mount namespace has at `path`, below the usual mount point, where exactly that folder
    /// exists on a BPF file system of this mount namespace.
    pub fn usual(path: &Path) -> Option<Self> {
        let folder = Path::new("/").join(path.strip_prefix(USUAL).ok()?);
        let is_there = |path: &BpfPath| path.here().is_some_and(|path| path.is_dir());
        let mounts = mounts().into_iter();
        mounts.map(|Mount { device, .. }| Self { device, folder: folder.clone() }).find(is_there)
    }

    /// The path from the root of the file system.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The device number of the file system, as `/proc/self/mountinfo` shows it.
    pub fn device(&self) -> impl Display {
        let (major, minor) = self.device;
        format!("{major}:{minor}")
    }

    fn among(mounts: &[Mount], path: &Path) -> Option<Self> {
        let existing = path.ancestors().find(|path| path.exists())?;
        let device = device(existing)?;
        let mut whole = fs::canonicalize(existing).ok()?;
        whole.extend(path.strip_prefix(existing).ok()?.components());
        // A later mount at the same place hides the earlier one.
        let holds = |mount: &&Mount| mount.device == device && whole.starts_with(&mount.at);
        let mount = mounts.iter().filter(holds).max_by_key(|mount| mount.at.components().count())?;
        let mut folder = mount.root.clone();
        folder.extend(whole.strip_prefix(&mount.at).ok()?.components());
        Some(Self { device, folder })
    }
}

impl Display for BpfPath {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.device(), self.folder.display())
    }
}

impl FromStr for BpfPath {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (device, folder) = text.split_once(' ').ok_or(())?;
        if !folder.starts_with('/') || Path::new(folder).components().any(|part| part == Component::ParentDir)
        {
            return Err(());
        }
        Ok(Self { device: device_of(device).ok_or(())?, folder: folder.into() })
    }
}

impl Mount {
    /// Where this mount shows a folder of its file system, if it does.
    fn path(&self, folder: &Path) -> Option<PathBuf> {
        let mut path = self.at.clone();
        path.extend(folder.strip_prefix(&self.root).ok()?.components());
        Some(path)
    }
}

/// The BPF file systems of this mount namespace, none where they cannot be listed.
fn mounts() -> Vec<Mount> {
    let mounts = Process::myself().and_then(|process| process.mountinfo());
    let of_bpf = mounts.into_iter().flatten().filter(|mount| mount.fs_type == "bpf");
    let mount = of_bpf.map(|mount| {
        Some(Mount { device: device_of(&mount.majmin)?, root: mount.root.into(), at: mount.mount_point })
    });
    mount.flatten().collect()
}

/// Whether a path, or what exists of it, is on this file system: another mount may hide it.
fn is_on(path: &Path, of: (u64, u64)) -> bool {
    path.ancestors().find(|path| path.exists()).and_then(device) == Some(of)
}

fn device(path: &Path) -> Option<(u64, u64)> {
    let number = fs::metadata(path).ok()?.dev();
    Some((major(number), minor(number)))
}

/// `MAJOR:MINOR`.
fn device_of(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_was_written() {
        let name: BpfPath = "0:35 /kube-lane".parse().unwrap();
        assert_eq!(name, BpfPath { device: (0, 35), folder: "/kube-lane".into() });
        assert_eq!(name.to_string(), "0:35 /kube-lane");
        for odd in ["", "/sys/fs/bpf/kube-lane", "0:35", "0:35 kube-lane", "x:1 /a", "0:35 /a/../b"] {
            assert_eq!(odd.parse::<BpfPath>(), Err(()), "{odd}");
        }
    }

    #[test]
    fn the_mount_nearest_to_a_path_tells_its_name() {
        let top = std::env::temp_dir().join(format!("kube-lane-bpf-path-{}", std::process::id()));
        fs::create_dir_all(top.join("inner")).unwrap();
        let device = device(&top).unwrap();
        let mount = |at: &Path, root: &str| Mount { device, root: root.into(), at: at.into() };
        let elsewhere = Mount { device: (device.0, device.1 + 1), root: "/".into(), at: top.join("inner") };
        let mounts = [mount(&top, "/"), mount(&top.join("inner"), "/part"), elsewhere];
        let name = |path: &str| BpfPath::among(&mounts, &top.join(path)).unwrap().folder;
        assert_eq!(name("to/come"), Path::new("/to/come"));
        assert_eq!(name("inner/to/come"), Path::new("/part/to/come"));
        assert_eq!(mounts[1].path(Path::new("/part/a")), Some(top.join("inner/a")));
        assert_eq!(mounts[1].path(Path::new("/other")), None);
        assert_eq!(BpfPath::among(&mounts, Path::new("/elsewhere")), None);
        fs::remove_dir_all(&top).unwrap();
    }
}
