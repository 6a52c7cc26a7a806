//! `cargo xtask`: everything a developer runs. One file per task; this one parses and dispatches.

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Development tasks of kube-lane.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {}

fn main() -> Result<()> {
    match Args::parse().task {}
}
