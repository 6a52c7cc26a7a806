//! `cargo xtask`: everything a developer runs. One file per task; this one parses and dispatches.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool speaks on its standard streams"
)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod build;
#[path = "../../proxy/build/commit.rs"]
mod commit;
#[cfg(test)]
mod commit_tests;
mod demo;
mod ebpf;
mod image;
mod links;
mod lint;
mod manifests;
mod preflight;
mod process;
mod release;
mod setup;
mod test;
mod tidy;

/// Development tasks of kube-lane.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Look for known vulnerabilities of dependencies, in the RustSec database on GitHub.
    Advisories,
    /// Install what the other tasks need and this machine lacks.
    Setup,
    /// Measure kube-lane beside kube-proxy; `bench --help` says what.
    Bench(bench::Args),
    /// Build kube-lane with its eBPF programs in it.
    Build(build::Args),
    /// Show kube-lane at work, in network namespaces of this machine.
    Demo(demo::Args),
    /// Write the image of the agent as an OCI archive.
    Image(image::Args),
    /// Check formatting, lints, documentation, dependencies, scripts and the project's own rules.
    Lint,
    /// Write deploy/kube-lane.yaml, the single file of `kubectl apply -f deploy/`.
    Manifests,
    /// Push the images and write the files of a release; the release workflow runs it.
    Release(release::Args),
    /// Run the test lanes; the last line printed is "N passed, N failed".
    Test(test::Args),
}

fn main() -> ExitCode {
    let result = match Args::parse().task {
        Task::Advisories => lint::advisories(),
        Task::Setup => setup::all(),
        Task::Bench(args) => bench::run(&args),
        Task::Build(args) => build::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Image(args) => image::run(&args),
        Task::Lint => lint::run(),
        Task::Release(args) => release::run(&args),
        Task::Manifests => manifests::write(),
        Task::Test(args) => return test::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
