//! Debian's kernels for the lane `vm`: fetched and unpacked below `target/vm`, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::{self, Apt};
use super::{Cost, Step};
use crate::process;

/// A kernel, unpacked in `target/vm/<series>` with its modules indexed.
pub(super) struct Kernel {
    series: &'static str,
    /// Depends on the newest image of the series.
    package: &'static str,
}

/// The kernels that the lane boots.
pub(super) const KERNELS: [Kernel; 2] = [
    Kernel { series: "6.1", package: "linux-image-cloud-amd64" },
    Kernel { series: "6.12", package: "linux-image-6.12-cloud-amd64" },
];

impl Kernel {
    fn dir(&self) -> PathBuf {
        process::target("vm").join(self.series)
    }
}

impl Step for Kernel {
    fn name(&self) -> String {
        format!("Debian's kernel {}, below target/", self.series)
    }

    fn is_done(&self) -> Result<bool> {
        Ok(self.dir().is_dir())
    }

    fn run(&self) -> Result<()> {
        if std::env::consts::ARCH != "x86_64" {
            bail!(
                "the virtual machines are x86-64 and run the programs built here: please use such a machine"
            );
        }
        let archives = process::target("vm").join(format!("{}.archives", self.series));
        let unpacked = process::target("vm").join(format!("{}.new", self.series));
        [&archives, &unpacked].into_iter().try_for_each(|dir| apt::empty(dir))?;
        let apt = Apt::update(&process::target("vm/apt"), "amd64")?;
        let image = apt.dependency(self.package)?;
        apt.download(&[&image], &archives)?;
        apt::unpack(&archives, &unpacked)?;
        fs::remove_dir_all(&archives)?;

        // A package leaves the index of its modules to the machine that installs it.
        let depmod = process::find_program("depmod").context("no depmod")?;
        process::run(Command::new(depmod).arg("-b").arg(&unpacked).arg(release(&unpacked)?))?;
        fs::rename(&unpacked, self.dir()).context("cannot put the kernel in place")
    }

    fn cost(&self) -> Cost {
        Cost { minutes: 1, megabytes: 30 }
    }
}

/// What `uname -r` says in a kernel that is unpacked here.
fn release(unpacked: &Path) -> Result<String> {
    let modules = unpacked.join("lib/modules");
    let first = fs::read_dir(&modules).with_context(|| format!("no {}", modules.display()))?.next();
    let release = first.with_context(|| format!("{} is empty", modules.display()))??.file_name();
    Ok(release.to_string_lossy().into_owned())
}
