//! `kube-lane version`.

use std::io::{self, Write};
use std::process::ExitCode;

/// Prints the version as kube-proxy does: the program's name would break who parses it there.
pub(super) fn run() -> anyhow::Result<ExitCode> {
    writeln!(io::stdout(), "kube-lane v{}", env!("CARGO_PKG_VERSION"))?;
    Ok(ExitCode::SUCCESS)
}
