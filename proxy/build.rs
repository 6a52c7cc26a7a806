//! Puts the commit into the agent, and the eBPF object where `KUBE_LANE_BPF_OBJECT` names one, as `cargo xtask build`
//! does. Without the variable the agent is built without eBPF, on any machine with stable Rust.

use std::path::{Path, PathBuf};

#[path = "build/commit.rs"]
mod commit;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(bpf_object)");
    put_commit();
    put_object();
}

fn put_commit() {
    println!("cargo::rerun-if-env-changed=KUBE_LANE_COMMIT");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    // A change here builds the agent again anyway; it also decides whether the sources are dirty.
    for source in commit::SOURCES {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    for file in files_of_head(&root) {
        println!("cargo::rerun-if-changed={}", file.display());
    }
    println!("cargo::rustc-env=KUBE_LANE_COMMIT_HASH={}", commit::of(&root));
}

/// The files of git that change with the commit. Cargo runs the script at every build where a file is missing, so only
/// those are named that exist.
fn files_of_head(root: &Path) -> Vec<PathBuf> {
    let path = |of: &str| Some(root.join(commit::git(root, &["rev-parse", "--git-path", of])?));
    let log = path("logs/HEAD").filter(|log| log.is_file());
    // The log gets a line whenever HEAD moves. Without one, the commit is in HEAD or in one of the references.
    let files = log.map_or_else(|| ["HEAD", "refs", "packed-refs"].map(path).to_vec(), |log| vec![Some(log)]);
    files.into_iter().flatten().filter(|file| file.exists()).collect()
}

fn put_object() {
    println!("cargo::rerun-if-env-changed=KUBE_LANE_BPF_OBJECT");
    let Some(object) = std::env::var_os("KUBE_LANE_BPF_OBJECT").filter(|object| !object.is_empty()) else {
        return;
    };
    match Path::new(&object).canonicalize().ok().as_deref().and_then(Path::to_str) {
        Some(object) => {
            println!("cargo::rerun-if-changed={object}");
            println!("cargo::rustc-env=KUBE_LANE_BPF_OBJECT_PATH={object}");
            println!("cargo::rustc-cfg=bpf_object");
        }
        None => println!("cargo::error=KUBE_LANE_BPF_OBJECT names no file: {}", object.display()),
    }
}
