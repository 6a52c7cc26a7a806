//! `cargo xtask lint`: every check that runs no code of ours. All of them run; then those that failed are named.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::setup::{self, DENY, MACHETE, Need, go};
use crate::{ebpf, process, tidy};

type Check = (&'static str, fn() -> Result<()>);

/// In the order they run: what answers soonest first.
const CHECKS: &[Check] = &[
    ("tidy", tidy::check),
    ("rustfmt", || process::run(process::cargo().args(["fmt", "--all", "--check"]))),
    ("shellcheck", shellcheck),
    ("machete", || process::run(Command::new(MACHETE.path()).current_dir(process::root()))),
    ("deny", deny),
    ("go", go_module),
    ("clippy", || {
        let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
        process::run(process::cargo().args(clippy))
    }),
    ("ebpf", ebpf::lint),
    ("doc", || {
        let doc = ["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"];
        process::run(process::cargo().env("RUSTDOCFLAGS", "-D warnings").args(doc))
    }),
];

/// Runs all checks.
///
/// # Errors
/// Names the checks that failed; each has printed what it found.
pub(crate) fn run() -> Result<()> {
    setup::ensure(&[Need::Build, Need::Ebpf, Need::Lint])?;
    let mut failed = Vec::new();
    for (name, check) in CHECKS {
        println!("lint: {name}");
        if let Err(error) = check() {
            eprintln!("lint: {name}: {error:#}");
            failed.push(*name);
        }
    }
    if !failed.is_empty() {
        bail!("lint: failed: {}", failed.join(", "));
    }
    println!("lint: {} checks passed", CHECKS.len());
    Ok(())
}

fn deny() -> Result<()> {
    let check = ["--workspace", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"];
    process::run(Command::new(DENY.path()).current_dir(process::root()).args(check))
}

fn shellcheck() -> Result<()> {
    let is_script = |file: &PathBuf| {
        let first_line = fs::read(process::root().join(file)).unwrap_or_default();
        let first_line = first_line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        first_line.starts_with(b"#!") && first_line.ends_with(b"sh")
    };
    let scripts: Vec<_> = process::tracked_files()?.into_iter().filter(is_script).collect();
    ensure!(!scripts.is_empty(), "no script found");
    process::run(Command::new("shellcheck").current_dir(process::root()).args(scripts))
}

/// The module holds no Go code, only go.mod and go.sum: they must say exactly what the tools need.
fn go_module() -> Result<()> {
    process::run(go::command().args(["mod", "tidy", "-diff"]))
}
