//! `kube-lane version`.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Output;
use crate::version::{COMMIT, VERSION};

#[derive(Args, Debug)]
pub(super) struct VersionFlags {
    /// Form of the version
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub(super) fn run(flags: &VersionFlags) -> anyhow::Result<ExitCode> {
    match flags.output {
        Output::Text => return print(),
        Output::Json => {
            let version = json!({ "version": VERSION, "commit": COMMIT, "os": os(), "arch": arch() });
            writeln!(io::stdout(), "{version:#}")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What the flag `--version` prints: one line that begins with the name and the version, as kube-proxy's does.
pub(super) fn print() -> anyhow::Result<ExitCode> {
    writeln!(io::stdout(), "kube-lane v{VERSION} (commit {COMMIT}, {}/{})", os(), arch())?;
    Ok(ExitCode::SUCCESS)
}

fn os() -> &'static str {
    std::env::consts::OS
}

/// The architecture, by the name that Go and container images give it.
fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
