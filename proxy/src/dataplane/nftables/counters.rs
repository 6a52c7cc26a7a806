//! Whose the counts of elements are: new connections to each backend, and refusals, of each port.
//!
//! Pure. Counters go with their elements, and a change of a Service moves a backend from slot to slot: what an element
//! that goes had counted is kept here for as long as its backend stays. Never decides whether anything counts.
//!
//! A connection is counted where it draws its backend: a chain of type nat sees its first packet alone. Clients of a port
//! with session affinity may be led back without a draw, but where they were led is looked up among the port's backends:
//! there these count.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::affinity::backends_of;
use super::element::{Key, Place};
use super::lower::{Applied, Target, position};
use super::readings::Readings;
use super::schema::Set;
use crate::dataplane::Counts;
use crate::model::input::{Family, Protocol, ServiceKey};
use crate::model::plan::{AddressPort, Plan, PortPlan};

/// What tells one port of a Service from another.
type PortKey = (Family, Protocol, Arc<str>);

/// What elements had counted that have gone, of ports and backends that are still there.
#[derive(Debug, Default)]
pub(crate) struct Carried(BTreeMap<ServiceKey, BTreeMap<PortKey, Counts>>);

impl Carried {
    /// A Service has changed, and these elements have gone with the change. `old` is what was programmed, `None` where
    /// that was not known: then what its elements counted is taken as if they were of `new`.
    pub(crate) fn change(
        &mut self,
        service: &ServiceKey,
        old: Option<&Applied>,
        new: Option<&Applied>,
        gone: &Readings,
    ) {
        let mut before = self.0.remove(service).unwrap_or_default();
        if before.is_empty() && gone.is_empty() {
            return;
        }
        let Some(new) = new else { return };
        let old = old.unwrap_or(new);
        let mut after = BTreeMap::new();
        for port in &new.plan().ports {
            let Some(was) = counterpart(old.plan(), port) else { continue };
            let mut counts = before.remove(&key(was)).unwrap_or_default();
            counts.add(&of(old, was, gone));
            counts.connections.retain(|backend, connections| *connections > 0 && has(port, *backend));
            if counts != Counts::default() {
                after.insert(key(port), counts);
            }
        }
        if !after.is_empty() {
            self.0.insert(service.clone(), after);
        }
    }

    /// All that a port counted, with these readings of its elements; `applied` is what is programmed.
    pub(crate) fn total(&self, applied: &Applied, port: &PortPlan, readings: &Readings) -> Counts {
        let mut counts = Counts::default();
        let backends = port.backends.iter().chain(&port.local_backends);
        counts.connections.extend(backends.map(|backend| (backend.address, 0)));
        let plan = applied.plan();
        if let Some(port) = position(plan, port).map(|i| &plan.ports[i]) {
            counts.add(&of(applied, port, readings));
            let carried = self.0.get(&plan.service).and_then(|ports| ports.get(&key(port)));
            carried.into_iter().for_each(|carried| counts.add(carried));
        }
        counts
    }
}

/// The elements that count what a Service's frontends meet: their keys, by table and set.
pub(crate) fn counters(applied: &Applied) -> BTreeMap<(Family, Set), Vec<Key>> {
    let mut counters: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for Place { family, set, key } in applied.counters() {
        counters.entry((family, set)).or_default().push(key);
    }
    counters
}

/// What these readings say of a port that is or was programmed.
fn of(applied: &Applied, port: &PortPlan, readings: &Readings) -> Counts {
    let mut counts = Counts::default();
    let mut places = Vec::new();
    let id = applied.id(port);
    places.extend(id.map(|id| backends_of(port.family, id)));
    for frontend in &port.frontends {
        let at = Target::new(port, frontend);
        counts.refused += readings.at(&at.refusals);
        if id.is_none() {
            places.extend(at.slots.map(|slots| slots.all));
        }
    }
    for (backend, connections) in places.into_iter().flat_map(|place| readings.below(place)) {
        *counts.connections.entry(backend).or_default() += connections;
    }
    counts
}

/// The port of a plan that this one of the same Service comes from: the same, or one that had an address of it.
fn counterpart<'a>(plan: &'a Plan, port: &PortPlan) -> Option<&'a PortPlan> {
    let shares = |candidate: &&PortPlan| {
        (candidate.family, candidate.protocol) == (port.family, port.protocol)
            && candidate.frontends.iter().any(|a| port.frontends.iter().any(|b| a.at == b.at))
    };
    position(plan, port).map(|i| &plan.ports[i]).or_else(|| plan.ports.iter().find(shares))
}

fn key(port: &PortPlan) -> PortKey {
    (port.family, port.protocol, Arc::clone(&port.name))
}

/// Whether the backend is in one of the port's sets.
fn has(port: &PortPlan, backend: AddressPort) -> bool {
    let sets = [&port.backends, &port.local_backends];
    sets.iter().any(|set| set.binary_search_by(|candidate| candidate.address.cmp(&backend)).is_ok())
}

#[cfg(test)]
#[path = "counters_tests.rs"]
mod tests;
