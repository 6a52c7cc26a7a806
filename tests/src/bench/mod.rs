//! `cargo xtask bench`: what kube-lane and the real kube-proxy take for the same work, on the same machine.
//!
//! Owns the command line, and where results lie. Asserts no figure: tests do that, by counting.
#![expect(clippy::print_stdout, reason = "a command-line tool speaks on its standard output")]

mod api;
mod connect;
mod probe;
mod proxy;
mod report;
mod results;
mod sync;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use self::results::Results;

/// Benchmarks of kube-lane beside kube-proxy.
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measure start, endpoint changes and memory from a real API server; kube-lane and kube-proxy in turn.
    Sync(sync::Args),
    /// Measure connect() and kept connections: dialled directly, through the agent in both modes, and kube-proxy in
    /// two.
    Connect(connect::Args),
    /// Write README's tables again, from the newest results.
    Table,
}

/// Does what the command line says.
///
/// # Errors
/// When a benchmark cannot run; a proxy that fails is part of the results.
pub fn run() -> Result<()> {
    match Args::parse().task {
        Task::Sync(args) => sync::run(&args),
        Task::Connect(args) => connect::run(&args),
        Task::Table => {
            let newest = Results::newest(&results_dir())?;
            report::write_readme(&root().join("README.md"), &newest)?;
            connect::write_table(&results_dir())
        }
    }
}

/// The top of the repository.
fn root() -> &'static Path {
    const MANIFEST_DIR: &str = env!("CARGO_MANIFEST_DIR");
    Path::new(MANIFEST_DIR).parent().unwrap_or(Path::new(MANIFEST_DIR))
}

/// Where results are committed.
fn results_dir() -> PathBuf {
    root().join("bench/results")
}

/// Runs a program in the calling thread's network namespace; its standard output.
fn output(program: impl AsRef<Path>, arguments: &[&str]) -> Result<String> {
    let program = program.as_ref();
    let output = std::process::Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let error = String::from_utf8_lossy(&output.stderr);
    let line = arguments.join(" ");
    anyhow::ensure!(output.status.success(), "{} {line}: {}\n{error}", program.display(), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
