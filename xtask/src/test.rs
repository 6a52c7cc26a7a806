//! `cargo xtask test`: the test lanes. A lane that cannot run fails, and so does one that ran nothing.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::ops::AddAssign;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::setup::{self, KubernetesChoice, KubernetesRelease, Need};
use crate::{build, ebpf, process};

/// What `cargo xtask test` is told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only this lane; may be given several times.
    #[arg(long = "lane", value_name = "LANE")]
    lanes: Vec<Lane>,
    /// Run the lanes cluster and oracle with this release of Kubernetes: 1.30, 1.33, or any patch release such as
    /// 1.31.4. It is built on first use.
    #[arg(long, value_name = "VERSION")]
    kubernetes: Option<KubernetesChoice>,
    /// Run only tests whose names contain this.
    #[arg(last = true)]
    filter: Option<String>,
}

/// What a test needs, from nothing to a whole cluster.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Lane {
    /// Tests that run anywhere, without root.
    Unit,
    /// Tests on this machine's kernel, in network namespaces.
    Kernel,
    /// Tests with a real API server.
    Cluster,
    /// The scenarios, over kube-lane and kube-proxy.
    Oracle,
    /// Scenarios on other kernels, in virtual machines.
    Vm,
}

impl Lane {
    fn needs(self, kubernetes: Option<KubernetesRelease>) -> Vec<Need> {
        match self {
            Lane::Unit => vec![Need::Build],
            Lane::Kernel => vec![Need::Build, Need::Kernel],
            Lane::Cluster | Lane::Oracle => {
                vec![Need::Build, Need::Kernel, kubernetes.map_or(Need::ControlPlane, Need::Kubernetes)]
            }
            Lane::Vm => vec![Need::Build, Need::Vm],
        }
    }

    /// Whether the lane runs programs of Kubernetes.
    fn runs_kubernetes(self) -> bool {
        matches!(self, Lane::Cluster | Lane::Oracle)
    }

    /// What `cargo test` is told, once for each of its runs.
    fn runs(self) -> &'static [&'static [&'static str]] {
        match self {
            Lane::Unit => &[
                &["--workspace", "--exclude", "kube-lane-tests", "--exclude", "kube-lane-lab"],
                &["--package", "kube-lane-tests", "--lib"],
            ],
            Lane::Kernel => {
                &[&["--package", "kube-lane-lab"], &["--package", "kube-lane-tests", "--test", "kernel"]]
            }
            Lane::Cluster => &[&["--package", "kube-lane-tests", "--test", "cluster"]],
            Lane::Oracle => &[&["--package", "kube-lane-tests", "--test", "oracle"]],
            Lane::Vm => &[&["--package", "kube-lane-tests", "--test", "vm"]],
        }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Lane::Unit => "unit",
            Lane::Kernel => "kernel",
            Lane::Cluster => "cluster",
            Lane::Oracle => "oracle",
            Lane::Vm => "vm",
        })
    }
}

/// How many tests passed, and how many did not: an ignored one did not.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Tally {
    passed: usize,
    failed: usize,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

impl Tally {
    /// What a line says that ends a test program's output: "test result: ok. 3 passed; 0 failed; 1 ignored; …".
    fn parse(line: &str) -> Option<Tally> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let count = |what| {
            let (number, _) =
                counts.split("; ").find_map(|part| part.split_once(' ').filter(|p| p.1 == what))?;
            number.parse::<usize>().ok()
        };
        Some(Tally { passed: count("passed")?, failed: count("failed")? + count("ignored")? })
    }
}

/// Runs the lanes, prints each one's outcome and, in the last line, the sum of all.
pub(crate) fn run(args: &Args) -> ExitCode {
    let kubernetes = args.kubernetes.and_then(|choice| choice.0);
    // A release that is named asks for the lanes that run it.
    let runs = |lane: &&Lane| args.kubernetes.is_none() || lane.runs_kubernetes();
    let lanes: Vec<_> = match args.lanes.as_slice() {
        [] => Lane::value_variants().iter().filter(runs).collect(),
        lanes => lanes.iter().collect(),
    };
    let mut total = Tally::default();
    for lane in lanes {
        let start = Instant::now();
        println!("lane {lane}");
        let mut tally = run_lane(*lane, kubernetes, args.filter.as_deref()).unwrap_or_else(|error| {
            eprintln!("lane {lane} cannot run: {error:#}");
            Tally { passed: 0, failed: 1 }
        });
        // A filter may leave a lane without any test, but not all of them.
        if tally == Tally::default() && args.filter.is_none() {
            eprintln!("lane {lane} ran no test");
            tally.failed = 1;
        }
        println!("lane {lane}: {tally} in {:.0?}", start.elapsed());
        total += tally;
    }
    if total == Tally::default() {
        eprintln!("no test matches");
        total.failed = 1;
    }
    println!("{total}");
    if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_lane(lane: Lane, kubernetes: Option<KubernetesRelease>, filter: Option<&str>) -> Result<Tally> {
    let unprivileged = matches!(lane, Lane::Unit | Lane::Vm);
    ensure!(unprivileged || process::is_root(), "it makes network namespaces, which takes root");
    setup::ensure(&lane.needs(kubernetes))?;
    let mut tally = Tally::default();
    // The lanes run the agent as users have it: with its eBPF programs in it.
    let built = if lane == Lane::Unit { None } else { Some((build::agent(false)?, ebpf::build_object()?)) };
    for run in lane.runs() {
        let mut test = process::cargo();
        test.args(["test", "--no-fail-fast"]).args(*run);
        if let Some((binary, object)) = &built {
            test.env("KUBE_LANE_BIN", binary).env(build::OBJECT_VARIABLE, object);
        }
        if let Some(release) = kubernetes {
            test.env("KUBE_LANE_CONTROLPLANE", release.bin());
        }
        test.args(filter);
        tally += run_cargo_test(&mut test)?;
    }
    Ok(tally)
}

/// Runs `cargo test`, passes its output on and counts.
fn run_cargo_test(test: &mut Command) -> Result<Tally> {
    let mut child = test.stdout(Stdio::piped()).spawn().context("cannot start cargo test")?;
    let mut tally = Tally::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            tally += Tally::parse(&line).unwrap_or_default();
        }
    }
    // Nothing compiled, or a test program died before it could count.
    if !child.wait()?.success() && tally.failed == 0 {
        tally.failed = 1;
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_tests_count_as_failed() {
        let line =
            "test result: ok. 12 passed; 0 failed; 2 ignored; 0 measured; 3 filtered out; finished in 0.01s";
        assert_eq!(Tally::parse(line), Some(Tally { passed: 12, failed: 2 }));
    }

    #[test]
    fn failures_are_counted() {
        let line =
            "test result: FAILED. 1 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s";
        assert_eq!(Tally::parse(line), Some(Tally { passed: 1, failed: 4 }));
    }

    #[test]
    fn ci_runs_every_lane() {
        let workflow = std::fs::read_to_string(process::root().join(".github/workflows/ci.yml")).unwrap();
        let matrix = workflow.lines().find_map(|line| line.trim().strip_prefix("lane: ")).unwrap();
        let lanes = Lane::value_variants().iter().map(Lane::to_string).collect::<Vec<_>>();
        assert_eq!(matrix, format!("[{}]", lanes.join(", ")));
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(Tally::parse("test model::plan ... ok"), None);
    }
}
