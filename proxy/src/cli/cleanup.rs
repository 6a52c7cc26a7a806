//! `kube-lane cleanup`, and kube-proxy's `--cleanup`: removes all that is ours from the kernel, without the API.
//!
//! Never beside an agent: that would put everything back, and meanwhile tell what is not so.

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use tracing::info;

use super::instance;
use crate::config::Roots;
use crate::config::flags::LogFlags;
use crate::dataplane::{nftables, socket};
use crate::observability::telemetry;

#[derive(Args, Debug)]
pub(super) struct CleanupFlags {
    #[command(flatten)]
    log: LogFlags,
    #[command(flatten)]
    roots: Roots,
}

pub(super) fn run(flags: &CleanupFlags) -> anyhow::Result<ExitCode> {
    remove(&flags.log, &flags.roots)
}

pub(super) fn remove(log: &LogFlags, roots: &Roots) -> anyhow::Result<ExitCode> {
    telemetry::init(&log.logging())?;
    // Nor does one start meanwhile.
    let _only = instance::claim().context("nothing is removed")?;
    // What answers first goes first. One that cannot go does not keep the other.
    let socket = socket::cleanup(&roots.bpf_root()).context("cleanup of the socket layer");
    nftables::cleanup().context("cleanup (it needs CAP_NET_ADMIN)")?;
    socket?;
    info!("removed everything of kube-lane; established connections end unless another proxy is in place");
    Ok(ExitCode::SUCCESS)
}
