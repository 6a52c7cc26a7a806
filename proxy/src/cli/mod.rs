//! The command line: one file per subcommand. No subcommand means `run`, so that kube-lane starts as kube-proxy does.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::causes::with_causes;
use crate::config::flags::{Action, RunFlags};

mod bridges;
mod check;
mod cleanup;
mod confinement;
mod follow;
mod instance;
mod probe;
mod render;
mod rights;
mod run;
mod settings;
mod status;
mod sysctls;
mod version;

const FLAGS_NOTE: &str = "kube-lane accepts every other flag of kube-proxy 1.37. One warning at the start \
lists those that are set and that kube-lane does not support. With --config, only --hostname-override, --master, --manifests, \
--state-dir, --conntrack-clean-sctp, --count-connections, --drop-invalid, --cgroup-root, --bpf-root, --socket-lb-* and the flags about logs still \
have an effect.";

/// kube-lane: Kubernetes Services in nftables and eBPF, in place of kube-proxy
#[derive(Debug, Parser)]
#[command(
    name = "kube-lane",
    disable_version_flag = true,
    args_conflicts_with_subcommands = true,
    args_override_self = true,
    after_help = FLAGS_NOTE
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Box<RunFlags>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve Services on this node (the default)
    #[command(args_override_self = true, after_help = FLAGS_NOTE)]
    Run(Box<RunFlags>),
    /// Remove everything of kube-lane from the kernel
    Cleanup(cleanup::CleanupFlags),
    /// Try what this machine allows, and say what that means for each proxy mode
    Check(check::CheckFlags),
    /// Print what a folder of manifests leads to, without touching the kernel
    Render(render::RenderFlags),
    /// Ask the agent of this node what it has programmed, and which layer answers
    Status(status::StatusFlags),
    /// Answer a probe of the kubelet: ask the agent of this container, and fail with the reason
    Probe(probe::ProbeFlags),
    /// Print the version and the commit
    Version(version::VersionFlags),
}

/// Forms of what is printed.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Runs the command line. Errors go to standard error, one a line.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = Cli::parse_from(args.into_iter().map(dashed));
    let result = match cli.command {
        None => run_or_act(&cli.run),
        Some(Command::Run(flags)) => run_or_act(&flags),
        Some(Command::Cleanup(flags)) => cleanup::run(&flags),
        Some(Command::Check(flags)) => check::run(&flags),
        Some(Command::Render(flags)) => render::run(&flags),
        Some(Command::Status(flags)) => status::run(&flags),
        Some(Command::Probe(flags)) => probe::run(&flags),
        Some(Command::Version(flags)) => version::run(&flags),
    };
    match result {
        Ok(code) => code,
        // Such as `head`. Others die of SIGPIPE there, which a shell tells by this code.
        Err(error) if is_reader_gone(&error) => ExitCode::from(128 + 13),
        Err(error) => {
            // Nothing is left to do where standard error is closed.
            let _ = writeln!(io::stderr(), "Error: {}", with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Whoever reads standard output, or standard error, has had enough: an error of nothing else comes without a context.
fn is_reader_gone(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>().filter(|_| error.source().is_none());
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn run_or_act(flags: &RunFlags) -> anyhow::Result<ExitCode> {
    match flags.action() {
        Action::Version => version::print(),
        Action::Cleanup => cleanup::run_as_kube_proxy(flags),
        Action::WriteConfig(path) => run::write_config(flags, &path),
        Action::InitOnly => run::init_only(flags),
        Action::Run => run::run(flags),
    }
}

/// kube-proxy takes `--cluster_cidr` for `--cluster-cidr`.
fn dashed(argument: OsString) -> OsString {
    match argument.to_str() {
        Some(text) if text.starts_with("--") => {
            let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
            (name.replace('_', "-") + value).into()
        }
        _ => argument,
    }
}
