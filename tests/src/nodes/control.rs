//! The rest of a control plane: kube-controller-manager and kube-scheduler, beside an API server that runs already.
//!
//! Owns these two processes and their flags.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::controlplane::{ControlPlane, program};
use crate::process::Process;

/// Both programs; they end when this is dropped.
#[derive(Debug)]
pub(super) struct Controllers {
    _manager: Process,
    _scheduler: Process,
}

impl Controllers {
    /// Starts both in the network namespace `netns`, with their logs in `logs`.
    pub(super) fn start(control_plane: &ControlPlane, netns: &Path, logs: &Path) -> Result<Self> {
        let flag = |name: &str, file: PathBuf| format!("--{name}={}", file.display());
        let start = |name: &str, arguments: &[String]| {
            let mut command = Command::new(program(name)?);
            command.arg(flag("kubeconfig", control_plane.admin_kubeconfig()));
            // One instance, whose health nobody asks for.
            command.args(["--leader-elect=false", "--secure-port=0"]).args(arguments);
            Process::spawn(command, &logs.join(format!("{name}.log")), Some(netns))
        };
        let manager = [
            "--use-service-account-credentials=true".into(),
            flag("service-account-private-key-file", control_plane.service_account_key()),
            flag("root-ca-file", control_plane.authority()),
        ];
        Ok(Self {
            _manager: start("kube-controller-manager", &manager)?,
            _scheduler: start("kube-scheduler", &[])?,
        })
    }
}
