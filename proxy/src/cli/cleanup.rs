//! `kube-lane cleanup`, and kube-proxy's `--cleanup`: removes all that is ours from the kernel, without the API.

use std::process::ExitCode;

use anyhow::Context;
use tracing::info;

use crate::dataplane::nftables;

pub(super) fn run() -> anyhow::Result<ExitCode> {
    nftables::cleanup().context("cleanup (it needs CAP_NET_ADMIN)")?;
    info!("removed everything of kube-lane; established connections end unless another proxy is in place");
    Ok(ExitCode::SUCCESS)
}
