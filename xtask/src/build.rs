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
    let object = ebpf::build_object()?;
    let mut build = process::cargo();
    build.args(["build", "--package", "kube-lane"]).env(OBJECT_VARIABLE, object);
    let profile = if release { "release" } else { "debug" };
    if release {
        build.arg("--release");
    }
    process::run(&mut build)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| process::target(""), PathBuf::from);
    Ok(process::root().join(target).join(profile).join("kube-lane"))
}
