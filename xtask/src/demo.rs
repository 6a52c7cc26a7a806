//! `cargo xtask demo`: builds the agent and the demo, and becomes the demo.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::setup::{self, Need};
use crate::{build, preflight, process};

/// What `cargo xtask demo` is told; the demo itself explains it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Take the Services from a real etcd and kube-apiserver (built on first use), not from a manifest folder.
    #[arg(long)]
    api: bool,
    /// Answer at the sockets what can be answered there (eBPF), and show what was.
    #[arg(long)]
    ebpf: bool,
    /// Leave everything running until Ctrl-C, to look around.
    #[arg(long)]
    keep: bool,
}

/// Runs the demo.
///
/// # Errors
/// On a machine that cannot run it, or when something is missing that cannot be installed. The demo's own end is the process's.
pub(crate) fn run(args: &Args) -> Result<()> {
    preflight::lab().context("the demo cannot run")?;
    setup::ensure(&[Need::Build, Need::Kernel])?;
    if args.api {
        setup::ensure(&[Need::ControlPlane])?;
    }
    // As it is shipped, so that the milliseconds are those of a user.
    let agent = if args.ebpf { build::agent(true)? } else { build::agent_for_nftables()? };
    process::run(process::cargo().args(["build", "--package", "kube-lane-tests", "--bin", "demo"]))?;

    let mut demo = Command::new(build::target_dir().join("debug/demo"));
    demo.env("KUBE_LANE_BIN", agent);
    let flags = [(args.api, "--api"), (args.ebpf, "--ebpf"), (args.keep, "--keep")];
    demo.args(flags.into_iter().filter_map(|(given, flag)| given.then_some(flag)));
    // The demo takes this process's place: Ctrl-C is its alone to answer.
    Err(demo.exec()).context("cannot start the demo")
}
