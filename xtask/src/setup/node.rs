//! What clusters of real kubelets need of Debian: containerd, runc, the CNI plugins and AppArmor's parser. They are unpacked
//! below `target/node` and never installed. An installed containerd would run as a service, and take the place of one that
//! the user has.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{Cost, Step, apt, debian};
use crate::process;

/// The last one is for the node in a virtual machine, whose kernel has AppArmor.
const PACKAGES: &[&str] = &["containerd", "runc", "containernetworking-plugins", "apparmor"];

/// A container runtime.
pub(super) struct Runtime;

impl Runtime {
    fn root() -> PathBuf {
        process::target("node/debian")
    }

    /// Says which packages are unpacked: other packages, another stamp.
    fn stamp() -> PathBuf {
        Self::root().join("unpacked")
    }
}

impl Step for Runtime {
    fn name(&self) -> String {
        "Debian's containerd, runc, CNI plugins and apparmor, below target/".into()
    }

    fn is_done(&self) -> Result<bool> {
        Ok(fs::read_to_string(Self::stamp()).is_ok_and(|unpacked| unpacked == PACKAGES.join("\n")))
    }

    fn run(&self) -> Result<()> {
        apt::ensure_debian()?;
        let (root, archives) = (Self::root(), process::target("node/archives"));
        [&root, &archives].into_iter().try_for_each(|dir| apt::empty(dir))?;
        debian::download(PACKAGES, &archives)?;
        apt::unpack(&archives, &root)?;
        fs::remove_dir_all(&archives)?;
        fs::write(Self::stamp(), PACKAGES.join("\n")).context("cannot write the stamp")
    }

    fn cost(&self) -> Cost {
        Cost { minutes: 1, megabytes: 60 }
    }
}
