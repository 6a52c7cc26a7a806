//! What tests with real packets share: a lab whose nodes run the agent, and its manifest folder.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use kube_lane_lab::{Dial, Echo, Filter, Host, Lab, Met, Outcome, Pod, Proto, Sniff, topology};
use kube_lane_tests::agent::{self, Agent};
use kube_lane_tests::objects::{Endpoint, Folder, Port, node, service, slices};
use serde_json::{Value, json};

/// The most that an agent may take to program everything.
pub(super) const SYNC: Duration = Duration::from_secs(60);
/// After so long without an answer a packet was dropped.
pub(super) const QUIET: Duration = Duration::from_millis(300);

/// How the agents serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// As by default.
    Nftables,
    /// With the socket layer in front of it.
    Ebpf,
}

impl Mode {
    pub(super) const ALL: [Self; 2] = [Self::Nftables, Self::Ebpf];
}

/// A lab of two nodes that both run the agent.
pub(super) struct World {
    pub(super) folder: Folder,
    logs: tempfile::TempDir,
    /// How the agents tell pods from other clients.
    detector: Vec<String>,
    pub(super) mode: Mode,
    pub(super) agents: Vec<Agent>,
    pub(super) lab: Lab,
}

impl World {
    /// Agents that know the pods of both nodes by their addresses.
    pub(super) fn new(arguments: &[&str]) -> Self {
        let cidrs = topology::cluster_cidrs().map(|cidr| cidr.to_string()).join(",");
        Self::with(false, &["--cluster-cidr", &cidrs], arguments)
    }

    /// The same in a cluster whose Services are IPv4; nodes and pods have addresses of both families.
    pub(super) fn single_stack() -> Self {
        let cidrs = topology::cluster_cidrs().map(|cidr| cidr.to_string()).join(",");
        let lab = Lab::builder().nodes(2).build().unwrap();
        let mut world = Self::prepare(lab, Mode::Nftables, &["--cluster-cidr", &cidrs]);
        world.folder.put("cidrs", &[service_cidr(0, topology::service_cidrs()[0])]).unwrap();
        world.start_agents(&[]);
        world
    }

    /// The same in a mode.
    pub(super) fn in_mode(mode: Mode) -> Self {
        Self::configured(mode, |_| json!({}))
    }

    /// The same with these fields of KubeProxyConfiguration.
    pub(super) fn configured(mode: Mode, fields: impl FnOnce(&Lab) -> Value) -> Self {
        let cidrs = topology::cluster_cidrs().map(|cidr| cidr.to_string()).join(",");
        let lab = Lab::builder().nodes(2).build().unwrap();
        let mut config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "mode": if mode == Mode::Ebpf { "ebpf" } else { "nftables" }, "clusterCIDR": cidrs,
        });
        for (field, value) in fields(&lab).as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        let mut world = Self::prepare(lab, mode, &[]);
        let file = world.logs.path().join("config.json");
        fs::write(&file, config.to_string()).unwrap();
        world.detector.extend(["--config".to_owned(), file.to_str().unwrap().to_owned()]);
        world.start_agents(&[]);
        world
    }

    /// Agents that tell pods in this way; `bridge`: pods are attached to a bridge.
    pub(super) fn with(bridge: bool, detector: &[&str], arguments: &[&str]) -> Self {
        let lab = Lab::builder().nodes(2).bridge(bridge).build().unwrap();
        let mut world = Self::prepare(lab, Mode::Nftables, detector);
        world.start_agents(arguments);
        world
    }

    /// Agents that tell pods in this way, on the nodes of a lab.
    pub(super) fn in_lab(lab: Lab, mode: Mode, detector: &[&str]) -> Self {
        let mode_arguments = ["--proxy-mode", if mode == Mode::Ebpf { "ebpf" } else { "nftables" }];
        let mut world = Self::prepare(lab, mode, &[detector, &mode_arguments[..]].concat());
        world.start_agents(&[]);
        world
    }

    /// A lab of two nodes with everything but the agents, which the test starts by itself.
    pub(super) fn prepared() -> Self {
        Self::prepare(Lab::builder().nodes(2).build().unwrap(), Mode::Nftables, &[])
    }

    /// A lab with everything but the agents.
    fn prepare(lab: Lab, mode: Mode, detector: &[&str]) -> Self {
        lab.outside().route_via(lab.node(0)).unwrap();
        let folder = Folder::new().unwrap();
        let cidrs: Vec<_> =
            topology::service_cidrs().iter().enumerate().map(|(i, cidr)| service_cidr(i, *cidr)).collect();
        folder.put("cidrs", &cidrs).unwrap();
        let nodes: Vec<_> =
            (0..2).map(|i| node(lab.node(i).name(), &topology::node_addresses(i as u8))).collect();
        folder.put("nodes", &nodes).unwrap();
        let logs = tempfile::tempdir().unwrap();
        let detector = detector.iter().map(|argument| (*argument).to_owned()).collect();
        Self { folder, logs, detector, mode, agents: Vec::new(), lab }
    }

    fn start_agents(&mut self, arguments: &[&str]) {
        for index in 0..2 {
            let agent = self.start_agent(index, arguments);
            self.agents.push(agent);
        }
        self.agents.iter_mut().for_each(|agent| agent.wait_synced(SYNC).unwrap());
    }

    /// The log of a node's agent.
    pub(super) fn log(&self, index: usize) -> PathBuf {
        self.logs.path().join(format!("agent-{index}.log"))
    }

    pub(super) fn start_agent(&self, index: usize, arguments: &[&str]) -> Agent {
        self.start_build(&agent::binary().unwrap(), index, arguments)
    }

    /// The agent of a given binary.
    pub(super) fn start_build(&self, binary: &Path, index: usize, arguments: &[&str]) -> Agent {
        let node = self.lab.node(index);
        let folder = self.folder.arg();
        let mut all = vec!["--manifests", &folder, "--hostname-override", node.name(), "-v", "4"];
        all.extend(self.detector.iter().map(String::as_str));
        let places = agent::places(node);
        if self.mode == Mode::Ebpf {
            all.extend(places.iter().map(String::as_str));
        }
        all.extend(arguments);
        Agent::start_binary(binary, node, &all, &self.log(index)).unwrap()
    }

    /// Puts a Service and its slices into the folder.
    pub(super) fn put(&self, name: &str, ports: &[Port], number: u8, endpoints: &[Endpoint]) {
        self.put_spec(name, ports, number, endpoints, json!({}));
    }

    /// The same, with these fields of `spec` in place of the usual ones.
    pub(super) fn put_spec(
        &self,
        name: &str,
        ports: &[Port],
        number: u8,
        endpoints: &[Endpoint],
        spec: Value,
    ) {
        let mut service = service(name, &vips(number), ports);
        for (field, value) in spec.as_object().into_iter().flatten() {
            let object = if field == "status" { &mut service } else { &mut service["spec"] };
            object[field] = value.clone();
        }
        let mut objects = vec![service];
        objects.extend(slices(name, ports, endpoints));
        self.folder.put(name, &objects).unwrap();
    }
}

fn service_cidr(index: usize, cidr: IpNetwork) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": {"name": format!("range-{index}")}, "spec": {"cidrs": [cidr]},
    })
}

/// The cluster IPs of the Service with this number.
pub(super) fn vips(number: u8) -> [IpAddr; 2] {
    topology::service_cidrs().map(|cidr| cidr.iter().nth(usize::from(number)).unwrap())
}

/// The IPv4 cluster IP of the Service with this number, with the port of all.
pub(super) fn vip(number: u8) -> SocketAddr {
    at(vips(number)[0], 80)
}

pub(super) fn at(ip: IpAddr, port: u16) -> SocketAddr {
    (ip, port).into()
}

/// The pod as an endpoint, in both families.
pub(super) fn endpoints(pods: &[&Pod]) -> Vec<Endpoint> {
    pods.iter()
        .flat_map(|pod| {
            let node = pod.name().split('-').next().unwrap_or_default().to_owned();
            [pod.v4(), pod.v6()].map(|ip| Endpoint::ready(ip, &node))
        })
        .collect()
}

/// Repeats until the outcome is as wanted, at most a few seconds; the last outcome where it never is.
pub(super) fn until(
    client: &Host,
    proto: Proto,
    to: SocketAddr,
    wanted: impl Fn(&Outcome) -> bool,
) -> Outcome {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let outcome = client.dial_with(Dial::new(proto, to).timeout(QUIET)).unwrap();
        if wanted(&outcome) || Instant::now() > deadline {
            return outcome;
        }
    }
}

/// The same by TCP, until the socket layer answers, or does not; what was met in the end.
pub(super) fn until_met(client: &Host, to: SocketAddr, wanted: impl Fn(&Met) -> bool) -> Met {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let met = meet(client, to);
        if wanted(&met) || Instant::now() > deadline {
            return met;
        }
    }
}

/// What a dial meets, and where.
pub(super) fn meet(client: &Host, to: SocketAddr) -> Met {
    let dial = Dial::new(Proto::Tcp, to).timeout(QUIET);
    client.run(move || dial.meet()).unwrap()
}

/// Answered by the layer that a mode has first.
pub(super) fn answered_in(mode: Mode) -> impl Fn(&Met) -> bool {
    move |met| answered(&met.outcome) && met.at_socket == (mode == Mode::Ebpf)
}

pub(super) fn answered(outcome: &Outcome) -> bool {
    outcome.by().is_some()
}

/// TCP and UDP on port 80, NodePorts 30080, to 8080.
pub(super) fn web_ports() -> Vec<Port> {
    ["TCP", "UDP"].map(|protocol| Port::new(protocol, 80, 8080).node_port(30080)).to_vec()
}

/// A pod `node<i>-<name>` that answers TCP and UDP on 8080.
pub(super) fn serving(lab: &Lab, index: usize, name: &str) -> (Pod, [Echo; 2]) {
    let pod = lab.node(index).add_pod(&format!("{}-{name}", lab.node(index).name())).unwrap();
    let echoes = [Proto::Tcp, Proto::Udp].map(|proto| pod.serve(proto, 8080).unwrap());
    (pod, echoes)
}

/// No packet may leave a node for a Service address: it would have slipped past translation.
pub(super) struct Leaks(Vec<Sniff>);

impl Leaks {
    pub(super) fn watch(lab: &Lab) -> Self {
        let cidrs = [topology::service_cidrs(), topology::vip_cidrs()].concat();
        let sniff = |cidr: IpNetwork| {
            let filter = Filter::new().to(cidr).on(topology::UPLINK).leaving();
            lab.node(0).sniff(filter).unwrap()
        };
        Self(cidrs.into_iter().map(sniff).collect())
    }

    pub(super) fn count(&self) -> u64 {
        self.0.iter().map(|sniff| sniff.count().unwrap()).sum()
    }
}
