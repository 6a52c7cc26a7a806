//! Where scenarios of one configuration run: a lab for each proxy, all alike, with one API server for all of them.
//!
//! Owns the labs, the proxies in them, and waiting until these have seen what was last put into the API.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kube::Client;
use kube_lane_lab::{Dial, Echo, Host, Lab, Outcome, Pod, Proto, topology};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::{self, Runtime};

use super::format::{Bridge, Proxy, Scenario};
use super::names::Hosts;
use super::objects::Objects;
use crate::agent::{self, Agent};
use crate::controlplane::{ControlPlane, Options};
use crate::kube_proxy::{self, KubeProxy, Mode, merge};
use crate::objects::{Endpoint, Folder, Port, node, service, slices};
use crate::relay::Relay;

/// The ports that every pod and node serves.
const TARGETS: [u16; 2] = [8080, 8081];
const NODES: u8 = 2;
const PODS: [&str; 3] = ["a", "b", "c"];
/// How long a proxy may take to start, and to follow.
const LIMIT: Duration = Duration::from_secs(30);

/// A Service that tells how far a proxy is: its name and its addresses.
type Marker = (&'static str, [&'static str; 2]);
const API_MARKER: Marker = ("marker", ["10.96.255.1", "fd00:10:96::ff01"]);
const MANIFEST_MARKER: Marker = ("static-marker", ["10.96.255.2", "fd00:10:96::ff02"]);

/// The API server, which outlives the stages.
pub(super) struct Api {
    // Dropped in this order: connections before their server.
    client: Client,
    control_plane: ControlPlane,
    runtime: Runtime,
    /// What it holds of the scenarios', the nodes and the marker.
    pub(super) objects: Objects,
    markers: u16,
}

impl Api {
    pub(super) fn start() -> Result<Self> {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let service_cidrs = topology::service_cidrs().map(|cidr| cidr.to_string()).to_vec();
        let options = Options { service_cidrs, ..Options::default() };
        let control_plane = runtime.block_on(ControlPlane::start_with(options))?;
        let client = runtime.block_on(control_plane.client())?;
        let mut api = Self { client, control_plane, runtime, objects: Objects::default(), markers: 0 };
        api.push(nodes())?;
        Ok(api)
    }

    /// Has the server hold these objects, and nothing else that this put there before.
    pub(super) fn push(&mut self, objects: Objects) -> Result<()> {
        let client = self.client.clone();
        self.runtime.block_on(objects.push(client, &self.objects))?;
        self.objects = objects;
        Ok(())
    }

    /// Makes a namespace.
    pub(super) fn namespace(&self, name: &str) -> Result<()> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        self.runtime.block_on(crate::cluster::apply(self.client.clone(), &namespace))
    }

    /// The nodes and whatever else is no scenario's.
    pub(super) fn base(&self) -> Objects {
        let mut base = self.objects.filter(|object| object["metadata"]["namespace"] == "default");
        base.extend(nodes());
        base
    }
}

/// The Nodes as they are at a scenario's start.
pub(super) fn nodes() -> Objects {
    let mut nodes = Objects::default();
    (0..NODES).map(node_object).for_each(|node| nodes.insert(node));
    nodes
}

/// A node as its kubelet would register it; node0 in zone east, node1 in zone west.
fn node_object(index: u8) -> Value {
    let mut object = node(&format!("node{index}"), &topology::node_addresses(index));
    let zone = ["east", "west"][usize::from(index) % 2];
    let cidrs = topology::pod_cidrs(index);
    object["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": zone});
    object["spec"] = json!({"podCIDR": cidrs[0], "podCIDRs": cidrs});
    object
}

/// A client in the lab: a host, and the addresses that it dials from where that is not the kernel's choice.
pub(super) struct Caller {
    pub(super) host: Host,
    from: Option<[IpAddr; 2]>,
    /// Where pods are on a bridge: the addresses of their node on it.
    gateway: Vec<IpAddr>,
}

impl Caller {
    /// The addresses that servers may see it by.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        let addresses = self.from.map_or_else(|| self.host.addresses(), |from| from.to_vec());
        addresses.into_iter().chain(self.gateway.iter().copied()).collect()
    }

    /// A dial from here.
    pub(super) fn dial(&self, proto: Proto, to: SocketAddr) -> Dial {
        let dial = Dial::new(proto, to);
        match self.from {
            Some(from) => dial.from((from[usize::from(to.is_ipv6())], 0).into()),
            None => dial,
        }
    }
}

/// Everybody who may dial in one proxy's lab.
pub(super) struct Callers {
    pub(super) proxy: Proxy,
    by_name: BTreeMap<String, Caller>,
}

impl Callers {
    /// The one of this name.
    pub(super) fn get(&self, name: &str) -> Result<&Caller> {
        self.by_name.get(name).with_context(|| format!("the lab has no host `{name}`"))
    }
}

/// A proxy on each node of a lab.
pub(super) struct Rig {
    pub(super) proxy: Proxy,
    // Dropped in this order: what runs in the lab before the lab.
    running: Vec<Running>,
    _relays: Vec<Relay>,
    _echoes: Vec<Echo>,
    pub(super) callers: Callers,
    pods: Vec<Pod>,
    _container: Pod,
    _lab: Lab,
    manifests: Option<Folder>,
    manifest_markers: u16,
    _dir: TempDir,
}

enum Running {
    KubeLane(Agent),
    KubeProxy(KubeProxy),
}

impl Running {
    fn log_tail(&mut self) -> String {
        match self {
            Self::KubeLane(agent) => {
                let log = agent.log();
                let lines: Vec<_> = log.lines().collect();
                lines[lines.len().saturating_sub(20)..].join("\n")
            }
            Self::KubeProxy(proxy) => proxy.process().log_tail(),
        }
    }
}

impl Rig {
    fn start(proxy: Proxy, config: &Value, switched: Option<Bridge>, api: &Api) -> Result<Self> {
        let bridge = switched.is_some() || config["detectLocalMode"] == "BridgeInterface";
        let lab = Lab::builder().nodes(NODES);
        let lab = match switched {
            Some(switched) => lab.switch(switched == Bridge::Filtered),
            None => lab.bridge(bridge),
        };
        let lab = lab.build()?;
        let mut pods = Vec::new();
        let mut callers = BTreeMap::new();
        let caller = |host: &Host| Caller { host: host.clone(), from: None, gateway: vec![] };
        for (index, node) in lab.nodes().iter().enumerate() {
            for pod in PODS {
                let pod = node.add_pod(&format!("pod{index}{pod}"))?;
                callers.insert(pod.name().to_owned(), caller(&pod));
                pods.push(pod);
            }
            let cidrs = if bridge { node.pod_cidrs().to_vec() } else { vec![] };
            let gateway = cidrs.iter().filter_map(|cidr| cidr.iter().nth(1)).collect();
            callers.insert(node.name().to_owned(), Caller { gateway, ..caller(node) });
        }
        let container = lab.node(0).add_container("container0")?;
        callers.insert(container.name().to_owned(), caller(&container));
        let mut echoes = Vec::new();
        for host in lab.nodes().iter().map(|node| &**node).chain(pods.iter().map(|pod| &**pod)) {
            for port in TARGETS {
                echoes.push(host.serve(Proto::Tcp, port)?);
                echoes.push(host.serve(Proto::Udp, port)?);
            }
        }
        for pod in &pods {
            for port in TARGETS {
                echoes.push(pod.serve(Proto::Sctp, port)?);
            }
        }

        let outside = lab.outside();
        callers
            .insert("outside".into(), Caller { from: Some([outside.v4(), outside.v6()]), ..caller(outside) });
        let from = Some(second(outside, 201)?);
        callers.insert("outside-b".into(), Caller { from, ..caller(outside) });
        let from = Some(second(lab.node(0), 11)?);
        callers.insert("node0-b".into(), Caller { from, ..caller(lab.node(0)) });

        let dir = tempfile::Builder::new().prefix("kube-lane-oracle-").tempdir()?;
        let manifests = if proxy.is_ours() { Some(Folder::new()?) } else { None };
        let mut relays = Vec::new();
        let mut running = Vec::new();
        for node in lab.nodes() {
            let address = api.control_plane.address();
            relays.push(Relay::start(node, address, api.runtime.handle())?);
            running.push(run(proxy, node, config, api, dir.path(), manifests.as_ref())?);
        }
        Ok(Self {
            proxy,
            running,
            _relays: relays,
            _echoes: echoes,
            callers: Callers { proxy, by_name: callers },
            pods,
            _container: container,
            _lab: lab,
            manifests,
            manifest_markers: 0,
            _dir: dir,
        })
    }

    /// Has kube-proxy stand still, or go on with all that has happened meanwhile: it leaves the machine to others.
    pub(super) fn pause(&mut self, pause: bool) -> Result<()> {
        for running in &mut self.running {
            if let Running::KubeProxy(proxy) = running {
                proxy.process().signal(if pause { Signal::SIGSTOP } else { Signal::SIGCONT })?;
            }
        }
        Ok(())
    }

    /// Puts objects into the manifest folder, in place of all that it has, and waits until they are programmed.
    pub(super) fn put_manifests(&mut self, mut objects: Vec<Value>, hosts: &Hosts) -> Result<()> {
        let folder = self.manifests.as_ref().context("only kube-lane reads manifests")?;
        self.manifest_markers += 1;
        let port = 1000 + self.manifest_markers;
        objects.extend(marker(MANIFEST_MARKER, port, hosts));
        folder.put("scenario", &objects)?;
        self.wait_marker(MANIFEST_MARKER, port)
    }

    /// Waits until the proxy of each node programs this marker.
    fn wait_marker(&mut self, (_, addresses): Marker, port: u16) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        for (number, pod) in self.pods.iter().enumerate().filter(|(number, _)| number % PODS.len() == 0) {
            let (host, node): (&Host, _) = (pod, number / PODS.len());
            for address in addresses {
                let to = SocketAddr::new(address.parse()?, port);
                let dial = Dial::new(Proto::Tcp, to).timeout(Duration::from_millis(100));
                let reached = host.run(move || {
                    while Instant::now() < deadline {
                        if matches!(dial.ask(), Outcome::Answered { .. }) {
                            return true;
                        }
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    false
                })?;
                if !reached {
                    let log = self.running[node].log_tail();
                    bail!(
                        "{} on node{node} does not lead to the marker {to} in {LIMIT:?}\n{log}",
                        self.proxy
                    );
                }
            }
        }
        Ok(())
    }
}

/// All proxies with one configuration.
pub(super) struct Stage {
    config: Value,
    bridge: Option<Bridge>,
    pub(super) rigs: Vec<Rig>,
    /// The addresses that the hosts of each lab have.
    pub(super) hosts: Hosts,
}

impl Stage {
    /// Whether a scenario can run here.
    pub(super) fn is_of(&self, scenario: &Scenario) -> bool {
        (&self.config, self.bridge) == (&scenario.config, scenario.bridge)
    }

    /// Builds the labs that a scenario wants and starts these proxies; its `config` is laid over their usual configuration.
    pub(super) fn start(
        scenario: &Scenario,
        proxies: impl Iterator<Item = Proxy>,
        api: &Api,
    ) -> Result<Self> {
        let Scenario { config, bridge, .. } = scenario;
        let rigs = at_once(proxies, |proxy| Rig::start(proxy, config, *bridge, api))?;
        let addresses = |(name, caller): (&String, &Caller)| {
            (name.clone(), caller.from.unwrap_or([caller.host.v4(), caller.host.v6()]))
        };
        let hosts =
            rigs.first().map(|rig| rig.callers.by_name.iter().map(addresses).collect()).unwrap_or_default();
        Ok(Self { config: config.clone(), bridge: *bridge, rigs, hosts })
    }

    /// Waits until these proxies have programmed all that the API server holds: a new marker comes after it.
    pub(super) fn settle(&mut self, proxies: &[Proxy], api: &mut Api) -> Result<()> {
        api.markers += 1;
        let (port, mut objects) = (1000 + api.markers, api.objects.clone());
        marker(API_MARKER, port, &self.hosts).into_iter().for_each(|object| objects.insert(object));
        api.push(objects)?;
        let rigs = self.rigs.iter_mut().filter(|rig| proxies.contains(&rig.proxy));
        at_once(rigs, |rig| rig.wait_marker(API_MARKER, port))?;
        Ok(())
    }
}

/// Does the same with several things, each on a thread of its own.
fn at_once<T: Send, U: Send>(
    items: impl IntoIterator<Item = T>,
    task: impl Fn(T) -> Result<U> + Sync,
) -> Result<Vec<U>> {
    let task = &task;
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(move || task(item))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<U>>| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().map(join).collect()
    })
}

/// A Service that is only answered by one who knows its newest port and its newest slices.
fn marker((name, addresses): Marker, port: u16, hosts: &Hosts) -> Vec<Value> {
    let ports = [Port { name: format!("m{port}"), ..Port::new("TCP", port, TARGETS[0]) }];
    let addresses: Vec<IpAddr> = addresses.iter().filter_map(|address| address.parse().ok()).collect();
    let endpoints: Vec<_> =
        hosts.get("pod0a").into_iter().flatten().map(|address| Endpoint::ready(*address, "node0")).collect();
    let mut objects = slices(name, &ports, &endpoints);
    objects.push(service(name, &addresses, &ports));
    objects
}

fn second(host: &Host, number: u16) -> Result<[IpAddr; 2]> {
    let last = |address: IpAddr| -> IpAddr {
        match address {
            IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() & !0xff | u32::from(number)).into(),
            IpAddr::V6(address) => {
                std::net::Ipv6Addr::from_bits(address.to_bits() & !0xffff | u128::from(number)).into()
            }
        }
    };
    let addresses = [last(host.v4()), last(host.v6())];
    for address in addresses {
        host.add_address(address)?;
    }
    Ok(addresses)
}

fn run(
    proxy: Proxy,
    node: &Host,
    config: &Value,
    api: &Api,
    dir: &Path,
    manifests: Option<&Folder>,
) -> Result<Running> {
    let mode = if proxy == Proxy::Iptables { Mode::Iptables } else { Mode::Nftables };
    let mut over = json!({mode.to_string(): {"minSyncPeriod": "200ms"}});
    merge(&mut over, config);
    // One name for the field of either mode.
    if let Some(all) = over.as_object_mut().and_then(|fields| fields.remove("masqueradeAll")) {
        over[mode.to_string()]["masqueradeAll"] = all;
    }
    let options = kube_proxy::Options {
        mode,
        netns: Some(Path::new("/run/netns").join(node.netns())),
        kubeconfig: api.control_plane.admin_kubeconfig(),
        hostname: node.name().to_owned(),
        cluster_cidr: Some(topology::cluster_cidrs().map(|cidr| cidr.to_string()).join(",")),
        config: over,
    };
    if !proxy.is_ours() {
        return Ok(Running::KubeProxy(KubeProxy::start(&options)?));
    }
    let any = |port| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    let mut file = kube_proxy::configuration(&options, any(10256), any(10249));
    // Only for kube-proxy, which waits a second else.
    file["nftables"]["minSyncPeriod"] = "0s".into();
    if proxy == Proxy::Ebpf {
        file["mode"] = "ebpf".into();
    }
    let path = dir.join(format!("{}.json", node.name()));
    fs::write(&path, serde_json::to_vec_pretty(&file)?)?;
    let path = path.to_str().context("a path that is no text")?;
    let manifests = manifests.map(Folder::arg).unwrap_or_default();
    let mut arguments = vec!["--config", path, "--hostname-override", node.name(), "--manifests", &manifests];
    let places = agent::places(node);
    if proxy == Proxy::Ebpf {
        arguments.extend(places.iter().map(String::as_str));
    }
    Ok(Running::KubeLane(Agent::start(node, &arguments, &dir.join(format!("{}.log", node.name())))?))
}
