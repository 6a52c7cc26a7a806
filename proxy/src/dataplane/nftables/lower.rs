//! From a plan to elements: which slots a port's backends take, and what one change adds and removes.
//!
//! Pure: reads plans and what the kernel was found to hold, yields elements. Never does I/O. The plan owns endpoint
//! *sets*; the order of slots is decided here and depends on history: a removed backend's slot is taken by a new
//! one, or by the last, so that a change costs a few elements whatever the size of the set.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::element::{Data, Element, Key, Place, comment};
use super::schema::{CLASSES, MAX_SLOTS, Set};
use crate::model::input::{Family, Protocol};
use crate::model::plan::{Backend, Frontend, FrontendAddress, FrontendKind, Plan, PortPlan, Verdict};

/// A Service as it was programmed: its plan, and which slot each backend has.
#[derive(Clone, Debug)]
pub(crate) struct Applied {
    plan: Arc<Plan>,
    /// For each port of the plan.
    ports: Box<[Slots]>,
}

/// Slot by slot the position of its backend in the port's sorted list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Slots(Box<[u16]>);

/// An element that several Services may want: it exists as long as one of them does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Shared {
    /// A cluster IP in use.
    ClusterIp(IpAddr),
    /// A local backend, which may dial itself through the Service.
    Hairpin(IpAddr),
}

/// What one Service's change does to the kernel.
#[derive(Debug, Default)]
pub(crate) struct Lowered {
    /// What is programmed once this is committed; `None`: nothing.
    pub(crate) applied: Option<Applied>,
    /// Elements to remove, before any is added.
    pub(crate) removed: Vec<Place>,
    /// Elements to add.
    pub(crate) added: Vec<Element>,
    /// Shared elements that this Service no longer wants.
    pub(crate) lost: Vec<Shared>,
    /// Shared elements that it wants from now on.
    pub(crate) gained: Vec<Shared>,
}

/// Tells which backend the kernel was found to have in a slot, when a Service is taken over from an earlier run.
pub(crate) trait KernelSlots {
    /// The backend at this place of a slot map, if there is one.
    fn backend(&self, place: &Place) -> Option<SocketAddr>;
}

/// A kernel that holds nothing.
pub(crate) struct Empty;

impl KernelSlots for Empty {
    fn backend(&self, _: &Place) -> Option<SocketAddr> {
        None
    }
}

impl Shared {
    /// The element it stands for.
    pub(crate) fn place(self) -> Place {
        match self {
            Self::ClusterIp(address) => {
                Place { family: Family::of(address), set: Set::ClusterIps, key: Key::address(address) }
            }
            Self::Hairpin(address) => {
                Place { family: Family::of(address), set: Set::Hairpin, key: Key::to_itself(address) }
            }
        }
    }
}

impl Applied {
    /// The plan that is programmed.
    pub(crate) fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    fn find(&self, port: &PortPlan, at: FrontendAddress) -> Option<(usize, Frontend)> {
        self.plan.ports.iter().enumerate().find_map(|(i, candidate)| {
            let same = candidate.family == port.family && candidate.protocol == port.protocol;
            let frontend = candidate.frontends.iter().find(|frontend| frontend.at == at);
            frontend.filter(|_| same).map(|frontend| (i, *frontend))
        })
    }
}

/// What has to change so that `next` is programmed where `previous` was.
pub(crate) fn lower(
    previous: Option<&Applied>,
    next: Option<&Arc<Plan>>,
    kernel: &impl KernelSlots,
) -> Lowered {
    let mut lowered = Lowered::default();
    let mut kept = BTreeSet::new();
    if let Some(plan) = next {
        let mut ports = Vec::with_capacity(plan.ports.len());
        for port in &plan.ports {
            let slots = Slots(assign(&current_order(previous, port, kernel), &port.backends));
            let comment = comment(&plan.port_name(port));
            for frontend in &port.frontends {
                let target = Target::new(port, frontend);
                let mut before = None;
                if let Some((applied, (i, old))) =
                    previous.zip(previous.and_then(|p| p.find(port, frontend.at)))
                {
                    kept.insert((port.family, port.protocol, frontend.at));
                    let old_port = &applied.plan.ports[i];
                    before = Some((old.verdict, Order { slots: &applied.ports[i], port: old_port }));
                    if old_port.name != port.name {
                        // A comment cannot be changed in place.
                        target.change(before.take(), None, &comment, &mut lowered);
                    }
                }
                let after = (frontend.verdict, Order { slots: &slots, port });
                target.change(before, Some(after), &comment, &mut lowered);
            }
            ports.push(slots);
        }
        lowered.applied = Some(Applied { plan: Arc::clone(plan), ports: ports.into() });
    }
    if let Some(applied) = previous {
        for (port, slots) in applied.plan.ports.iter().zip(&applied.ports) {
            for frontend in &port.frontends {
                if !kept.contains(&(port.family, port.protocol, frontend.at)) {
                    let before = (frontend.verdict, Order { slots, port });
                    Target::new(port, frontend).change(Some(before), None, &"".into(), &mut lowered);
                }
            }
        }
    }
    let (old, new) = (shared(previous.map(Applied::plan)), shared(next));
    lowered.lost = old.difference(&new).copied().collect();
    lowered.gained = new.difference(&old).copied().collect();
    lowered
}

/// The backends in the order of the slots that they have now: as programmed, else as the kernel was found.
fn current_order(previous: Option<&Applied>, port: &PortPlan, kernel: &impl KernelSlots) -> Vec<SocketAddr> {
    let programmed = previous.and_then(|applied| {
        let (i, _) = port.frontends.iter().find_map(|frontend| applied.find(port, frontend.at))?;
        Some(Order { slots: &applied.ports[i], port: &applied.plan.ports[i] }.iter().collect())
    });
    programmed.unwrap_or_else(|| {
        let Some(frontend) = port.frontends.first() else { return Vec::new() };
        let target = Target::new(port, frontend);
        (0..MAX_SLOTS as u32).map_while(|slot| kernel.backend(&target.slot(slot))).collect()
    })
}

/// Gives each of the sorted `wanted` backends a slot so that as few of the `current` slots as possible change: who
/// stays keeps its slot, newcomers fill the gaps, and the last ones move into gaps that are left.
fn assign(current: &[SocketAddr], wanted: &[Backend]) -> Box<[u16]> {
    let wanted = &wanted[..wanted.len().min(MAX_SLOTS)];
    let mut placed = vec![false; wanted.len()];
    let mut slots: Vec<Option<u16>> = current
        .iter()
        .map(|address| {
            let i = wanted.binary_search_by(|backend| backend.address.cmp(&(*address).into())).ok()?;
            // Twice in the kernel can only be somebody else's doing; the second place counts as a gap.
            (!std::mem::replace(&mut placed[i], true)).then_some(i as u16)
        })
        .collect();
    let mut newcomers = (0..wanted.len() as u16).filter(|i| !placed[usize::from(*i)]);
    for slot in slots.iter_mut().filter(|slot| slot.is_none()) {
        *slot = newcomers.next();
    }
    slots.extend(newcomers.map(Some));
    let mut gap = 0;
    loop {
        while slots.last().is_some_and(Option::is_none) {
            slots.pop();
        }
        match slots.iter().skip(gap).position(Option::is_none) {
            Some(i) => {
                gap += i;
                slots.swap_remove(gap);
            }
            None => return slots.into_iter().flatten().collect(),
        }
    }
}

/// A port's backends by slot.
#[derive(Clone, Copy)]
struct Order<'a> {
    slots: &'a Slots,
    port: &'a PortPlan,
}

impl<'a> Order<'a> {
    fn iter(self) -> impl ExactSizeIterator<Item = SocketAddr> + 'a {
        self.slots.0.iter().map(move |i| self.port.backends[usize::from(*i)].address.socket())
    }
}

/// Where a frontend's elements are.
struct Target {
    family: Family,
    key: Key,
    slots: Set,
    more: Set,
    member: Set,
    reject: Set,
}

impl Target {
    fn new(port: &PortPlan, frontend: &Frontend) -> Self {
        let (family, protocol): (Family, Protocol) = (port.family, port.protocol);
        match frontend.at {
            FrontendAddress::Vip(address) => Self {
                family,
                key: Key::vip(address.socket(), protocol),
                slots: Set::Endpoints,
                more: Set::More,
                member: Set::Vips,
                reject: Set::VipsReject,
            },
            FrontendAddress::NodePort(port) => Self {
                family,
                key: Key::nodeport(port, protocol),
                slots: Set::NpEndpoints,
                more: Set::NpMore,
                member: Set::Nps,
                reject: Set::NpsReject,
            },
        }
    }

    fn place(&self, set: Set, key: Key) -> Place {
        Place { family: self.family, set, key }
    }

    fn slot(&self, slot: u32) -> Place {
        self.place(self.slots, self.key.slot(slot))
    }

    fn membership(&self, verdict: Verdict) -> Place {
        let set = match verdict {
            Verdict::Cluster | Verdict::Local => self.member,
            Verdict::Reject => self.reject,
        };
        self.place(set, self.key)
    }

    /// Adds to `out` what leads from one state of the frontend to another; `None`: it does not exist.
    fn change(
        &self,
        before: Option<(Verdict, Order<'_>)>,
        after: Option<(Verdict, Order<'_>)>,
        comment: &Arc<str>,
        out: &mut Lowered,
    ) {
        let mut add = |place, data| {
            out.added.push(Element { place, data, comment: Some(Arc::clone(comment)) });
        };
        let (old, new) = (balanced(before), balanced(after));
        let mut count = (0u32, 0u32);
        let (mut old, mut new) = (old.map(Order::iter), new.map(Order::iter));
        for slot in 0.. {
            let pair = (old.as_mut().and_then(Iterator::next), new.as_mut().and_then(Iterator::next));
            if pair == (None, None) {
                break;
            }
            count.0 += u32::from(pair.0.is_some());
            count.1 += u32::from(pair.1.is_some());
            if pair.0 != pair.1 {
                if pair.0.is_some() {
                    out.removed.push(self.slot(slot));
                }
                if let Some(backend) = pair.1 {
                    add(self.slot(slot), Some(Data::backend(backend)));
                }
            }
        }
        for step in (0..CLASSES - 1).map(|i| 1 << i) {
            let place = self.place(self.more, self.key.slot(step));
            match (count.0 > step, count.1 > step) {
                (false, true) => add(place, None),
                (true, false) => out.removed.push(place),
                _ => {}
            }
        }
        let (old, new) = (before.map(|b| b.0), after.map(|a| a.0));
        if old != new {
            if let Some(verdict) = old {
                out.removed.push(self.membership(verdict));
            }
            if let Some(verdict) = new {
                add(self.membership(verdict), None);
            }
        }
    }
}

fn balanced(state: Option<(Verdict, Order<'_>)>) -> Option<Order<'_>> {
    state.and_then(|(verdict, order)| match verdict {
        Verdict::Cluster | Verdict::Local => Some(order),
        Verdict::Reject => None,
    })
}

/// The shared elements that a plan wants.
fn shared(plan: Option<&Arc<Plan>>) -> BTreeSet<Shared> {
    let mut wanted = BTreeSet::new();
    for port in plan.iter().flat_map(|plan| &plan.ports) {
        for frontend in &port.frontends {
            if let (FrontendKind::ClusterIp, FrontendAddress::Vip(address)) = (frontend.kind, frontend.at) {
                wanted.insert(Shared::ClusterIp(address.ip));
            }
        }
        let local = port.backends.iter().filter(|backend| backend.local);
        wanted.extend(local.map(|backend| Shared::Hairpin(backend.address.ip)));
    }
    wanted
}

/// How many Services want each shared element, as committed.
#[derive(Debug, Default)]
pub(crate) struct SharedCounts(BTreeMap<Shared, u32>);

impl SharedCounts {
    /// Which elements appear and vanish when Services lose and gain these.
    pub(crate) fn preview(&self, delta: &BTreeMap<Shared, i64>) -> (Vec<Place>, Vec<Element>) {
        let (mut removed, mut added) = (Vec::new(), Vec::new());
        for (shared, change) in delta {
            let before = i64::from(self.0.get(shared).copied().unwrap_or(0));
            match (before > 0, before + change > 0) {
                (true, false) => removed.push(shared.place()),
                (false, true) => {
                    added.push(Element { place: shared.place(), data: None, comment: None });
                }
                _ => {}
            }
        }
        (removed, added)
    }

    /// Takes a committed change over.
    pub(crate) fn commit(&mut self, delta: &BTreeMap<Shared, i64>) {
        for (shared, change) in delta {
            let count = self.0.entry(*shared).or_default();
            *count = u32::try_from(i64::from(*count) + change).unwrap_or(0);
            if *count == 0 {
                self.0.remove(shared);
            }
        }
    }
}

#[cfg(test)]
#[path = "lower_tests.rs"]
mod tests;
