//! Names of labs, and the removal of what a lab leaves in the file system, by name alone.
//!
//! Owns the naming scheme `lane-<pid>-<start time>-<number>`: whoever finds such a name can tell whether its maker
//! still lives. Never touches a name that is not of this form.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::{bpf, cgroup};

/// Where `ip netns` looks for names.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// The labs that this process has and has not yet removed.
static LIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// A name that no other lab has, of this process or another; registered until [`remove`].
pub(crate) fn new_name() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let pid = std::process::id();
    let name = format!(
        "lane-{pid}-{}-{}",
        start_time(pid).unwrap_or_default(),
        NUMBER.fetch_add(1, Ordering::Relaxed)
    );
    LIVE.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
    name
}

/// Removes the named namespaces, the cgroups and the pins of one lab, and kills the processes in them.
pub(crate) fn remove(lab: &str) {
    if let Ok(root) = cgroup::root() {
        cgroup::remove(&root.join(lab));
    }
    bpf::remove(lab);
    for (owner, path) in named_namespaces() {
        if owner == lab {
            unmount(&path);
        }
    }
    LIVE.lock().unwrap_or_else(PoisonError::into_inner).remove(lab);
}

/// Removes every lab of this process.
pub(crate) fn remove_own() {
    let labs = LIVE.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for lab in labs {
        remove(&lab);
    }
}

/// Removes the labs whose makers are dead.
pub(crate) fn sweep() {
    let mut labs: BTreeSet<String> = named_namespaces().map(|(lab, _)| lab).collect();
    for root in [cgroup::root().ok(), Some(bpf::DIR.into())].into_iter().flatten() {
        labs.extend(entries(&root).filter_map(|path| lab_of(path.file_name()?.to_str()?)));
    }
    for lab in labs.iter().filter(|lab| maker_is_dead(lab)) {
        remove(lab);
    }
}

/// Takes a namespace's name away; the namespace lives on while a thread or a socket is in it.
pub(crate) fn unmount(path: &Path) {
    unmount_from(path);
    let _ = fs::remove_file(path);
}

/// Takes away what is mounted there, if anything is.
pub(crate) fn unmount_from(path: &Path) {
    let _ = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
}

fn named_namespaces() -> impl Iterator<Item = (String, PathBuf)> {
    entries(Path::new(NETNS_DIR)).filter_map(|path| Some((lab_of(path.file_name()?.to_str()?)?, path)))
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// The lab that a file or directory belongs to, where its name is one of ours.
fn lab_of(name: &str) -> Option<String> {
    let mut parts = name.strip_prefix("lane-")?.splitn(4, '-');
    let (pid, start, number) = (parts.next()?, parts.next()?, parts.next()?);
    let ours = [pid, start, number].iter().all(|part| part.parse::<u64>().is_ok());
    ours.then(|| format!("lane-{pid}-{start}-{number}"))
}

/// Whether a name begins with that of a lab whose maker is dead: what it names may be removed.
pub fn is_left_over(name: &str) -> bool {
    lab_of(name).is_some_and(|lab| maker_is_dead(&lab))
}

fn maker_is_dead(lab: &str) -> bool {
    let mut parts = lab.split('-').skip(1).map(|part| part.parse::<u64>().ok());
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(pid), Some(start)) => {
            u32::try_from(pid).ok().and_then(start_time).is_none_or(|actual| actual != start)
        }
        _ => false,
    }
}

/// When a process started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses and may hold anything; the third follows the last ')'.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{lab_of, maker_is_dead, start_time};

    #[test]
    fn only_own_names_are_recognised() {
        assert_eq!(lab_of("lane-12-345-0-node0").as_deref(), Some("lane-12-345-0"));
        assert_eq!(lab_of("lane-12-345-0").as_deref(), Some("lane-12-345-0"));
        for other in ["lane-12", "lane-a-b-c", "cni-1234", "lane-1-2-node0"] {
            assert_eq!(lab_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_reused_pid_is_a_dead_maker() {
        let pid = std::process::id();
        let start = start_time(pid).unwrap();
        assert!(!maker_is_dead(&format!("lane-{pid}-{start}-0")));
        assert!(maker_is_dead(&format!("lane-{pid}-{}-0", start + 1)));
    }
}
