//! The proxies that are measured, each started as its users start it: kube-lane, and kube-proxy in two modes.

use std::fmt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube_lane_lab::{Host, topology};
use procfs::process::Process;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::output;
use crate::agent::{self, Agent};
use crate::kube_proxy::{self, KubeProxy, Mode};

/// How long a proxy may take to come to rest.
const REST_LIMIT: Duration = Duration::from_secs(60);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Proxy {
    /// The agent of this repository.
    KubeLane,
    /// kube-proxy in its mode nftables.
    Nftables,
    /// kube-proxy in its mode iptables.
    Iptables,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KubeLane => "kube-lane",
            Self::Nftables => "kube-proxy nftables",
            Self::Iptables => "kube-proxy iptables",
        })
    }
}

impl Proxy {
    /// In the order in which they are measured and shown.
    pub(super) const ALL: [Self; 3] = [Self::KubeLane, Self::Nftables, Self::Iptables];

    /// More Services than these would take kube-proxy hours.
    pub(super) fn most_services(self) -> usize {
        if self == Self::KubeLane { usize::MAX } else { 10_000 }
    }

    /// How often the start is measured: one of kube-proxy's can take minutes.
    pub(super) fn starts(self) -> usize {
        if self == Self::KubeLane { 3 } else { 1 }
    }

    /// How many endpoint changes are measured.
    pub(super) fn changes(self) -> usize {
        if self == Self::KubeLane { 200 } else { 10 }
    }

    /// How long to wait before the next change. kube-proxy's is longer than its default `minSyncPeriod` (1 s), so
    /// that every change finds it free to begin at once.
    pub(super) fn pause(self) -> Duration {
        if self == Self::KubeLane { Duration::from_millis(20) } else { Duration::from_millis(1500) }
    }
}

/// A proxy that runs; killed when dropped. What it programmed stays.
#[derive(Debug)]
pub(super) enum Running {
    KubeLane(Agent),
    KubeProxy(KubeProxy),
}

/// Processor time and memory of a process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    /// Of the process and of the programs that it called.
    pub(super) cpu: Duration,
    /// `VmRSS`, in bytes; of the process alone.
    pub(super) rss: u64,
    /// `VmHWM`, in bytes; of the process alone.
    pub(super) peak_rss: u64,
}

impl Running {
    /// Starts a proxy on the node `host`, with its log in `dir`. Returns at once.
    pub(super) fn start(proxy: Proxy, host: &Host, kubeconfig: &Path, dir: &Path) -> Result<Self> {
        let [pods, _] = topology::cluster_cidrs().map(|cidr| cidr.to_string());
        let mode = match proxy {
            Proxy::KubeLane => {
                return Self::start_kube_lane(&["--proxy-mode", "nftables"], host, kubeconfig, dir);
            }
            Proxy::Nftables => Mode::Nftables,
            Proxy::Iptables => Mode::Iptables,
        };
        Ok(Self::KubeProxy(KubeProxy::start(&kube_proxy::Options {
            mode,
            netns: Some(Path::new("/run/netns").join(host.netns())),
            kubeconfig: kubeconfig.to_owned(),
            hostname: host.name().to_owned(),
            cluster_cidr: Some(pods),
            config: Value::Null,
        })?))
    }

    /// The same with kube-lane, and these arguments besides the usual ones.
    pub(super) fn start_kube_lane(
        arguments: &[&str],
        host: &Host,
        kubeconfig: &Path,
        dir: &Path,
    ) -> Result<Self> {
        let [pods, _] = topology::cluster_cidrs().map(|cidr| cidr.to_string());
        let kubeconfig = kubeconfig.to_str().context("a path that is no text")?;
        let usual = ["--kubeconfig", kubeconfig, "--hostname-override", host.name(), "--cluster-cidr", &pods];
        let arguments = [&usual, arguments].concat();
        Ok(Self::KubeLane(Agent::start(host, &arguments, &dir.join("kube-lane.log"))?))
    }

    /// Fails when it has ended.
    pub(super) fn ensure_alive(&mut self) -> Result<()> {
        let (ended, log) = match self {
            Self::KubeLane(agent) => (agent.process().try_wait()?, agent.log()),
            Self::KubeProxy(proxy) => (proxy.process().try_wait()?, proxy.process().log_tail()),
        };
        let lines: Vec<_> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(5)..].join("\n");
        ensure!(ended.is_none(), "the proxy ended: {}\n{tail}", ended.unwrap_or_default());
        Ok(())
    }

    /// What it has used so far.
    pub(super) fn usage(&mut self) -> Result<Usage> {
        let id = match self {
            Self::KubeLane(agent) => agent.process().id(),
            Self::KubeProxy(proxy) => proxy.process().id(),
        };
        let process = Process::new(i32::try_from(id)?)?;
        let (stat, status) = (process.stat()?, process.status()?);
        let children = u64::try_from(stat.cutime + stat.cstime).unwrap_or_default();
        let ticks = stat.utime + stat.stime + children;
        Ok(Usage {
            cpu: Duration::from_secs_f64(ticks as f64 / procfs::ticks_per_second() as f64),
            rss: status.vmrss.context("no VmRSS")? * 1024,
            peak_rss: status.vmhwm.context("no VmHWM")? * 1024,
        })
    }

    /// Waits until it is at rest: next to no processor time in two seconds.
    pub(super) fn rest(&mut self) -> Result<()> {
        let (deadline, busy) = (Instant::now() + REST_LIMIT, Duration::from_millis(20));
        let mut before = self.usage()?.cpu;
        while Instant::now() < deadline {
            sleep(Duration::from_secs(2));
            self.ensure_alive()?;
            let now = self.usage()?.cpu;
            if now.saturating_sub(before) <= busy {
                break;
            }
            before = now;
        }
        Ok(())
    }
}

/// Removes everything that any proxy has programmed in the calling thread's network namespace, which is the
/// benchmark's own.
pub(super) fn remove_all() -> Result<()> {
    output("nft", &["flush", "ruleset"])?;
    // Where iptables is not the one that nft knows.
    KubeProxy::cleanup(None)
}

/// What this machine's kube-lane and kube-proxy call themselves.
pub(super) fn versions() -> Result<[String; 2]> {
    let version = |program: &Path| output(program, &["--version"]).map(|text| text.trim().to_owned());
    Ok([version(&agent::binary()?)?, version(&crate::controlplane::program("kube-proxy")?)?])
}
