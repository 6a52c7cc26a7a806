//! `cargo xtask bench sync`: from the real API server to answered connections.
//!
//! One node, in a network namespace with its API server on loopback, five pods that serve and one that dials. Services
//! are created once, in growing numbers; at each number every proxy is started in turn on the same empty node. What
//! it takes to create them is not measured.

use std::cell::Cell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::Client;
use kube_lane_lab::{Echo, Lab, Node, Pod, Proto, on_interrupt};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::proxy::{Proxy, Running, remove_all};
use super::results::{Changes, Commits, Measurement, Results, Rules, Spread};
use super::{api, output, probe, report, results_dir, root};
use crate::controlplane::{ControlPlane, Options};
use crate::objects::Endpoint;
use crate::process::in_netns;

/// Endpoints of each Service: as many pods serve.
const ENDPOINTS: usize = 5;
/// Services whose answers tell that all answer, besides the first and the last.
const SAMPLE: usize = 6;
/// Numbers of Services of which the rules of kube-lane are counted.
const COUNT_RULES: [usize; 2] = [10, 10_000];
/// The API server's range of ClusterIPs.
const SERVICE_CIDR: &str = "10.96.0.0/12";
/// How long the API server may digest what was created.
const DIGEST: Duration = Duration::from_secs(10);
/// How often it is checked that the proxy still runs.
const CHECK: Duration = Duration::from_secs(2);

/// What `cargo xtask bench sync` is told.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Numbers of Services, each with five endpoints.
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000, 10_000, 50_000])]
    sizes: Vec<usize>,
    /// Seconds that one start, or all changes at one size, may take.
    #[arg(long, default_value_t = 180)]
    limit: u64,
    /// Measure only this; may be given several times.
    #[arg(long)]
    only: Vec<Proxy>,
    /// Write the results to this folder and leave README as it is.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Measures, and writes the results down.
pub(super) fn run(args: &Args) -> Result<()> {
    let _removes_labs = on_interrupt()?;
    let mut results = Results::new(args.limit, ENDPOINTS)?;
    let dir = args.out.clone().unwrap_or_else(results_dir);
    let listeners = &results.machine.nftables_listeners;
    if !listeners.is_empty() {
        println!(
            "Not a quiet machine: processes {listeners:?} listen to changes of nftables, which makes large ones"
        );
        println!("slower in every network namespace. End them before you believe the figures.");
    }
    let lab = Lab::builder().nodes(1).build()?;
    let netns = Path::new("/run/netns").join(lab.node(0).netns());
    // Connections that no proxy translates go on to the outside host, which refuses them at once: a reset, because the
    // kernel limits how often it says "unreachable".
    lab.outside().run(|| output("ip", &["route", "add", "local", SERVICE_CIDR, "dev", "lo"]))??;
    // Everything that is started from this thread is in the node's namespace: the runtime, the clients, `nft`.
    in_netns(Some(&netns), || Bench::new(lab.node(0), &netns, args)?.run(args, &dir, &mut results))?;
    drop(lab);

    println!("\n{}", report::markdown(&results));
    let file = results.save(&dir)?;
    println!("written to {}", file.display());
    if args.out.is_none()
        && let Err(error) = report::write_readme(&root().join("README.md"), &results)
    {
        println!("README is left as it is: {error:#}");
    }
    Ok(())
}

struct Bench<'a> {
    // Dropped in this order: what runs before where it runs.
    control_plane: ControlPlane,
    client: Client,
    runtime: Runtime,
    node: &'a Node,
    dialler: Pod,
    servers: Vec<(Pod, Echo)>,
    /// Whose turn it is to be the changing Service's endpoint.
    turn: Cell<usize>,
    logs: TempDir,
    limit: Duration,
}

impl<'a> Bench<'a> {
    fn new(node: &'a Node, netns: &Path, args: &Args) -> Result<Self> {
        let dialler = node.add_pod("client")?;
        let mut servers = Vec::with_capacity(ENDPOINTS);
        for number in 0..ENDPOINTS {
            let pod = node.add_pod(&format!("pod{number}"))?;
            let echo = pod.serve(Proto::Tcp, api::TARGET)?;
            servers.push((pod, echo));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let options = Options { netns: Some(netns.to_owned()), ..Options::default() };
        let control_plane = runtime.block_on(ControlPlane::start_with(options))?;
        let client = runtime.block_on(control_plane.client())?;
        runtime.block_on(api::create_node_and_changing(&client, node, &servers[0].0))?;
        let logs = tempfile::Builder::new().prefix("kube-lane-bench-").tempdir()?;
        let limit = Duration::from_secs(args.limit);
        Ok(Self { control_plane, client, runtime, node, dialler, servers, turn: Cell::new(0), logs, limit })
    }

    fn run(&self, args: &Args, dir: &Path, results: &mut Results) -> Result<()> {
        let mut proxies = Proxy::ALL.to_vec();
        proxies.retain(|proxy| args.only.is_empty() || args.only.contains(proxy));
        let mut sizes = args.sizes.clone();
        if proxies.contains(&Proxy::KubeLane) {
            sizes.push(COUNT_RULES[0]);
        }
        sizes.sort_unstable();
        sizes.dedup();
        ensure!(sizes.first() != Some(&0), "--sizes: a number of Services is at least 1");

        let mut there = 0;
        for size in sizes {
            println!("{size} Services");
            self.create(there..size)?;
            there = size;
            if !args.sizes.contains(&size) {
                self.count_rules(size, results)?;
                continue;
            }
            for proxy in proxies.iter().copied().filter(|proxy| size <= proxy.most_services()) {
                let mut measurement = Measurement::new(proxy, size);
                // The others go on, and the results say what happened.
                if let Err(error) = self.measure(&mut measurement, results) {
                    measurement.error = Some(format!("{error:#}"));
                }
                println!("  {proxy}: {}", report::line(&measurement, results.limit_seconds));
                results.measurements.push(measurement);
                // What was measured survives whatever comes next.
                results.save(dir)?;
            }
        }
        remove_all()
    }

    fn create(&self, range: Range<usize>) -> Result<()> {
        let endpoints: Vec<_> =
            self.servers.iter().map(|(pod, _)| Endpoint::ready(pod.v4(), self.node.name())).collect();
        let seconds = Duration::from_secs_f64(range.len() as f64 / 2000.0);
        let etcd = self.control_plane.etcd();
        self.runtime.block_on(api::create_services(&self.client, etcd, range, &endpoints))?;
        sleep(seconds.min(DIGEST));
        Ok(())
    }

    fn measure(&self, found: &mut Measurement, results: &mut Results) -> Result<()> {
        let (proxy, size) = (found.proxy, found.services);
        for left in (0..proxy.starts()).rev() {
            let (mut running, took) = self.start(proxy, size)?;
            found.start_ms.push(took.map(milliseconds));
            if took.is_none() {
                let usage = running.usage()?;
                found.rss_bytes = Some(usage.rss);
                found.peak_rss_bytes = Some(usage.peak_rss);
                found.cpu_seconds = Some(usage.cpu.as_secs_f64());
                return Ok(());
            }
            if left > 0 {
                continue;
            }
            running.rest()?;
            let usage = running.usage()?;
            found.rss_bytes = Some(usage.rss);
            found.peak_rss_bytes = Some(usage.peak_rss);
            found.cpu_seconds = Some(usage.cpu.as_secs_f64());
            let answers = self.dialler.dial_many(Proto::Tcp, api::vip(size - 1), 20 * ENDPOINTS)?;
            found.answered_by = answers.answered.into_keys().collect();
            if proxy == Proxy::KubeLane && COUNT_RULES.contains(&size) {
                results.rules.push(Rules { services: size, rules: list_rules()? });
            }
            self.change_endpoints(&mut running, found)?;
        }
        Ok(())
    }

    /// Starts a proxy on the node that no proxy has programmed, and waits until Services answer: how long that took,
    /// unless it was given up.
    fn start(&self, proxy: Proxy, size: usize) -> Result<(Running, Option<Duration>)> {
        remove_all()?;
        let sample = sample(size);
        let answered = self.dialler.dial_with(probe::dial(sample[0], Instant::now()))?;
        ensure!(answered.by().is_none(), "a Service {answered} with no proxy");

        let begun = Instant::now();
        let kubeconfig = self.control_plane.admin_kubeconfig();
        let mut running = Running::start(proxy, self.node, &kubeconfig, self.logs.path())?;
        let deadline = begun + self.limit;
        let mut pending = sample;
        loop {
            let until = deadline.min(Instant::now() + CHECK);
            let (left, at) = self.dialler.run(move || {
                let at = probe::await_answers(&mut pending, begun, until);
                (pending, at)
            })?;
            pending = left;
            if let Some(at) = at {
                return Ok((running, Some(at - begun)));
            }
            running.ensure_alive()?;
            if Instant::now() >= deadline {
                return Ok((running, None));
            }
        }
    }

    fn change_endpoints(&self, running: &mut Running, found: &mut Measurement) -> Result<()> {
        let deadline = Instant::now() + self.limit;
        // Opens the connection, and shows that there is an effect at all.
        let mut took = Vec::new();
        if let Some(first) = self.change(deadline)? {
            running.rest()?;
            let counters = Counters::read(running)?;
            for _ in 0..found.proxy.changes() {
                sleep(found.proxy.pause());
                let Some(one) = self.change(deadline)? else { break };
                took.push(one);
            }
            running.ensure_alive()?;
            // What took effect is not yet counted for a moment.
            sleep(Duration::from_millis(100));
            if let (Some(before), Some(after)) = (counters, Counters::read(running)?) {
                found.commits = Some(after.since(before, took.len()));
            }
            if took.is_empty() {
                took.push(first);
            }
        }
        let (from_request, from_response): (Vec<_>, Vec<_>) = took.iter().copied().unzip();
        found.changes = Some(Changes {
            count: took.len(),
            from_request_ms: Spread::of(from_request),
            from_response_ms: Spread::of(from_response),
        });
        Ok(())
    }

    /// Replaces the changing Service's endpoint. How long that took from the request and from the response, in
    /// milliseconds, unless it was given up; from the response it may be less than nothing.
    fn change(&self, deadline: Instant) -> Result<Option<(f64, f64)>> {
        self.turn.set((self.turn.get() + 1) % self.servers.len());
        let (pod, _) = &self.servers[self.turn.get()];
        let endpoint = Endpoint::ready(pod.v4(), self.node.name());
        let patch = self.runtime.spawn(api::lead_to(self.client.clone(), endpoint));
        let name = pod.name().to_owned();
        let begun = Instant::now();
        let at = self.dialler.run(move || probe::await_only(api::changing_vip(), &name, begun, deadline))?;
        let (sent, answered) = self.runtime.block_on(patch)??;
        let since = |moment: Instant, at: Instant| match at.checked_duration_since(moment) {
            Some(after) => milliseconds(after),
            None => -milliseconds(moment - at),
        };
        Ok(at.map(|at| (since(sent, at), since(answered, at))))
    }

    fn count_rules(&self, size: usize, results: &mut Results) -> Result<()> {
        let (_running, took) = self.start(Proxy::KubeLane, size)?;
        ensure!(took.is_some(), "kube-lane has not programmed {size} Services within the limit");
        results.rules.push(Rules { services: size, rules: list_rules()? });
        Ok(())
    }
}

/// Addresses of a sample of Services. They are waited for from the back: the last Service first.
fn sample(size: usize) -> Vec<std::net::SocketAddr> {
    // Knuth's multiplier spreads the numbers over all sizes, the same in every run.
    let mut numbers: Vec<_> = (1..=SAMPLE).map(|number| number * 2_654_435_761 % size).collect();
    numbers.extend([0, size - 1]);
    numbers.into_iter().map(api::vip).collect()
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Of the calling thread's network namespace.
fn list_rules() -> Result<usize> {
    Ok(report::count_rules(&output("nft", &["list", "ruleset"])?))
}

/// What kube-lane counts of its commits.
struct Counters([f64; 6]);

impl Counters {
    const NAMES: [&str; 6] = [
        "kubeproxy_sync_proxy_rules_duration_seconds_count",
        "kubelane_nftables_messages_total",
        "kubelane_nftables_message_bytes_total",
        "kubelane_nftables_elements_added_total",
        "kubelane_nftables_elements_removed_total",
        "kubeproxy_sync_proxy_rules_duration_seconds_sum",
    ];

    /// `None` of kube-proxy, which does not count these.
    fn read(running: &Running) -> Result<Option<Self>> {
        let Running::KubeLane(agent) = running else { return Ok(None) };
        let mut values = [0.0; 6];
        for (value, name) in values.iter_mut().zip(Self::NAMES) {
            *value = agent.metric(name).context("kube-lane's metrics")?;
        }
        Ok(Some(Self(values)))
    }

    /// The mean of each of `changes`.
    fn since(self, before: Self, changes: usize) -> Commits {
        let mut means = self.0;
        for (value, before) in means.iter_mut().zip(before.0) {
            *value = (*value - before) / changes.max(1) as f64;
        }
        let [commits, messages, bytes, added, removed, seconds] = means;
        Commits { commits, messages, bytes, elements: added + removed, duration_us: seconds * 1e6 }
    }
}
