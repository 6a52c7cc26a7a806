//! Tests of what is kept of counters that go with their elements.

use std::net::SocketAddr;
use std::num::NonZeroU32;

use super::super::affinity::Ids;
use super::super::element::Data;
use super::super::kernel::Empty;
use super::super::lower::lower;
use super::*;
use crate::model::plan::{Backend, Frontend, FrontendAddress, FrontendKind, Verdict};

const VIP: &str = "10.96.0.1:80";

fn address(n: u8) -> AddressPort {
    SocketAddr::from(([10, 1, 0, n], 8080)).into()
}

/// A Service with one port, a cluster IP and a NodePort.
fn plan(name: &str, affinity: bool, cluster: &[u8], local: &[u8]) -> Arc<Plan> {
    let backends = |numbers: &[u8]| {
        numbers.iter().map(|n| Backend { address: address(*n), local: true }).collect::<Box<[_]>>()
    };
    let verdict = if cluster.is_empty() { Verdict::Reject } else { Verdict::Cluster };
    let external = if local.is_empty() { verdict } else { Verdict::Local };
    let vip = FrontendAddress::Vip(VIP.parse::<SocketAddr>().unwrap().into());
    let port = PortPlan {
        family: Family::V4,
        protocol: Protocol::Tcp,
        name: name.into(),
        affinity: NonZeroU32::new(10).filter(|_| affinity),
        source_ranges: None,
        backends: backends(cluster),
        local_backends: backends(local),
        draining: [].into(),
        frontends: [
            Frontend { at: vip, kind: FrontendKind::ClusterIp, verdict },
            Frontend {
                at: FrontendAddress::NodePort(30080),
                kind: FrontendKind::NodePort,
                verdict: external,
            },
        ]
        .into(),
    };
    let service = ServiceKey::new("default", "web");
    Arc::new(Plan { service, ports: [port].into(), health_check: None, warnings: [].into() })
}

/// A kernel that counts, without packets.
#[derive(Default)]
struct Node {
    applied: Option<Applied>,
    carried: Carried,
    ids: Ids,
    elements: BTreeMap<Place, (Option<AddressPort>, u64)>,
}

impl Node {
    /// Commits a plan; the elements that go tell what they had counted.
    fn apply(&mut self, next: Option<Arc<Plan>>) {
        let lowered = lower(self.applied.as_ref(), next.as_ref(), &Empty { counts: true }, &mut self.ids);
        let mut gone = Readings::default();
        for place in lowered.removed.iter().filter(|place| place.set.counts()) {
            let (backend, packets) = self.elements.remove(place).unwrap();
            gone.put(*place, backend, packets);
        }
        for element in lowered.added.iter().filter(|element| element.place.set.counts()) {
            let of_data = element.data.and_then(Data::to_backend).map(AddressPort::from);
            let backend = of_data.or_else(|| element.place.key.to_backend());
            assert!(self.elements.insert(element.place, (backend, 0)).is_none());
        }
        let service = ServiceKey::new("default", "web");
        self.carried.change(&service, self.applied.as_ref(), lowered.applied.as_ref(), &gone);
        self.applied = lowered.applied;
    }

    /// New connections to a backend, by the cluster IP: so many drawn, and so many led back.
    fn connect(&mut self, backend: u8, drawn: u64, back: u64) {
        let mut counts = |set: Set, connections: u64| {
            let is_it = |(place, (to, _)): &(&Place, &mut (Option<AddressPort>, u64))| {
                place.set == set && *to == Some(address(backend))
            };
            let found = self.elements.iter_mut().find(is_it);
            found.map(|(_, (_, count))| *count += connections)
        };
        counts(Set::Endpoints, drawn).unwrap();
        counts(Set::AffinityBackends, drawn + back);
    }

    fn refuse(&mut self) {
        let refusing = self.elements.iter_mut().find(|(place, _)| place.set == Set::VipsReject);
        refusing.unwrap().1.1 += 1;
    }

    /// What `status` tells: connections of each backend, and refusals.
    fn status(&self) -> (Vec<u64>, u64) {
        let applied = self.applied.as_ref().unwrap();
        let mut readings = Readings::default();
        for ((family, set), keys) in counters(applied) {
            for key in keys {
                let place = Place { family, set, key };
                let (backend, packets) = self.elements[&place];
                readings.put(place, backend, packets);
            }
        }
        let plan = applied.plan();
        let counts = self.carried.total(applied, &plan.ports[0], &readings);
        (counts.connections.into_values().collect(), counts.refused)
    }
}

#[test]
fn a_backend_that_moves_to_another_slot_keeps_its_count() {
    let mut node = Node::default();
    node.apply(Some(plan("http", false, &[1, 2, 3], &[])));
    node.connect(1, 1, 0);
    node.connect(2, 2, 0);
    node.connect(3, 4, 0);
    assert_eq!(node.status(), (vec![1, 2, 4], 0));
    node.apply(Some(plan("http", false, &[2, 3], &[])));
    assert_eq!(node.status().0, [2, 4], "the third took the slot of the first");
    node.connect(3, 8, 0);
    node.apply(Some(plan("http", false, &[3], &[])));
    node.apply(Some(plan("http", false, &[1, 3], &[])));
    assert_eq!(node.status().0, [0, 12], "who comes back begins anew");
    node.apply(Some(plan("web", false, &[1, 3], &[])));
    assert_eq!(node.status().0, [0, 12], "under another name");
    node.apply(None);
    node.apply(Some(plan("web", false, &[1, 3], &[])));
    assert_eq!(node.status().0, [0, 0]);
    assert!(node.carried.0.is_empty());
}

#[test]
fn refusals_are_kept_through_better_times() {
    let mut node = Node::default();
    node.apply(Some(plan("http", false, &[], &[])));
    node.refuse();
    node.apply(Some(plan("http", false, &[1], &[])));
    node.connect(1, 3, 0);
    assert_eq!(node.status(), (vec![3], 1));
    node.apply(Some(plan("http", false, &[], &[])));
    node.refuse();
    assert_eq!(node.status(), (vec![], 2));
}

#[test]
fn affinity_counts_whom_nobody_draws() {
    let mut node = Node::default();
    node.apply(Some(plan("http", false, &[1, 2], &[])));
    node.connect(1, 1, 0);
    node.apply(Some(plan("http", true, &[1, 2], &[])));
    node.connect(1, 1, 5);
    assert_eq!(node.status().0, [7, 0]);
    // Of both sets, then of one, then of both.
    node.apply(Some(plan("http", true, &[1, 2], &[1])));
    node.connect(1, 10, 0);
    assert_eq!(node.status().0, [17, 0]);
    node.apply(Some(plan("http", true, &[1, 2, 3], &[1, 3])));
    node.connect(3, 2, 1);
    node.apply(Some(plan("http", true, &[1, 3], &[3])));
    assert_eq!(node.status().0, [17, 3], "who is still in one of them");
    node.apply(Some(plan("http", true, &[1, 3], &[])));
    node.connect(3, 0, 4);
    assert_eq!(node.status().0, [17, 7]);
    node.apply(Some(plan("http", false, &[1, 3], &[])));
    node.connect(3, 1, 0);
    assert_eq!(node.status().0, [17, 8]);
}
