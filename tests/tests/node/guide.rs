//! The documents as what they are: instructions. A scenario runs the very commands that a document shows.
//!
//! Owns finding a block of commands in a document, and running it where its reader would. Knows no command.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use kube_lane_tests::controlplane::program;
use kube_lane_tests::nodes::NodeCluster;

/// The top of the repository.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Where a block of commands runs.
enum Runs {
    /// In a scenario of this lane, by [`block`].
    Here,
    /// Elsewhere or nowhere, and why.
    Not(&'static str),
}
use Runs::{Here, Not};

/// Every block of commands in the documents about installing: a part that no other block of the document has.
const BLOCKS: &[(&str, &str, Runs)] = &[
    ("install.md", "git clone", Not("this is a clone, and the lane has made the image")),
    (
        "install.md",
        "scp",
        Not("no node of the lane has an SSH server; the image is imported by the same `ctr`"),
    ),
    ("install.md", "skopeo", Not("no registry")),
    ("install.md", "apply -f deploy/kube-lane.yaml", Here),
    ("install.md", "kubectl expose", Here),
    ("install.md", "kubectl apply -k my-cluster/\nkubectl -n", Here),
    (
        "install.md",
        "check --config=",
        Not("the lane's nodes have no cgroup v2 for pods; the node in a VM runs it"),
    ),
    ("install.md", "helm install", Not("the lane `cluster` installs the chart")),
    ("install.md", "kind load", Not("no kind")),
    ("install.md", "k3s ctr", Not("no k3s")),
    ("install.md", "cp deploy/static-pod", Here),
    ("install.md", "kube-lane render", Here),
    ("install.md", "kube-lane-cleanup", Here),
    ("install.md", "install -D -m 644 deploy/systemd", Here),
    ("install.md", "kubectl config set-cluster", Here),
    ("install.md", "systemctl enable", Here),
    ("install.md", "systemctl disable", Here),
    ("install.md", "kubectl kustomize", Here),
    ("migrate.md", "kube-lane status --all", Here),
    ("migrate.md", "> kube-proxy.yaml", Here),
    ("migrate.md", "kubectl apply -k canary/", Here),
    ("migrate.md", "patch ds kube-proxy", Here),
    ("migrate.md", "delete ds kube-proxy", Here),
    ("migrate.md", "--cleanup", Here),
    ("migrate.md", "apply -f kube-proxy.yaml", Here),
    ("migrate.md", "kube-lane.io/canary-", Here),
    ("migrate.md", "kubectl apply -k uninstall-one/", Here),
    (
        "migrate.md",
        "kubeadm-config",
        Not("the lane makes no cluster by kubeadm, so there is no such ConfigMap"),
    ),
    ("upgrade.md", "kube-lane version", Here),
    ("operations.md", "apply -k deploy/uninstall", Here),
];

/// Whether [`BLOCKS`] is complete.
pub(crate) fn is_complete() -> Result<()> {
    for document in ["install.md", "migrate.md", "upgrade.md"] {
        for block in blocks(&read(document)?).into_iter().filter(|block| block.language == "sh") {
            let listed = BLOCKS.iter().filter(|(of, part, _)| *of == document && block.text.contains(part));
            ensure!(listed.count() == 1, "docs/{document}: not once in BLOCKS:\n{}", block.text);
        }
    }
    for (document, part, runs) in BLOCKS {
        if let Not(why) = runs {
            println!("not run: docs/{document}, {part:?}: {why}");
        }
        only_block(document, part)?;
    }
    Ok(())
}

/// A block of commands of a document below `docs/`, with each of `values` put in for its name.
///
/// # Errors
/// When [`BLOCKS`] does not say that it runs here, or no block has this part, or several have.
pub(crate) fn commands(document: &str, part: &str, values: &[(&str, &str)]) -> Result<String> {
    let listed = BLOCKS.iter().any(|(of, is, runs)| *of == document && *is == part && matches!(runs, Here));
    ensure!(listed, "docs/{document}, {part:?}: BLOCKS does not say that it runs");
    file(document, part, values)
}

/// A file that a document shows, with each of `values` put in for its name.
///
/// # Errors
/// When no block has this part, or several have.
pub(crate) fn file(document: &str, part: &str, values: &[(&str, &str)]) -> Result<String> {
    let mut text = only_block(document, part)?;
    for (name, value) in values {
        ensure!(text.contains(name), "docs/{document}, the block with {part:?}: no {name} to fill in");
        text = text.replace(name, value);
    }
    Ok(text)
}

fn only_block(document: &str, part: &str) -> Result<String> {
    let blocks = blocks(&read(document)?).into_iter().filter(|block| block.text.contains(part));
    let mut blocks = blocks.map(|block| block.text);
    let block = blocks.next().with_context(|| format!("docs/{document} has no block with {part:?}"))?;
    ensure!(blocks.next().is_none(), "docs/{document} has several blocks with {part:?}");
    Ok(block)
}

fn read(document: &str) -> Result<String> {
    let path = repository().join("docs").join(document);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// A fenced block, without the indentation of its fence.
struct Block {
    language: String,
    text: String,
}

/// The fenced blocks of a document.
fn blocks(text: &str) -> Vec<Block> {
    let mut blocks = vec![];
    let mut open: Option<(usize, Block)> = None;
    for line in text.lines() {
        let fence = line.trim_start().strip_prefix("```");
        match (&mut open, fence) {
            (None, Some(language)) => {
                let indentation = line.len() - line.trim_start().len();
                open = Some((indentation, Block { language: language.to_owned(), text: String::new() }));
            }
            (Some(_), Some(_)) => blocks.extend(open.take().map(|(_, block)| block)),
            (Some((indentation, block)), None) => {
                block.text.push_str(line.get(*indentation..).unwrap_or_default());
                block.text.push('\n');
            }
            (None, None) => {}
        }
    }
    blocks
}

/// Writes `NAME/kustomization.yaml` beside the clone of the repository, which is called `kube-lane`; returns the folder of
/// both.
pub(crate) fn beside_the_clone(nodes: &NodeCluster, name: &str, kustomization: &str) -> Result<PathBuf> {
    let folder = nodes.folder().join("administrator");
    fs::create_dir_all(folder.join(name))?;
    let clone = folder.join("kube-lane");
    if !clone.exists() {
        symlink(repository().canonicalize()?, clone)?;
    }
    fs::write(folder.join(name).join("kustomization.yaml"), kustomization)?;
    Ok(folder)
}

/// Runs commands as the cluster's administrator, in a clone of the repository; returns what they print.
///
/// # Errors
/// With what they say, when one fails.
pub(crate) fn administrator(nodes: &NodeCluster, commands: &str) -> Result<String> {
    administrator_in(nodes, &repository(), commands)
}

/// The same, in another folder.
pub(crate) fn administrator_in(nodes: &NodeCluster, folder: &Path, commands: &str) -> Result<String> {
    nodes.cluster().run(&mut administrators_shell(folder, commands)?)
}

/// A shell that runs commands in a folder, among them `kubectl`.
///
/// # Errors
/// When that has not been built.
pub(crate) fn administrators_shell(folder: &Path, commands: &str) -> Result<Command> {
    let kubectl = program("kubectl")?;
    let programs = kubectl.parent().context("kubectl is in no folder")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut shell = Command::new("sh");
    shell.args(["-euc", commands]).current_dir(folder);
    shell.env("PATH", format!("{}:{path}", programs.display()));
    Ok(shell)
}

/// A program that runs commands of a node's administrator, in a clone of the repository.
///
/// # Errors
/// When the repository has no path.
pub(crate) fn shell(commands: &str) -> Result<[String; 3]> {
    let script = format!("cd '{}'\n{commands}", repository().canonicalize()?.display());
    Ok(["sh".into(), "-euc".into(), script])
}
