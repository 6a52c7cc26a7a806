//! `kube-lane cleanup`, and kube-proxy's `--cleanup`: removes all that is ours from the kernel, without the API.
//!
//! Never beside an agent: that would put everything back, and meanwhile tell what is not so.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use tracing::info;

use super::instance;
use crate::config::SocketLb;
use crate::config::flags::{AgentFlags, LogFlags, RunFlags};
use crate::dataplane::nftables::{self, Mark, Marks};
use crate::dataplane::socket::{self, Presence, Removal, SocketError};
use crate::observability::telemetry;

#[derive(Args, Debug)]
pub(super) struct CleanupFlags {
    #[command(flatten)]
    log: LogFlags,
    #[command(flatten)]
    agent: AgentFlags,
    /// Afterwards, wait for SIGTERM: for a pod that must not end
    #[arg(long)]
    wait: bool,
}

pub(super) fn run(flags: &CleanupFlags) -> anyhow::Result<ExitCode> {
    let ends = flags.wait.then(block_signals).transpose()?;
    let code = remove(&flags.log, &RunFlags::from(&flags.agent))?;
    if let Some(ends) = ends {
        info!("waiting for SIGTERM; agents can start meanwhile");
        ends.wait().context("cannot wait for SIGTERM")?;
    }
    Ok(code)
}

/// Blocks the signals that end `--wait`. Done first, so that one that arrives during the cleanup ends the wait at once.
/// The first process of a container would ignore it otherwise.
fn block_signals() -> anyhow::Result<SigSet> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    signals.thread_block().context("cannot block SIGTERM")?;
    Ok(signals)
}

/// `--cleanup`.
pub(super) fn run_as_kube_proxy(flags: &RunFlags) -> anyhow::Result<ExitCode> {
    remove(flags.log(), flags)
}

/// The socket layer is where the flags say, or the configuration, else where its mark says.
fn remove(log: &LogFlags, agent: &RunFlags) -> anyhow::Result<ExitCode> {
    telemetry::init(&log.logging())?;
    let bpf_root = agent.bpf_root()?;
    // Nor does one start meanwhile.
    let _only = instance::claim().context("nothing is removed")?;
    let mut marks = Marks::open().context("cleanup (it needs CAP_NET_ADMIN)")?;
    let mark = marks.read()?;
    let marked = mark.as_ref().and_then(Mark::bpf_root);
    let bpf_root = bpf_root.or_else(|| marked.clone()).unwrap_or_else(|| SocketLb::default().bpf_root);
    // What answers first goes first. One that cannot go does not keep the other, unless it is another agent's.
    let socket = socket::cleanup(&bpf_root);
    if let Err(error @ SocketError::Owned { .. }) = socket {
        return Err(error).context("nothing is removed");
    }
    nftables::cleanup().context("cleanup (it needs CAP_NET_ADMIN)")?;
    info!(
        "no table `kube-lane` is left in nftables; what one translated ends unless another proxy is in place"
    );
    let removal = socket.context("cleanup of the socket layer")?;
    let at = bpf_root.display();
    match removal {
        Removal::Done => info!(bpf_root = %at, "removed the socket layer; its connections live on"),
        Removal::Nothing => {
            info!(bpf_root = %at, "no socket layer is pinned here; one pinned elsewhere stays");
        }
        Removal::Unseen => {
            info!(bpf_root = %at, "no socket layer can be pinned here: it is no BPF file system");
        }
    }
    let Some(mark) = mark else { return Ok(ExitCode::SUCCESS) };
    let left = match &marked {
        Some(marked) => socket::presence(marked).context("what the mark of the socket layer names")?,
        None if mark == Mark::Untold && removal == Removal::Done => Presence::Absent,
        None => Presence::Unseen,
    };
    match left {
        Presence::Absent => {
            marks.remove()?;
            Ok(ExitCode::SUCCESS)
        }
        Presence::Pinned => {
            let marked = marked.unwrap_or(bpf_root);
            let at = marked.display();
            bail!("a socket layer is pinned at {at} all the same: run this with --bpf-root={at}, too")
        }
        Presence::Unseen => bail!(
            "a socket layer may be there all the same, pinned at {mark}: run this where that BPF file system is mounted, \
             as on the node itself"
        ),
    }
}
