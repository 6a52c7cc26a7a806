//! Debian's kernels for the lane `vm`: fetched and unpacked below `target/vm`, never installed. Owns an apt
//! configuration of its own there, so that any machine with apt can have them, whatever release it runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Cost, Step};
use crate::process;

/// Where Debian has the packages below.
const ARCHIVES: [&str; 2] = [
    "http://deb.debian.org/debian bookworm main",
    "http://deb.debian.org/debian-security bookworm-security main",
];
/// Delivered by the package `debian-archive-keyring`, of Debian and of its derivatives.
pub(super) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

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
        if process::find_program("apt-get").is_none() || process::find_program("dpkg").is_none() {
            bail!("this is no Debian: it takes apt-get and dpkg to fetch and unpack a kernel");
        }
        let archives = process::target("vm").join(format!("{}.archives", self.series));
        let unpacked = process::target("vm").join(format!("{}.new", self.series));
        for dir in [&archives, &unpacked] {
            if dir.exists() {
                fs::remove_dir_all(dir).with_context(|| format!("cannot empty {}", dir.display()))?;
            }
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }

        let apt = Apt::configure()?;
        process::run_long("apt-get update", apt.command("apt-get").arg("update"))?;
        let image = apt.dependency(self.package)?;
        let mut download = apt.command("apt-get");
        process::run_long(&format!("apt-get download {image}"), {
            download.current_dir(&archives).args(["download", &image])
        })?;
        for archive in fs::read_dir(&archives)? {
            process::run(Command::new("dpkg").arg("-x").arg(archive?.path()).arg(&unpacked))?;
        }
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

/// apt with lists of its own.
struct Apt {
    configuration: PathBuf,
}

impl Apt {
    fn configure() -> Result<Self> {
        let dir = process::target("vm/apt");
        fs::create_dir_all(dir.join("lists/partial"))?;
        fs::create_dir_all(dir.join("cache"))?;
        let sources = ARCHIVES.map(|archive| format!("deb [arch=amd64 signed-by={KEYRING}] {archive}\n"));
        fs::write(dir.join("sources.list"), sources.concat())?;
        let at = dir.display();
        let configuration = format!(
            "Dir::Etc::SourceList \"{at}/sources.list\";\n\
             Dir::Etc::SourceParts \"/dev/null\";\n\
             Dir::State::Lists \"{at}/lists\";\n\
             Dir::Cache \"{at}/cache\";\n\
             Acquire::Languages \"none\";\n\
             // Another user could not write here.\n\
             APT::Sandbox::User \"root\";\n"
        );
        let file = dir.join("apt.conf");
        fs::write(&file, configuration).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(Self { configuration: file })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.configuration);
        command
    }

    /// The package that a package without content of its own stands for.
    fn dependency(&self, package: &str) -> Result<String> {
        let depends = process::output(self.command("apt-cache").args(["depends", package]))?;
        let first = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(first.with_context(|| format!("{package} depends on nothing"))?.to_owned())
    }
}
