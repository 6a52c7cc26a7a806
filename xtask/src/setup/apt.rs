//! apt with lists of its own, below `target/`: any machine with apt can fetch packages of Debian 12, whatever release
//! and architecture it has itself. Installs nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// Where Debian has its packages.
const ARCHIVES: [&str; 2] = [
    "http://deb.debian.org/debian bookworm main",
    "http://deb.debian.org/debian-security bookworm-security main",
];
/// The keys of these archives. The package `debian-archive-keyring` of Debian and of its derivatives delivers them.
pub(super) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with a configuration of its own.
pub(super) struct Apt {
    configuration: PathBuf,
}

impl Apt {
    /// Fetches the lists of `arch` into the folder `dir`.
    ///
    /// # Errors
    /// Where there is no apt, or the archives cannot be reached.
    pub(super) fn update(dir: &Path, arch: &str) -> Result<Self> {
        ensure_debian()?;
        fs::create_dir_all(dir.join("lists/partial"))?;
        fs::create_dir_all(dir.join("cache"))?;
        let sources = ARCHIVES.map(|archive| format!("deb [arch={arch} signed-by={KEYRING}] {archive}\n"));
        fs::write(dir.join("sources.list"), sources.concat())?;
        // Nothing is installed in this system, so apt finds no conflict.
        fs::write(dir.join("status"), "")?;
        let at = dir.display();
        let configuration = format!(
            "APT::Architecture \"{arch}\";\n\
             APT::Architectures \"{arch}\";\n\
             Dir::Etc::SourceList \"{at}/sources.list\";\n\
             Dir::Etc::SourceParts \"/dev/null\";\n\
             Dir::State::Lists \"{at}/lists\";\n\
             Dir::State::status \"{at}/status\";\n\
             Dir::Cache \"{at}/cache\";\n\
             Acquire::Languages \"none\";\n\
             // Another user could not write here.\n\
             APT::Sandbox::User \"root\";\n"
        );
        let file = dir.join("apt.conf");
        fs::write(&file, configuration).with_context(|| format!("cannot write {}", file.display()))?;
        let apt = Self { configuration: file };
        process::run_long(&format!("apt-get update for {arch}"), apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.configuration);
        command
    }

    /// Fetches the archives of `packages` into the folder `to`.
    ///
    /// # Errors
    /// Where Debian does not have one of them.
    pub(super) fn download(&self, packages: &[&str], to: &Path) -> Result<()> {
        let mut download = self.command("apt-get");
        download.current_dir(to).arg("download").args(packages);
        process::run_long("apt-get download", &mut download)
    }

    /// The first package that `package` depends on: the content of a package that has none of its own.
    ///
    /// # Errors
    /// Where it depends on nothing.
    pub(super) fn dependency(&self, package: &str) -> Result<String> {
        first_dependency(&mut self.command("apt-cache"), package)
    }
}

/// As [`Apt::dependency`], by this apt-cache.
pub(super) fn first_dependency(apt_cache: &mut Command, package: &str) -> Result<String> {
    let depends = process::output(apt_cache.args(["depends", package]))?;
    let first = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(first.with_context(|| format!("{package} depends on nothing"))?.to_owned())
}

/// # Errors
/// Where apt-get or dpkg is missing.
pub(super) fn ensure_debian() -> Result<()> {
    for program in ["apt-get", "dpkg"] {
        ensure!(
            process::find_program(program).is_some(),
            "there is no {program}; this takes Debian or a distribution that is made from it"
        );
    }
    Ok(())
}

/// Unpacks every archive of the folder `archives` into the folder `root`.
///
/// # Errors
/// Where dpkg cannot.
pub(super) fn unpack(archives: &Path, root: &Path) -> Result<()> {
    let mut count = 0;
    for archive in fs::read_dir(archives).with_context(|| format!("cannot read {}", archives.display()))? {
        process::run(Command::new("dpkg").arg("-x").arg(archive?.path()).arg(root))?;
        count += 1;
    }
    if count == 0 {
        bail!("apt-get fetched nothing into {}", archives.display());
    }
    Ok(())
}

/// An empty folder at `dir`.
///
/// # Errors
/// Where the old one cannot be removed, or the new one not be made.
pub(super) fn empty(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))
}
