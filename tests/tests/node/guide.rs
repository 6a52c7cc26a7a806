//! The documents as what they are: instructions. A scenario runs the very commands that a document shows.
//!
//! Owns finding a block of commands in a document, and running it where its reader would. Knows no command.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use kube_lane_tests::controlplane::program;
use kube_lane_tests::nodes::NodeCluster;

/// The top of the repository.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The one block of a document below `docs/` that has this text in it, with each of `values` put in for its name.
///
/// # Errors
/// When no block has it, or several have.
pub(crate) fn block(document: &str, with: &str, values: &[(&str, &str)]) -> Result<String> {
    let path = repository().join("docs").join(document);
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let blocks = blocks(&text);
    let mut found = blocks.into_iter().filter(|block| block.contains(with));
    let mut block = found.next().with_context(|| format!("docs/{document} has no block with {with:?}"))?;
    ensure!(found.next().is_none(), "docs/{document} has several blocks with {with:?}");
    for (name, value) in values {
        ensure!(block.contains(name), "docs/{document}, the block with {with:?}: no {name} to fill in");
        block = block.replace(name, value);
    }
    Ok(block)
}

/// The fenced blocks of a document, without the indentation of their fences.
fn blocks(text: &str) -> Vec<String> {
    let mut blocks = vec![];
    let mut open: Option<(usize, String)> = None;
    for line in text.lines() {
        let indentation = line.len() - line.trim_start().len();
        let fence = line.trim_start().starts_with("```");
        match &mut open {
            None if fence => open = Some((indentation, String::new())),
            Some(_) if fence => blocks.extend(open.take().map(|(_, block)| block)),
            Some((indentation, block)) => {
                block.push_str(line.get(*indentation..).unwrap_or_default());
                block.push('\n');
            }
            None => {}
        }
    }
    blocks
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
    let kubectl = program("kubectl")?;
    let programs = kubectl.parent().context("kubectl is in no folder")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut shell = Command::new("sh");
    shell.args(["-euc", commands]).current_dir(folder);
    shell.env("PATH", format!("{}:{path}", programs.display()));
    nodes.cluster().run(&mut shell)
}
