//! `kube-lane cleanup`, and kube-proxy's `--cleanup`: removes all that is ours from the kernel, without the API.

use std::process::ExitCode;

use anyhow::bail;

pub(super) fn run() -> anyhow::Result<ExitCode> {
    bail!("this build has no dataplane, so nothing of it can be in the kernel")
}
