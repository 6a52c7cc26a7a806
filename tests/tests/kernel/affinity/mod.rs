//! Session affinity with real packets: who is led where by what the kernel remembers, and what a change does to it.

mod changes;
mod clients;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;

use kube_lane::dataplane::nftables::{Detector, Nftables, Settings};
use kube_lane::dataplane::{Batch, Dataplane, Outcome};
use kube_lane::model::input::{Family, Protocol, ServiceKey};
use kube_lane::model::plan::{
    AddressPort, Backend, Frontend, FrontendAddress, FrontendKind, NodePlan, Plan, PortPlan, Verdict,
};
use kube_lane_lab::{Echo, Host, Lab, Pod, Proto, topology};
use nix::sched::{CloneFlags, setns};

use crate::plans::{listing, nft};

const PROTOS: [(Proto, Protocol); 2] = [(Proto::Tcp, Protocol::Tcp), (Proto::Udp, Protocol::Udp)];
const HOUR: u32 = 3600;
/// So many new connections in a row to one of four backends are no accident.
const ENOUGH: usize = 16;

/// Four pods that serve, two on each node, and the dataplane on the first node, whose namespace the test's thread enters.
struct World {
    dataplane: Nftables,
    /// It has committed nothing yet.
    is_new: bool,
    pods: Vec<(Pod, [Echo; 2])>,
    lab: Lab,
}

/// What a Service should be: its endpoint sets by the pods' numbers, and how its frontends lead there.
#[derive(Clone)]
struct Wanted {
    timeout: Option<u32>,
    cluster: Vec<usize>,
    local: Vec<usize>,
    cluster_ip: Verdict,
    external: Verdict,
}

impl Wanted {
    fn new(timeout: u32) -> Self {
        Self {
            timeout: Some(timeout),
            cluster: (0..4).collect(),
            local: vec![],
            cluster_ip: Verdict::Cluster,
            external: Verdict::Cluster,
        }
    }

    fn among(self, cluster: &[usize]) -> Self {
        Self { cluster: cluster.to_vec(), ..self }
    }
}

impl World {
    fn new() -> Self {
        let lab = Lab::builder().nodes(2).build().unwrap();
        lab.outside().route_via(lab.node(0)).unwrap();
        let pods = (0..4)
            .map(|i| {
                let pod = lab.node(i / 2).add_pod(&format!("pod{i}")).unwrap();
                let echoes = PROTOS.map(|(proto, _)| pod.serve(proto, 8080).unwrap());
                (pod, echoes)
            })
            .collect();
        let namespace = std::fs::File::open(format!("/run/netns/{}", lab.node(0).netns())).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        let dataplane = open();
        let mut world = Self { dataplane, is_new: false, pods, lab };
        let batch = Batch { node: Some(node()), sweep: true, ..Batch::default() };
        world.dataplane.apply(&batch).unwrap();
        world
    }

    /// The dataplane as after a kill and a new start.
    fn restart(&mut self) {
        (self.dataplane, self.is_new) = (open(), true);
    }

    fn plan(&self, wanted: &Wanted) -> Arc<Plan> {
        let mut ports: Vec<PortPlan> = Family::ALL
            .into_iter()
            .flat_map(|family| PROTOS.map(|(_, protocol)| self.port(wanted, family, protocol)))
            .collect();
        ports.sort_by_key(|port| (port.family, port.protocol));
        let service = ServiceKey::new("default", "web");
        Arc::new(Plan::new(service, ports))
    }

    fn port(&self, wanted: &Wanted, family: Family, protocol: Protocol) -> PortPlan {
        let backends = |pods: &[usize]| {
            let mut backends: Vec<_> = pods
                .iter()
                .map(|i| Backend { address: at(&self.pods[*i].0, family, 8080), local: *i < 2 })
                .collect();
            backends.sort();
            backends.into()
        };
        let load_balancer = FrontendAddress::Vip(lb(family).into());
        let external = wanted.external;
        PortPlan {
            affinity: wanted.timeout.and_then(NonZeroU32::new),
            backends: backends(&wanted.cluster),
            local_backends: backends(&wanted.local),
            frontends: [
                Frontend::cluster_ip(vip(family), wanted.cluster_ip),
                Frontend { at: load_balancer, kind: FrontendKind::LoadBalancer, verdict: external },
                Frontend::nodeport(30080, external),
            ]
            .into(),
            ..PortPlan::new(family, protocol, "http")
        }
    }

    fn apply(&mut self, wanted: &Wanted) -> Outcome {
        let plan = self.plan(wanted);
        let services = vec![(plan.service.clone(), Some(plan))];
        let batch = Batch { node: Some(node()), services, sweep: true };
        let outcome = self.dataplane.apply(&batch).unwrap();
        assert!(outcome.failed.is_empty(), "{outcome:?}");
        // Writing the ruleset anew takes many more: no change may need that.
        assert!(outcome.messages < 200 || self.is_new, "{outcome:?}");
        self.is_new = false;
        outcome
    }

    fn listing(&self) -> String {
        listing()
    }

    /// What the Service's port of a protocol remembers in IPv4 of the Cluster set: client → backend, seconds to live.
    fn remembered(&self, protocol: Protocol) -> BTreeMap<String, (String, f64)> {
        let vip = format!("{} . {} . 80", cluster_ip(Family::V4), protocol.to_string().to_lowercase());
        let Some(port) = elements("affinity-ids").remove(&vip) else { return BTreeMap::new() };
        let members = elements("affinity-members");
        let entry = |(key, member): (String, String)| {
            let (id, client) = key.split_once(" . ")?;
            let (client, times) = client.split_once(' ').unwrap_or((client, ""));
            let lives = times.rsplit(' ').next()?;
            // Who is remembered for a member that has gone is led nowhere.
            let backend = members.get(&member)?.split(' ').next()?.to_owned();
            (id == port).then(|| (client.to_owned(), (backend, seconds(lives))))
        };
        elements("affinity-clients").into_iter().filter_map(entry).collect()
    }
}

/// The elements of a map of IPv4: keys with what stands behind them, and what they lead to; without comments.
fn elements(map: &str) -> BTreeMap<String, String> {
    let text = nft(&["list", "map", "ip", "kube-lane", map], None);
    let elements = text.split_once("elements = {").map(|(_, rest)| rest.split('}').next().unwrap());
    let elements = elements.unwrap_or_default().split(',').filter(|element| !element.trim().is_empty());
    let pair = |element: &str| {
        let words = element.split_whitespace().collect::<Vec<_>>().join(" ");
        let (key, data) = words.split_once(" : ").unwrap();
        (key.split(" comment ").next().unwrap().to_owned(), data.to_owned())
    };
    elements.map(pair).collect()
}

fn node() -> NodePlan {
    NodePlan {
        nodeport_addresses: topology::node_addresses(0).into(),
        pod_cidrs: topology::cluster_cidrs().into(),
        service_cidrs: topology::service_cidrs().into(),
        ..NodePlan::default()
    }
}

fn open() -> Nftables {
    Nftables::open(Settings { detector: Detector::PodCidrs, masquerade_all: false, ..Settings::default() })
        .unwrap()
}

/// A duration as nft prints it: `59m58s120ms`.
fn seconds(text: &str) -> f64 {
    let mut sum = 0.0;
    let mut number = String::new();
    let mut unit = String::new();
    for c in text.chars().chain(['0']) {
        if c.is_ascii_digit() && !unit.is_empty() {
            let scale = match unit.as_str() {
                "d" => 86400.0,
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                _ => 0.001,
            };
            sum += number.parse::<f64>().unwrap() * scale;
            (number, unit) = (String::new(), String::new());
        }
        if c.is_ascii_digit() { number.push(c) } else { unit.push(c) }
    }
    sum
}

fn at(host: &Host, family: Family, port: u16) -> AddressPort {
    SocketAddr::new(if family == Family::V4 { host.v4() } else { host.v6() }, port).into()
}

fn of(family: Family, addresses: [IpAddr; 2]) -> IpAddr {
    addresses[usize::from(family == Family::V6)]
}

fn cluster_ip(family: Family) -> IpAddr {
    of(family, topology::service_cidrs().map(|cidr| cidr.iter().nth(10).unwrap()))
}

fn lb_ip(family: Family) -> IpAddr {
    of(family, topology::vip_cidrs().map(|cidr| cidr.iter().nth(10).unwrap()))
}

fn vip(family: Family) -> SocketAddr {
    (cluster_ip(family), 80).into()
}

fn lb(family: Family) -> SocketAddr {
    (lb_ip(family), 80).into()
}

fn nodeport(family: Family) -> SocketAddr {
    (of(family, topology::node_addresses(0)), 30080).into()
}

/// Who answers all of many new connections; `None` where not one answers all.
fn sole(host: &Host, proto: Proto, to: SocketAddr) -> Option<String> {
    let tally = host.dial_many(proto, to, ENOUGH).unwrap();
    assert_eq!(tally.failures(), 0, "{} to {to}: {tally:?}", host.name());
    (tally.answered.len() == 1).then(|| tally.answered.into_keys().next().unwrap())
}

fn who(host: &Host, proto: Proto, to: SocketAddr) -> String {
    let outcome = host.dial(proto, to).unwrap();
    outcome.by().unwrap_or_else(|| panic!("{} to {to}: {outcome}", host.name())).to_owned()
}
