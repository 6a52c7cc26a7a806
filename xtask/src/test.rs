//! `cargo xtask test`: the test lanes. A lane that cannot run fails, and so does one that ran nothing.

use std::fmt::{self, Write as _};
use std::io::{BufRead as _, BufReader};
use std::ops::AddAssign;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::build::Arch;
use crate::setup::{self, Cost, KubernetesChoice, KubernetesRelease, Need};
use crate::{build, ebpf, image, preflight, process};

/// What `cargo xtask test` is told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only this lane; may be given several times.
    #[arg(long = "lane", value_name = "LANE")]
    lanes: Vec<Lane>,
    /// Run the lanes cluster and oracle with this release of Kubernetes: 1.30, 1.33, 1.36, or any patch release such
    /// as 1.31.4. It is built on first use.
    #[arg(long, value_name = "VERSION")]
    kubernetes: Option<KubernetesChoice>,
    /// Run scenarios that take more than some minutes, too.
    #[arg(long)]
    long: bool,
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
    /// Installing and upgrading on clusters of real kubelets.
    Node,
    /// Scenarios on other kernels, in virtual machines.
    Vm,
}

impl Lane {
    fn needs(self, kubernetes: Option<KubernetesRelease>, long: bool) -> Vec<Need> {
        match self {
            Lane::Unit => vec![Need::Build],
            Lane::Kernel => vec![Need::Build, Need::Kernel],
            Lane::Cluster | Lane::Oracle => {
                let control_plane = kubernetes.map_or(Need::ControlPlane, Need::Kubernetes);
                let mut needs = vec![Need::Build, Need::Kernel, control_plane];
                needs.extend((self == Lane::Cluster).then_some(Need::Helm));
                needs
            }
            Lane::Node => {
                let mut needs = vec![Need::Build, Need::Kernel, Need::ControlPlane, Need::Node];
                needs.extend(build::Arch::native().map(Need::Image));
                // One of its nodes is in a virtual machine.
                needs.extend(long.then_some(Need::Vm));
                needs
            }
            Lane::Vm if long => vec![Need::Build, Need::Vm, Need::Image(Arch::Arm64), Need::VmArm64],
            Lane::Vm => vec![Need::Build, Need::Vm],
        }
    }

    /// Looks whether this machine can run the lane at all, before anything is installed or built.
    fn preflight(self) -> Result<()> {
        match self {
            Lane::Unit | Lane::Vm => Ok(()),
            Lane::Kernel | Lane::Cluster | Lane::Oracle | Lane::Node => preflight::lab(),
        }
    }

    /// How long the tests run once everything is built, roughly, on a machine with two processors.
    fn minutes(self) -> u32 {
        match self {
            Lane::Unit => 1,
            Lane::Kernel | Lane::Cluster => 5,
            Lane::Oracle => 10,
            Lane::Node => 12,
            Lane::Vm => 15,
        }
    }

    /// Whether the lane runs programs of Kubernetes.
    fn runs_kubernetes(self) -> bool {
        matches!(self, Lane::Cluster | Lane::Oracle)
    }

    /// What `cargo test` is told, once for each of its runs.
    fn runs(self, long: bool) -> &'static [&'static [&'static str]] {
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
            Lane::Node => &[&["--package", "kube-lane-tests", "--test", "node"]],
            Lane::Vm if long => &[
                &["--package", "kube-lane-tests", "--test", "vm"],
                &["--package", "kube-lane-tests", "--test", "arm64"],
            ],
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
            Lane::Node => "node",
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
    let refusals: Vec<_> = lanes.iter().map(|lane| lane.preflight().err()).collect();
    for (lane, refusal) in lanes.iter().zip(&refusals) {
        if let Some(refusal) = refusal {
            eprintln!("lane {lane} cannot run: {refusal:#}");
        }
    }
    let able: Vec<_> = lanes
        .iter()
        .zip(&refusals)
        .filter(|(_, refusal)| refusal.is_none())
        .map(|(lane, _)| **lane)
        .collect();
    // What cannot be told now, the lanes tell.
    if let Ok(Some(announcement)) = first_run(&able, kubernetes, args.long) {
        println!("{announcement}");
    }
    let mut total = Tally { passed: 0, failed: lanes.len() - able.len() };
    for lane in &able {
        let start = Instant::now();
        println!("lane {lane}");
        let mut tally = run_lane(*lane, kubernetes, args).unwrap_or_else(|error| {
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

/// What a first run announces: how long it takes, what it fetches and what it builds. Later runs announce nothing.
fn first_run(lanes: &[Lane], kubernetes: Option<KubernetesRelease>, long: bool) -> Result<Option<String>> {
    let mut needs: Vec<_> = lanes.iter().flat_map(|lane| lane.needs(kubernetes, long)).collect();
    if lanes.iter().any(|lane| *lane != Lane::Unit) {
        needs.push(Need::Ebpf);
    }
    let mut steps = setup::missing(&needs)?;
    if !build::target_dir().join("debug/deps").is_dir() {
        steps.push(("the workspace and its tests".to_owned(), WORKSPACE));
    }
    Ok(announce(&steps, lanes))
}

/// The dependencies of the workspace, its tests and the eBPF programs.
const WORKSPACE: Cost = Cost { minutes: 10, megabytes: 60 };

fn announce(steps: &[(String, Cost)], lanes: &[Lane]) -> Option<String> {
    if steps.is_empty() {
        return None;
    }
    let lasting: u32 = lanes.iter().map(|lane| lane.minutes()).sum();
    let minutes = lasting + steps.iter().map(|(_, cost)| cost.minutes).sum::<u32>();
    let megabytes: u32 = steps.iter().map(|(_, cost)| cost.megabytes).sum();
    let mut text = format!(
        "first run: about {minutes} minutes on two processors, {megabytes} MB to fetch; later runs {lasting} minutes"
    );
    for (name, Cost { minutes, megabytes }) in steps {
        let _ = write!(text, "\n  {minutes:>3} min  {name} ({megabytes} MB)");
    }
    for lane in lanes {
        let _ = write!(text, "\n  {:>3} min  lane {lane}", lane.minutes());
    }
    Some(text)
}

fn run_lane(lane: Lane, kubernetes: Option<KubernetesRelease>, args: &Args) -> Result<Tally> {
    setup::ensure(&lane.needs(kubernetes, args.long))?;
    let mut tally = Tally::default();
    // The lanes run the agent as users have it: with its eBPF programs in it.
    let built = if lane == Lane::Unit { None } else { Some((build::agent(false)?, ebpf::build_object()?)) };
    // And the image as users have it, for the nodes.
    let image = match &built {
        Some((agent, _)) if lane == Lane::Node => Some(image::archive_of_dev(agent)?),
        _ => None,
    };
    // The machine that is arm64 runs what users of that architecture get, which takes a release build.
    let arm64 = if lane == Lane::Vm && args.long { Some(image::files(Arch::Arm64)?) } else { None };
    for run in lane.runs(args.long) {
        let mut test = process::cargo();
        test.args(["test", "--no-fail-fast"]).args(*run);
        if let Some((binary, object)) = &built {
            test.env("KUBE_LANE_BIN", binary).env(build::OBJECT_VARIABLE, object);
        }
        if let Some(image) = &image {
            test.env("KUBE_LANE_IMAGE", image);
        }
        if let Some(files) = &arm64 {
            test.env("KUBE_LANE_ARM64_FILES", files);
        }
        if let Some(release) = kubernetes {
            test.env("KUBE_LANE_CONTROLPLANE", release.bin());
        }
        if args.long {
            test.env("KUBE_LANE_LONG", "1");
        }
        test.args(args.filter.as_deref());
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
    fn a_first_run_says_how_long_it_takes() {
        assert_eq!(announce(&[], &[Lane::Unit]), None);
        let steps =
            [("a compiler".to_owned(), Cost { minutes: 2, megabytes: 30 }), ("etcd".to_owned(), WORKSPACE)];
        let text = announce(&steps, &[Lane::Unit, Lane::Kernel]).unwrap();
        let expected = "first run: about 18 minutes on two processors, 90 MB to fetch; later runs 6 minutes\n    \
                        2 min  a compiler (30 MB)\n   10 min  etcd (60 MB)\n    1 min  lane unit\n    5 min  lane kernel";
        assert_eq!(text, expected);
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(Tally::parse("test model::plan ... ok"), None);
    }
}
