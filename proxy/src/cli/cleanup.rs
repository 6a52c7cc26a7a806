//! `kube-lane cleanup`, and kube-proxy's `--cleanup`: removes all that is ours from the kernel, without the API.

use std::process::ExitCode;

use anyhow::Context;
use tracing::{info, warn};

use super::instance;
use crate::dataplane::nftables;

pub(super) fn run() -> anyhow::Result<ExitCode> {
    match instance::running() {
        Ok(None) => {}
        Ok(Some(pid)) => warn!(pid, "an agent runs on this node and will put everything back: stop it first"),
        Err(error) => warn!(%error, "cannot tell whether an agent runs on this node"),
    }
    nftables::cleanup().context("cleanup (it needs CAP_NET_ADMIN)")?;
    info!("removed everything of kube-lane; established connections end unless another proxy is in place");
    Ok(ExitCode::SUCCESS)
}
