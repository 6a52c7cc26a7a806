//! The commit that the sources of the agent are at. The build script of the agent and `cargo xtask` both include this
//! file, so that the binary and the labels of its image agree. Never writes anything.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The agent is built from these, relative to the top of the repository. A change elsewhere does not make it dirty.
pub(crate) const SOURCES: &[&str] = &[
    "proxy/src",
    "proxy/build",
    "proxy/build.rs",
    "proxy/Cargo.toml",
    "proxy-common",
    "proxy-ebpf",
    "Cargo.toml",
    "Cargo.lock",
];

/// What a build at `root` says of its commit: `KUBE_LANE_COMMIT`, which names it where the sources come without their
/// repository; else what git says; else `unknown`.
pub(crate) fn of(root: &Path) -> String {
    let told = std::env::var("KUBE_LANE_COMMIT").ok().filter(|commit| !commit.is_empty());
    told.or_else(|| describe(root)).unwrap_or_else(|| "unknown".to_owned())
}

/// The full hash of the commit, followed by `-dirty` where the sources differ from it. `None` without git, and where
/// `root` is not the top of a repository, such as in an unpacked archive.
fn describe(root: &Path) -> Option<String> {
    let top = PathBuf::from(git(root, &["rev-parse", "--show-toplevel"])?);
    if top.canonicalize().ok()? != root.canonicalize().ok()? {
        return None;
    }
    let mut commit = git(root, &["rev-parse", "HEAD"])?;
    let mut status = vec!["status", "--porcelain", "--"];
    status.extend(SOURCES);
    // The status may refresh git's index. A build must not take the lock that this needs.
    if !git(root, &[&["--no-optional-locks"], status.as_slice()].concat())?.is_empty() {
        commit.push_str("-dirty");
    }
    Some(commit)
}

/// What git prints, without the line's end; `None` where it fails.
pub(crate) fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim_end().to_owned())
}
