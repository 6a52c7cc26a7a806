//! The `kube-lane` binary: parses the command line, starts telemetry, dispatches.

fn main() {}
