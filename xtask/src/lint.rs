//! `cargo xtask lint`: every check that runs no code of ours. All of them run; then those that failed are named.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::setup::{self, DENY, MACHETE, Need, go, go_tools};
use crate::{ebpf, links, manifests, process, tidy};

type Check = (&'static str, fn() -> Result<()>);

/// In the order they run: what answers soonest first.
const CHECKS: &[Check] = &[
    ("tidy", tidy::check),
    ("links", links::check),
    ("rustfmt", || process::run(process::cargo().args(["fmt", "--all", "--check"]))),
    ("shellcheck", shellcheck),
    ("actionlint", actionlint),
    ("machete", || process::run(Command::new(MACHETE.path()).current_dir(process::root()))),
    ("deny", deny),
    ("go", go_modules),
    ("manifests", manifests::check),
    ("helm", helm),
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
    setup::ensure(&[Need::Build, Need::Ebpf, Need::Lint, Need::ControlPlane, Need::Helm])?;
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

/// Checks dependencies against the RustSec advisory database. It is a Git repository on GitHub, which [`run`] does not
/// need: lint must also work where only package registries can be reached. CI runs this beside lint, and each week.
///
/// # Errors
/// When a dependency has an advisory or was yanked, or the database cannot be fetched.
pub(crate) fn advisories() -> Result<()> {
    setup::ensure_step(&DENY)?;
    let check = ["--workspace", "check", "--hide-inclusion-graph", "advisories"];
    process::run(Command::new(DENY.path()).current_dir(process::root()).args(check))
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

/// Workflows that GitHub would refuse, and mistakes in their scripts (by shellcheck).
fn actionlint() -> Result<()> {
    let is_workflow = |file: &PathBuf| file.starts_with(".github/workflows");
    let workflows: Vec<_> = process::tracked_files()?.into_iter().filter(is_workflow).collect();
    ensure!(!workflows.is_empty(), "no workflow found below .github/workflows");
    process::run(Command::new(go_tools::ACTIONLINT.path()).current_dir(process::root()).args(workflows))
}

/// The chart's own rules, and a template that renders.
fn helm() -> Result<()> {
    let lint = ["lint", "--strict", "--quiet", "deploy/chart"];
    process::run(Command::new(go_tools::HELM.path()).current_dir(process::root()).args(lint))
}

/// The modules hold no Go code, only go.mod and go.sum: they must say exactly what the tools need.
fn go_modules() -> Result<()> {
    for mut command in [go::command(), go::command_in(go_tools::MODULE)] {
        process::run(command.args(["mod", "tidy", "-diff"]))?;
    }
    Ok(())
}
