//! Programs and libraries of the distribution. Looks for what a package delivers, so that any
//! distribution will do; installs only where there is apt-get.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::{Cost, Step};
use crate::process;

/// A Debian package and how to tell that what it delivers is there.
#[derive(Clone, Copy)]
pub(crate) struct Package {
    /// Its name in Debian.
    pub(crate) name: &'static str,
    /// What tells that it is there.
    pub(crate) probe: Probe,
}

/// What a package delivers.
#[derive(Clone, Copy)]
pub(crate) enum Probe {
    /// A program of this name.
    Program(&'static str),
    /// A library that pkg-config knows by this name.
    Library(&'static str),
    /// A file at this path.
    File(&'static str),
}

impl Package {
    fn is_installed(&self) -> bool {
        match self.probe {
            Probe::Program(name) => process::find_program(name).is_some(),
            Probe::File(path) => Path::new(path).is_file(),
            Probe::Library(name) => {
                process::output(Command::new("pkg-config").args(["--exists", name])).is_ok()
            }
        }
    }
}

/// Packages that are installed together.
pub(super) struct Packages(pub(super) Vec<Package>);

impl Packages {
    fn missing(&self) -> BTreeSet<&'static str> {
        self.0.iter().filter(|package| !package.is_installed()).map(|package| package.name).collect()
    }
}

impl Step for Packages {
    fn name(&self) -> String {
        format!("Debian packages {}", Vec::from_iter(self.missing()).join(" "))
    }

    fn is_done(&self) -> Result<bool> {
        Ok(self.missing().is_empty())
    }

    fn run(&self) -> Result<()> {
        install(&Vec::from_iter(self.missing()))
    }

    fn cost(&self) -> Cost {
        Cost { minutes: 1, megabytes: 60 }
    }
}

/// Installs `packages` by apt-get, as root or through sudo.
///
/// # Errors
/// Names the packages where this machine or this user cannot install them.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if process::find_program("apt-get").is_none() {
        bail!("please install what Debian calls {list}");
    }
    let sudo = process::find_program("sudo").is_some();
    if !process::is_root() && !sudo {
        bail!("not root, and no sudo: please run apt-get install {list}");
    }
    update()?;
    let mut install = apt_get();
    install.args(["install", "--no-install-recommends"]);
    process::run_long("apt-get install", install.args(packages))
}

/// Fetches the archives of `packages` into the folder `to`; installs nothing.
///
/// # Errors
/// Where Debian does not have them, also after its lists have been updated.
pub(super) fn download(packages: &[&str], to: &Path) -> Result<()> {
    let fetch = || {
        let mut download = Command::new("apt-get");
        process::run_long("apt-get download", download.current_dir(to).arg("download").args(packages))
    };
    // The lists may never have been fetched, or name a release that is gone.
    fetch().or_else(|_| update().and_then(|()| fetch()))
}

fn update() -> Result<()> {
    process::run_long("apt-get update", apt_get().arg("update"))
}

/// `apt-get -y` as root.
fn apt_get() -> Command {
    let mut command;
    if process::is_root() {
        command = Command::new("env");
    } else {
        command = Command::new("sudo");
        // Without a terminal nobody can type a password: fail, do not wait.
        if !io::stdin().is_terminal() {
            command.arg("--non-interactive");
        }
    }
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-y"]);
    command
}
