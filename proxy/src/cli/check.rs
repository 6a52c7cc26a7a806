//! `kube-lane check`: what this kernel, its mounts and our rights allow, and what that means for each proxy mode.
//!
//! Tries things instead of comparing versions, and leaves nothing behind.

use std::fmt::{self, Display, Formatter};
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::{Output, bridges, rights, settings};
use crate::causes::with_causes;
use crate::config::flags::{AgentFlags, RunFlags};
use crate::config::values::go_bool;
use crate::config::{Config, Environment, Mode, Resolved, SocketLb};
use crate::dataplane::nftables::{Settings, try_ruleset};
use crate::dataplane::{conntrack, socket};
use crate::model::input::Family;

#[derive(Args, Debug)]
pub(super) struct CheckFlags {
    /// The mode that has to work for the check to succeed [default: the configuration's; without one, both have to]
    #[arg(long, value_enum)]
    proxy_mode: Option<Mode>,
    /// Whether nftables has to be able to count connections for the check to succeed
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    count_connections: Option<bool>,
    #[command(flatten)]
    agent: AgentFlags,
    /// Form of the table
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// One thing that was tried.
struct Row {
    name: &'static str,
    /// The mode does not work without it.
    required: bool,
    needed_for: &'static str,
    /// What was found, or why it was not.
    found: Result<String, String>,
    /// What it means where it is missing.
    means: &'static str,
}

/// What was tried for one mode.
struct Table {
    mode: &'static str,
    rows: Vec<Row>,
}

pub(super) fn run(flags: &CheckFlags) -> anyhow::Result<ExitCode> {
    let Resolved { mut config, warnings, .. } =
        RunFlags::from(&flags.agent).resolve_for_node(&Environment::read())?;
    let names_file = flags.agent.names_file();
    let wanted = flags.proxy_mode.or(names_file.then_some(config.mode));
    config.count_connections = flags.count_connections.unwrap_or(config.count_connections);
    if names_file {
        warnings.iter().try_for_each(|warning| writeln!(io::stderr(), "{warning}"))?;
    }

    let nftables = Table { mode: "nftables", rows: nftables(&config) };
    let ebpf = Table { mode: "ebpf", rows: ebpf(&config) };
    let works = nftables.works() && (wanted == Some(Mode::Nftables) || ebpf.works());
    let mut out = io::stdout().lock();
    match flags.output {
        Output::Text => write!(out, "{nftables}{ebpf}")?,
        Output::Json => {
            let tables = json!({ "works": works, "nftables": nftables.to_json(), "ebpf": ebpf.to_json() });
            writeln!(out, "{}", serde_json::to_string_pretty(&tables)?)?;
        }
    }
    Ok(if works { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn nftables(config: &Config) -> Vec<Row> {
    let attempt = |family, count_connections| {
        let settings = Settings { count_connections, ..settings::nftables(config) };
        let taken = try_ruleset(&settings, family).map(|()| "the kernel takes it".to_owned());
        taken.map_err(|error| with_causes(&error))
    };
    let [v4, v6] = Family::ALL.map(|family| attempt(family, false));
    let counting = attempt(Family::V4, true);
    let counting = if v6.is_ok() { counting.and_then(|_| attempt(Family::V6, true)) } else { counting };
    let tracking = conntrack::load().map(|()| "can be read".to_owned());
    vec![
        Row {
            name: "capabilities",
            required: true,
            needed_for: "everything",
            found: rights::rights(rights::NFTABLES),
            means: "kube-lane does not work here",
        },
        Row {
            name: "the ruleset",
            required: true,
            needed_for: "everything",
            found: v4,
            means: "kube-lane does not work here: it takes a kernel with nf_tables, nft_fib, nft_numgen, nft_hash, \
                    nft_nat, nft_masq and nft_reject",
        },
        Row {
            name: "the ruleset for IPv6",
            required: false,
            needed_for: "Services with an IPv6 address",
            found: v6,
            means: "these are not served, dual-stack ones neither; it takes the same of the kernel for IPv6",
        },
        Row {
            name: "the ruleset with counters",
            required: config.count_connections,
            needed_for: "--count-connections",
            found: counting,
            means: "nftables counts no connections",
        },
        Row {
            name: "Services within a bridge of pods",
            required: false,
            needed_for: "pods on a bridge, to connect to a Service whose endpoint is on the same bridge",
            found: bridges::filtered(&config.network.detector),
            means: "such connections time out, as with kube-proxy; in mode ebpf, TCP connections to ClusterIPs do not",
        },
        Row {
            name: "connection tracking over netlink",
            required: false,
            needed_for: "to forget UDP flows to endpoints that are gone",
            found: tracking.map_err(|error| with_causes(&error)),
            means: "UDP clients that never pause stay with an endpoint that is gone; \
                    it takes CAP_NET_ADMIN and a kernel with nf_conntrack_netlink",
        },
    ]
}

fn ebpf(config: &Config) -> Vec<Row> {
    let rights = Row {
        name: "capabilities",
        required: true,
        needed_for: "maps (CAP_BPF), programs (CAP_PERFMON), attaching them (CAP_NET_ADMIN)",
        found: rights::rights(rights::EBPF),
        means: "no socket layer: nftables answers everything",
    };
    let SocketLb { cgroup_root, bpf_root, pod_cgroups, .. } = &config.socket_lb;
    let features = socket::probe(cgroup_root.as_deref(), bpf_root, pod_cgroups);
    let confinement = rights::confinement(rights::EBPF);
    let told = |socket::Failure { words, is_not_permitted }| match &confinement {
        Some(confinement) if is_not_permitted => format!("{words} ({confinement})"),
        _ => words,
    };
    let row = |socket::Feature { name, required, needed_for, found, means }| Row {
        name,
        required,
        needed_for,
        found: found.map_err(told),
        means,
    };
    std::iter::once(rights).chain(features.into_iter().map(row)).collect()
}

impl Table {
    fn works(&self) -> bool {
        self.rows.iter().all(|row| !row.required || row.found.is_ok())
    }

    fn to_json(&self) -> Value {
        let row = |row: &Row| {
            let (Ok(words) | Err(words)) = &row.found;
            json!({
                "name": row.name,
                "neededFor": row.needed_for,
                "required": row.required,
                "works": row.found.is_ok(),
                "found": words,
                "without": row.means,
            })
        };
        json!({ "works": self.works(), "checks": self.rows.iter().map(row).collect::<Vec<_>>() })
    }
}

impl Row {
    fn fmt(&self, width: usize, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { name, required, needed_for, found, means } = self;
        match found {
            Ok(words) if words == "yes" => writeln!(f, "  yes  {name}"),
            Ok(words) => writeln!(f, "  yes  {name:width$}  {words}"),
            Err(words) => {
                let no = if *required { "NO" } else { "no" };
                writeln!(f, "  {no}   {name:width$}  {words}")?;
                writeln!(f, "       {:width$}  for: {needed_for}", "")?;
                writeln!(f, "       {:width$}  without it: {means}", "")
            }
        }
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let works = if self.works() { "works" } else { "does not work here" };
        writeln!(f, "--proxy-mode {}: {works}", self.mode)?;
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or_default();
        let (required, optional): (Vec<_>, Vec<_>) = self.rows.iter().partition(|row| row.required);
        required.into_iter().try_for_each(|row| row.fmt(width, f))?;
        if !optional.is_empty() {
            writeln!(f, "  not required:")?;
        }
        optional.into_iter().try_for_each(|row| row.fmt(width, f))
    }
}
