//! Random events in random order: the planner's history leaves no trace in its plans.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use kube_lane::model::input::{
    Change, Endpoint, EndpointSlice, Event, Family, Node, ObjectKey, Origin, Protocol, Service, ServicePort,
    ServiceType, SlicePort, TrafficPolicy,
};
use kube_lane::model::plan::{AddressPort, FrontendAddress, NodePlan, Plan};
use kube_lane::model::planner::{Changes, Planner};

use crate::build::{NODE, event, key, planner};

const CASES: u64 = 3_000;
const STEPS: u64 = 60;

#[test]
fn incremental_equals_fresh() {
    for seed in 1..=CASES {
        let caught = std::panic::catch_unwind(|| case(seed));
        if let Err(cause) = caught {
            println!("seed {seed}");
            std::panic::resume_unwind(cause);
        }
    }
}

fn case(seed: u64) {
    let mut random = Random(seed);
    let mut incremental = planner();
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

    let mut fresh = planner();
    let mut events = told.events();
    random.shuffle(&mut events);
    events.into_iter().for_each(|event| fresh.apply(event));
    fresh.replan();

    assert_eq!(by_key(&incremental), by_key(&fresh));
    assert_eq!(incremental.node(), fresh.node());
    assert_eq!(reported.plans, by_key(&incremental), "what was reported adds up to the plans");
    assert_eq!(reported.node.as_ref(), incremental.node());
    assert_eq!(owners(&incremental), told.owners());
}

fn by_key(planner: &Planner) -> BTreeMap<ObjectKey, Arc<Plan>> {
    planner.plans().map(|plan| (plan.service.clone(), Arc::clone(plan))).collect()
}

type Claimed = (Protocol, Family, FrontendAddress);

/// Who serves what, as planned; nothing is served twice.
fn owners(planner: &Planner) -> BTreeMap<Claimed, ObjectKey> {
    let mut owners = BTreeMap::new();
    for plan in planner.plans() {
        for port in &plan.ports {
            for frontend in &port.frontends {
                let claimed = (port.protocol, port.family, frontend.at);
                assert_eq!(owners.insert(claimed, plan.service.clone()), None, "{claimed:?} is served twice");
            }
        }
    }
    owners
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

/// The objects that are there in the end.
#[derive(Default)]
struct World {
    services: BTreeMap<(Origin, ObjectKey), Service>,
    slices: BTreeMap<(Origin, ObjectKey), EndpointSlice>,
    last: BTreeMap<(u8, Origin), Event>,
}

impl World {
    fn hear(&mut self, event: &Event) {
        let (origin, change) = match event.clone() {
            Event::Source { origin, change } => (origin, change),
            Event::HostAddresses(_) => {
                self.last.insert((0, Origin::Static), event.clone());
                return;
            }
        };
        match change {
            Change::Service(service) => drop(self.services.insert((origin, service.key.clone()), service)),
            Change::ServiceGone(key) => drop(self.services.remove(&(origin, key))),
            Change::Slice(slice) => drop(self.slices.insert((origin, slice.key.clone()), slice)),
            Change::SliceGone(key) => drop(self.slices.remove(&(origin, key))),
            Change::Node(_) => drop(self.last.insert((1, origin), event.clone())),
            Change::ServiceCidrs(_) => drop(self.last.insert((2, origin), event.clone())),
            Change::Synced => drop(self.last.insert((3, origin), event.clone())),
            Change::Complete(_) => drop(self.last.insert((4, origin), event.clone())),
        }
    }

    fn events(&self) -> Vec<Event> {
        let services = self.services.iter().map(|((o, _), s)| event(*o, Change::Service(s.clone())));
        let slices = self.slices.iter().map(|((o, _), s)| event(*o, Change::Slice(s.clone())));
        services.chain(slices).chain(self.last.values().cloned()).collect()
    }

    /// Who serves what, by the rule itself: of all that ask, the least of (origin, created, key).
    fn owners(&self) -> BTreeMap<Claimed, ObjectKey> {
        let mut effective: BTreeMap<&ObjectKey, (Origin, &Service)> = BTreeMap::new();
        for ((origin, key), service) in &self.services {
            if self.last.contains_key(&(3, *origin)) {
                effective.entry(key).or_insert((*origin, service));
            }
        }
        let mut ranked: Vec<_> = effective.into_iter().collect();
        ranked.sort_by_key(|(key, (origin, service))| (*origin, service.created, *key));
        let mut owners = BTreeMap::new();
        for (key, (_, service)) in ranked {
            for port in &service.ports {
                for ip in &service.cluster_ips {
                    let vip = FrontendAddress::Vip(AddressPort { ip: *ip, port: port.port });
                    let node_port = port.node_port.map(FrontendAddress::NodePort);
                    for at in std::iter::once(vip).chain(node_port) {
                        owners.entry((port.protocol, Family::of(*ip), at)).or_insert(key.clone());
                    }
                }
            }
        }
        owners
    }
}

/// Xorshift: the same seed gives the same case everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

    fn event(&mut self) -> Event {
        let origin = self.pick(&[Origin::Static, Origin::Api]);
        let change = match self.below(20) {
            0 => Change::Synced,
            1 => {
                let addresses = self.some_addresses(2);
                Change::Node((!self.one_in(3)).then_some(Node { addresses, ..Node::default() }))
            }
            2 => Change::ServiceCidrs(
                (0..self.below(4))
                    .map(|_| self.pick(&["10.96.0.0/16", "10.96.1.9/24", "fd00::/112"]))
                    .map(|c| c.parse().unwrap())
                    .collect(),
            ),
            3 => return Event::HostAddresses(self.some_addresses(4)),
            4..=5 => Change::ServiceGone(self.name()),
            6..=7 => Change::SliceGone(self.name()),
            8..=13 => Change::Service(self.service()),
            _ => Change::Slice(self.slice()),
        };
        event(origin, change)
    }

    fn name(&mut self) -> ObjectKey {
        key(self.pick(&["a", "b", "c", "d"]))
    }

    fn address(&mut self, family: Family) -> IpAddr {
        let host = self.below(4) as u32;
        match family {
            Family::V4 => Ipv4Addr::from(0x0a60_0000 + host).into(),
            Family::V6 => Ipv6Addr::from((0xfd00 << 112) + u128::from(host)).into(),
        }
    }

    fn some_addresses(&mut self, most: u64) -> Vec<IpAddr> {
        (0..self.below(most + 1))
            .map(|_| {
                let family = self.pick(&Family::ALL);
                self.address(family)
            })
            .collect()
    }

    fn service(&mut self) -> Service {
        let mut ports = Vec::new();
        for name in ["http", "", "dns"] {
            if self.one_in(2) {
                // The number tells the port, so that a Service never contests itself: other tests do that.
                let number = 80 + ports.len() as u16;
                ports.push(ServicePort {
                    name: name.into(),
                    protocol: self.pick(&[Protocol::Tcp, Protocol::Udp]),
                    port: number,
                    node_port: self.one_in(2).then_some(30_000 + number),
                });
            }
        }
        Service {
            key: self.name(),
            created: self.below(3) as i64,
            cluster_ips: self.some_addresses(2),
            ports,
            kind: ServiceType::default(),
            internal_policy: TrafficPolicy::default(),
            external_policy: TrafficPolicy::default(),
            affinity: None,
            external: None,
        }
    }

    fn slice(&mut self) -> EndpointSlice {
        let family = self.pick(&Family::ALL);
        let ports = ["http", "", "dns"].map(|name| SlicePort {
            name: name.into(),
            protocol: self.pick(&[Protocol::Tcp, Protocol::Udp]),
            port: 8080 + self.below(2) as u16,
        });
        let endpoints = (0..self.below(4)).map(|_| Endpoint {
            address: self.address(family),
            ready: self.one_in(2),
            serving: self.one_in(2),
            terminating: self.one_in(2),
            node: self.pick(&[None, Some(NODE.into()), Some("node-b".into())]),
            hints: None,
        });
        let endpoints = endpoints.collect();
        EndpointSlice { key: self.name(), service: self.name(), family, ports: ports.into(), endpoints }
    }
}
