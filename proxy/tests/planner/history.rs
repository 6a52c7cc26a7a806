//! Random histories of objects, valid and not, and the objects that are left in the end.
//!
//! The same seed gives the same history everywhere. Addresses, names and ports come from small pools, so that objects
//! meet and contest each other. Other tests include this file as it is.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use kube_lane::model::input::{
    Change, Endpoint, EndpointSlice, Event, External, Family, Hints, Node, ObjectKey, Origin, Protocol,
    Service, ServicePort, ServiceType, SlicePort, TrafficPolicy,
};
use kube_lane::model::planner::{NodePortAddresses, OwnPort, Planner, PodCidrs, Settings};

/// The own node's name among the random ones.
pub(crate) const NODE: &str = "node-a";

/// Where the agent serves its own health, over IPv4: some of the random NodePorts and health checks are there, too.
pub(crate) const OWN_PORT: u16 = 30_083;

/// Of a node that knows of no pods' addresses, with both origins.
pub(crate) fn settings() -> Settings {
    Settings {
        node_name: NODE.into(),
        origins: vec![Origin::Static, Origin::Api],
        node_address: None,
        pod_cidrs: PodCidrs::Unknown,
        nodeport_addresses: NodePortAddresses::PRIMARY,
        own_ports: vec![OwnPort { server: "health", address: ([0, 0, 0, 0], OWN_PORT).into() }],
    }
}

/// Runs a case for each seed, and says which one failed.
pub(crate) fn each_seed(cases: u64, case: fn(u64)) {
    for seed in 1..=cases {
        let caught = std::panic::catch_unwind(|| case(seed));
        if let Err(cause) = caught {
            println!("seed {seed}");
            std::panic::resume_unwind(cause);
        }
    }
}

/// A planner that starts now, and has planned what it was told.
pub(crate) fn fresh(settings: Settings, events: Vec<Event>) -> Planner {
    let mut fresh = Planner::new(settings);
    events.into_iter().for_each(|event| fresh.apply(event));
    fresh.replan();
    fresh
}

/// What identifies an object among all events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fact {
    HostAddresses,
    Node,
    ServiceCidrs,
    Complete,
    Synced,
}

/// The objects that are there in the end.
#[derive(Default)]
pub(crate) struct World {
    services: BTreeMap<(Origin, ObjectKey), Service>,
    slices: BTreeMap<(Origin, ObjectKey), EndpointSlice>,
    last: BTreeMap<(Fact, Origin), Event>,
}

impl World {
    /// Takes note of what an event leaves.
    pub(crate) fn hear(&mut self, event: &Event) {
        let Event::Source { origin, change } = event.clone() else {
            self.last.insert((Fact::HostAddresses, Origin::Static), event.clone());
            return;
        };
        let fact = match change {
            Change::Service(service) => {
                self.services.insert((origin, service.key.clone()), service);
                return;
            }
            Change::ServiceGone(key) => {
                self.services.remove(&(origin, key));
                return;
            }
            Change::Slice(slice) => {
                self.slices.insert((origin, slice.key.clone()), slice);
                return;
            }
            Change::SliceGone(key) => {
                self.slices.remove(&(origin, key));
                return;
            }
            Change::Triggered(..) => return,
            Change::Node(_) => Fact::Node,
            Change::ServiceCidrs(_) => Fact::ServiceCidrs,
            Change::Complete(_) => Fact::Complete,
            Change::Synced => Fact::Synced,
        };
        self.last.insert((fact, origin), event.clone());
    }

    /// What a planner that starts now is told: each object once, slices before Services.
    pub(crate) fn events(&self) -> Vec<Event> {
        let told = |origin: Origin, change| Event::Source { origin, change };
        let slices = self.slices.iter().map(|((o, _), slice)| told(*o, Change::Slice(slice.clone())));
        let services =
            self.services.iter().map(|((o, _), service)| told(*o, Change::Service(service.clone())));
        slices.chain(services).chain(self.last.values().cloned()).collect()
    }
}

/// Xorshift.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        // Zero stays zero for ever, and small seeds differ only after some steps.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

    /// Up to `most` of what `one` gives.
    fn some<T>(&mut self, most: u64, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(most + 1)).map(|_| one(self)).collect()
    }

    /// Something that happens at a source or at the host.
    pub(crate) fn event(&mut self) -> Event {
        let origin = self.pick(&[Origin::Static, Origin::Api]);
        let change = match self.below(40) {
            0..=1 => Change::Synced,
            2..=3 => Change::Node((!self.one_in(4)).then(|| self.node())),
            4 => Change::ServiceCidrs(
                self.some(3, |r| r.network(&["10.96.0.0/16", "10.96.1.9/24", "fd00::/112"])),
            ),
            5 => return Event::HostAddresses(self.some(4, Self::any_address)),
            6 => Change::Complete(self.one_in(2)),
            7..=10 => Change::ServiceGone(self.name()),
            11..=14 => Change::SliceGone(self.name()),
            15..=27 => Change::Service(self.service()),
            _ => Change::Slice(self.slice()),
        };
        Event::Source { origin, change }
    }

    fn name(&mut self) -> ObjectKey {
        ObjectKey::new("demo", self.pick(&["a", "b", "c", "d"]))
    }

    fn address(&mut self, family: Family) -> IpAddr {
        let host = self.below(6) as u32;
        match family {
            Family::V4 => Ipv4Addr::from(0x0a60_0000 + host).into(),
            Family::V6 => Ipv6Addr::from((0xfd00 << 112) + u128::from(host)).into(),
        }
    }

    fn any_address(&mut self) -> IpAddr {
        let family = self.pick(&Family::ALL);
        self.address(family)
    }

    fn network(&mut self, from: &[&str]) -> IpNetwork {
        self.pick(from).parse().unwrap()
    }

    fn zone(&mut self) -> Arc<str> {
        self.pick(&["zone-a", "zone-b", "zone-c"]).into()
    }

    fn node(&mut self) -> Node {
        Node {
            addresses: self.some(2, Self::any_address),
            pod_cidrs: self.some(2, |r| r.network(&["10.244.1.0/24", "10.244.2.0/24", "fd01::/64"])),
            zone: (!self.one_in(3)).then(|| self.zone()),
            leaving: self.one_in(5),
        }
    }

    fn policy(&mut self) -> TrafficPolicy {
        self.pick(&[TrafficPolicy::Cluster, TrafficPolicy::Local])
    }

    fn protocol(&mut self) -> Protocol {
        self.pick(&[Protocol::Tcp, Protocol::Udp, Protocol::Udp, Protocol::Sctp])
    }

    fn service(&mut self) -> Service {
        let cluster_ips = self.some(2, Self::any_address);
        // Nothing keeps names, numbers and NodePorts apart: what the API would refuse, a manifest may say.
        let ports = self.some(3, |r| ServicePort {
            name: r.pick(&["http", "", "dns"]).into(),
            protocol: r.protocol(),
            port: 80 + r.below(3) as u16,
            node_port: r.one_in(2).then(|| 30_080 + r.below(4) as u16),
        });
        Service {
            key: self.name(),
            created: self.below(3) as i64,
            cluster_ips: cluster_ips.into(),
            ports: ports.into(),
            kind: self.pick(&[ServiceType::ClusterIp, ServiceType::NodePort, ServiceType::LoadBalancer]),
            internal_policy: self.policy(),
            external_policy: self.policy(),
            affinity: self.pick(&[None, NonZeroU32::new(10), NonZeroU32::new(10_800)]),
            external: self.one_in(2).then(|| Box::new(self.external())),
        }
    }

    fn external(&mut self) -> External {
        let ranges = [
            "10.96.0.0/31",
            "10.96.0.1/32",
            "10.96.0.2/31",
            "198.51.100.0/24",
            "198.51.100.9/24",
            "fd00::/127",
            "fd00::1/128",
            "2001:db8::/48",
            "0.0.0.0/0",
        ];
        External {
            ips: self.some(2, Self::any_address),
            load_balancer_ips: self.some(2, Self::any_address),
            source_ranges: self.some(4, |r| r.network(&ranges)),
            ranges_unread: self.one_in(4),
            health_check_node_port: self.one_in(2).then(|| 30_082 + self.below(3) as u16),
        }
    }

    fn slice(&mut self) -> EndpointSlice {
        let family = self.pick(&Family::ALL);
        // Mostly all hinted, since one endpoint without a hint makes the others' void.
        let hinted = !self.one_in(3);
        let (key, service) = (self.name(), self.name());
        let ports = self.some(4, |r| SlicePort {
            name: r.pick(&["http", "", "dns"]).into(),
            protocol: r.protocol(),
            port: 8080 + r.below(2) as u16,
        });
        EndpointSlice {
            key,
            service,
            family,
            ports: ports.into(),
            endpoints: self.some(6, |r| r.endpoint(family, hinted)),
        }
    }

    fn endpoint(&mut self, family: Family, hinted: bool) -> Endpoint {
        // An endpoint of the other family is none.
        let address = if self.one_in(20) { self.any_address() } else { self.address(family) };
        let zones = if self.one_in(10) { vec![] } else { vec![self.zone(), self.zone()] };
        let nodes = if self.one_in(3) { vec![self.pick(&[NODE, "node-b"]).into()] } else { vec![] };
        Endpoint {
            address,
            ready: self.one_in(2),
            serving: !self.one_in(3),
            terminating: self.one_in(2),
            node: self.pick(&[None, Some(NODE.into()), Some("node-b".into())]),
            hints: hinted.then(|| Box::new(Hints { zones, nodes })),
        }
    }
}
