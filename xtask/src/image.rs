//! `cargo xtask image`: builds the agent as it is shipped and has the package `kube-lane-image` put it into an OCI archive,
//! or into a folder. Pushes nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::build::{self, Arch};
use crate::setup::sysroot::{RUNTIME, Sysroot};
use crate::setup::{self, Need};
use crate::{commit, process};

/// What `cargo xtask image` is told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The architecture of the nodes; the default is that of this machine
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Write the files of the image into this folder, and no archive
    #[arg(long, value_name = "DIR")]
    rootfs: Option<PathBuf>,
}

/// Builds the image, and prints in the last line where it is.
///
/// # Errors
/// When something is missing that cannot be installed, or does not compile; and when the archive gets too large.
pub(crate) fn run(args: &Args) -> Result<()> {
    let arch = args.arch.map_or_else(Arch::native, Ok)?;
    let written = match &args.rootfs {
        Some(folder) => {
            let folder = std::env::current_dir()?.join(folder);
            write(arch, "--rootfs", folder)?
        }
        None => archive(arch)?,
    };
    println!("{}", written.display());
    Ok(())
}

/// Writes the archive of this architecture, prints what it is, and returns where it is.
///
/// # Errors
/// As [`run`].
pub(crate) fn archive(arch: Arch) -> Result<PathBuf> {
    let name = format!("kube-lane-{}-{}.tar", env!("CARGO_PKG_VERSION"), arch.as_str());
    write(arch, "--archive", process::target("image").join(name))
}

/// Writes the archive that the lane `node` installs: that of [`archive`] but for the agent, which is `agent` without its
/// debug information. An optimised build would take many minutes more.
///
/// # Errors
/// As [`run`].
pub(crate) fn archive_of_dev(agent: &Path) -> Result<PathBuf> {
    let dir = process::target("image/dev");
    fs::create_dir_all(&dir)?;
    let stripped = dir.join("kube-lane");
    process::run(Command::new("strip").args(["--strip-debug", "-o"]).arg(&stripped).arg(agent))?;
    let arch = Arch::native()?;
    setup::ensure(&[Need::Image(arch)])?;
    pack(arch, &stripped, "--archive", dir.join("kube-lane.tar"))
}

/// Writes the files of the image for this architecture into a folder below `target/`, and returns where it is.
///
/// # Errors
/// As [`run`].
pub(crate) fn files(arch: Arch) -> Result<PathBuf> {
    let folder = process::target("image").join(format!("files-{}", arch.as_str()));
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    write(arch, "--rootfs", folder)
}

/// `to` is what `option` names.
fn write(arch: Arch, option: &str, to: PathBuf) -> Result<PathBuf> {
    setup::ensure(&[Need::Image(arch)])?;
    pack(arch, &build::agent_for(arch)?, option, to)
}

fn pack(arch: Arch, agent: &Path, option: &str, to: PathBuf) -> Result<PathBuf> {
    let mut image = process::cargo();
    image.args(["run", "--quiet", "--package", "kube-lane-image", "--", "--arch", arch.as_str()]);
    image.arg("--agent").arg(agent).arg("--license").arg(process::root().join("LICENSE"));
    image.arg("--system").arg(Sysroot(arch).dir());
    image.args(RUNTIME.iter().flat_map(|package| ["--package", package]));
    image.args(["--revision", &commit::of(process::root()), "--created", &commit_time()?]);
    process::run(image.arg(option).arg(&to))?;
    Ok(to)
}

/// When the sources were committed, in seconds since 1970. The variable is what other tools for reproducible builds
/// read.
fn commit_time() -> Result<String> {
    let told = std::env::var("SOURCE_DATE_EPOCH").ok();
    told.or_else(|| commit::git(process::root(), &["log", "-1", "--format=%ct"])).context(
        "git does not tell when the sources were committed; set SOURCE_DATE_EPOCH to the seconds since 1970",
    )
}
