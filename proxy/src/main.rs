//! The `kube-lane` binary: all of it is in `kube_lane::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    kube_lane::cli::main(std::env::args_os())
}
