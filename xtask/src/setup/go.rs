//! A Go toolchain for `tests/controlplane` and `tests/tools`: the machine's own, which from 1.21 on fetches the release that
//! go.mod asks for by itself; an older one fetches it here, from the same module registry.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Cost, Step, debian};
use crate::process;

/// The first release that obeys `GOTOOLCHAIN=auto`.
const FIRST_SWITCHING: (u32, u32) = (1, 21);

/// The folder of the Go module that names the upstream programs.
pub(crate) fn module() -> PathBuf {
    process::root().join("tests/controlplane")
}

/// `go` in [`module`], in the release that its go.mod asks for or a later one.
pub(crate) fn command() -> Command {
    command_in("tests/controlplane")
}

/// `go` in the folder `module`, relative to the top of this repository; otherwise as [`command`].
pub(crate) fn command_in(module: impl AsRef<Path>) -> Command {
    let fetched = process::target("tools/go/bin/go");
    let mut command = Command::new(if fetched.is_file() { fetched } else { "go".into() });
    command.current_dir(process::root().join(module)).env("GOTOOLCHAIN", "auto");
    command
}

/// Downloads a module such as `k8s.io/api@v0.36.3`, checked as any module is, and returns its folder in Go's cache.
///
/// # Errors
/// When the module proxy does not serve it.
pub(super) fn download(module: &str) -> Result<PathBuf> {
    process::run_long("go mod download", outside_module().args(["mod", "download", module]))?;
    let cache = process::output(outside_module().args(["env", "GOMODCACHE"]))?;
    Ok(Path::new(cache.trim()).join(module))
}

/// A working [`command`].
pub(crate) struct Toolchain;

impl Step for Toolchain {
    fn name(&self) -> String {
        "a Go toolchain".into()
    }

    fn is_done(&self) -> Result<bool> {
        Ok(release(&mut command()).is_some_and(|release| release >= FIRST_SWITCHING))
    }

    fn run(&self) -> Result<()> {
        if process::find_program("go").is_none() {
            debian::install(&["golang-go"])?;
        }
        match release(&mut outside_module()) {
            Some(release) if release >= FIRST_SWITCHING => Ok(()),
            Some(_) => fetch(),
            None => bail!("`go version` does not answer: please install Go {} or later", wanted()?),
        }
    }

    fn cost(&self) -> Cost {
        Cost { minutes: 1, megabytes: 70 }
    }
}

/// The `go` of PATH where no go.mod is read: an old one cannot parse ours.
fn outside_module() -> Command {
    let mut command = Command::new("go");
    command.current_dir("/").env("GO111MODULE", "on");
    command
}

/// Major and minor of what `go version` answers.
fn release(go: &mut Command) -> Option<(u32, u32)> {
    let answer = process::output(go.arg("version")).ok()?;
    let (major, rest) = answer.strip_prefix("go version go")?.split_once('.')?;
    let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The release that go.mod asks for.
fn wanted() -> Result<String> {
    let go_mod = fs::read_to_string(module().join("go.mod")).context("tests/controlplane/go.mod")?;
    let line = go_mod.lines().find_map(|line| line.strip_prefix("go "));
    Ok(line.context("tests/controlplane/go.mod has no go line")?.trim().to_owned())
}

/// Does what newer releases do by themselves: takes the toolchain as a module, checked as any module is.
fn fetch() -> Result<()> {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let module = format!("golang.org/toolchain@v0.0.1-go{}.linux-{arch}", wanted()?);
    let toolchain = download(&module)?;

    // Modules carry no mode bits.
    for dir in ["bin", "pkg/tool"] {
        make_executable(&toolchain.join(dir))?;
    }
    let link = process::target("tools/go");
    fs::create_dir_all(process::target("tools"))?;
    if link.is_symlink() {
        fs::remove_file(&link)?;
    }
    std::os::unix::fs::symlink(&toolchain, &link).with_context(|| format!("cannot link {}", link.display()))
}

fn make_executable(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            make_executable(&entry.path())?;
        } else {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o555))?;
        }
    }
    Ok(())
}
