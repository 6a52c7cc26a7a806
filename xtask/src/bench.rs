//! `cargo xtask bench`: builds what is measured as it is shipped, and hands over to the benchmarks' own program.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::setup::{self, Need};
use crate::{build, preflight, process};

/// What a run's folder in `target/` begins with; its process id follows.
const TEMPORARY: &str = "bench-";

/// What `cargo xtask bench` is told; the program says what it takes.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Runs a benchmark.
///
/// # Errors
/// When something is missing that cannot be installed, or the benchmark cannot run.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut bench = process::cargo();
    bench.args(["run", "--quiet", "--package", "kube-lane-tests", "--bin", "bench"]);
    // All else only reads results, or says how to use it.
    let asks = args.arguments.iter().any(|argument| argument == "--help" || argument == "-h");
    let measures = |task: &OsString| task == "sync" || task == "connect";
    if asks || !args.arguments.first().is_some_and(measures) {
        setup::ensure(&[Need::Build])?;
        return process::run(bench.arg("--").args(&args.arguments));
    }
    preflight::lab().context("benchmarks cannot run")?;
    setup::ensure(&[Need::Build, Need::Kernel, Need::ControlPlane])?;
    sweep();
    let temporary = process::target(&format!("{TEMPORARY}{}", std::process::id()));
    fs::create_dir_all(&temporary)?;
    bench.env("KUBE_LANE_BIN", build::agent(true)?).env("TMPDIR", &temporary);
    // Only what is measured has to be what is shipped: the program itself waits, and is the lanes' build already.
    let result = process::run(bench.arg("--").args(&args.arguments));
    let _ = fs::remove_dir_all(&temporary);
    result
}

/// Removes what interrupted runs have left; others that run keep theirs.
fn sweep() {
    for entry in fs::read_dir(process::target("")).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix(TEMPORARY)?.parse::<u32>().ok());
        if id.is_some_and(|id| !Path::new("/proc").join(id.to_string()).exists()) {
            // What cannot be removed is in nobody's way.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
