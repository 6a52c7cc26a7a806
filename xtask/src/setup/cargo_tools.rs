//! Programs from crates.io, in `target/tools`, and components of the Rust toolchain.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::Step;
use crate::process;

/// Checks licenses, duplicate versions and sources of dependencies.
pub(crate) const DENY: Tool = Tool { name: "cargo-deny", version: "0.20.2", arguments: &[] };
/// Lists the crates that a program is built from.
pub(crate) const CYCLONEDX: Tool = Tool { name: "cargo-cyclonedx", version: "0.5.9", arguments: &[] };
/// Finds dependencies that nothing uses.
pub(crate) const MACHETE: Tool = Tool { name: "cargo-machete", version: "0.9.2", arguments: &[] };

/// A program from crates.io, in exactly one version.
pub(crate) struct Tool {
    /// The crate, and the program that it builds.
    pub(crate) name: &'static str,
    /// The version that is installed.
    pub(crate) version: &'static str,
    /// What `cargo install` is told besides: features, for instance.
    pub(crate) arguments: &'static [&'static str],
}

impl Tool {
    /// Where the program is once installed. The path holds the version, so another version is another file.
    pub(crate) fn path(&self) -> PathBuf {
        self.root().join("bin").join(self.name)
    }

    /// The `cargo install` that makes it.
    pub(super) fn install(&self) -> Command {
        let mut install = process::cargo();
        // Tools run for seconds: an unoptimised build costs less than it saves.
        install.args(["install", "--locked", "--profile", "dev"]);
        install.arg("--target-dir").arg(process::target("tools/build")).arg("--root").arg(self.root());
        install.args(["--version", self.version, self.name]).args(self.arguments);
        install
    }

    fn root(&self) -> PathBuf {
        process::target("tools").join(format!("{}-{}", self.name, self.version))
    }
}

impl Step for Tool {
    fn name(&self) -> String {
        format!("{} {}", self.name, self.version)
    }

    fn is_done(&self) -> Result<bool> {
        Ok(self.path().is_file())
    }

    fn run(&self) -> Result<()> {
        process::run_long(&format!("cargo install {}", self.name), &mut self.install())
    }
}

/// rustfmt and clippy, where rustup has left them out.
pub(super) struct RustComponents;

impl Step for RustComponents {
    fn name(&self) -> String {
        "Rust components rustfmt and clippy".into()
    }

    fn is_done(&self) -> Result<bool> {
        let works = |subcommand| process::output(process::cargo().args([subcommand, "--version"])).is_ok();
        Ok(works("fmt") && works("clippy"))
    }

    fn run(&self) -> Result<()> {
        let mut rustup = Command::new("rustup");
        process::run(rustup.current_dir(process::root()).args(["component", "add", "rustfmt", "clippy"]))
    }
}
