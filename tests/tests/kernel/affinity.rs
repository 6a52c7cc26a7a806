//! Session affinity with real packets: who is led where by what the kernel remembers, and what a change does to it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kube_lane::dataplane::nftables::{Detector, Nftables, Settings};
use kube_lane::dataplane::{Batch, Dataplane, Outcome};
use kube_lane::model::input::{Family, Protocol, ServiceKey};
use kube_lane::model::plan::{
    AddressPort, Backend, Frontend, FrontendAddress, FrontendKind, NodePlan, Plan, PortPlan, Verdict,
};
use kube_lane_lab::{Dial, Echo, Host, Lab, Pod, Proto, topology};
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

    /// What the map of the TCP port remembers in IPv4: client → backend, seconds to live.
    fn remembered(&self, map: &str) -> BTreeMap<String, (String, f64)> {
        let text = nft(&["list", "map", "ip", "kube-lane", map], None);
        let elements = text.split_once("elements = {").map(|(_, rest)| rest.split('}').next().unwrap());
        let entry = |element: &str| {
            let words: Vec<_> = element.split_whitespace().collect();
            let lives = words.iter().position(|word| *word == "expires").map(|i| words[i + 1]).unwrap();
            let backend = words.iter().position(|word| *word == ":").map(|i| words[i + 1]).unwrap();
            (words[0].to_owned(), (backend.to_owned(), seconds(lives)))
        };
        elements.unwrap_or_default().split(',').filter(|e| !e.trim().is_empty()).map(entry).collect()
    }
}

fn node() -> NodePlan {
    NodePlan {
        nodeport_addresses: topology::node_addresses(0).into(),
        pod_cidrs: topology::cluster_cidrs().into(),
        service_cidrs: topology::service_cidrs().into(),
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

#[test]
fn a_client_comes_back_through_every_frontend() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    let lab = &world.lab;
    let client = lab.node(0).add_pod("client").unwrap();
    for (proto, _) in PROTOS {
        for family in Family::ALL {
            let hosts: [&Host; 4] = [&client, lab.outside(), lab.node(0), &world.pods[0].0];
            for host in hosts {
                let first = who(host, proto, vip(family));
                for to in [vip(family), nodeport(family), lb(family)] {
                    assert_eq!(sole(host, proto, to).as_ref(), Some(&first), "{proto} {} {to}", host.name());
                }
            }
        }
    }
    // The node's own pods are known by their own addresses, not by the node's.
    assert!(world.remembered("aff/default/web/tcp/http/8080").contains_key(&client.v4().to_string()));
}

#[test]
fn a_pod_comes_back_to_itself() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR).among(&[0]));
    let ask = |world: &World| {
        for (proto, _) in PROTOS {
            for to in Family::ALL.map(vip) {
                assert_eq!(sole(&world.pods[0].0, proto, to).as_deref(), Some("pod0"), "{proto} {to}");
            }
        }
    };
    ask(&world);
    world.apply(&Wanted::new(HOUR));
    ask(&world);
}

#[test]
fn each_new_connection_starts_the_time_again() {
    let mut world = World::new();
    world.apply(&Wanted::new(2));
    let client = world.lab.node(0).add_pod("client").unwrap();
    let first = who(&client, Proto::Tcp, vip(Family::V4));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        std::thread::sleep(Duration::from_millis(700));
        assert_eq!(who(&client, Proto::Tcp, nodeport(Family::V4)), first);
    }
    assert_eq!(world.remembered("aff/default/web/tcp/http/8080").len(), 1);
    std::thread::sleep(Duration::from_millis(2100));
    assert!(world.remembered("aff/default/web/tcp/http/8080").is_empty());
}

#[test]
fn those_of_a_backend_that_leaves_move_and_the_others_stay() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    let sources: Vec<IpAddr> = (100..140).map(|n| IpAddr::from([192, 168, 77, n])).collect();
    sources.iter().for_each(|source| world.lab.outside().add_address(*source).unwrap());
    let ask = |world: &World| -> BTreeMap<IpAddr, String> {
        let by = |source: &IpAddr| {
            let dial = Dial::new(Proto::Tcp, vip(Family::V4)).from((*source, 0).into());
            let outcome = world.lab.outside().dial_with(dial).unwrap();
            (*source, outcome.by().unwrap_or_else(|| panic!("{outcome}")).to_owned())
        };
        sources.iter().map(by).collect()
    };
    let before = ask(&world);
    assert_eq!(before, ask(&world));
    let leaves = before.values().filter(|by| *by == "pod3").count();
    assert!(leaves > 0);
    let outcome = world.apply(&Wanted::new(HOUR).among(&[0, 1, 2]));
    assert!(outcome.removed >= leaves, "{outcome:?}");
    let held = world.remembered("aff/default/web/tcp/http/8080");
    assert_eq!(held.len(), sources.len() - leaves);
    let after = ask(&world);
    for (source, by) in &before {
        if by == "pod3" {
            assert_ne!(after[source], "pod3");
        } else {
            assert_eq!(&after[source], by, "{source}");
        }
    }
    // It comes back: nobody is led to it because of old times, and nobody leaves another for it.
    world.apply(&Wanted::new(HOUR));
    assert_eq!(ask(&world), after);
}

#[test]
fn another_timeout_counts_from_the_last_connection() {
    const MAP: &str = "aff/default/web/tcp/http/8080";
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    let old = world.lab.node(0).add_pod("old").unwrap();
    let new = world.lab.node(0).add_pod("new").unwrap();
    who(&old, Proto::Tcp, vip(Family::V4));
    std::thread::sleep(Duration::from_secs(4));
    let second = who(&new, Proto::Tcp, vip(Family::V4));
    let lives = |world: &World, pod: &Pod| world.remembered(MAP).get(&pod.v4().to_string()).map(|e| e.1);
    world.apply(&Wanted::new(2 * HOUR));
    assert!((7190.0..7196.5).contains(&lives(&world, &old).unwrap()), "{:?}", lives(&world, &old));
    assert!((7196.5..=7200.0).contains(&lives(&world, &new).unwrap()), "{:?}", lives(&world, &new));
    world.apply(&Wanted::new(60));
    assert!((50.0..56.5).contains(&lives(&world, &old).unwrap()), "{:?}", lives(&world, &old));
    world.apply(&Wanted::new(3));
    assert_eq!(lives(&world, &old), None, "its time was over");
    assert!((0.0..=3.0).contains(&lives(&world, &new).unwrap()), "{:?}", lives(&world, &new));
    assert_eq!(who(&new, Proto::Tcp, nodeport(Family::V4)), second);
    assert!(lives(&world, &new).unwrap() > 2.0, "a new connection, and the new timeout");
}

#[test]
fn a_new_start_keeps_what_is_remembered() {
    const MAP: &str = "aff/default/web/tcp/http/8080";
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    let client = world.lab.node(0).add_pod("client").unwrap();
    let first = who(&client, Proto::Tcp, vip(Family::V4));
    let before = world.listing();
    world.restart();
    let outcome = world.apply(&Wanted::new(HOUR));
    assert_eq!((outcome.added, outcome.removed), (0, 0));
    assert_eq!(without_time(&before), without_time(&world.listing()));
    assert_eq!(sole(&client, Proto::Tcp, nodeport(Family::V4)), Some(first.clone()));
    // A timeout and an endpoint that changed while nobody looked.
    world.restart();
    let gone: usize = first.trim_start_matches("pod").parse().unwrap();
    let others: Vec<_> = (0..4).filter(|i| *i != gone).collect();
    world.apply(&Wanted::new(60).among(&others));
    assert!(world.remembered(MAP).is_empty());
    let second = sole(&client, Proto::Tcp, vip(Family::V4)).expect("another");
    assert_ne!(second, first);
    assert!(world.remembered(MAP)[&client.v4().to_string()].1 <= 60.0);
    // And affinity that was switched off while nobody looked leaves nothing.
    world.restart();
    world.apply(&Wanted { timeout: None, ..Wanted::new(1) });
    assert!(!world.listing().contains("aff/"), "{}", world.listing());
}

/// Such as `59m58s120ms`.
fn is_time(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_digit()) && word.ends_with('s') && !word.contains(['.', ':'])
}

/// A listing without the order of elements and the times that pass.
fn without_time(listing: &str) -> Vec<String> {
    let words = listing.split_whitespace().map(|word| word.trim_end_matches(','));
    let mut words: Vec<_> = words.filter(|word| !is_time(word)).map(str::to_owned).collect();
    words.sort();
    words
}

#[test]
fn affinity_is_switched_on_and_off_in_place() {
    let mut world = World::new();
    let off = Wanted { timeout: None, ..Wanted::new(1) };
    world.apply(&off);
    let bare = world.listing();
    let client = world.lab.node(0).add_pod("client").unwrap();
    let load = |world: &World| {
        let dial = Dial::new(Proto::Tcp, vip(Family::V4));
        kube_lane_lab::Load::start(world.lab.node(0), dial, 4, Duration::from_millis(1)).unwrap()
    };
    let running = load(&world);
    for _ in 0..3 {
        assert_eq!(sole(&client, Proto::Tcp, vip(Family::V4)), None);
        world.apply(&Wanted::new(HOUR));
        assert!(sole(&client, Proto::Tcp, vip(Family::V4)).is_some());
        world.apply(&off);
        assert_eq!(without_time(&bare), without_time(&world.listing()));
    }
    for round in 0..30 {
        for pods in [[0, 1], [2, 3]] {
            world.apply(&Wanted::new(HOUR).among(&pods));
            let backends = pods.map(|i| world.pods[i].0.v4().to_string());
            let held = world.remembered("aff/default/web/tcp/http/8080");
            assert!(held.values().all(|(backend, _)| backends.contains(backend)), "{held:?}");
        }
        if round % 5 == 0 {
            world.apply(&off);
        }
    }
    let report = running.stop();
    assert_eq!(report.tally.failures(), 0, "{report:?}");
    let plan = world.plan(&off);
    let gone = Batch { services: vec![(plan.service.clone(), None)], ..Batch::default() };
    world.apply(&Wanted::new(HOUR));
    world.dataplane.apply(&gone).unwrap();
    assert!(!world.listing().contains("aff/"));
}

#[test]
fn a_backend_counts_only_where_it_is_in_the_set() {
    let mut world = World::new();
    let mixed = Wanted { local: vec![0, 1], external: Verdict::Local, ..Wanted::new(HOUR).among(&[1, 2, 3]) };
    world.apply(&mixed);
    let lab = &world.lab;
    let client = lab.node(0).add_pod("client").unwrap();
    for (proto, _) in PROTOS {
        for family in Family::ALL {
            // Pods and the host get the Cluster set everywhere.
            for host in [&*client, lab.node(0)] {
                let first = sole(host, proto, vip(family)).expect("one");
                for to in [lb(family), nodeport(family)] {
                    assert_eq!(sole(host, proto, to).as_ref(), Some(&first), "{proto} {}", host.name());
                }
            }
            // Who comes from outside gets the Local set, but not through the cluster IP.
            let local = sole(lab.outside(), proto, lb(family)).expect("one");
            assert!(["pod0", "pod1"].contains(&&*local), "{local}");
            assert_eq!(sole(lab.outside(), proto, nodeport(family)).as_ref(), Some(&local));
            let cluster = sole(lab.outside(), proto, vip(family)).expect("one");
            assert_eq!(cluster == local, local == "pod1", "{local} {cluster}");
            assert_eq!(sole(lab.outside(), proto, lb(family)).as_ref(), Some(&local));
        }
    }
}

#[test]
fn a_policy_that_changes_takes_along_what_is_remembered() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR).among(&[0, 1]));
    let outside = |world: &World| sole(world.lab.outside(), Proto::Tcp, nodeport(Family::V4)).expect("one");
    let first = outside(&world);
    let local = Wanted { local: vec![0, 1], external: Verdict::Local, ..Wanted::new(HOUR).among(&[0, 1]) };
    for wanted in [local, Wanted::new(HOUR), Wanted::new(HOUR).among(&[0, 1])] {
        world.apply(&wanted);
        assert_eq!(outside(&world), first);
    }
}

#[test]
fn what_nft_lists_with_affinity_nft_takes_back() {
    let mut world = World::new();
    let mixed = Wanted { local: vec![0, 1], external: Verdict::Local, ..Wanted::new(HOUR) };
    world.apply(&mixed);
    let plan = world.plan(&Wanted::new(10800));
    let mut odd = Plan::clone(&plan);
    odd.service = ServiceKey::new(&"n".repeat(63), &"s".repeat(63));
    for port in &mut odd.ports {
        port.name = "Ä odd\"name".repeat(9).into();
        port.frontends = [Frontend::nodeport(30081, Verdict::Cluster)].into();
    }
    let odd = (odd.service.clone(), Some(Arc::new(odd)));
    let outcome = world.dataplane.apply(&Batch { services: vec![odd], ..Batch::default() }).unwrap();
    assert!(outcome.failed.is_empty(), "{outcome:?}");
    who(world.lab.outside(), Proto::Tcp, lb(Family::V4));
    who(world.lab.outside(), Proto::Udp, nodeport(Family::V6));
    let before = world.listing();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &before).unwrap();
    nft(&["flush", "ruleset"], None);
    nft(&["-f", &file.path().to_string_lossy()], None);
    assert_eq!(without_time(&before), without_time(&world.listing()));
    // Somebody else's flush is repaired; what was remembered went with it.
    world.dataplane.repair().unwrap();
    nft(&["flush", "ruleset"], None);
    assert!(world.dataplane.repair().unwrap().is_some_and(|outcome| outcome.failed.is_empty()));
    assert!(sole(world.lab.outside(), Proto::Tcp, lb(Family::V4)).is_some());
}

#[test]
fn a_change_costs_a_few_elements_whatever_is_remembered() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    let client = world.lab.node(0).add_pod("client").unwrap();
    let first = who(&client, Proto::Tcp, vip(Family::V4));
    let gone = (0..4).find(|i| format!("pod{i}") != first).unwrap();
    let others: Vec<_> = (0..4).filter(|i| *i != gone).collect();
    let outcome = world.apply(&Wanted::new(HOUR).among(&others));
    // For each of four ports a member, and for each of three frontends: at most the last takes the gap and one class goes.
    assert!(outcome.removed <= 4 * (1 + 3 * 3) && outcome.added <= 4 * 3, "{outcome:?}");
    assert_eq!(world.remembered("aff/default/web/tcp/http/8080").len(), 1);
}

#[test]
fn backends_may_listen_on_several_ports() {
    let mut world = World::new();
    let other: Vec<_> = [1, 3].map(|i| world.pods[i].0.serve(Proto::Tcp, 9090).unwrap()).into();
    let plan = |world: &World, pods: &[usize]| {
        let mut plan = Plan::clone(&world.plan(&Wanted::new(HOUR).among(pods)));
        plan.ports = plan.ports.into_iter().filter(|port| port.protocol == Protocol::Tcp).collect();
        for port in &mut plan.ports {
            let others = [1, 3].map(|i| at(&world.pods[i].0, port.family, 8080));
            for backend in port.backends.iter_mut().filter(|backend| others.contains(&backend.address)) {
                backend.address.port = 9090;
            }
        }
        let services = vec![(plan.service.clone(), Some(Arc::new(plan)))];
        Batch { services, ..Batch::default() }
    };
    for pods in [&[0, 1, 2, 3][..], &[1], &[0, 1, 2, 3], &[0], &[0, 1, 2, 3]] {
        let outcome = world.dataplane.apply(&plan(&world, pods)).unwrap();
        assert!(outcome.failed.is_empty() && outcome.messages < 200, "{outcome:?}");
        for family in Family::ALL {
            for host in [&**world.lab.outside(), world.lab.node(0)] {
                let first = sole(host, Proto::Tcp, vip(family)).expect("one");
                assert_eq!(sole(host, Proto::Tcp, nodeport(family)), Some(first), "{pods:?}");
            }
        }
    }
    // With nobody else for a while, they stayed with the last.
    assert_eq!(sole(world.lab.outside(), Proto::Tcp, vip(Family::V4)).as_deref(), Some("pod0"));
    drop(other);
}

#[test]
fn a_service_whose_objects_the_kernel_refuses_is_named_and_left_out() {
    let mut world = World::new();
    let mixed = Wanted { local: vec![0, 1], external: Verdict::Local, ..Wanted::new(HOUR) };
    let mut wrong = Plan::clone(&world.plan(&mixed));
    wrong.service = ServiceKey::new("default", "wrong");
    for port in &mut wrong.ports {
        // An address of the other family: an element of the wrong length.
        let stranger = if port.family == Family::V4 { Family::V6 } else { Family::V4 };
        port.local_backends[0].address = at(&world.pods[0].0, stranger, 8080);
        let address = of(port.family, topology::service_cidrs().map(|cidr| cidr.iter().nth(11).unwrap()));
        port.frontends = [Frontend::cluster_ip(SocketAddr::new(address, 80), Verdict::Local)].into();
    }
    let good = world.plan(&Wanted::new(HOUR));
    let services =
        vec![(wrong.service.clone(), Some(Arc::new(wrong))), (good.service.clone(), Some(good.clone()))];
    let moved = Wanted { timeout: None, ..Wanted::new(1) };
    world.apply(&moved);
    let outcome = world.dataplane.apply(&Batch { services, ..Batch::default() }).unwrap();
    let failed: Vec<_> = outcome.failed.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(failed, ["default/wrong"], "{outcome:?}");
    assert!(sole(world.lab.outside(), Proto::Tcp, vip(Family::V4)).is_some());
    let listing = world.listing();
    assert!(listing.contains("aff/default/web/tcp/http") && !listing.contains("default/wrong"), "{listing}");
}

#[test]
fn what_is_sent_again_to_a_backend_that_left_does_not_lead_back_there() {
    const MAP: &str = "aff/default/web/udp/http/8080";
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    world.pods.iter().for_each(|(_, echoes)| echoes[1].pause());
    let client = world.lab.node(0).add_pod("client").unwrap();
    let dial = Dial::new(Proto::Udp, vip(Family::V4)).timeout(Duration::from_millis(200));
    let mut unanswered = client.flow(dial).unwrap();
    assert_eq!(unanswered.ask(), kube_lane_lab::Outcome::TimedOut);
    let (backend, _) = world.remembered(MAP).into_values().next().expect("the first packet counts");
    let others: Vec<_> = (0..4).filter(|i| world.pods[*i].0.v4().to_string() != backend).collect();
    assert_eq!(others.len(), 3);
    world.apply(&Wanted::new(HOUR).among(&others));
    for _ in 0..3 {
        assert_eq!(unanswered.ask(), kube_lane_lab::Outcome::TimedOut);
        assert_eq!(world.remembered(MAP).len(), 0);
    }
}
