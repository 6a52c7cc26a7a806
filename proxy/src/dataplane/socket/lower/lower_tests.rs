//! What a change writes: how much, in which order, and what becomes of Services that meet or do not fit.

use std::collections::BTreeSet;
use std::sync::Arc;

use kube_lane_common::{
    Backend as MapBackend, Frontend as Word, FrontendKey, Member, Port as PortNumber, Set, Slot,
};

use super::super::answers::{Answer, Limit, Policy, Why};
use super::super::write::{Found, Sizes, Write};
use super::addresses::{Addresses, key};
use super::memory_tests::{Memory, Outcome, Reader};
use super::{Lowered, Lowering};
use crate::dataplane::Batch;
use crate::model::input::{Family, Protocol, ServiceKey};
use crate::model::plan::{AddressPort, Backend, Frontend, FrontendKind, NodePlan, Plan, PortPlan, Verdict};

const AMPLE: Sizes = Sizes { frontends: 100, ports: 50, slots: 1 << 15, backends: 25_000 };
const POLICY: Policy = Policy {
    external: true,
    udp: false,
    loopback_nodeports: false,
    host_namespace_only: false,
    leave_alone: false,
    detector: super::super::answers::Clients::Interface,
    masquerade_all: false,
};

fn address(text: &str) -> AddressPort {
    text.parse::<std::net::SocketAddr>().unwrap().into()
}

fn pod(n: u32) -> Backend {
    let ip = std::net::Ipv4Addr::from(0x0af4_0000 + n).into();
    Backend { address: AddressPort { ip, port: 8080 }, local: false }
}

fn cluster_ip(vip: &str) -> Frontend {
    Frontend::cluster_ip(address(vip), Verdict::Cluster)
}

fn nodeport(number: u16) -> Frontend {
    Frontend::nodeport(number, Verdict::Cluster)
}

fn port(frontends: &[Frontend], backends: impl IntoIterator<Item = Backend>) -> PortPlan {
    let mut backends: Vec<_> = backends.into_iter().collect();
    backends.sort();
    let verdict = |frontend: &Frontend| match backends.is_empty() {
        true => Frontend { verdict: Verdict::Reject, ..*frontend },
        false => *frontend,
    };
    PortPlan {
        frontends: frontends.iter().map(verdict).collect(),
        backends: backends.into(),
        ..PortPlan::new(Family::V4, Protocol::Tcp, "http")
    }
}

fn plan(name: &str, port: PortPlan) -> (ServiceKey, Option<Arc<Plan>>) {
    let service = ServiceKey::new("demo", name);
    let plan = Plan::new(service.clone(), [port]);
    (service, Some(Arc::new(plan)))
}

fn gone(name: &str) -> (ServiceKey, Option<Arc<Plan>>) {
    (ServiceKey::new("demo", name), None)
}

/// An agent and its maps.
struct Agent {
    lowering: Lowering,
    maps: Memory,
    last: Lowered,
}

impl Agent {
    fn new(sizes: Sizes) -> Self {
        let (lowering, _) = Lowering::adopt(POLICY, Found::default(), sizes);
        Self { lowering, maps: Memory::new(sizes), last: Lowered::default() }
    }

    /// Commits, and gives what was written.
    fn commit(&mut self, batch: Batch) -> Vec<Write> {
        let mut writes = Vec::new();
        self.last = self.lowering.apply(&batch, &mut |write| writes.push(write));
        writes.iter().for_each(|write| self.maps.write(*write));
        writes
    }

    fn apply<const N: usize>(&mut self, services: [(ServiceKey, Option<Arc<Plan>>); N]) -> Vec<Write> {
        self.commit(Batch { services: services.into(), ..Batch::default() })
    }

    /// Where connections to a frontend end.
    fn outcome(&self, frontend: &Frontend) -> Outcome {
        self.maps.outcome(&key(&port(&[], []), frontend.at))
    }

    /// Who answers the first frontend of a Service.
    fn answer(&self, name: &str) -> Answer {
        let mut ports = self.lowering.service(&ServiceKey::new("demo", name)).unwrap();
        ports.next().unwrap().answers[0]
    }

    fn ids(&self, name: &str) -> (u32, Vec<(AddressPort, u32)>) {
        let view = self.lowering.service(&ServiceKey::new("demo", name)).unwrap().next().unwrap();
        (view.id, view.backends().collect())
    }
}

fn led(backends: &[Backend]) -> Outcome {
    Outcome::Led(backends.iter().map(|backend| backend.address.socket()).collect())
}

#[test]
fn one_change_is_as_many_writes_at_any_size() {
    let frontends = [cluster_ip("10.96.0.1:80"), nodeport(30_080)];
    for size in [10, 10_000] {
        let mut agent = Agent::new(AMPLE);
        let mut apply = |numbers: std::ops::Range<u32>, but: u32| {
            let backends = numbers.filter(|n| *n != but).map(pod);
            agent.apply([plan("web", port(&frontends, backends))])
        };
        apply(0..size, size);
        let removed = apply(0..size, 3);
        assert!(
            matches!(removed[..], [Write::Member(_, Member::NONE), Write::Slot(..), Write::Set(..)]),
            "{removed:?}"
        );
        let added = apply(0..size, size);
        assert!(
            matches!(added[..], [Write::Backend(..), Write::Member(..), Write::Slot(..), Write::Set(..)]),
            "{added:?}"
        );
        let replaced = apply(1..size + 1, 0);
        assert!(
            matches!(
                replaced[..],
                [Write::Backend(..), Write::Member(..), Write::Member(_, Member::NONE), Write::Slot(..)]
            ),
            "{replaced:?}"
        );
        assert_eq!(apply(1..size + 1, 0), []);
    }
}

#[test]
fn a_set_that_grows_is_written_whole_and_then_shown_by_one_store() {
    let mut agent = Agent::new(AMPLE);
    let frontends = [cluster_ip("10.96.0.1:80")];
    agent.apply([plan("web", port(&frontends, (0..4).map(pod)))]);
    let grown = agent.apply([plan("web", port(&frontends, (0..5).map(pod)))]);
    let slots = grown.iter().filter(|write| matches!(write, Write::Slot(..))).count();
    assert_eq!((slots, matches!(grown.last(), Some(Write::Set(2, _)))), (5, true), "{grown:?}");
    assert_eq!(agent.last.retired.ranges.len(), 1);
}

#[test]
fn endpoints_come_and_go_by_one_store() {
    let mut agent = Agent::new(AMPLE);
    let frontends = [cluster_ip("10.96.0.1:80"), nodeport(30_080)];
    let sets = |writes: Vec<Write>| {
        let of = |write: &Write| matches!(write, Write::Set(..) | Write::Frontend(..));
        writes.into_iter().filter(of).collect::<Vec<_>>()
    };
    agent.apply([plan("web", port(&frontends, []))]);
    assert_eq!(agent.outcome(&frontends[0]), Outcome::Refused);
    assert_eq!(sets(agent.apply([plan("web", port(&frontends, [pod(1)]))])), [Write::Set(2, Set::new(0, 1))]);
    assert_eq!(sets(agent.apply([plan("web", port(&frontends, []))])), [Write::Set(2, Set::REFUSED)]);
    assert_eq!(agent.outcome(&frontends[1]), Outcome::Refused);
}

#[test]
fn a_port_keeps_its_ids_whatever_it_is_called_and_dialled_at() {
    let mut agent = Agent::new(AMPLE);
    agent.apply([plan("web", port(&[cluster_ip("10.96.0.1:80")], [pod(1)]))]);
    let before = agent.ids("web");
    agent.apply([plan(
        "web",
        PortPlan { name: "www".into(), ..port(&[cluster_ip("10.96.0.1:80")], [pod(1)]) },
    )]);
    agent.apply([plan(
        "web",
        PortPlan { name: "www".into(), ..port(&[cluster_ip("10.96.0.1:81")], [pod(1)]) },
    )]);
    assert_eq!(agent.ids("web"), before);
    assert_eq!(agent.outcome(&cluster_ip("10.96.0.1:80")), Outcome::Left);
}

#[test]
fn what_would_be_translated_twice_is_left_to_nftables_while_it_would() {
    let mut agent = Agent::new(AMPLE);
    let (front, behind) = (cluster_ip("10.96.0.1:80"), cluster_ip("10.244.0.1:8080"));
    agent.apply([plan("front", port(&[front], [pod(1)]))]);
    assert_eq!(agent.outcome(&front), led(&[pod(1)]));
    // Another Service's VIP is the endpoint.
    agent.apply([plan("behind", port(&[behind], [pod(2)]))]);
    assert_eq!(agent.outcome(&front), Outcome::Left);
    assert_eq!(agent.answer("front"), Answer::Nftables(Why::TranslatedTwice(pod(1).address)));
    agent.apply([plan("front", port(&[front], [pod(1), pod(3)]))]);
    assert_eq!(agent.outcome(&front), Outcome::Left);
    agent.apply([plan("front", port(&[front], [pod(3)]))]);
    assert_eq!(agent.outcome(&front), led(&[pod(3)]));
    agent.apply([plan("front", port(&[front], [pod(1)]))]);
    assert_eq!(agent.outcome(&front), Outcome::Left);
    agent.apply([gone("behind")]);
    assert_eq!(agent.outcome(&front), led(&[pod(1)]));
    // It is a NodePort as soon as the node has the address.
    agent.apply([plan("nodeport", port(&[nodeport(8080)], [pod(4)]))]);
    assert_eq!(agent.outcome(&front), led(&[pod(1)]));
    let node = NodePlan { nodeport_addresses: vec![pod(1).address.ip], ..NodePlan::default() };
    let writes = agent.commit(Batch { node: Some(node), ..Batch::default() });
    assert_eq!(writes.last(), Some(&Write::NodeAddress(pod(1).address.ip.into(), true)));
    assert_eq!(agent.outcome(&front), Outcome::Left);
    agent.commit(Batch { node: Some(NodePlan::default()), ..Batch::default() });
    assert_eq!(agent.outcome(&front), led(&[pod(1)]));
    assert!(agent.maps.node.is_empty());
}

#[test]
fn a_vip_on_the_node_stands_before_a_nodeport() {
    let mut agent = Agent::new(AMPLE);
    let node = NodePlan { nodeport_addresses: vec![address("192.0.2.1:0").ip], ..NodePlan::default() };
    agent.commit(Batch { node: Some(node), ..Batch::default() });
    agent.apply([plan("np", port(&[nodeport(30_080)], [pod(1)]))]);
    assert_eq!(agent.outcome(&nodeport(30_080)), led(&[pod(1)]));
    let vip = Frontend { kind: FrontendKind::ExternalIp, ..cluster_ip("192.0.2.1:30080") };
    agent.apply([plan("vip", port(&[vip], [pod(2)]))]);
    assert_eq!(agent.outcome(&nodeport(30_080)), Outcome::Left);
    assert_eq!(agent.answer("np"), Answer::Nftables(Why::VipOnNode));
    agent.apply([gone("vip")]);
    assert_eq!(agent.outcome(&nodeport(30_080)), led(&[pod(1)]));
}

/// A node of which interfaces have these addresses.
fn having(addresses: &[&str]) -> NodePlan {
    let interface_addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
    NodePlan { interface_addresses, ..NodePlan::default() }
}

#[test]
fn a_vip_that_an_interface_of_the_node_has_is_left_to_nftables_while_it_has() {
    let mut agent = Agent::new(AMPLE);
    let move_to = |agent: &mut Agent, addresses: &[&str]| {
        agent.commit(Batch { node: Some(having(addresses)), ..Batch::default() })
    };
    let ports = [cluster_ip("10.96.0.10:53"), cluster_ip("10.96.0.10:9153")];
    let others = [cluster_ip("10.96.0.1:53"), nodeport(53)];
    let dns = || plan("dns", port(&ports, [pod(1)]));
    agent.apply([dns(), plan("web", port(&others, [pod(2)]))]);
    assert_eq!(move_to(&mut agent, &["192.0.2.11"]), []);
    move_to(&mut agent, &["10.96.0.10", "192.0.2.11"]);
    assert_eq!(ports.map(|vip| agent.outcome(&vip)), [Outcome::Left, Outcome::Left]);
    assert_eq!(agent.answer("dns"), Answer::Nftables(Why::OwnAddress));
    assert_eq!(others.map(|vip| agent.outcome(&vip)), [led(&[pod(2)]), led(&[pod(2)])]);
    // The interface may have it before the Service does, and an agent may start then.
    agent.apply([gone("dns")]);
    agent.apply([dns()]);
    assert_eq!(agent.outcome(&ports[0]), Outcome::Left);
    move_to(&mut agent, &["192.0.2.11"]);
    assert_eq!(ports.map(|vip| agent.outcome(&vip)), [led(&[pod(1)]), led(&[pod(1)])]);
    let (mut lowering, _) = Lowering::adopt(POLICY, agent.maps.found(), AMPLE);
    let services = agent.lowering.everything().services;
    let batch = Batch { node: Some(having(&["10.96.0.10"])), services, sweep: false };
    lowering.apply(&batch, &mut |write| agent.maps.write(write));
    assert_eq!(ports.map(|vip| agent.outcome(&vip)), [Outcome::Left, Outcome::Left]);
    assert_eq!(others.map(|vip| agent.outcome(&vip)), [led(&[pod(2)]), led(&[pod(2)])]);
}

#[test]
fn an_address_that_comes_or_goes_names_the_services_that_it_concerns() {
    let plans = [
        plan("vip", port(&[cluster_ip("192.0.2.1:80")], [pod(1)])),
        plan("hidden", port(&[nodeport(80)], [pod(2)])),
        plan(
            "backend",
            port(&[cluster_ip("10.96.0.1:80")], [Backend { address: address("192.0.2.1:9"), ..pod(3) }]),
        ),
        plan("other", port(&[cluster_ip("192.0.2.10:80"), nodeport(81)], [pod(4)])),
    ];
    let plans = plans.iter().map(|(_, plan)| plan.as_deref().unwrap());
    let mut addresses = Addresses::of(plans, &NodePlan::default());
    let mut touched = |node: &NodePlan| {
        let mut touched = BTreeSet::new();
        addresses.move_node(node, &mut touched);
        Vec::from_iter(touched)
    };
    let nodeports =
        |ip: &str| NodePlan { nodeport_addresses: vec![ip.parse().unwrap()], ..NodePlan::default() };
    assert_eq!(touched(&having(&["192.0.2.1", "192.0.2.2"])), [0]);
    assert!(touched(&having(&["192.0.2.1"])).is_empty());
    assert_eq!(touched(&having(&[])), [0]);
    assert_eq!(touched(&nodeports("192.0.2.1")), [1, 2]);
    assert!(touched(&nodeports("192.0.2.1")).is_empty());
    assert_eq!(touched(&nodeports("192.0.2.3")), [1, 2]);
}

#[test]
fn a_service_that_does_not_fit_is_named_left_to_nftables_and_tried_again() {
    let vip = |n: u32| cluster_ip(&format!("10.96.0.{n}:80"));
    let limits = [
        (Sizes { frontends: 1, ..AMPLE }, Limit::Frontends),
        (Sizes { ports: 1, ..AMPLE }, Limit::Ports),
        (Sizes { slots: 3, ..AMPLE }, Limit::Slots),
        (Sizes { backends: 3, ..AMPLE }, Limit::Backends),
    ];
    for (sizes, limit) in limits {
        let mut agent = Agent::new(sizes);
        agent.apply([
            plan("a", port(&[vip(1)], [pod(1), pod(2)])),
            plan("b", port(&[vip(2)], [pod(3), pod(4)])),
        ]);
        let b = ServiceKey::new("demo", "b");
        assert_eq!(agent.last.full, [(b.clone(), limit)]);
        assert_eq!(agent.answer("b"), Answer::Nftables(Why::Full(limit)));
        assert!(agent.lowering.is_full(&b));
        assert_eq!(agent.outcome(&vip(2)), Outcome::Left);
        agent.apply([gone("a")]);
        let retired = std::mem::take(&mut agent.last.retired);
        agent.lowering.reclaim(retired);
        agent.commit(Batch::default());
        assert_eq!(agent.outcome(&vip(2)), led(&[pod(3), pod(4)]));
        assert!(!agent.lowering.is_full(&b) && agent.last.full.is_empty());
        // One that grows beyond the limit is withdrawn as a whole.
        let more = (0..5).map(pod);
        agent.apply([plan("b", port(&[vip(2), vip(3), vip(4)], more))]);
        let fits = limit == Limit::Ports;
        assert_eq!(agent.outcome(&vip(2)) == Outcome::Left, !fits, "{limit}");
    }
}

#[test]
fn what_does_not_fit_together_is_not_trusted() {
    let mut agent = Agent::new(AMPLE);
    agent.apply([
        plan("a", port(&[cluster_ip("10.96.0.1:80")], [pod(1), pod(2)])),
        plan("b", port(&[cluster_ip("10.96.0.2:80")], [pod(3)])),
    ]);
    let (a, b) = (agent.ids("a"), agent.ids("b"));
    let spoil: [&dyn Fn(&mut Found); 8] = [
        &|found| found.slots[0] = Slot::new(b.1[0].1, Set::cluster_of(a.0)),
        &|found| found.slots[0] = Slot::new(a.1[0].1, Set::cluster_of(b.0)),
        &|found| found.slots[0] = Slot::new(u32::MAX, Set::cluster_of(a.0)),
        &|found| found.sets[Set::cluster_of(a.0) as usize] = Set::new(1, 2),
        &|found| found.sets[Set::cluster_of(a.0) as usize] = Set::new(u32::MAX, 2),
        &|found| found.sets[Set::cluster_of(a.0) as usize] = Set(1 << 62),
        &|found| found.backends[a.1[0].1 as usize] = found.backends[a.1[1].1 as usize],
        &|found| {
            let ipv6 = std::net::IpAddr::from([0xfd, 0, 0, 1, 0, 0, 0, 1]);
            found.backends[a.1[0].1 as usize] = MapBackend::new(ipv6.into(), PortNumber::from_host(1), a.0);
        },
    ];
    for (i, spoil) in spoil.iter().enumerate() {
        let mut found = agent.maps.found();
        spoil(&mut found);
        let mut maps = agent.maps.clone();
        let (mut lowering, writes) = Lowering::adopt(POLICY, found, AMPLE);
        writes.into_iter().for_each(|write| maps.write(write));
        let led_to = |maps: &Memory, vip: &str| maps.outcome(&key(&port(&[], []), cluster_ip(vip).at));
        assert_eq!(led_to(&maps, "10.96.0.1:80"), Outcome::Left, "{i}");
        assert_eq!(led_to(&maps, "10.96.0.2:80"), led(&[pod(3)]), "{i}");
        lowering.apply(&agent.lowering.everything(), &mut |write| maps.write(write));
        assert_eq!(led_to(&maps, "10.96.0.1:80"), led(&[pod(1), pod(2)]), "{i}");
    }
}

#[test]
fn frontends_of_nowhere_are_withdrawn_and_those_of_nobody_at_the_sweep() {
    let mut agent = Agent::new(AMPLE);
    agent.apply([
        plan("a", port(&[cluster_ip("10.96.0.1:80"), cluster_ip("10.96.0.3:80")], [pod(1)])),
        plan("b", port(&[cluster_ip("10.96.0.2:80")], [pod(2)])),
    ]);
    let mut found = agent.maps.found();
    let nowhere = FrontendKey::tcp("10.96.0.9:80".parse().unwrap());
    let mut maps = agent.maps.clone();
    for word in [
        Word::new(2, 0, 0),
        Word::new(0, 0, nowhere.fingerprint()),
        Word::new(9_999, 0, nowhere.fingerprint()),
    ] {
        found.frontends.retain(|(key, _)| *key != nowhere);
        found.frontends.push((nowhere, word));
        maps.write(Write::Frontend(nowhere, Some(word)));
        let again = Found { frontends: found.frontends.clone(), ..agent.maps.found() };
        let (_, writes) = Lowering::adopt(POLICY, again, AMPLE);
        assert_eq!(writes, [Write::Frontend(nowhere, None)]);
        maps.write(writes[0]);
    }
    // What the claiming Service does not have any more goes at once; what nobody claims stays till the sweep.
    let mut maps = agent.maps.clone();
    let (mut lowering, writes) = Lowering::adopt(POLICY, maps.found(), AMPLE);
    assert_eq!(writes, []);
    let led_to = |maps: &Memory, vip: &str| maps.outcome(&key(&port(&[], []), cluster_ip(vip).at));
    let services = [plan("a", port(&[cluster_ip("10.96.0.1:80")], [pod(1)]))].into();
    lowering.apply(&Batch { services, ..Batch::default() }, &mut |write| maps.write(write));
    let outcomes = ["10.96.0.1:80", "10.96.0.3:80", "10.96.0.2:80"].map(|vip| led_to(&maps, vip));
    assert_eq!(outcomes, [led(&[pod(1)]), Outcome::Left, led(&[pod(2)])]);
    let swept = lowering.apply(&Batch { sweep: true, ..Batch::default() }, &mut |write| maps.write(write));
    assert_eq!(led_to(&maps, "10.96.0.2:80"), Outcome::Left);
    assert_eq!((swept.retired.ports.len(), swept.retired.backends.len()), (1, 1));
    maps.check_members();
}

#[test]
fn a_fresh_start_before_the_node_is_known_leaves_where_nodeports_answer() {
    let mut agent = Agent::new(AMPLE);
    let node = NodePlan { nodeport_addresses: vec![address("192.0.2.1:0").ip], ..NodePlan::default() };
    agent.commit(Batch { node: Some(node.clone()), ..Batch::default() });
    let next = || Lowering::adopt(POLICY, agent.maps.found(), AMPLE).0;
    // Larger maps are made before the first batch is written.
    let everything = next().everything();
    assert_eq!(everything.node, None);
    let mut lowering = next();
    lowering.apply(&everything, &mut |write| panic!("{write:?}"));
    lowering.apply(&Batch { node: Some(node.clone()), ..Batch::default() }, &mut |write| panic!("{write:?}"));
    assert_eq!(lowering.everything().node, Some(node));
}

#[test]
fn who_reads_late_is_led_to_another_service_only_without_a_grace_period() {
    let (old, new) = (cluster_ip("10.96.0.1:80"), cluster_ip("10.96.0.2:80"));
    for waits in [true, false] {
        let mut agent = Agent::new(AMPLE);
        agent.apply([plan("old", port(&[old], [pod(1)]))]);
        let mut reader = Reader::Dials(key(&port(&[], []), old.at)).step(&agent.maps, 0, None);
        agent.apply([gone("old")]);
        let retired = std::mem::take(&mut agent.last.retired);
        if !waits {
            agent.lowering.reclaim(retired);
        }
        agent.apply([plan("new", port(&[new], [pod(2)]))]);
        for _ in 0..3 {
            reader = reader.step(&agent.maps, 0, None);
        }
        assert_eq!(matches!(reader, Reader::Left), waits, "{reader:?}");
        assert_eq!(
            matches!(reader, Reader::Led(_, at) if at == pod(2).address.socket()),
            !waits,
            "{reader:?}"
        );
    }
}
