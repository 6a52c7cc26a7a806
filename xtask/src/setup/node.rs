//! containerd, runc and the CNI plugins for the lane `node`: Debian's packages, unpacked below `target/node` and never
//! installed. An installed containerd would run as a service, and take the place of one that the user has.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Cost, Step, debian};
use crate::process;

const PACKAGES: &[&str] = &["containerd", "runc", "containernetworking-plugins"];

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
        "Debian's containerd, runc and CNI plugins, below target/".into()
    }

    fn is_done(&self) -> Result<bool> {
        Ok(fs::read_to_string(Self::stamp()).is_ok_and(|unpacked| unpacked == PACKAGES.join("\n")))
    }

    fn run(&self) -> Result<()> {
        if process::find_program("apt-get").is_none() || process::find_program("dpkg").is_none() {
            bail!("this is no Debian: it takes apt-get and dpkg to fetch and unpack {}", PACKAGES.join(", "));
        }
        let (root, archives) = (Self::root(), process::target("node/archives"));
        for dir in [&root, &archives] {
            if dir.exists() {
                fs::remove_dir_all(dir).with_context(|| format!("cannot empty {}", dir.display()))?;
            }
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        debian::download(PACKAGES, &archives)?;
        for archive in fs::read_dir(&archives)? {
            process::run(Command::new("dpkg").arg("-x").arg(archive?.path()).arg(&root))?;
        }
        fs::remove_dir_all(&archives)?;
        fs::write(Self::stamp(), PACKAGES.join("\n")).context("cannot write the stamp")
    }

    fn cost(&self) -> Cost {
        Cost { minutes: 1, megabytes: 60 }
    }
}
