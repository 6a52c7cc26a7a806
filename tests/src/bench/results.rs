//! What a run found, as it lies in `bench/results`: every figure names its unit.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use k8s_openapi::jiff::Timestamp;
use procfs::Current;
use procfs::process::{FDTarget, Process};
use serde::{Deserialize, Serialize};

use super::proxy::{self, Proxy};
use super::{output, root};

/// All of one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Results {
    /// When it began (UTC).
    pub(super) date: String,
    /// What was checked out; `-dirty` where files differed.
    pub(super) commit: String,
    pub(super) machine: Machine,
    pub(super) versions: Versions,
    /// A kube-proxy that took longer was given up.
    pub(super) limit_seconds: u64,
    /// Of every Service but one.
    pub(super) endpoints_per_service: usize,
    pub(super) measurements: Vec<Measurement>,
    /// How long the ruleset of kube-lane is.
    pub(super) rules: Vec<Rules>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) kernel: String,
    pub(super) cpu: String,
    pub(super) cpus: usize,
    pub(super) memory_bytes: u64,
    /// Processes that listen to changes of nftables in any network namespace: the kernel then writes notifications of
    /// everybody's changes, in all namespaces, which makes large ones take about twice as long.
    pub(super) nftables_listeners: Vec<i32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Versions {
    pub(super) kube_lane: String,
    pub(super) kube_proxy: String,
    pub(super) nft: String,
}

/// One proxy at one number of Services.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Measurement {
    pub(super) proxy: Proxy,
    pub(super) services: usize,
    /// From the process's start until a new connection to every Service of a sample (the first, the last, some
    /// between) had been answered; for each start. Null: not within the limit.
    pub(super) start_ms: Vec<Option<f64>>,
    /// Who answered connections to the last Service.
    pub(super) answered_by: Vec<String>,
    /// Resident memory after the start, at rest.
    pub(super) rss_bytes: Option<u64>,
    /// The most resident memory up to then.
    pub(super) peak_rss_bytes: Option<u64>,
    /// Processor time up to then, of the process and of the programs that it called.
    pub(super) cpu_seconds: Option<f64>,
    pub(super) changes: Option<Changes>,
    /// kube-lane alone says.
    pub(super) commits: Option<Commits>,
    /// Why something is missing.
    pub(super) error: Option<String>,
}

/// A slice's only endpoint replaced by another, again and again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Changes {
    /// How many took effect within the limit.
    pub(super) count: usize,
    /// PATCH sent → only the new pod answers. Null where none took effect.
    pub(super) from_request_ms: Option<Spread>,
    /// PATCH's response received → only the new pod answers.
    pub(super) from_response_ms: Option<Spread>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Spread {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

/// The mean of one change, of what kube-lane's own metrics say.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Commits {
    /// Commits to the kernel for each change.
    pub(super) commits: f64,
    /// Netlink messages sent.
    pub(super) messages: f64,
    /// Bytes of these messages.
    pub(super) bytes: f64,
    /// Elements added and elements removed.
    pub(super) elements: f64,
    /// How long they took, lowering and the kernel's answer included.
    pub(super) duration_us: f64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Rules {
    pub(super) services: usize,
    /// Rules that `nft list ruleset` prints.
    pub(super) rules: usize,
}

impl Spread {
    /// Of no figures: none.
    pub(super) fn of(mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_by(f64::total_cmp);
        // The nearest rank: a figure that was measured.
        let rank = |percent: usize| figures.get((figures.len() * percent).div_ceil(100).max(1) - 1).copied();
        Some(Self { p50: rank(50)?, p99: rank(99)?, max: rank(100)? })
    }
}

impl Measurement {
    /// Of which nothing is known yet.
    pub(super) fn new(proxy: Proxy, services: usize) -> Self {
        Self {
            proxy,
            services,
            start_ms: vec![],
            answered_by: vec![],
            rss_bytes: None,
            peak_rss_bytes: None,
            cpu_seconds: None,
            changes: None,
            commits: None,
            error: None,
        }
    }

    /// The middle one of its starts, in milliseconds; `None` where one was given up.
    pub(super) fn start(&self) -> Option<f64> {
        let starts: Option<Vec<f64>> = self.start_ms.iter().copied().collect();
        Spread::of(starts?).map(|spread| spread.p50)
    }
}

impl Results {
    /// Of which only the surroundings are known.
    pub(super) fn new(limit_seconds: u64, endpoints_per_service: usize) -> Result<Self> {
        Ok(Self {
            date: Timestamp::now().to_string(),
            commit: commit(),
            machine: Machine::this()?,
            versions: Versions::here()?,
            limit_seconds,
            endpoints_per_service,
            measurements: vec![],
            rules: vec![],
        })
    }

    /// The day it began, `2026-01-31`.
    pub(super) fn day(&self) -> String {
        self.date.chars().take(10).collect()
    }

    /// Writes them to `sync-<day>.json` in `dir`, in place of an earlier run of that day.
    pub(super) fn save(&self, dir: &Path) -> Result<PathBuf> {
        save(self, "sync", &self.day(), dir)
    }

    /// The newest in `dir`.
    pub(super) fn newest(dir: &Path) -> Result<Self> {
        newest("sync", dir)
    }

    /// A proxy's measurement at a number of Services.
    pub(super) fn of(&self, proxy: Proxy, services: usize) -> Option<&Measurement> {
        self.measurements.iter().find(|one| (one.proxy, one.services) == (proxy, services))
    }

    /// The numbers of Services that were measured, in order.
    pub(super) fn sizes(&self) -> Vec<usize> {
        let mut sizes: Vec<_> = self.measurements.iter().map(|one| one.services).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }
}

impl Machine {
    /// The one that this runs on.
    pub(super) fn this() -> Result<Self> {
        let cpus = procfs::CpuInfo::current()?;
        Ok(Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpu: cpus.model_name(0).unwrap_or("unknown").to_owned(),
            cpus: cpus.num_cores(),
            memory_bytes: procfs::Meminfo::current()?.mem_total,
            nftables_listeners: nftables_listeners(),
        })
    }
}

impl Versions {
    /// Those of what is measured.
    pub(super) fn here() -> Result<Self> {
        let [kube_lane, kube_proxy] = proxy::versions()?;
        Ok(Self { kube_lane, kube_proxy, nft: output("nft", &["--version"])?.trim().to_owned() })
    }
}

/// Writes results to `<name>-<day>.json` in `dir`, in place of an earlier run of that day.
pub(super) fn save(results: &impl Serialize, name: &str, day: &str, dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir)?;
    let file = dir.join(format!("{name}-{day}.json"));
    let text = serde_json::to_string_pretty(results)? + "\n";
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

/// The newest results of a name in `dir`.
pub(super) fn newest<T: serde::de::DeserializeOwned>(name: &str, dir: &Path) -> Result<T> {
    let entries = fs::read_dir(dir).with_context(|| format!("no results in {}", dir.display()))?;
    let files = entries.flatten().map(|entry| entry.path()).filter(|file| {
        let file = file.file_name().and_then(|file| file.to_str()).unwrap_or_default();
        file.strip_prefix(name).is_some_and(|rest| rest.starts_with('-')) && file.ends_with(".json")
    });
    let newest = files.max().with_context(|| format!("no results of {name} in {}", dir.display()))?;
    let text = fs::read_to_string(&newest)?;
    serde_json::from_str(&text).with_context(|| format!("{} is not what it was", newest.display()))
}

/// The processes that are subscribed to nftables, in whatever network namespace.
fn nftables_listeners() -> Vec<i32> {
    const NETFILTER: &str = "12"; // NETLINK_NETFILTER
    const NFTABLES: u32 = 1 << 6; // NFNLGRP_NFTABLES, counted from 1
    // The inode of a subscribed socket, from its line: address, protocol, port, groups, …, inode.
    let inode = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let groups = u32::from_str_radix(fields.get(3)?, 16).ok()?;
        (fields.get(1) == Some(&NETFILTER) && groups & NFTABLES != 0).then_some(())?;
        fields.last()?.parse::<u64>().ok()
    };
    let mut namespaces = BTreeSet::new();
    let mut sockets = BTreeSet::new();
    let processes: Vec<_> = procfs::process::all_processes().into_iter().flatten().flatten().collect();
    for process in &processes {
        let proc = PathBuf::from(format!("/proc/{}", process.pid));
        // What has ended meanwhile listens no more.
        let Ok(namespace) = fs::read_link(proc.join("ns/net")) else { continue };
        if namespaces.insert(namespace) {
            let listing = fs::read_to_string(proc.join("net/netlink")).unwrap_or_default();
            sockets.extend(listing.lines().filter_map(inode));
        }
    }
    let listens = |process: &Process| {
        let mut open = process.fd().into_iter().flatten().flatten();
        open.any(|fd| matches!(fd.target, FDTarget::Socket(inode) if sockets.contains(&inode)))
    };
    processes.iter().filter(|process| listens(process)).map(Process::pid).collect()
}

/// What is checked out.
pub(super) fn commit() -> String {
    let Some(top) = root().to_str() else { return "unknown".to_owned() };
    let git = |arguments: &[&str]| output("git", &[&["-C", top], arguments].concat());
    let Ok(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    // What a run writes is no change of what it measures.
    let changed = git(&["status", "--porcelain", "--", ".", ":!bench", ":!README.md"]);
    let dirty = if changed.is_ok_and(|files| files.is_empty()) { "" } else { "-dirty" };
    format!("{}{dirty}", commit.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_of_figures_that_were_measured() {
        let spread = Spread::of((1..=200).rev().map(f64::from).collect()).unwrap();
        assert_eq!((spread.p50, spread.p99, spread.max), (100.0, 198.0, 200.0));
        let spread = Spread::of(vec![7.0]).unwrap();
        assert_eq!((spread.p50, spread.p99, spread.max), (7.0, 7.0, 7.0));
        assert!(Spread::of(vec![]).is_none());
    }

    #[test]
    fn a_start_that_was_given_up_has_no_middle() {
        let mut measurement = Measurement::new(Proxy::KubeLane, 100);
        measurement.start_ms = vec![Some(3.0), Some(1.0), Some(2.0)];
        assert_eq!(measurement.start(), Some(2.0));
        measurement.start_ms.push(None);
        assert_eq!(measurement.start(), None);
    }
}
