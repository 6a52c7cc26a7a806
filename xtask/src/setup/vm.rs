//! Debian's kernels for the lane `vm`: fetched and unpacked below `target/vm`, never installed. Beside that for arm64 is
//! the busybox of its machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::{self, Apt};
use super::{Cost, Step};
use crate::build::Arch;
use crate::process;

/// A kernel, unpacked in `target/vm/<name>` with its modules indexed.
pub(super) struct Kernel {
    name: &'static str,
    arch: Arch,
    /// Depends on the newest image of the series.
    package: &'static str,
    /// Other packages that are unpacked with it.
    besides: &'static [&'static str],
}

/// The kernels that the lane boots.
pub(super) const KERNELS: [Kernel; 2] = [
    Kernel { name: "6.1", arch: Arch::Amd64, package: "linux-image-cloud-amd64", besides: &[] },
    Kernel { name: "6.12", arch: Arch::Amd64, package: "linux-image-6.12-cloud-amd64", besides: &[] },
];

/// The kernel that it boots with `--long`.
pub(super) const ARM64: Kernel = Kernel {
    name: "6.1-arm64",
    arch: Arch::Arm64,
    package: "linux-image-cloud-arm64",
    besides: &["busybox-static"],
};

impl Kernel {
    fn dir(&self) -> PathBuf {
        process::target("vm").join(self.name)
    }
}

impl Step for Kernel {
    fn name(&self) -> String {
        format!("Debian's kernel {}, below target/", self.name)
    }

    fn is_done(&self) -> Result<bool> {
        Ok(self.dir().is_dir())
    }

    fn run(&self) -> Result<()> {
        if self.arch == Arch::Amd64 && !self.arch.is_native() {
            bail!(
                "these virtual machines are x86-64 and run the programs built here: please use such a machine"
            );
        }
        let archives = process::target("vm").join(format!("{}.archives", self.name));
        let unpacked = process::target("vm").join(format!("{}.new", self.name));
        [&archives, &unpacked].into_iter().try_for_each(|dir| apt::empty(dir))?;
        let lists = if self.arch == Arch::Amd64 { "vm/apt" } else { "vm/apt-arm64" };
        let apt = Apt::update(&process::target(lists), self.arch.as_str())?;
        let image = apt.dependency(self.package)?;
        apt.download(&[&[image.as_str()], self.besides].concat(), &archives)?;
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
