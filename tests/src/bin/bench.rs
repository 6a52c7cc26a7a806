//! The benchmarks' program. `cargo xtask bench` builds what it measures and starts it.
#![expect(clippy::print_stderr, reason = "a command-line tool speaks on its standard streams")]

use std::process::ExitCode;

fn main() -> ExitCode {
    match kube_lane_tests::bench::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
