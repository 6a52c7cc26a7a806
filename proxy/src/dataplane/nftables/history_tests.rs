//! Random histories through planner and lowering, into a model of the kernel: what is there in the end is what a fresh
//! start from the final objects puts there, slots apart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use nix::errno::Errno;

use super::affinity::Ids;
use super::commit::frontends;
use super::element::{Data, Element, Key, Place};
use super::kernel::{Empty, Kernel};
use super::lower::{Applied, Lowered, lower};
use super::observe::{Each, Found, LookUp};
use super::schema::Set;
use super::shared::{Shared, SharedCounts};
use crate::dataplane::history::{Random, World, each_seed, fresh, settings};
use crate::model::input::{Family, ServiceKey};
use crate::model::plan::Plan;
use crate::model::planner::Planner;

const CASES: u64 = 2_000;
const STEPS: u64 = 60;

#[test]
fn history_leaves_no_trace_in_the_elements() {
    each_seed(CASES, case);
}

fn case(seed: u64) {
    let mut random = Random::new(seed);
    let mut planner = Planner::new(settings());
    let mut told = World::default();
    // Where elements count, some changes write more of them anew.
    let mut node = Node { counts: seed.is_multiple_of(2), ..Node::default() };
    for _ in 0..STEPS {
        let event = random.event();
        told.hear(&event);
        planner.apply(event);
        if random.one_in(4) {
            node.apply(&planner.replan().services);
        }
        if random.one_in(20) {
            // The agent starts again; meanwhile objects have changed.
            planner.replan();
            node.adopt(&planner);
        }
    }
    node.apply(&planner.replan().services);

    let mut events = told.events();
    random.shuffle(&mut events);
    let mut started = Node::default();
    started.adopt(&fresh(settings(), events));
    assert_eq!(node.kernel.meaning(), started.kernel.meaning());
    assert_eq!(node.adopt(&planner), 0, "a restart touches nothing that is right");

    let gone: Vec<_> = planner.plans().map(|plan| (plan.service.clone(), None)).collect();
    node.apply(&gone);
    assert_eq!(node.kernel, Model::default(), "Services that go leave nothing");
}

/// A dataplane without its netlink.
#[derive(Default)]
struct Node {
    counts: bool,
    applied: BTreeMap<ServiceKey, Applied>,
    shared: SharedCounts,
    ids: Ids,
    kernel: Model,
}

impl Node {
    /// Commits what changed, in one transaction.
    fn apply(&mut self, services: &[(ServiceKey, Option<Arc<Plan>>)]) {
        let lowered: Vec<_> = services
            .iter()
            .map(|(key, plan)| {
                let nothing = Empty { counts: self.counts };
                (key, lower(self.applied.get(key), plan.as_ref(), &nothing, &mut self.ids))
            })
            .collect();
        let (lost, gained) = self.settle(lowered.iter().map(|(_, lowered)| lowered));
        self.kernel.remove(lost.iter().chain(lowered.iter().flat_map(|(_, lowered)| &lowered.removed)));
        self.kernel.add(lowered.iter().flat_map(|(_, lowered)| &lowered.added).chain(&gained));
        for (key, lowered) in lowered {
            let (old, new) = (self.applied.get(key), lowered.applied.as_ref());
            let kept: Vec<_> = new.into_iter().flat_map(Applied::ids).collect();
            self.ids.release(old.into_iter().flat_map(Applied::ids).filter(|id| !kept.contains(id)));
            match lowered.applied {
                Some(applied) => self.applied.insert(key.clone(), applied),
                None => self.applied.remove(key),
            };
        }
    }

    /// Takes over what is in the kernel, as after a restart; tells how many elements and objects come or go.
    fn adopt(&mut self, planner: &Planner) -> usize {
        (self.applied, self.shared, self.ids) = Default::default();
        let elements = self.kernel.elements();
        let mut found = Found::listed(elements.iter());
        for family in Family::ALL {
            found.ids(family).for_each(|id| self.ids.keep(family, id));
        }
        found.look_up(&mut self.kernel, planner.plans().flat_map(|plan| frontends(plan))).unwrap();
        let lowered: Vec<_> =
            planner.plans().map(|plan| lower(None, Some(plan), &found, &mut self.ids)).collect();
        let (_, gained) = self.settle(lowered.iter());
        let mut removed: Vec<Place> =
            lowered.iter().flat_map(|lowered| lowered.removed.iter().copied()).collect();
        let wanted: Vec<_> = lowered.iter().flat_map(|lowered| &lowered.added).chain(&gained).collect();
        let added: Vec<&Element> = wanted.iter().copied().filter(|element| !found.has(element)).collect();
        removed.extend(added.iter().map(|element| element.place).filter(|place| found.holds(place)));
        self.kernel.remove(removed.iter());
        self.kernel.add(added.iter().copied());

        removed.iter().for_each(|place| found.settle(place));
        wanted.iter().for_each(|element| found.settle(&element.place));
        found.look_up_rest(&mut self.kernel).unwrap();
        let stale = found.places();
        self.kernel.remove(stale.iter());
        self.ids.keep_no_longer();
        let changed = removed.len() + added.len() + stale.len();
        for (plan, lowered) in planner.plans().zip(lowered) {
            self.applied.extend(lowered.applied.map(|applied| (plan.service.clone(), applied)));
        }
        changed
    }

    /// What becomes of the shared elements.
    fn settle<'a>(&mut self, lowered: impl Iterator<Item = &'a Lowered>) -> (Vec<Place>, Vec<Element>) {
        let mut delta: BTreeMap<Shared, i64> = BTreeMap::new();
        for lowered in lowered {
            lowered.shared.lost.iter().for_each(|shared| *delta.entry(*shared).or_default() -= 1);
            lowered.shared.gained.iter().for_each(|shared| *delta.entry(*shared).or_default() += 1);
        }
        let preview = self.shared.preview(&delta);
        self.shared.commit(&delta);
        preview
    }
}

/// A model of the kernel: refuses what the kernel refuses.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    elements: BTreeMap<Place, Commented<Option<Data>>>,
}

type Commented<T> = (T, Option<Arc<str>>);

/// The slot map, the key but for the slot, and whether it is the Local set.
type EndpointSet = (Family, Set, Vec<u8>);

/// What the kernel holds when the order of slots and the numbers of affinity say nothing: the other elements, the backends
/// of each endpoint set, the port that a frontend with affinity leads to.
#[derive(Debug, Default, PartialEq)]
struct Meaning {
    others: BTreeMap<Place, Commented<Option<Data>>>,
    backends: BTreeMap<EndpointSet, BTreeSet<Commented<SocketAddr>>>,
    ports: BTreeMap<Place, AffinityPort>,
}

/// A port with affinity: its timeouts, its backends, and whether they are in the Cluster set and in the Local set.
#[derive(Clone, Debug, Default, PartialEq)]
struct AffinityPort {
    timeouts: BTreeSet<Vec<u8>>,
    members: BTreeSet<(SocketAddr, [bool; 2])>,
}

impl LookUp for Model {
    fn look_up(&mut self, places: &[Place], each: &mut Each<'_>) -> Result<(), Errno> {
        for place in places {
            if let Some((data, comment)) = self.elements.get(place) {
                each(place, *data, comment.as_deref().map(str::as_bytes));
            }
        }
        Ok(())
    }
}

impl Model {
    fn remove<'a>(&mut self, places: impl Iterator<Item = &'a Place>) {
        for place in places {
            assert!(self.elements.remove(place).is_some(), "{place} is not there");
        }
    }

    fn add<'a>(&mut self, elements: impl Iterator<Item = &'a Element>) {
        for Element { place, data, comment } in elements {
            if place.set == Set::Ranges {
                let held =
                    self.elements.keys().filter(|held| (held.family, held.set) == (place.family, place.set));
                for held in held {
                    let (a, b) = (held.key.last().unwrap(), place.key.last().unwrap());
                    let apart = *a < *place.key.as_bytes() || *b < *held.key.as_bytes();
                    assert!(apart, "{held} and {place} overlap");
                }
            }
            let before = self.elements.insert(*place, (*data, comment.clone()));
            assert!(before.is_none(), "{place} is there already");
        }
    }

    fn elements(&self) -> Vec<Element> {
        let element = |(place, (data, comment)): (&Place, &Commented<Option<Data>>)| Element {
            place: *place,
            data: *data,
            comment: comment.clone(),
        };
        self.elements.iter().map(element).collect()
    }

    /// The ports with affinity by their numbers. Each number leads to one backend and back.
    fn ports(&self) -> BTreeMap<(Family, u32), AffinityPort> {
        let mut ports: BTreeMap<_, AffinityPort> = BTreeMap::new();
        for (place, (data, _)) in &self.elements {
            let at = |set, member| Place { set, key: Key::id(member), ..*place };
            let is_there = |set, member| self.elements.contains_key(&at(set, member));
            let bytes = place.key.as_bytes();
            let number = || u32::from_ne_bytes(*bytes.first_chunk().unwrap());
            match place.set {
                Set::AffinityTimeouts => {
                    let port = ports.entry((place.family, number())).or_default();
                    assert!(port.timeouts.insert(bytes[4..].to_vec()) && port.timeouts.len() == 1, "{place}");
                }
                Set::AffinityBackends => {
                    let (member, backend) = (data.unwrap().to_id().unwrap(), place.key.to_backend().unwrap());
                    let back = self.elements[&at(Set::AffinityMembers, member)].0.and_then(Data::to_backend);
                    assert_eq!((back, member >> 16 << 16), (Some(backend.socket()), number()), "{place}");
                    assert_ne!(member & 0xffff, 0, "{place}");
                    let sets = [Set::AffinityCluster, Set::AffinityLocal].map(|set| is_there(set, member));
                    let port = ports.entry((place.family, number())).or_default();
                    port.members.insert((backend.socket(), sets));
                }
                _ => {}
            }
        }
        let count = |set| self.elements.keys().filter(|place| place.set == set).count();
        assert_eq!(count(Set::AffinityBackends), count(Set::AffinityMembers));
        let scopes: usize =
            ports.values().flat_map(|port| &port.members).flat_map(|(_, sets)| sets).filter(|s| **s).count();
        assert_eq!(scopes, count(Set::AffinityCluster) + count(Set::AffinityLocal), "a member that is none");
        ports
    }

    fn meaning(&self) -> Meaning {
        let (mut meaning, ports) = (Meaning::default(), self.ports());
        let mut led = BTreeSet::new();
        let mut slots: BTreeMap<_, BTreeSet<u32>> = BTreeMap::new();
        for (place, (data, comment)) in &self.elements {
            match place.set {
                Set::AffinityIds | Set::NpAffinityIds => {
                    let number = (place.family, data.unwrap().to_id().unwrap());
                    led.insert(number);
                    meaning.ports.insert(*place, ports[&number].clone());
                    continue;
                }
                Set::AffinityTimeouts
                | Set::AffinityBackends
                | Set::AffinityMembers
                | Set::AffinityCluster
                | Set::AffinityLocal => continue,
                _ => {}
            }
            let Some(backend) = data.and_then(Data::to_backend) else {
                meaning.others.insert(*place, (*data, comment.clone()));
                continue;
            };
            let (frontend, slot) = place.key.as_bytes().split_last_chunk().unwrap();
            let key = (place.family, place.set, frontend.to_vec());
            slots.entry(key.clone()).or_default().insert(u32::from_ne_bytes(*slot));
            let first = meaning.backends.entry(key).or_default().insert((backend, comment.clone()));
            assert!(first, "{backend} has two slots at {place}");
        }
        for (key, slots) in slots {
            assert!(slots.iter().copied().eq(0..slots.len() as u32), "the slots of {key:?} have a gap");
        }
        assert!(ports.keys().eq(&led), "no frontend leads to a port, or to none");
        meaning
    }
}
