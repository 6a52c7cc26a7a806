//! Tests of session affinity's elements: which of them a change costs, and whose a number is.

use std::net::SocketAddr;
use std::num::NonZeroU32;

use super::super::kernel::Empty;
use super::super::lower::{Applied, Lowered, lower};
use super::super::observe::Found;
use super::*;
use crate::model::input::{Protocol, ServiceKey};
use crate::model::plan::Plan;

fn backend(n: u8) -> Backend {
    Backend { address: SocketAddr::from(([10, 1, 0, n], 8080)).into(), local: false }
}

/// A port with cluster IP and NodePort; `verdicts` are theirs.
fn port(timeout: u32, verdicts: [Verdict; 2], cluster: &[u8], local: &[u8]) -> PortPlan {
    let vip = SocketAddr::from(([10, 96, 0, 1], 80));
    PortPlan {
        affinity: NonZeroU32::new(timeout),
        backends: cluster.iter().copied().map(backend).collect(),
        local_backends: local.iter().copied().map(backend).collect(),
        frontends: [Frontend::cluster_ip(vip, verdicts[0]), Frontend::nodeport(30080, verdicts[1])].into(),
        ..PortPlan::new(Family::V4, Protocol::Tcp, "http")
    }
}

fn plan(port: PortPlan) -> Arc<Plan> {
    Arc::new(Plan::new(ServiceKey::new("default", "web"), [port]))
}

fn single(timeout: u32, backends: &[u8]) -> Arc<Plan> {
    let verdict = if backends.is_empty() { Verdict::Reject } else { Verdict::Cluster };
    plan(port(timeout, [verdict; 2], backends, &[]))
}

fn mixed(timeout: u32, cluster: &[u8], local: &[u8]) -> Arc<Plan> {
    plan(port(timeout, [Verdict::Cluster, Verdict::Local], cluster, local))
}

/// One Service, as programmed.
#[derive(Default)]
struct Node {
    applied: Option<Applied>,
    ids: Ids,
    elements: BTreeMap<Place, Element>,
}

impl Node {
    fn apply(&mut self, next: Option<&Arc<Plan>>) -> Lowered {
        let lowered = lower(self.applied.as_ref(), next, &Empty::default(), &mut self.ids);
        self.take(lowered)
    }

    fn take(&mut self, lowered: Lowered) -> Lowered {
        for place in &lowered.removed {
            assert!(self.elements.remove(place).is_some(), "{place}");
        }
        for element in &lowered.added {
            assert!(self.elements.insert(element.place, element.clone()).is_none(), "{}", element.place);
        }
        self.applied.clone_from(&lowered.applied);
        lowered
    }

    /// The elements of affinity, as an operator reads them.
    fn affinity(&self) -> Vec<String> {
        let is_it = |element: &&Element| element.place.set.name().contains("affinity");
        let print = |element: &Element| match &element.data {
            Some(data) => format!("{} {data:?}", element.place),
            None => element.place.to_string(),
        };
        self.elements.values().filter(is_it).map(print).collect()
    }

    /// The number of each member.
    fn members(&self) -> BTreeMap<u8, u32> {
        let number = |element: &Element| {
            let [.., last] = element.place.key.to_backend()?.ip.to_string().bytes().collect::<Vec<_>>()[..]
            else {
                return None;
            };
            Some((last - b'0', element.data?.to_id()?))
        };
        let backends = self.elements.values().filter(|element| element.place.set == Set::AffinityBackends);
        backends.filter_map(number).collect()
    }
}

#[test]
fn a_port_is_a_number_and_its_members_are_others() {
    let mut node = Node::default();
    node.apply(Some(&mixed(10, &[1, 2], &[2, 3])));
    assert_eq!(
        node.affinity(),
        [
            "affinity { 10.96.0.1 . 6 . 80 }",
            "affinity-ids { 10.96.0.1 . 6 . 80 } 1:0",
            "np-affinity { 6 . 30080 }",
            "np-affinity-ids { 6 . 30080 } 1:0",
            "affinity-timeouts { 1:0 . 10 }",
            "affinity-backends { 1:0 . 10.1.0.1 . 8080 } 1:1",
            "affinity-backends { 1:0 . 10.1.0.2 . 8080 } 1:2",
            "affinity-backends { 1:0 . 10.1.0.3 . 8080 } 1:3",
            "affinity-members { 1:1 } 10.1.0.1:8080",
            "affinity-members { 1:2 } 10.1.0.2:8080",
            "affinity-members { 1:3 } 10.1.0.3:8080",
            "affinity-cluster { 1:1 }",
            "affinity-cluster { 1:2 }",
            "affinity-local { 1:2 }",
            "affinity-local { 1:3 }",
        ]
    );
    node.apply(None);
    assert!(node.elements.is_empty());
}

#[test]
fn a_vip_of_internal_policy_local_has_the_local_set_alone() {
    let mut node = Node::default();
    node.apply(Some(&plan(port(10, [Verdict::Local, Verdict::Cluster], &[1, 2], &[2]))));
    assert!(node.affinity().contains(&"affinity-local-only { 10.96.0.1 . 6 . 80 }".to_owned()));
    node.apply(Some(&single(10, &[1, 2])));
    assert!(!node.affinity().iter().any(|element| element.starts_with("affinity-local")));
}

#[test]
fn a_change_costs_what_changes() {
    let mut node = Node::default();
    let many: Vec<_> = (1..=200).collect();
    node.apply(Some(&single(10, &many)));
    let is_affinity = |set: Set| set.name().contains("affinity");
    let cost = |lowered: &Lowered| {
        let removed = lowered.removed.iter().filter(|place| is_affinity(place.set)).count();
        let added = lowered.added.iter().filter(|element| is_affinity(element.place.set)).count();
        (removed, added)
    };
    assert_eq!(cost(&node.apply(Some(&single(10, &many[1..])))), (3, 0));
    assert_eq!(cost(&node.apply(Some(&single(10, &many)))), (0, 3));
    assert_eq!(cost(&node.apply(Some(&single(20, &many)))), (1, 1));
    assert_eq!(cost(&node.apply(Some(&single(20, &many)))), (0, 0));
    assert_eq!(cost(&node.apply(Some(&mixed(20, &many, &[7])))), (0, 1));
}

#[test]
fn a_number_stays_with_its_backend_and_is_not_given_away_at_once() {
    let mut node = Node::default();
    node.apply(Some(&single(10, &[1, 2, 3])));
    node.apply(Some(&single(10, &[1, 3])));
    node.apply(Some(&single(10, &[1, 3, 4])));
    assert_eq!(node.members(), BTreeMap::from([(1, 0x1_0001), (3, 0x1_0003), (4, 0x1_0004)]));
    node.apply(Some(&single(10, &[])));
    assert!(node.affinity().is_empty(), "{:?}", node.affinity());
    let numbers = Numbers { id: 1, members: [(backend(1).address, u16::MAX)].into(), last: u16::MAX };
    let next = numbers.with(&port(10, [Verdict::Cluster; 2], &[1, 2], &[]));
    assert_eq!(next.members.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [u16::MAX, 1]);
}

#[test]
fn a_restart_finds_the_numbers_again_and_clears_what_left_meanwhile() {
    let mut node = Node::default();
    node.apply(Some(&single(10, &[1, 2])));
    node.apply(Some(&single(10, &[2, 3])));
    let before = node.members();
    let found = Found::holding(node.elements.values());
    let mut ids = Ids::default();
    found.ids(Family::V4).for_each(|id| ids.keep(Family::V4, id));
    let next = single(20, &[3, 4]);
    let mut lowered = lower(None, Some(&next), &found, &mut ids);
    lowered.added.retain(|element| !found.has(element));
    let other = lowered.added.iter().map(|element| element.place).filter(|place| found.holds(place));
    lowered.removed.extend(other.collect::<Vec<_>>());
    node.take(lowered);
    assert_eq!(node.members(), BTreeMap::from([(3, before[&3]), (4, 0x1_0004)]));
    let timeouts: Vec<_> =
        node.affinity().into_iter().filter(|element| element.starts_with("affinity-timeouts")).collect();
    assert_eq!(timeouts, ["affinity-timeouts { 1:0 . 20 }"]);
    // Another port does not get the number that one has, nor one that the kernel holds.
    assert_eq!(ids.take(Family::V4), Some(2));
    assert_eq!(ids.take_found(Family::V4, 1), None);
}

#[test]
fn what_others_left_under_a_number_takes_away_nothing_that_is_right() {
    let mut node = Node::default();
    node.apply(Some(&single(10, &[1, 2])));
    // An element of somebody else leads to a member that is ours, and another to a member of another port.
    let all = backends_of(Family::V4, 1);
    for (n, member) in [(7, 0x1_0001), (8, 0x2_0001)] {
        let place = Place { key: all.key.with_backend(backend(n).address.socket()), ..all };
        let element = Element { place, data: Some(Data::id(member)), comment: None };
        node.elements.insert(place, element);
    }
    // A member of another port, and one of this port's numbers with another backend.
    let members = |id| Place { family: Family::V4, set: Set::AffinityMembers, key: Key::id(id) };
    let other = Element {
        place: members(0x2_0001),
        data: Some(Data::backend(backend(9).address.socket())),
        comment: None,
    };
    node.elements.insert(other.place, other.clone());
    let found = Found::holding(node.elements.values());
    let mut ids = Ids::default();
    found.ids(Family::V4).for_each(|id| ids.keep(Family::V4, id));
    let mut lowered = lower(None, Some(&single(10, &[1, 2])), &found, &mut ids);
    lowered.added.retain(|element| !found.has(element));
    assert!(lowered.added.is_empty(), "{:?}", lowered.added);
    node.take(lowered);
    assert!(node.elements.contains_key(&other.place));
    assert_eq!(node.members(), BTreeMap::from([(1, 0x1_0001), (2, 0x1_0002)]));
    assert_eq!(ids.take(Family::V4), Some(3), "2 is held as well");
}

#[test]
fn numbers_go_round() {
    let mut ids = Ids::default();
    assert_eq!((ids.take(Family::V4), ids.take(Family::V4)), (Some(1), Some(2)));
    ids.release([(Family::V4, 1)].into_iter());
    assert_eq!(ids.take(Family::V4), Some(3), "what is free again comes last");
    ids.last = u16::MAX;
    assert_eq!(ids.take(Family::V4), Some(1));
    for _ in 0..u16::MAX - 3 {
        assert!(ids.take(Family::V4).is_some());
    }
    assert_eq!(ids.take(Family::V4), None);
}
