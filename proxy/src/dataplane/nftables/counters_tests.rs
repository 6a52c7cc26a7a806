//! Tests of what is kept of counters that go with their elements.

use std::net::SocketAddr;
use std::num::NonZeroU32;

use super::super::element::Data;
use super::super::kernel::Empty;
use super::super::lower::lower;
use super::super::object::Object;
use super::super::schema::Set;
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
    elements: BTreeMap<Place, (Option<AddressPort>, u64)>,
    members: BTreeMap<Object, BTreeMap<AddressPort, u64>>,
}

impl Node {
    /// Commits a plan; the elements that go tell what they had counted.
    fn apply(&mut self, next: Option<Arc<Plan>>) {
        let lowered = lower(self.applied.as_ref(), next.as_ref(), &Empty { counts: true });
        let mut gone = Readings::default();
        for place in lowered.removed.iter().filter(|place| place.set.counts()) {
            let (backend, packets) = self.elements.remove(place).unwrap();
            gone.put(*place, backend, packets);
        }
        for element in lowered.added.iter().filter(|element| element.place.set.counts()) {
            let backend = element.data.as_ref().and_then(Data::to_backend).map(AddressPort::from);
            assert!(self.elements.insert(element.place, (backend, 0)).is_none());
        }
        for object in &lowered.affinity.dropped {
            for (member, packets) in self.members.remove(object).into_iter().flatten() {
                gone.put_member(object, member, packets);
            }
        }
        for (object, left, joined) in &lowered.affinity.members {
            let members = self.members.entry(object.clone()).or_default();
            match left {
                Some(left) => left.iter().for_each(|left| assert!(members.remove(left).is_some())),
                None => std::mem::take(members)
                    .into_iter()
                    .for_each(|(member, packets)| gone.put_member(object, member, packets)),
            }
            joined.iter().for_each(|joined| assert!(members.insert(*joined, 0).is_none()));
        }
        let old = self.applied.as_ref().map(Applied::plan);
        let service = ServiceKey::new("default", "web");
        self.carried.change(&service, old.map(AsRef::as_ref), next.as_deref(), &gone);
        self.applied = lowered.applied;
    }

    /// New connections to a backend, by the cluster IP: so many drawn, and so many led back.
    fn connect(&mut self, backend: u8, drawn: u64, back: u64) {
        let slots = self
            .elements
            .iter_mut()
            .filter(|(place, (to, _))| place.set == Set::Endpoints && *to == Some(address(backend)));
        let (_, (_, count)) = slots.into_iter().next().unwrap();
        *count += drawn;
        let members = self.members.values_mut().filter_map(|members| members.get_mut(&address(backend)));
        members.for_each(|count| *count += drawn + back);
    }

    fn refuse(&mut self) {
        let refusing = self.elements.iter_mut().find(|(place, _)| place.set == Set::VipsReject);
        refusing.unwrap().1.1 += 1;
    }

    /// What `status` tells: connections of each backend, and refusals.
    fn status(&self) -> (Vec<u64>, u64) {
        let applied = self.applied.as_ref().unwrap();
        let mut readings = Readings::default();
        for ((_, set), keys) in counters(applied) {
            for key in keys {
                match Set::named(&set) {
                    Some(set) => {
                        let place = Place { family: Family::V4, set, key };
                        let (backend, packets) = self.elements[&place];
                        readings.put(place, backend, packets);
                    }
                    None => {
                        let object = Object::named(&set, Family::V4, false).unwrap();
                        let member = key.to_backend().unwrap();
                        readings.put_member(&object, member, self.members[&object][&member]);
                    }
                }
            }
        }
        let plan = applied.plan();
        let counts = self.carried.total(plan, &plan.ports[0], &readings);
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
