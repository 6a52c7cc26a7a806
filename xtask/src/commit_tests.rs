//! Tests of which commit the agent and its image name, in repositories made here.

use std::fs;
use std::path::Path;

use crate::commit::{git, of};

/// Runs git without the user's own configuration.
fn run(root: &Path, arguments: &[&str]) -> String {
    let author =
        ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"];
    git(root, &[&author, arguments].concat()).unwrap_or_else(|| panic!("git {arguments:?} failed"))
}

#[test]
fn the_commit_is_that_of_the_sources() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    fs::create_dir_all(root.join("proxy/src")).unwrap();
    fs::write(root.join("proxy/src/lib.rs"), "//! One.").unwrap();
    assert_eq!(of(root), "unknown", "no repository");

    run(root, &["init", "--quiet"]);
    assert_eq!(of(root), "unknown", "no commit");
    run(root, &["add", "."]);
    run(root, &["commit", "--quiet", "--message", "One"]);
    let head = run(root, &["rev-parse", "HEAD"]);
    assert_eq!((of(root), head.len()), (head.clone(), 40));
    assert_eq!(of(&root.join("proxy")), "unknown", "unpacked somewhere in another repository");

    fs::write(root.join("README.md"), "No source of the agent.").unwrap();
    assert_eq!(of(root), head);
    fs::write(root.join("proxy/src/new.rs"), "//! New.").unwrap();
    assert_eq!(of(root), format!("{head}-dirty"), "a file that git does not know");
    fs::remove_file(root.join("proxy/src/new.rs")).unwrap();
    fs::write(root.join("proxy/src/lib.rs"), "//! Two.").unwrap();
    assert_eq!(of(root), format!("{head}-dirty"));
}
