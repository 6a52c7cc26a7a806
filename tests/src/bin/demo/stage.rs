//! The stage: two nodes with an agent each, four pods, a client outside, and the Services of the play.
//!
//! Owns what runs and what is written to the store. Never looks at who answers.

use std::net::IpAddr;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kube_lane_lab::{Dial, Echo, Host, Lab, Outcome, Pod, Proto};
use kube_lane_tests::agent::Agent;
use kube_lane_tests::objects::{self, Endpoint, Port};
use serde_json::Value;

use crate::probe::Target;
use crate::store::{Store, Written};

/// The pods of the Service `web`; `pod-d` is the client among the pods.
pub(crate) const WEB: [&str; 3] = ["pod-a", "pod-b", "pod-c"];
/// The pod that leaves.
pub(crate) const LEAVER: &str = "pod-c";

const AGENT_LIMIT: Duration = Duration::from_secs(20);

/// All that runs.
pub(crate) struct Stage {
    // Dropped in this order: what runs in the lab before the lab, which is the store's.
    agents: Vec<Agent>,
    pods: Vec<RunningPod>,
    pub(crate) store: Store,
}

/// A pod and what it serves.
#[derive(Debug)]
struct RunningPod {
    // Dropped first: its sockets are in the pod.
    _echoes: [Echo; 2],
    pod: Pod,
    node: usize,
}

/// A Service of the play: both families, TCP and UDP.
struct Service {
    name: &'static str,
    /// The end of its cluster IPs.
    number: u8,
    node_ports: bool,
}

const ALL: [Service; 3] = [
    Service { name: "web", number: 80, node_ports: true },
    Service { name: "self", number: 81, node_ports: false },
    Service { name: "empty", number: 82, node_ports: false },
];

impl Service {
    fn cluster_ips(&self) -> [IpAddr; 2] {
        [[10, 96, 0, self.number].into(), [0xfd00, 0x10, 0x96, 0, 0, 0, 0, self.number.into()].into()]
    }

    fn ports(&self) -> [Port; 2] {
        let ports = [Port::new("TCP", 80, 8080), Port::new("UDP", 53, 5353)];
        if !self.node_ports {
            return ports;
        }
        let [tcp, udp] = ports;
        [tcp.node_port(30080), udp.node_port(30053)]
    }

    fn object(&self) -> Value {
        objects::service(self.name, &self.cluster_ips(), &self.ports())
    }
}

/// Where `web` answers: cluster IPs and NodePorts, IPv4 (at node0) and IPv6 (at node1).
pub(crate) fn targets(lab: &Lab) -> Vec<Target> {
    let mut targets = Vec::new();
    for (proto, port) in [(Proto::Tcp, 80), (Proto::Udp, 53)] {
        for ip in ALL[0].cluster_ips() {
            targets.push(Target { kind: "ClusterIP", proto, at: (ip, port).into() });
        }
    }
    for (proto, port) in [(Proto::Tcp, 30080), (Proto::Udp, 30053)] {
        for ip in [lab.node(0).v4(), lab.node(1).v6()] {
            targets.push(Target { kind: "NodePort", proto, at: (ip, port).into() });
        }
    }
    targets
}

/// Where a Service answers by TCP, IPv4 first.
fn tcp(service: &Service) -> [std::net::SocketAddr; 2] {
    service.cluster_ips().map(|ip| (ip, 80).into())
}

impl Stage {
    /// The pods; no agent yet.
    pub(crate) fn build(store: Store) -> Result<Self> {
        let mut stage = Self { agents: Vec::new(), pods: Vec::new(), store };
        for (name, node) in [("pod-a", 0), ("pod-b", 0), ("pod-c", 1), ("pod-d", 1)] {
            stage.start_pod(name, node)?;
        }
        Ok(stage)
    }

    pub(crate) fn lab(&self) -> &Lab {
        self.store.lab()
    }

    /// Adds a pod that serves; a pod that comes back has another address.
    pub(crate) fn start_pod(&mut self, name: &str, node: usize) -> Result<()> {
        let pod = self.lab().node(node).add_pod(name)?;
        let echoes = [pod.serve(Proto::Tcp, 8080)?, pod.serve(Proto::Udp, 5353)?];
        self.pods.push(RunningPod { _echoes: echoes, pod, node });
        Ok(())
    }

    /// Ends a pod: its servers, its addresses, its link.
    pub(crate) fn end_pod(&mut self, name: &str) {
        self.pods.retain(|running| running.pod.name() != name);
    }

    fn pod(&self, name: &str) -> Result<&RunningPod> {
        self.pods.iter().find(|running| running.pod.name() == name).with_context(|| format!("no pod {name}"))
    }

    /// A pod's IPv4 address.
    pub(crate) fn address(&self, pod: &str) -> Result<IpAddr> {
        Ok(self.pod(pod)?.pod.v4())
    }

    /// The name of a pod's namespace.
    pub(crate) fn netns(&self, pod: &str) -> Result<&str> {
        Ok(self.pod(pod)?.pod.netns())
    }

    /// The clients: a pod without an endpoint of its own, a node, and the host outside.
    pub(crate) fn clients(&self) -> Result<Vec<Host>> {
        let pod: &Host = &self.pod("pod-d")?.pod;
        let node: &Host = self.lab().node(0);
        let outside: &Host = self.lab().outside();
        Ok(vec![pod.clone(), node.clone(), outside.clone()])
    }

    /// Starts an agent on each node and waits until all that the store has is programmed.
    pub(crate) fn start_agents(&mut self, ebpf: bool) -> Result<()> {
        for node in self.store.lab().nodes() {
            self.agents.push(self.store.start_agent(node, ebpf)?);
        }
        self.agents.iter_mut().try_for_each(|agent| agent.wait_synced(AGENT_LIMIT))
    }

    /// The last lines of every agent's log, for a failure.
    pub(crate) fn logs(&self) -> String {
        let mut text = String::new();
        for (node, agent) in self.lab().nodes().iter().zip(&self.agents) {
            let log = agent.log();
            let lines: Vec<_> = log.lines().collect();
            text += &format!("{}:\n", node.name());
            text.extend(lines[lines.len().saturating_sub(10)..].iter().map(|line| format!("  {line}\n")));
        }
        text
    }

    /// Writes the Nodes.
    pub(crate) fn put_nodes(&self) -> Result<()> {
        let nodes: Vec<_> = self
            .lab()
            .nodes()
            .iter()
            .map(|node| objects::node(node.name(), &[node.v4(), node.v6()]))
            .collect();
        self.store.put("nodes", &nodes)?;
        Ok(())
    }

    /// Writes all Services and their slices.
    pub(crate) fn put_services(&self) -> Result<Written> {
        let mut all: Vec<_> = ALL.iter().map(Service::object).collect();
        all.extend(self.slices(&ALL[1], &["pod-a"])?);
        let Written { begun, .. } = self.store.put("services", &all)?;
        Ok(Written { begun, ..self.put_web(&WEB)? })
    }

    /// Writes the slices of `web`, with these pods as endpoints.
    pub(crate) fn put_web(&self, pods: &[&str]) -> Result<Written> {
        let slices = self.slices(&ALL[0], pods)?;
        self.store.put("web-endpoints", &slices)
    }

    fn slices(&self, service: &Service, pods: &[&str]) -> Result<Vec<Value>> {
        let mut endpoints = Vec::new();
        for name in pods {
            let RunningPod { pod, node, .. } = self.pod(name)?;
            let node = self.lab().node(*node).name();
            endpoints.extend([pod.v4(), pod.v6()].map(|address| Endpoint::ready(address, node)));
        }
        Ok(objects::slices(service.name, &service.ports(), &endpoints))
    }

    /// Dials `web` from `pod-d` until it is answered, beside the caller; when that was, or `None` after the limit.
    pub(crate) fn await_first_answer(&self, limit: Duration) -> Result<JoinHandle<Option<Instant>>> {
        // What comes too early is dropped: a new dial is sooner answered than a retransmission.
        let dial = Dial::new(Proto::Tcp, tcp(&ALL[0])[0]).timeout(Duration::from_millis(4));
        let pod: Host = (*self.pod("pod-d")?.pod).clone();
        let deadline = Instant::now() + limit;
        let until_answered = move || {
            while Instant::now() < deadline {
                if dial.ask().by().is_some() {
                    return Some(Instant::now());
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            None
        };
        let thread = std::thread::Builder::new().name("demo-first".into());
        Ok(thread.spawn(move || pod.run(until_answered).ok().flatten())?)
    }

    /// Dials the Service that has no endpoint, IPv4 and IPv6; how long each took.
    pub(crate) fn dial_empty(&self, host: &Host) -> Result<[(Outcome, Duration); 2]> {
        let addresses = tcp(&ALL[2]);
        Ok(host.run(move || {
            addresses.map(|at| {
                let begun = Instant::now();
                (Dial::new(Proto::Tcp, at).ask(), begun.elapsed())
            })
        })?)
    }

    /// `pod-a` dials the Service whose only endpoint it is itself, IPv4 and IPv6.
    pub(crate) fn dial_self(&self) -> Result<[Outcome; 2]> {
        let addresses = tcp(&ALL[1]);
        Ok(self.pod("pod-a")?.pod.run(move || addresses.map(|at| Dial::new(Proto::Tcp, at).ask()))?)
    }
}
