//! `kube-lane cleanup`, and kube-proxy's `--cleanup`: removes all that is ours from the kernel, without the API.
//!
//! Never beside an agent: that would put everything back, and meanwhile tell what is not so.

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use tracing::info;

use super::instance;
use crate::config::flags::{AgentFlags, LogFlags, RunFlags};
use crate::dataplane::{nftables, socket};
use crate::observability::telemetry;

#[derive(Args, Debug)]
pub(super) struct CleanupFlags {
    #[command(flatten)]
    log: LogFlags,
    #[command(flatten)]
    agent: AgentFlags,
}

pub(super) fn run(flags: &CleanupFlags) -> anyhow::Result<ExitCode> {
    remove(&flags.log, &RunFlags::from(&flags.agent))
}

/// `--cleanup`.
pub(super) fn run_as_kube_proxy(flags: &RunFlags) -> anyhow::Result<ExitCode> {
    remove(flags.log(), flags)
}

fn remove(log: &LogFlags, agent: &RunFlags) -> anyhow::Result<ExitCode> {
    telemetry::init(&log.logging())?;
    let bpf_root = &agent.bpf_root()?;
    // Nor does one start meanwhile.
    let _only = instance::claim().context("nothing is removed")?;
    // What answers first goes first. One that cannot go does not keep the other.
    let socket = socket::cleanup(bpf_root).context("cleanup of the socket layer");
    nftables::cleanup().context("cleanup (it needs CAP_NET_ADMIN)")?;
    if socket? {
        info!(bpf_root = %bpf_root.display(), "removed the socket layer; its connections live on");
    } else {
        info!(bpf_root = %bpf_root.display(), "no socket layer is pinned here; one pinned elsewhere stays");
    }
    info!(
        "removed everything of kube-lane in nftables; what it translated ends unless another proxy is in place"
    );
    Ok(ExitCode::SUCCESS)
}
