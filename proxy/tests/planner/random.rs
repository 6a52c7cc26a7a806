//! Random events in random order: the planner's history leaves no trace in its plans, and every plan keeps its promises.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use kube_lane::model::input::{
    Change, Event, Family, ObjectKey, Origin, Protocol, Service, ServiceType, TrafficPolicy,
};
use kube_lane::model::plan::{
    AddressPort, Backend, FrontendAddress, FrontendKind, NodePlan, Plan, PortPlan, Verdict,
};
use kube_lane::model::planner::{Changes, NodePortAddresses, Planner, PodCidrs, Settings};

use crate::history::{OWN_PORT, Random, World, each_seed, fresh, settings};

const CASES: u64 = 4_000;
const STEPS: u64 = 60;

#[test]
fn incremental_equals_fresh() {
    each_seed(CASES, case);
}

fn case(seed: u64) {
    let mut random = Random::new(seed);
    let settings = some_settings(&mut random);
    let mut incremental = Planner::new(settings.clone());
    let mut told = World::default();
    let mut reported = Reported::default();
    for _ in 0..STEPS {
        let event = random.event();
        told.hear(&event);
        incremental.apply(event);
        if random.one_in(4) {
            reported.add(incremental.replan());
        }
    }
    reported.add(incremental.replan());
    assert_eq!(reported.plans, by_key(&incremental), "what was reported adds up to the plans");
    assert_eq!(reported.node.as_ref(), incremental.node());
    incremental.plans().for_each(|plan| check(plan));

    let slices_first = told.events();
    check_owners(&incremental, &expected_owners(&slices_first));
    let services_first: Vec<_> = slices_first.iter().rev().cloned().collect();
    let mut shuffled = slices_first.clone();
    random.shuffle(&mut shuffled);
    for order in [slices_first, services_first, shuffled] {
        let fresh = fresh(settings.clone(), order);
        assert_eq!(by_key(&incremental), by_key(&fresh));
        assert_eq!(incremental.node(), fresh.node());
        assert_eq!(incremental.node_eligible(), fresh.node_eligible());
        assert_eq!(incremental.synced(), fresh.synced());
    }
}

fn some_settings(random: &mut Random) -> Settings {
    let network = |text: &str| -> IpNetwork { text.parse().unwrap() };
    Settings {
        node_address: random.pick(&[None, Some("10.96.0.1".parse().unwrap())]),
        pod_cidrs: random.pick(&[PodCidrs::Unknown, PodCidrs::Node]),
        nodeport_addresses: random.pick(&[
            NodePortAddresses::PRIMARY,
            NodePortAddresses { primary: false, within: vec![network("10.96.0.0/30")] },
            NodePortAddresses { primary: true, within: vec![network("10.96.0.0/30")] },
        ]),
        ..settings()
    }
}

fn by_key(planner: &Planner) -> BTreeMap<ObjectKey, Arc<Plan>> {
    planner.plans().map(|plan| (plan.service.clone(), Arc::clone(plan))).collect()
}

type Claimed = (Protocol, Family, Option<IpAddr>, u16);

/// Whoever should have something to be dialled at has it, and nobody else; the same holds for ports of health checks.
fn check_owners(planner: &Planner, expected: &BTreeMap<Claimed, (ObjectKey, For)>) {
    let dialled = |(claimed, (owner, what)): (&Claimed, &(ObjectKey, For))| {
        (*what == For::Clients).then(|| (*claimed, owner.clone()))
    };
    assert_eq!(owners(planner), expected.iter().filter_map(dialled).collect());
    for plan in planner.plans() {
        let check = plan.health_check.as_deref();
        let asked = check.into_iter().flat_map(|check| {
            [(Family::V4, check.v4_endpoints), (Family::V6, check.v6_endpoints)]
                .map(|(family, count)| (family, count.map(|_| check.port)))
        });
        let planned: BTreeSet<Claimed> =
            asked.filter_map(|(family, port)| Some((Protocol::Tcp, family, None, port?))).collect();
        let is_served = |family: Family| plan.ports.iter().any(|port| port.family == family);
        let owned = expected.iter().filter(|(claimed, (owner, what))| {
            *owner == plan.service && *what == For::HealthCheck && is_served(claimed.1)
        });
        assert_eq!(planned, owned.map(|(claimed, _)| *claimed).collect(), "{}", plan.service);
    }
}

/// What a claim is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum For {
    Clients,
    HealthCheck,
}

/// Who serves what, as planned; nothing is served twice.
fn owners(planner: &Planner) -> BTreeMap<Claimed, ObjectKey> {
    let mut owners = BTreeMap::new();
    for plan in planner.plans() {
        for port in &plan.ports {
            for frontend in &port.frontends {
                let (ip, number) = match frontend.at {
                    FrontendAddress::Vip(address) => (Some(address.ip), address.port),
                    FrontendAddress::NodePort(number) => (None, number),
                };
                let claimed = (port.protocol, port.family, ip, number);
                assert_eq!(owners.insert(claimed, plan.service.clone()), None, "{claimed:?} is served twice");
            }
        }
    }
    owners
}

/// Who serves what, by the rule itself: of all that ask, the least of (origin, created, key), but for the agent's own port.
fn expected_owners(objects: &[Event]) -> BTreeMap<Claimed, (ObjectKey, For)> {
    let mut services: BTreeMap<&ObjectKey, BTreeMap<Origin, &Service>> = BTreeMap::new();
    let mut synced = BTreeSet::new();
    for event in objects {
        match event {
            Event::Source { origin, change: Change::Service(service) } => {
                services.entry(&service.key).or_default().insert(*origin, service);
            }
            Event::Source { origin, change: Change::Synced } => drop(synced.insert(*origin)),
            _ => {}
        }
    }
    services.values_mut().for_each(|by_origin| by_origin.retain(|origin, _| synced.contains(origin)));
    let effective = services.values().filter_map(BTreeMap::first_key_value);
    let mut ranked: Vec<_> = effective.collect();
    ranked.sort_by_key(|(origin, service)| (**origin, service.created, &service.key));
    let mut owners = BTreeMap::new();
    for (_, service) in ranked {
        for (claimed, what) in asked(service) {
            owners.entry(claimed).or_insert((service.key.clone(), what));
        }
    }
    owners.remove(&(Protocol::Tcp, Family::V4, None, OWN_PORT));
    owners
}

/// All that a Service asks for; what its clients are to dial comes before its health check.
fn asked(service: &Service) -> BTreeSet<(Claimed, For)> {
    let families: BTreeSet<Family> = service.cluster_ips.iter().copied().map(Family::of).collect();
    let external = service.external.as_deref();
    let external =
        external.into_iter().flat_map(|external| external.ips.iter().chain(&external.load_balancer_ips));
    let addresses: Vec<IpAddr> = service.cluster_ips.iter().chain(external).copied().collect();
    let mut named = BTreeSet::new();
    let mut asked = BTreeSet::new();
    for port in service.ports.iter().filter(|port| named.insert((port.protocol, port.name.clone()))) {
        for ip in addresses.iter().filter(|ip| families.contains(&Family::of(**ip))) {
            asked.insert(((port.protocol, Family::of(*ip), Some(*ip), port.port), For::Clients));
        }
        let node_ports =
            families.iter().filter_map(|family| Some((port.protocol, *family, None, port.node_port?)));
        asked.extend(node_ports.map(|claimed| (claimed, For::Clients)));
    }
    let is_checked =
        service.kind == ServiceType::LoadBalancer && service.external_policy == TrafficPolicy::Local;
    let health_check = service.external.as_ref().and_then(|external| external.health_check_node_port);
    if let Some(port) = health_check.filter(|_| is_checked) {
        asked.extend(families.iter().map(|family| ((Protocol::Tcp, *family, None, port), For::HealthCheck)));
    }
    asked
}

/// What every plan promises.
fn check(plan: &Plan) {
    let key = |port: &PortPlan| (port.family, port.protocol, port.name.clone());
    assert!(plan.ports.is_sorted_by_key(key));
    assert_eq!(plan.ports.iter().map(key).collect::<BTreeSet<_>>().len(), plan.ports.len());
    plan.ports.iter().for_each(check_port);
    if let Some(check) = &plan.health_check {
        for (family, count) in [(Family::V4, check.v4_endpoints), (Family::V6, check.v6_endpoints)] {
            assert!(count.is_none() || plan.ports.iter().any(|port| port.family == family));
        }
        assert!(check.v4_endpoints.is_some() || check.v6_endpoints.is_some());
    }
}

fn check_port(port: &PortPlan) {
    assert!(!port.frontends.is_empty());
    assert!(port.frontends.is_sorted_by(|a, b| a.at < b.at));
    let sorted = |backends: &[Backend]| backends.is_sorted_by(|a, b| a.address < b.address);
    assert!(
        sorted(&port.backends) && sorted(&port.local_backends) && port.draining.is_sorted_by(|a, b| a < b)
    );
    assert!(port.local_backends.iter().all(|backend| backend.local));
    let used = |backends: &[Backend]| backends.iter().map(|backend| backend.address).collect::<BTreeSet<_>>();
    let all: BTreeSet<AddressPort> = &used(&port.backends) | &used(&port.local_backends);
    assert!(port.draining.iter().all(|address| !all.contains(address)));
    assert!(all.iter().chain(&port.draining).all(|address| Family::of(address.ip) == port.family));

    let verdict = |wanted| port.frontends.iter().any(|frontend| frontend.verdict == wanted);
    let external = port.frontends.iter().any(|frontend| frontend.kind != FrontendKind::ClusterIp);
    if verdict(Verdict::Reject) {
        assert!(all.is_empty() && port.frontends.iter().all(|frontend| frontend.verdict == Verdict::Reject));
    } else {
        assert_eq!(!port.backends.is_empty(), external || verdict(Verdict::Cluster));
        assert!(port.local_backends.is_empty() || verdict(Verdict::Local));
    }
    let policies: BTreeSet<(bool, Verdict)> =
        port.frontends.iter().map(|f| (f.kind == FrontendKind::ClusterIp, f.verdict)).collect();
    assert!(policies.len() <= 2, "one internal policy, one external");

    if let Some(ranges) = &port.source_ranges {
        assert!(ranges.iter().all(|range| Family::of(range.ip()) == port.family));
        assert!(ranges.iter().all(|range| range.prefix() > 0 && range.network() == range.ip()));
        let disjoint = |a: &IpNetwork, b: &IpNetwork| a.ip() < b.ip() && !a.contains(b.ip());
        assert!(ranges.is_sorted_by(disjoint));
        assert!(port.frontends.iter().any(|frontend| frontend.kind == FrontendKind::LoadBalancer));
    }
}

/// What the reports of the incremental planner add up to.
#[derive(Default)]
struct Reported {
    plans: BTreeMap<ObjectKey, Arc<Plan>>,
    node: Option<NodePlan>,
}

impl Reported {
    fn add(&mut self, changes: Changes) {
        assert!(changes.services.is_sorted_by(|a, b| a.0 < b.0), "in order, no key twice");
        for (key, plan) in changes.services {
            assert_ne!(self.plans.get(&key), plan.as_ref(), "reported without a difference");
            match plan {
                Some(plan) => self.plans.insert(key, plan),
                None => self.plans.remove(&key),
            };
        }
        if let Some(node) = changes.node {
            assert_ne!(self.node.as_ref(), Some(&node));
            self.node = Some(node);
        }
    }
}
