//! Session affinity: the numbers of ports and members, and what one change of a port does to its elements.
//!
//! Pure: reads plans and what the kernel was found to hold, yields elements. Never does I/O. The rules that search these
//! elements are in [`super::affinity_rules`]; what clients are remembered is between them and the packets.
//!
//! A number stays with its port, and that of a member with its backend, for as long as they are there, over a restart too:
//! what packets have learned names them. A number is given to another only when all others have been: a client that is
//! remembered for what had it before is led to a backend that it may have drawn.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::element::{Data, Element, Key, Place};
use super::kernel::Kernel;
use super::lower::{Lowered, Target};
use super::schema::Set;
use super::shared::{Shared, only_in};
use crate::model::input::Family;
use crate::model::plan::{AddressPort, Backend, Frontend, FrontendAddress, FrontendKind, PortPlan, Verdict};

/// The numbers of the ports with affinity, by family.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ids {
    taken: BTreeSet<(Family, u16)>,
    /// Those that the kernel was found to hold: they are kept for the ports that had them.
    found: BTreeSet<(Family, u16)>,
    last: u16,
}

impl Ids {
    /// A number that nobody has; `None`: there are no more.
    fn take(&mut self, family: Family) -> Option<u16> {
        let is_free = |id: &u16| !self.taken.contains(&(family, *id)) && !self.found.contains(&(family, *id));
        let id = next(self.last, is_free)?;
        self.last = id;
        self.taken.insert((family, id));
        Some(id)
    }

    /// Takes this number, unless somebody has it.
    fn take_found(&mut self, family: Family, id: u16) -> Option<u16> {
        self.taken.insert((family, id)).then_some(id)
    }

    /// The kernel holds this number.
    pub(crate) fn keep(&mut self, family: Family, id: u16) {
        self.found.insert((family, id));
        self.last = self.last.max(id);
    }

    /// Nobody will ask for what the kernel was found to hold any more.
    pub(crate) fn keep_no_longer(&mut self) {
        self.found.clear();
    }

    /// These ports are no more.
    pub(crate) fn release(&mut self, ids: impl Iterator<Item = (Family, u16)>) {
        ids.for_each(|id| {
            self.taken.remove(&id);
        });
    }
}

/// The first free number behind the last that was given away, or else from 1 on; 0 is nobody's.
fn next(last: u16, is_free: impl Fn(&u16) -> bool) -> Option<u16> {
    (last.checked_add(1).unwrap_or(1)..=u16::MAX).chain(1..=last).find(is_free)
}

/// A port that remembers its clients, as it was programmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Numbers {
    /// Its number; 0 is nobody's.
    pub(crate) id: u16,
    /// Its backends, in order, and the lower halves of their numbers; 0 is nobody's.
    members: Arc<[(AddressPort, u16)]>,
    last: u16,
}

impl Numbers {
    /// Numbers for a port: those that it has, else those that the kernel was found to hold, else others. `None` where it
    /// remembers nobody.
    pub(crate) fn new(
        port: &PortPlan,
        old: Option<&Self>,
        kernel: &impl Kernel,
        ids: &mut Ids,
    ) -> Option<Self> {
        if !remembers(port) {
            return None;
        }
        if let Some(old) = old {
            return Some(old.with(port));
        }
        let found = port.frontends.iter().find_map(|frontend| kernel.id(&ids_at(port, frontend)));
        let found = found.and_then(|id| ids.take_found(port.family, id));
        let Some(id) = found else {
            let id = ids.take(port.family)?;
            return Some(Self { id, members: [].into(), last: 0 }.with(port));
        };
        let mut members = BTreeMap::new();
        let mut numbers = BTreeSet::new();
        for (place, data) in kernel.below(backends_of(port.family, id)) {
            let number = data.and_then(Data::to_id).filter(|member| member >> 16 == u32::from(id));
            let number = number.map(|member| member as u16).filter(|number| *number != 0);
            if let Some((backend, number)) = place.key.to_backend().zip(number)
                && numbers.insert(number)
            {
                members.insert(backend, number);
            }
        }
        let last = numbers.last().copied().unwrap_or_default();
        Some(Self { id, members: members.into_iter().collect(), last }.with(port))
    }

    /// The same for another plan of the port: who stays keeps its number.
    fn with(&self, port: &PortPlan) -> Self {
        let mut taken: BTreeSet<u16> = self.members.iter().map(|(_, number)| *number).collect();
        let mut last = self.last;
        let mut old = self.members.iter().peekable();
        let mut members = Vec::with_capacity(port.backends.len());
        for backend in all_backends(port) {
            while old.next_if(|(candidate, _)| *candidate < backend).is_some() {}
            let number = old.next_if(|(candidate, _)| *candidate == backend).map(|(_, number)| *number);
            let number = number.or_else(|| {
                last = next(last, |number| !taken.contains(number))?;
                taken.insert(last);
                Some(last)
            });
            members.extend(number.map(|number| (backend, number)));
        }
        Self { id: self.id, members: members.into(), last }
    }

    /// The number of a member.
    fn member(&self, backend: AddressPort) -> Option<u32> {
        let i = self.members.binary_search_by(|(candidate, _)| candidate.cmp(&backend)).ok()?;
        Some(self.port() | u32::from(self.members[i].1))
    }

    /// The number of the port, as the kernel has it.
    fn port(&self) -> u32 {
        u32::from(self.id) << 16
    }

    /// The elements that count its connections.
    pub(crate) fn counters(&self, family: Family) -> impl Iterator<Item = Place> {
        let all = backends_of(family, self.id);
        self.members
            .iter()
            .map(move |(backend, _)| Place { key: all.key.with_backend(backend.socket()), ..all })
    }
}

/// The beginning of the keys of a port's backends.
pub(crate) fn backends_of(family: Family, id: u16) -> Place {
    Place { family, set: Set::AffinityBackends, key: Key::id(u32::from(id) << 16) }
}

/// Whether a port has affinity and somebody to lead its clients to.
pub(crate) fn remembers(port: &PortPlan) -> bool {
    port.affinity.is_some() && port.frontends.iter().any(leads)
}

/// Whether a frontend leads anybody anywhere.
fn leads(frontend: &Frontend) -> bool {
    frontend.verdict != Verdict::Reject
}

/// The sets of frontends with affinity that a frontend of this port is in.
pub(super) fn named(port: &PortPlan, frontend: &Frontend) -> &'static [Set] {
    if !remembers(port) || !leads(frontend) {
        return &[];
    }
    match (frontend.at, frontend.kind, frontend.verdict) {
        (FrontendAddress::NodePort(_), ..) => &[Set::NpAffinity],
        (FrontendAddress::Vip(_), FrontendKind::ClusterIp, Verdict::Local) => {
            &[Set::Affinity, Set::AffinityLocalOnly]
        }
        (FrontendAddress::Vip(_), ..) => &[Set::Affinity],
    }
}

/// Where a frontend leads to the number of its port.
fn ids_at(port: &PortPlan, frontend: &Frontend) -> Place {
    let set = match frontend.at {
        FrontendAddress::Vip(_) => Set::AffinityIds,
        FrontendAddress::NodePort(_) => Set::NpAffinityIds,
    };
    Place { set, ..Target::new(port, frontend).refusals }
}

/// The backends of both endpoint sets, in order.
fn all_backends(port: &PortPlan) -> Vec<AddressPort> {
    let backends = port.backends.iter().chain(&port.local_backends);
    let mut all: Vec<_> = backends.map(|backend| backend.address).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// A port and its numbers.
#[derive(Clone, Copy)]
pub(super) struct Port<'a> {
    pub(super) plan: &'a PortPlan,
    pub(super) numbers: &'a Numbers,
}

/// Adds to `out` what leads from one port with affinity to another, or from none, or to none. Both have the same number.
pub(super) fn lower(
    old: Option<Port<'_>>,
    new: Option<Port<'_>>,
    comment: &Arc<str>,
    kernel: &impl Kernel,
    out: &mut Lowered,
) {
    let (before, after) = (old.map(Port::singles), new.map(Port::singles));
    let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
    out.removed.extend(before.iter().filter(|(place, data)| after.get(place) != Some(data)).map(|(p, _)| *p));
    let mut add = |place, data| out.added.push(Element { place, data, comment: Some(Arc::clone(comment)) });
    after.iter().filter(|(p, data)| before.get(p) != Some(data)).for_each(|(p, data)| add(*p, *data));
    if let Some(old) = old {
        let kept = new.map(|new| new.numbers);
        for (backend, member) in old.members() {
            if kept.and_then(|kept| kept.member(backend)) != Some(member) {
                out.removed.extend([old.backend_at(backend), old.at(Set::AffinityMembers, member)]);
            }
        }
    }
    if let Some(new) = new {
        let kept = old.map(|old| old.numbers);
        for (backend, member) in new.members() {
            if kept.and_then(|kept| kept.member(backend)) != Some(member) {
                add(new.backend_at(backend), Some(Data::id(member)));
                add(new.at(Set::AffinityMembers, member), Some(Data::backend(backend.socket())));
            }
        }
    }
    for set in [Set::AffinityCluster, Set::AffinityLocal] {
        let (before, after) = (old.map(|old| old.scope(set)), new.map(|new| new.scope(set)));
        let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
        let place = |port: Option<Port<'_>>, member: &u32| port.map(|port| port.at(set, *member));
        out.removed.extend(only_in(&before, &after).filter_map(|member| place(old, member)));
        let joined = only_in(&after, &before).filter_map(|member| place(new, member));
        joined.for_each(|place| add(place, None));
    }
    let timeout = |port: Port<'_>| Some(Shared::Timeout(port.plan.family, port.plan.affinity?));
    out.shared.lost.extend(old.and_then(timeout));
    out.shared.gained.extend(new.and_then(timeout));
    if let Some(new) = new.filter(|_| old.is_none()) {
        new.clear_found(kernel, out);
    }
}

impl Port<'_> {
    /// Its elements that do not depend on its backends.
    fn singles(self) -> BTreeMap<Place, Option<Data>> {
        let id = self.numbers.port();
        let of_frontends = self.plan.frontends.iter().filter(|frontend| leads(frontend));
        let mut singles: BTreeMap<_, _> =
            of_frontends.map(|frontend| (ids_at(self.plan, frontend), Some(Data::id(id)))).collect();
        if let Some(timeout) = self.plan.affinity {
            let timeouts = self.at(Set::AffinityTimeouts, id);
            singles.insert(Place { key: timeouts.key.slot(timeout.get()), ..timeouts }, None);
        }
        singles
    }

    /// A number in one of the sets.
    fn at(self, set: Set, id: u32) -> Place {
        Place { family: self.plan.family, set, key: Key::id(id) }
    }

    fn backend_at(self, backend: AddressPort) -> Place {
        let all = backends_of(self.plan.family, self.numbers.id);
        Place { key: all.key.with_backend(backend.socket()), ..all }
    }

    /// Its backends, and their numbers.
    fn members(&self) -> impl Iterator<Item = (AddressPort, u32)> {
        let port = self.numbers.port();
        self.numbers.members.iter().map(move |(backend, number)| (*backend, port | u32::from(*number)))
    }

    /// The sorted numbers of those in an endpoint set.
    fn scope(self, set: Set) -> Vec<u32> {
        let backends: &[Backend] = match set {
            Set::AffinityLocal => &self.plan.local_backends,
            _ => &self.plan.backends,
        };
        let mut members: Vec<_> =
            backends.iter().filter_map(|backend| self.numbers.member(backend.address)).collect();
        members.sort_unstable();
        members
    }

    /// Removes what the kernel was found to hold of the port and that it does not have: other timeouts, and members that
    /// left.
    fn clear_found(self, kernel: &impl Kernel, out: &mut Lowered) {
        let singles = self.singles();
        let timeouts = kernel.below(self.at(Set::AffinityTimeouts, self.numbers.port()));
        out.removed.extend(timeouts.map(|(place, _)| place).filter(|place| !singles.contains_key(place)));
        let scopes = [Set::AffinityCluster, Set::AffinityLocal].map(|set| (set, self.scope(set)));
        let numbers: BTreeSet<_> = self.members().map(|(_, member)| member).collect();
        let mut stale = BTreeSet::new();
        for (place, data) in kernel.below(backends_of(self.plan.family, self.numbers.id)) {
            let backend = place.key.to_backend();
            let is_ours = backend.is_some_and(|backend| self.numbers.member(backend).is_some());
            if !is_ours {
                stale.insert(place);
            }
            let of_port = |member: &u32| member >> 16 == u32::from(self.numbers.id);
            let Some(member) = data.and_then(Data::to_id).filter(of_port) else { continue };
            // A number that another backend has from now on is written over.
            if !is_ours && !numbers.contains(&member) {
                stale.insert(self.at(Set::AffinityMembers, member));
            }
            let left = scopes.iter().filter(|(_, members)| members.binary_search(&member).is_err());
            stale.extend(left.map(|(set, _)| self.at(*set, member)));
        }
        let is_held = |place: &Place| kernel.holds(place);
        out.removed.extend(stale.into_iter().filter(is_held));
    }
}

#[cfg(test)]
#[path = "affinity_tests.rs"]
mod tests;
