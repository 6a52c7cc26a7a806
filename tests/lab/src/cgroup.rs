//! Cgroups: one for each node, below it one for its pods, and one for each host beyond them.
//!
//! Owns `kube-lane-lab/<lab>/<host>` in the cgroup v2 hierarchy, and `kubepods` below a node's. The children are *threaded* cgroups, so that threads
//! of one process sit in several of them: a socket belongs to the cgroup of the thread that creates it, hence eBPF
//! programs on a node's cgroup see what a client thread of that node does. The price is that the whole process moves
//! to `kube-lane-lab` while it has a lab, since threads only move below the resource domain of their process.
//! Nothing here limits or accounts anything.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Doing, Error, Result};

/// The labs of this process that are inside the domain, and where the process was before the first.
static DOMAIN: Mutex<Domain> = Mutex::new(Domain { labs: 0, home: None });

struct Domain {
    labs: usize,
    home: Option<PathBuf>,
}

fn domain() -> MutexGuard<'static, Domain> {
    DOMAIN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the cgroup v2 hierarchy is mounted.
pub(crate) fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").doing(|| "read /proc/self/mounts".into())?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .find_map(|(at, kind)| (kind == "cgroup2").then(|| PathBuf::from(at)))
        .ok_or(Error::NoCgroup2)
}

/// The parent of every lab's cgroups.
pub(crate) fn root() -> Result<PathBuf> {
    Ok(mount_point()?.join("kube-lane-lab"))
}

/// The cgroups of one lab; while it lives, this process is in the domain.
#[derive(Debug)]
pub(crate) struct LabCgroups {
    path: PathBuf,
}

impl LabCgroups {
    /// Moves this process to the domain, unless another of its labs did, and makes the lab's cgroup.
    pub(crate) fn create(lab: &str) -> Result<Self> {
        let root = root()?;
        let mut domain = domain();
        if domain.labs == 0 {
            domain.home = Some(own_cgroup()?);
            enter(&root)?;
        }
        domain.labs += 1;
        drop(domain);
        // From here on Drop leaves the domain again, whatever fails.
        let cgroups = Self { path: root.join(lab) };
        make_threaded(&cgroups.path)?;
        Ok(cgroups)
    }

    /// Makes the cgroup of one host.
    pub(crate) fn add(&self, host: &str) -> Result<PathBuf> {
        let path = self.path.join(host);
        make_threaded(&path)?;
        Ok(path)
    }
}

/// Makes the cgroup of a node's pods, below the node's own.
pub(crate) fn add_pods(node: &Path) -> Result<PathBuf> {
    let path = node.join("kubepods");
    make_threaded(&path)?;
    Ok(path)
}

impl Drop for LabCgroups {
    fn drop(&mut self) {
        remove(&self.path);
        let mut domain = domain();
        domain.labs -= 1;
        if domain.labs == 0 {
            leave(&mut domain);
        }
    }
}

/// Takes this process out of the domain, for good: it is about to exit.
pub(crate) fn abandon() {
    leave(&mut domain());
}

fn leave(domain: &mut Domain) {
    // Best effort: the home may have gone, and labs of other processes keep the root.
    let Some(home) = domain.home.take() else { return };
    let _ = fs::write(home.join("cgroup.procs"), std::process::id().to_string());
    if let Ok(root) = root() {
        let _ = fs::remove_dir(root);
    }
}

/// The cgroup that this process is in.
fn own_cgroup() -> Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").doing(|| "read /proc/self/cgroup".into())?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).ok_or(Error::NoCgroup2)?;
    Ok(mount_point()?.join(path))
}

/// Moves this process to the domain. Another process that leaves may remove it under our hands: then once more.
fn enter(root: &Path) -> Result<()> {
    let mut attempts = 0;
    loop {
        let entered = create_dir(root)
            .and_then(|()| fs::write(root.join("cgroup.procs"), std::process::id().to_string()));
        match entered {
            Err(error) if attempts < 10 && error.kind() == io::ErrorKind::NotFound => attempts += 1,
            Err(error) if attempts < 10 && error.raw_os_error() == Some(libc::ENODEV) => attempts += 1,
            other => return other.doing(|| format!("move this process to the cgroup {}", root.display())),
        }
    }
}

fn create_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn make_threaded(path: &Path) -> Result<()> {
    create_dir(path)
        .and_then(|()| fs::write(path.join("cgroup.type"), "threaded"))
        .doing(|| format!("make the threaded cgroup {}", path.display()))
}

/// Moves the calling thread.
pub(crate) fn enter_thread(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.threads"), "0").doing(|| format!("enter the cgroup {}", cgroup.display()))
}

/// Removes a lab's cgroups, those below first: whatever other process is still in them is killed, threads of this one
/// move to the root.
pub(crate) fn remove(cgroup: &Path) {
    let below = fs::read_dir(cgroup).into_iter().flatten().flatten().map(|entry| entry.path());
    below.filter(|path| path.is_dir()).for_each(|path| remove(&path));
    // A killed process leaves its cgroup only once it is reaped by the kernel.
    for _ in 0..100 {
        evict(cgroup);
        match fs::remove_dir(cgroup) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(2));
            }
            _ => break,
        }
    }
}

fn evict(cgroup: &Path) {
    let threads = fs::read_to_string(cgroup.join("cgroup.threads")).unwrap_or_default();
    for tid in threads.lines() {
        let own = Path::new("/proc/self/task").join(tid).exists();
        if own {
            if let Some(root) = cgroup.ancestors().find(|path| path.ends_with("kube-lane-lab")) {
                let _ = fs::write(root.join("cgroup.threads"), tid);
            }
        } else if let Ok(tid) = tid.parse() {
            // The kernel takes a thread's id for its process.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(tid), nix::sys::signal::SIGKILL);
        }
    }
}
