//! What an image holds of Debian, unpacked below `target/image` and never installed: the packages as Debian delivers
//! them, whatever the administrator of this machine has changed in its own. Also what it takes to build for an
//! architecture that this machine does not have.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::apt::{self, Apt};
use super::{Cost, Step, cross, debian};
use crate::build::Arch;
use crate::process;

/// Delivers the compiler's library; the package that it depends on first holds its licence.
const COMPILER_LIBRARY: &str = "libgcc-s1";

/// The libraries that the agent loads, and the certificates that it trusts.
pub(crate) const RUNTIME: &[&str] = &["libc6", COMPILER_LIBRARY, "libnftnl11", "libmnl0", "ca-certificates"];

/// Holds the texts of common licences.
const LICENCES: &str = "base-files";

/// What the cross compiler needs besides.
const DEVELOPMENT: &[&str] = &["libc6-dev", "linux-libc-dev", "libnftnl-dev", "libmnl-dev"];

/// The packages of one architecture.
pub(crate) struct Sysroot(pub(crate) Arch);

impl Sysroot {
    /// Where the packages are unpacked.
    pub(crate) fn dir(&self) -> PathBuf {
        process::target("image").join(format!("sysroot-{}", self.0.as_str()))
    }

    fn packages(&self) -> Vec<&'static str> {
        let mut packages = [RUNTIME, &[LICENCES]].concat();
        if !self.0.is_native() {
            packages.extend(DEVELOPMENT);
            packages.extend((!cross::compiler_has(self.0)).then_some(cross::STANDARD_LIBRARY));
        }
        packages
    }

    /// The file that is there once all packages are unpacked, and what it then says.
    fn stamp(&self) -> (PathBuf, String) {
        (self.dir().join("unpacked"), self.packages().join("\n"))
    }
}

impl Step for Sysroot {
    fn name(&self) -> String {
        format!("Debian's packages for images of {}, below target/", self.0.as_str())
    }

    fn is_done(&self) -> Result<bool> {
        let (stamp, packages) = self.stamp();
        Ok(fs::read_to_string(stamp).is_ok_and(|unpacked| unpacked == packages))
    }

    fn run(&self) -> Result<()> {
        apt::ensure_debian()?;
        let root = self.dir();
        let archives = root.with_extension("archives");
        [&root, &archives].into_iter().try_for_each(|dir| apt::empty(dir))?;
        let mut packages = self.packages();
        if self.0.is_native() {
            // Of the release that this machine runs: the agent is linked with its libraries.
            let licence = apt::first_dependency(&mut Command::new("apt-cache"), COMPILER_LIBRARY)?;
            packages.push(&licence);
            debian::download(&packages, &archives)?;
        } else {
            let lists = process::target("image").join(format!("apt-{}", self.0.as_str()));
            let apt = Apt::update(&lists, self.0.as_str())?;
            let licence = apt.dependency(COMPILER_LIBRARY)?;
            packages.push(&licence);
            apt.download(&packages, &archives)?;
        }
        apt::unpack(&archives, &root)?;
        fs::remove_dir_all(&archives)?;
        let (stamp, unpacked) = self.stamp();
        Ok(fs::write(stamp, unpacked)?)
    }

    fn cost(&self) -> Cost {
        Cost { minutes: 1, megabytes: if self.0.is_native() { 10 } else { 70 } }
    }
}
