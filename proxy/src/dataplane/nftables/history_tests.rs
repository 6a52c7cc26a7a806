//! Random histories through planner and lowering, into a model of the kernel: what is there in the end is what a fresh
//! start from the final objects puts there, slots apart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use nix::errno::Errno;

use super::affinity::Change;
use super::commit::frontends;
use super::element::{Data, Element, Place};
use super::kernel::{Empty, Kernel};
use super::lower::{Applied, Lowered, lower};
use super::object::Object;
use super::observe::{Each, Found, LookUp};
use super::rules::Chain;
use super::schema::Set;
use super::shared::{Shared, SharedCounts};
use crate::dataplane::history::{Random, World, each_seed, fresh, settings};
use crate::model::input::{Family, ServiceKey};
use crate::model::plan::{AddressPort, Plan};
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
    kernel: Model,
}

impl Node {
    /// Commits what changed, in one transaction.
    fn apply(&mut self, services: &[(ServiceKey, Option<Arc<Plan>>)]) {
        let lowered: Vec<_> = services
            .iter()
            .map(|(key, plan)| {
                (key, lower(self.applied.get(key), plan.as_ref(), &Empty { counts: self.counts }))
            })
            .collect();
        let (lost, gained) = self.settle(lowered.iter().map(|(_, lowered)| lowered));
        self.kernel.remove(lost.iter().chain(lowered.iter().flat_map(|(_, lowered)| &lowered.removed)));
        lowered.iter().for_each(|(_, lowered)| self.kernel.change_objects(&lowered.affinity));
        self.kernel.add(lowered.iter().flat_map(|(_, lowered)| &lowered.added).chain(&gained));
        for (key, lowered) in lowered {
            match lowered.applied {
                Some(applied) => self.applied.insert(key.clone(), applied),
                None => self.applied.remove(key),
            };
        }
    }

    /// Takes over what is in the kernel, as after a restart; tells how many elements and objects come or go.
    fn adopt(&mut self, planner: &Planner) -> usize {
        (self.applied, self.shared) = Default::default();
        let elements = self.kernel.elements();
        let mut found = Found::listed(elements.iter(), self.kernel.objects.keys());
        found.look_up(&mut self.kernel, planner.plans().flat_map(|plan| frontends(plan))).unwrap();
        let lowered: Vec<_> = planner.plans().map(|plan| lower(None, Some(plan), &found)).collect();
        let (_, gained) = self.settle(lowered.iter());
        let mut removed: Vec<Place> =
            lowered.iter().flat_map(|lowered| lowered.removed.iter().copied()).collect();
        let wanted: Vec<_> = lowered.iter().flat_map(|lowered| &lowered.added).chain(&gained).collect();
        let added: Vec<&Element> = wanted.iter().copied().filter(|element| !found.has(element)).collect();
        removed.extend(added.iter().map(|element| element.place).filter(|place| found.holds(place)));
        self.kernel.remove(removed.iter());
        lowered.iter().for_each(|lowered| self.kernel.change_objects(&lowered.affinity));
        self.kernel.add(added.iter().copied());

        removed.iter().for_each(|place| found.settle(place));
        wanted.iter().for_each(|element| found.settle(&element.place));
        let objects = lowered.iter().flat_map(|lowered| &lowered.affinity.created);
        objects.for_each(|object| found.settle_object(object));
        found.look_up_rest(&mut self.kernel).unwrap();
        let (stale, stale_objects) = (found.places(), found.objects());
        self.kernel.remove(stale.iter());
        stale_objects.iter().for_each(|object| self.kernel.drop_object(object));
        let changed = removed.len() + added.len() + stale.len() + stale_objects.len();
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
    objects: BTreeMap<Object, Content>,
}

/// What a chain, map or set of a port with affinity holds; the map holds what only packets put there.
#[derive(Clone, Debug, Default, PartialEq)]
struct Content {
    rules: Option<Chain>,
    members: BTreeSet<AddressPort>,
}

type Commented<T> = (T, Option<Arc<str>>);

/// The slot map, the key but for the slot, and whether it is the Local set.
type EndpointSet = (Family, Set, Vec<u8>);

/// What the kernel holds when the order of slots says nothing: the other elements, the backends of each endpoint set,
/// the objects.
#[derive(Debug, Default, PartialEq)]
struct Meaning {
    others: BTreeMap<Place, Commented<Option<Data>>>,
    backends: BTreeMap<EndpointSet, BTreeSet<Commented<SocketAddr>>>,
    objects: BTreeMap<Object, Content>,
}

impl LookUp for Model {
    fn look_up(&mut self, places: &[Place], each: &mut Each<'_>) -> Result<(), Errno> {
        for place in places {
            if let Some((data, comment)) = self.elements.get(place) {
                each(place, data.clone(), comment.as_deref().map(str::as_bytes));
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
                    let (a, b) = ((held.key, held.key.last()), (place.key, place.key.last()));
                    let apart = a.1.as_bytes() < b.0.as_bytes() || b.1.as_bytes() < a.0.as_bytes();
                    assert!(apart, "{held} and {place} overlap");
                }
            }
            let before = self.elements.insert(*place, (data.clone(), comment.clone()));
            assert!(before.is_none(), "{place} is there already");
        }
    }

    fn change_objects(&mut self, change: &Change) {
        let (chains, sets): (Vec<_>, Vec<_>) =
            change.dropped.iter().partition(|object| object.kind.is_chain());
        chains.into_iter().for_each(|object| self.drop_object(object));
        for object in &change.created {
            self.objects.entry(object.clone()).or_default();
        }
        for (object, rules) in &change.rules {
            self.objects.get_mut(object).expect("a chain is created before its rules").rules =
                Some(rules.clone());
        }
        sets.into_iter().for_each(|object| self.drop_object(object));
        for (object, left, joined) in &change.members {
            let members =
                &mut self.objects.get_mut(object).expect("a set is created before its members").members;
            match left {
                Some(left) => {
                    left.iter().for_each(|left| assert!(members.remove(left), "{left:?} is no member"));
                }
                None => members.clear(),
            }
            joined.iter().for_each(|joined| assert!(members.insert(*joined), "{joined:?} is a member"));
        }
    }

    /// Removes an object that nothing names any more.
    fn drop_object(&mut self, object: &Object) {
        assert!(self.objects.remove(object).is_some(), "{object} is not there");
        let name = object.name();
        for (place, (data, _)) in self.elements.iter().filter(|(place, _)| place.family == object.family) {
            let target = match data {
                Some(Data::Jump(target) | Data::Goto(target)) => Some(target),
                Some(Data::Backend(..)) | None => None,
            };
            assert!(!object.kind.is_chain() || target != Some(&name), "{place} leads to {object}");
        }
        let named = format!("{:?}", &*name);
        for (chain, content) in self.objects.iter().filter(|(other, _)| other.family == object.family) {
            let rules = format!("{:?}", content.rules.as_ref().map(|chain| &chain.rules));
            assert!(object.kind.is_chain() || !rules.contains(&named), "{chain} names {object}");
        }
    }

    fn elements(&self) -> Vec<Element> {
        let element = |(place, (data, comment)): (&Place, &Commented<Option<Data>>)| Element {
            place: *place,
            data: data.clone(),
            comment: comment.clone(),
        };
        self.elements.iter().map(element).collect()
    }

    fn meaning(&self) -> Meaning {
        let mut meaning = Meaning { objects: self.objects.clone(), ..Meaning::default() };
        let mut slots: BTreeMap<_, BTreeSet<u32>> = BTreeMap::new();
        for (place, (data, comment)) in &self.elements {
            let Some(backend) = data.as_ref().and_then(Data::to_backend) else {
                meaning.others.insert(*place, (data.clone(), comment.clone()));
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
        meaning
    }
}
