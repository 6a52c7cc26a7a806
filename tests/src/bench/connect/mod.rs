//! `cargo xtask bench connect`: what it costs a client in a pod to connect, and to keep a connection.
//!
//! Each way of reaching a Service has a node of its own, wired like all others, with five pods that serve and one that
//! dials. At each number of Services all proxies program their nodes, one after the other, and end: what they programmed
//! stays. Then all ways are measured in turn, round by round, so that what slows the machine slows all of them; the best
//! round of each counts.

mod report;
mod rounds;

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum as _;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube_lane_lab::{Lab, Pod, on_interrupt};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::runtime::Runtime;

use self::rounds::{Dialled, Stream};
use super::proxy::{Proxy, Running};
use super::results::{self, Machine, Versions};
use super::{api, output, results_dir, root};
use crate::agent::{self, Agent};
use crate::controlplane::{ControlPlane, Options};
use crate::objects::Endpoint;
use crate::relay::Relay;

/// Endpoints of each Service: as many pods serve.
const ENDPOINTS: usize = 5;
const SERVICE_CIDR: &str = "10.96.0.0/12";
/// How many endpoint changes are counted, and how long each may take.
const CHANGES: usize = 50;
const CHANGE_LIMIT: Duration = Duration::from_secs(5);
/// What results and README's block are called.
const NAME: &str = "connect";

/// What `cargo xtask bench connect` is told.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Numbers of Services, each with five endpoints.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 10_000, 50_000])]
    sizes: Vec<usize>,
    /// Seconds that one start may take.
    #[arg(long, default_value_t = 300)]
    limit: u64,
    /// Rounds in which everything is dialled in turn.
    #[arg(long, default_value_t = 40)]
    rounds: usize,
    /// Measure only this; may be given several times.
    #[arg(long)]
    only: Vec<Way>,
    /// Write the results to this folder and leave README as it is.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What a node has between a client and the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Way {
    /// Nothing: pods are dialled directly.
    Bare,
    /// kube-lane in its mode ebpf.
    Ebpf,
    /// kube-lane in its mode nftables.
    Nftables,
    /// kube-proxy in its mode nftables.
    KubeProxyNftables,
    /// kube-proxy in its mode iptables.
    KubeProxyIptables,
}

impl Way {
    fn kube_proxy(self) -> Option<Proxy> {
        match self {
            Self::KubeProxyNftables => Some(Proxy::Nftables),
            Self::KubeProxyIptables => Some(Proxy::Iptables),
            _ => None,
        }
    }
}

/// All of one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Results {
    /// When it began (UTC).
    date: String,
    /// What was checked out; `-dirty` where files differed.
    commit: String,
    machine: Machine,
    versions: Versions,
    /// A start that took longer was given up.
    limit_seconds: u64,
    endpoints_per_service: usize,
    rounds: usize,
    dials_per_round: usize,
    measurements: Vec<Measurement>,
}

/// One way at one number of Services.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Measurement {
    way: Way,
    services: usize,
    /// From the agent's start until the first and the last Service answered, in ebpf at the socket.
    start_ms: Option<f64>,
    /// Resident memory of the agent, at rest.
    rss_bytes: Option<u64>,
    /// Memory of the eBPF maps, as the kernel counts it.
    map_bytes: Option<u64>,
    /// What the socket layer did for that.
    #[serde(default)]
    socket: Option<Socket>,
    connects: Vec<Dialled>,
    stream: Option<Stream>,
    /// Why something is missing.
    error: Option<String>,
}

/// What the socket layer did in its maps.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Socket {
    /// All Services, at the start, in milliseconds.
    start_ms: f64,
    /// Words and elements written at the start.
    start_writes: f64,
    /// The mean of one endpoint change, in microseconds.
    change_us: f64,
    /// Words and elements written for it.
    change_writes: f64,
}

impl Results {
    fn of(&self, way: Way, services: usize) -> Option<&Measurement> {
        self.measurements.iter().find(|one| (one.way, one.services) == (way, services))
    }

    fn day(&self) -> &str {
        self.date.get(..10).unwrap_or(&self.date)
    }
}

/// Measures, and writes the results down.
pub(super) fn run(args: &Args) -> Result<()> {
    let _removes_labs = on_interrupt()?;
    let mut results = Results {
        date: Timestamp::now().to_string(),
        commit: results::commit(),
        machine: Machine::this()?,
        versions: Versions::here()?,
        limit_seconds: args.limit,
        endpoints_per_service: ENDPOINTS,
        rounds: args.rounds,
        dials_per_round: rounds::DIALS,
        measurements: vec![],
    };
    let dir = args.out.clone().unwrap_or_else(results_dir);
    let mut sizes = args.sizes.clone();
    sizes.sort_unstable();
    ensure!(sizes.first().is_some_and(|size| *size > 0), "--sizes: a number of Services is at least 1");
    let source = Source::start()?;
    let mut there = 0;
    for size in sizes {
        println!("{size} Services");
        source.create(there..size)?;
        there = size;
        results.measurements.extend(measure(&source, size, args)?);
        // What was measured survives whatever comes next.
        results::save(&results, NAME, results.day(), &dir)?;
    }
    println!("\n{}", report::markdown(&results));
    let file = results::save(&results, NAME, results.day(), &dir)?;
    println!("written to {}", file.display());
    if args.out.is_none() { write_table(&dir) } else { Ok(()) }
}

/// Writes README's table from the newest results of `dir`.
pub(super) fn write_table(dir: &Path) -> Result<()> {
    let results: Results = results::newest(NAME, dir)?;
    super::report::write_block(&root().join("README.md"), report::BEGIN, &report::markdown(&results))
}

/// Everything at one number of Services.
fn measure(source: &Source, size: usize, args: &Args) -> Result<Vec<Measurement>> {
    let chosen = |way: &Way| {
        let most = way.kube_proxy().map_or(usize::MAX, Proxy::most_services);
        size <= most && (args.only.is_empty() || args.only.contains(way))
    };
    let mut sites = Vec::new();
    let mut failed = Vec::new();
    for way in Way::value_variants().iter().copied().filter(chosen) {
        let mut found = Measurement {
            way,
            services: size,
            start_ms: None,
            rss_bytes: None,
            map_bytes: None,
            socket: None,
            connects: vec![],
            stream: None,
            error: None,
        };
        // The others go on, and the results say what happened.
        match Site::start(way, size, source, Duration::from_secs(args.limit), &mut found) {
            Ok(site) => sites.push((site, found)),
            Err(error) => {
                found.error = Some(format!("{error:#}"));
                println!("  {way:?}: {error:#}");
                failed.push(found);
            }
        }
    }
    let all: Vec<_> = sites.iter().map(|(site, _)| site).collect();
    let dialled = rounds::connects(&all, args.rounds)?;
    let streams = rounds::streams(&all)?;
    let mut measurements = Vec::new();
    for (((_, mut found), connects), stream) in sites.into_iter().zip(dialled).zip(streams) {
        (found.connects, found.stream) = (connects, Some(stream));
        println!("  {}", report::line(&found));
        measurements.push(found);
    }
    measurements.extend(failed);
    Ok(measurements)
}

/// The API server that all proxies watch.
struct Source {
    // Dropped in this order: connections before their server.
    client: Client,
    control_plane: ControlPlane,
    runtime: Runtime,
    logs: tempfile::TempDir,
    /// What the endpoints are; all nodes are alike.
    endpoints: Vec<Endpoint>,
}

impl Source {
    fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let control_plane = runtime.block_on(ControlPlane::start_with(Options::default()))?;
        let client = runtime.block_on(control_plane.client())?;
        let (lab, pods) = build()?;
        runtime.block_on(api::create_node_and_changing(&client, lab.node(0), &pods[0]))?;
        let endpoints =
            pods[..ENDPOINTS].iter().map(|pod| Endpoint::ready(pod.v4(), lab.node(0).name())).collect();
        let logs = tempfile::Builder::new().prefix("kube-lane-bench-").tempdir()?;
        Ok(Self { client, control_plane, runtime, logs, endpoints })
    }

    fn create(&self, range: std::ops::Range<usize>) -> Result<()> {
        let etcd = self.control_plane.etcd();
        self.runtime.block_on(api::create_services(&self.client, etcd, range, &self.endpoints))
    }

    /// What the socket layer has done since the start, and does for a change of one endpoint.
    fn changes(&self, running: &Running) -> Result<Socket> {
        let Running::KubeLane(agent) = running else { bail!("kube-proxy has no socket layer") };
        let begun = counted(agent)?;
        for endpoint in self.endpoints.iter().cycle().skip(1).take(CHANGES) {
            let before = counted(agent)?;
            self.runtime.block_on(api::lead_to(self.client.clone(), endpoint.clone()))?;
            let deadline = Instant::now() + CHANGE_LIMIT;
            while counted(agent)?[0] == before[0] {
                ensure!(Instant::now() < deadline, "a change was not in force in {CHANGE_LIMIT:?}");
                sleep(Duration::from_millis(2));
            }
        }
        let ended = counted(agent)?;
        let mean = |at: usize| (ended[at] - begun[at]) / CHANGES as f64;
        Ok(Socket {
            start_ms: begun[1] * 1e3,
            start_writes: begun[2],
            change_us: mean(1) * 1e6,
            change_writes: mean(2),
        })
    }
}

/// What kube-lane counts of its socket layer: commits, seconds, writes.
fn counted(agent: &Agent) -> Result<[f64; 3]> {
    Ok([
        agent.metric("kubelane_socket_sync_duration_seconds_count")?,
        agent.metric("kubelane_socket_sync_duration_seconds_sum")?,
        agent.metric("kubelane_socket_writes_total")?,
    ])
}

/// A node, five pods that serve and the pod that dials, in this order.
fn build() -> Result<(Lab, Vec<Pod>)> {
    let lab = Lab::builder().nodes(1).build()?;
    // What no proxy translates goes on to the outside host, which refuses it at once.
    lab.outside().run(|| output("ip", &["route", "add", "local", SERVICE_CIDR, "dev", "lo"]))??;
    let pods = (0..=ENDPOINTS).map(|number| lab.node(0).add_pod(&format!("pod{number}")));
    let pods = pods.collect::<Result<_, _>>()?;
    Ok((lab, pods))
}

/// A node that has been programmed; nothing runs there any more.
struct Site {
    way: Way,
    /// Who dials.
    client: Pod,
    /// On every serving pod.
    listeners: Vec<TcpListener>,
    _servers: Vec<Pod>,
    lab: Lab,
    services: usize,
}

impl Site {
    /// Builds it and has it programmed, and notes what that took.
    fn start(
        way: Way,
        size: usize,
        source: &Source,
        limit: Duration,
        found: &mut Measurement,
    ) -> Result<Self> {
        let (lab, mut servers) = build()?;
        let client = servers.pop().context("no pod")?;
        let listen = |pod: &Pod| -> Result<TcpListener> {
            let at = SocketAddr::new(pod.v4(), api::TARGET);
            let listener = pod.run(move || TcpListener::bind(at))??;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listeners = servers.iter().map(listen).collect::<Result<_>>()?;
        let mut site = Self { way, client, listeners, _servers: servers, lab, services: size };
        site.program(source, limit, found)?;
        Ok(site)
    }

    fn program(&mut self, source: &Source, limit: Duration, found: &mut Measurement) -> Result<()> {
        let node = self.lab.node(0);
        let kubeconfig = source.control_plane.admin_kubeconfig();
        let _relay = Relay::start(node, source.control_plane.address(), source.runtime.handle())?;
        let begun = Instant::now();
        let mut running = match (self.way, self.way.kube_proxy()) {
            (Way::Bare, _) => return Ok(()),
            (_, Some(proxy)) => Running::start(proxy, node, &kubeconfig, source.logs.path())?,
            (way, None) => {
                let mode = if way == Way::Ebpf { "ebpf" } else { "nftables" };
                let places = agent::places(node);
                let mut arguments = vec!["--proxy-mode", mode];
                if way == Way::Ebpf {
                    arguments.extend(places.iter().map(String::as_str));
                }
                Running::start_kube_lane(&arguments, node, &kubeconfig, source.logs.path())?
            }
        };
        for service in [self.services - 1, 0] {
            while !self.answers(api::vip(service))? {
                running.ensure_alive()?;
                ensure!(begun.elapsed() < limit, "not programmed within {} s", limit.as_secs());
                sleep(Duration::from_millis(2));
            }
        }
        found.start_ms = Some(begun.elapsed().as_secs_f64() * 1000.0);
        running.rest()?;
        found.rss_bytes = Some(running.usage()?.rss);
        if self.way == Way::Ebpf {
            found.map_bytes = Some(map_bytes(node.bpf_root())?);
            found.socket = Some(source.changes(&running)?);
        }
        Ok(())
    }

    /// Whether a Service leads to a server; in ebpf, at the socket.
    fn answers(&self, to: SocketAddr) -> Result<bool> {
        let listeners = self.listeners.iter().map(TcpListener::try_clone).collect::<Result<Vec<_>, _>>()?;
        let at_socket = self.way == Way::Ebpf;
        Ok(self.client.run(move || rounds::answers(to, &listeners, at_socket))??)
    }
}

/// The memory of all maps that are pinned below a folder.
fn map_bytes(root: &Path) -> Result<u64> {
    let maps: Value = serde_json::from_str(&output("bpftool", &["--json", "--bpffs", "map", "show"])?)?;
    let below = |map: &Value| {
        let pins = map["pinned"].as_array();
        pins.into_iter().flatten().filter_map(Value::as_str).any(|pin| Path::new(pin).starts_with(root))
    };
    let maps = maps.as_array().context("bpftool lists no maps")?.iter().filter(|map| below(map));
    Ok(maps.filter_map(|map| map["bytes_memlock"].as_u64()).sum())
}
