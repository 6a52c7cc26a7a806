//! `kube-lane cleanup`, and kube-proxy's `--cleanup`: removes all that is ours from the kernel, without the API.

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use tracing::{info, warn};

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
    match instance::running() {
        Ok(None) => {}
        Ok(Some(pid)) => warn!(pid, "an agent runs on this node and will put everything back: stop it first"),
        Err(error) => warn!(%error, "cannot tell whether an agent runs on this node"),
    }
    // What answers first goes first. One that cannot go does not keep the other.
    let socket = socket::cleanup(&roots.bpf_root()).context("cleanup of the socket layer");
    nftables::cleanup().context("cleanup (it needs CAP_NET_ADMIN)")?;
    socket?;
    info!("removed everything of kube-lane; established connections end unless another proxy is in place");
    Ok(ExitCode::SUCCESS)
}
