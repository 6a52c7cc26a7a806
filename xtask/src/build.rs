//! `cargo xtask build`: the agent with its eBPF programs in it. Plain `cargo build` makes one without them.

use std::path::PathBuf;

use anyhow::Result;

use crate::ebpf;
use crate::process;
use crate::setup::{self, Need};

/// Names the object that `proxy/build.rs` puts into the agent.
pub(crate) const OBJECT_VARIABLE: &str = "KUBE_LANE_BPF_OBJECT";

/// What `cargo xtask build` is told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build what is shipped: optimised, stripped.
    #[arg(long)]
    release: bool,
}

/// Builds, and prints where the agent is.
///
/// # Errors
/// When something is missing that cannot be installed, or does not compile.
pub(crate) fn run(args: &Args) -> Result<()> {
    println!("{}", agent(args.release)?.display());
    Ok(())
}

/// Builds the agent with its eBPF programs in it, and says where it is.
///
/// # Errors
/// As [`run`].
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    setup::ensure(&[Need::Build])?;
    build_agent(release, Some(ebpf::build_object()?))
}

/// Builds the optimised agent, with eBPF programs only where this machine has the toolchain for them already: what
/// needs no more than nftables can be had sooner.
///
/// # Errors
/// As [`run`].
pub(crate) fn agent_for_nftables() -> Result<PathBuf> {
    setup::ensure(&[Need::Build])?;
    let object = if setup::has(Need::Ebpf)? { Some(ebpf::build_object()?) } else { None };
    build_agent(true, object)
}

fn build_agent(release: bool, object: Option<PathBuf>) -> Result<PathBuf> {
    let mut build = process::cargo();
    build.args(["build", "--package", "kube-lane"]);
    if let Some(object) = object {
        build.env(OBJECT_VARIABLE, object);
    }
    let profile = if release { "release" } else { "debug" };
    if release {
        build.arg("--release");
    }
    process::run(&mut build)?;
    Ok(target_dir().join(profile).join("kube-lane"))
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| process::target(""), PathBuf::from);
    process::root().join(target)
}
