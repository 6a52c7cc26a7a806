//! From a plan to elements: which slots a port's backends take, and what one change adds and removes.
//!
//! Pure: reads plans and what the kernel was found to hold, yields elements. Never does I/O. The plan owns endpoint
//! *sets*; the order of slots is decided here and depends on history: a removed backend's slot is taken by a new
//! one, or by the last, so that a change costs a few elements whatever the size of the set.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::affinity::{self, Ids, Numbers};
use super::element::{Data, Element, Key, Place, comment};
use super::kernel::Kernel;
use super::schema::{CLASSES, MAX_SLOTS, NODEPORT_SLOTS, Set, SlotSets, VIP_SLOTS};
use super::shared::{SharedChange, only_in};
use crate::model::input::{Family, Protocol};
use crate::model::plan::{
    AddressPort, Backend, Frontend, FrontendAddress, FrontendKind, MAX_BACKENDS, Plan, PortPlan, Verdict,
};

/// A Service as it was programmed: its plan, and which slot each backend has.
#[derive(Clone, Debug)]
pub(crate) struct Applied {
    plan: Arc<Plan>,
    /// The slots of all ports, one port after the other.
    slots: Box<[u16]>,
    /// By position of the port in the plan: the numbers of those with session affinity.
    numbers: BTreeMap<usize, Numbers>,
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
    /// Elements that other Services may want too.
    pub(crate) shared: SharedChange,
}

impl Applied {
    /// The plan that is programmed.
    pub(crate) fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// The numbers of its ports with session affinity.
    pub(crate) fn ids(&self) -> impl Iterator<Item = (Family, u16)> {
        self.numbers.iter().map(|(index, numbers)| (self.plan.ports[*index].family, numbers.id))
    }

    /// The number of one of its ports, where it has session affinity.
    pub(crate) fn id(&self, port: &PortPlan) -> Option<u16> {
        self.numbers.get(&position(&self.plan, port)?).map(|numbers| numbers.id)
    }

    /// The elements that count its new connections and refusals.
    pub(crate) fn counters(&self) -> Vec<Place> {
        let mut places = Vec::new();
        for port in self.ports() {
            for frontend in &port.plan.frontends {
                let at = Target::new(port.plan, frontend);
                let shape = Shape::new(frontend, port.plan, port.slots);
                places.extend(shape.is_in(at.refusals.set).then_some(at.refusals));
                if port.numbers.is_none() {
                    let sets = at.slots.into_iter().zip(shape.endpoints);
                    places
                        .extend(sets.flat_map(|(slots, order)| (0..order.len()).map(move |i| slots.slot(i))));
                }
            }
            places.extend(port.numbers.into_iter().flat_map(|numbers| numbers.counters(port.plan.family)));
        }
        places
    }

    fn ports(&self) -> impl Iterator<Item = AppliedPort<'_>> {
        let mut rest = &*self.slots;
        self.plan.ports.iter().enumerate().map(move |(index, plan)| {
            let slots;
            (slots, rest) = rest.split_at(SETS.map(|set| set.of(plan).len()).iter().sum());
            AppliedPort { index, plan, slots: Slots(slots), numbers: self.numbers.get(&index) }
        })
    }
}

/// One port of a Service as it was programmed.
#[derive(Clone, Copy)]
struct AppliedPort<'a> {
    /// Its position in the plan.
    index: usize,
    plan: &'a PortPlan,
    slots: Slots<'a>,
    numbers: Option<&'a Numbers>,
}

/// What has to change so that `next` is programmed where `previous` was. New ports with session affinity take their number
/// of `ids`; whoever commits the change or does not releases those that are no more.
pub(crate) fn lower(
    previous: Option<&Applied>,
    next: Option<&Arc<Plan>>,
    kernel: &impl Kernel,
    ids: &mut Ids,
) -> Lowered {
    let mut lowered = Lowered::default();
    // What was programmed and has no counterpart in `next`: ports by position, frontends by what tells them apart.
    let mut ports: BTreeMap<_, _> =
        previous.into_iter().flat_map(Applied::ports).map(|port| (port.index, port)).collect();
    let mut frontends: BTreeMap<_, _> = ports
        .values()
        .flat_map(|port| port.plan.frontends.iter().map(|f| (identity(port.plan, f), (*port, f))))
        .collect();
    if let Some(plan) = next {
        let mut slots = Vec::new();
        for port in &plan.ports {
            let old = port.frontends.iter().find_map(|f| frontends.get(&identity(port, f)));
            let old = old.map(|(old, _)| *old);
            let same = old.filter(|old| old.plan == port);
            let order = same.map_or_else(|| order(old, port, kernel), |same| same.slots.0.to_vec());
            let comment = comment(&plan.port_name(port));
            // With affinity the members count, also those whom nobody draws.
            let counts_otherwise = |old: &PortPlan, new: &PortPlan| {
                kernel.counts() && affinity::remembers(old) != affinity::remembers(new)
            };
            for frontend in &port.frontends {
                let before = frontends.remove(&identity(port, frontend));
                if same.is_some() {
                    continue;
                }
                let change = Change { at: Target::new(port, frontend), comment: &comment, kernel };
                let after = Shape::new(frontend, port, Slots(&order));
                let before = before.map(|(old, f)| (old, Shape::new(f, old.plan, old.slots)));
                match before {
                    None => change.lower(Shape::default(), after, &mut lowered),
                    Some((old, before))
                        if old.plan.name == port.name && !counts_otherwise(old.plan, port) =>
                    {
                        change.lower(before, after, &mut lowered);
                    }
                    // A comment cannot be changed in place, nor a counter.
                    Some((_, before)) => {
                        change.lower(before, Shape::default(), &mut lowered);
                        change.lower(Shape::default(), after, &mut lowered);
                    }
                }
            }
            let counterpart = old.and_then(|old| ports.remove(&old.index));
            lowered.shared.between(counterpart.map(|old| old.plan), Some(port));
            slots.extend(order);
        }
        let numbers = BTreeMap::new();
        lowered.applied = Some(Applied { plan: Arc::clone(plan), slots: slots.into(), numbers });
    }
    for (port, frontend) in frontends.into_values() {
        let change = Change { at: Target::new(port.plan, frontend), comment: &"".into(), kernel };
        change.lower(Shape::new(frontend, port.plan, port.slots), Shape::default(), &mut lowered);
    }
    for port in ports.into_values() {
        lowered.shared.between(Some(port.plan), None);
    }
    affinity(previous, &mut lowered, kernel, ids);
    lowered
}

/// What has to change of the ports with session affinity. A port of another name is another port, which remembers nobody.
fn affinity(previous: Option<&Applied>, lowered: &mut Lowered, kernel: &impl Kernel, ids: &mut Ids) {
    let mut old: BTreeMap<_, _> = previous
        .into_iter()
        .flat_map(Applied::ports)
        .filter_map(|port| {
            Some((port_identity(port.plan), affinity::Port { plan: port.plan, numbers: port.numbers? }))
        })
        .collect();
    let mut applied = lowered.applied.take();
    if let Some(applied) = &mut applied {
        for (index, plan) in applied.plan.ports.iter().enumerate() {
            let old = old.remove(&port_identity(plan));
            if let Some(old) = old.filter(|old| old.plan == plan) {
                applied.numbers.insert(index, old.numbers.clone());
                continue;
            }
            let numbers = Numbers::new(plan, old.map(|old| old.numbers), kernel, ids);
            let new = numbers.as_ref().map(|numbers| affinity::Port { plan, numbers });
            let comment = comment(&applied.plan.port_name(plan));
            affinity::lower(old, new, &comment, kernel, lowered);
            applied.numbers.extend(numbers.map(|numbers| (index, numbers)));
        }
    }
    old.into_values().for_each(|old| affinity::lower(Some(old), None, &"".into(), kernel, lowered));
    lowered.applied = applied;
}

/// What tells one port of a Service from another: a plan's ports are sorted by it.
fn port_identity(port: &PortPlan) -> (Family, Protocol, &str) {
    (port.family, port.protocol, &port.name)
}

/// Where the same port is in another plan of the Service.
pub(crate) fn position(plan: &Plan, port: &PortPlan) -> Option<usize> {
    plan.ports.binary_search_by(|candidate| port_identity(candidate).cmp(&port_identity(port))).ok()
}

/// What tells one frontend of a Service from another.
fn identity(port: &PortPlan, frontend: &Frontend) -> (Family, Protocol, FrontendAddress) {
    (port.family, port.protocol, frontend.at)
}

/// Slot by slot the position of its backend in the port's sorted list: those of the Cluster set, then those of the
/// Local set.
#[derive(Clone, Copy)]
struct Slots<'a>(&'a [u16]);

/// One of a port's two endpoint sets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum EndpointSet {
    Cluster,
    Local,
}

// What has no slot would be in no other account of what is served.
const _: () = assert!(MAX_BACKENDS <= MAX_SLOTS);

/// In the order of their slots.
const SETS: [EndpointSet; 2] = [EndpointSet::Cluster, EndpointSet::Local];

impl EndpointSet {
    /// Its backends, as many as there can be slots.
    fn of(self, port: &PortPlan) -> &[Backend] {
        let backends = match self {
            Self::Cluster => &port.backends,
            Self::Local => &port.local_backends,
        };
        &backends[..backends.len().min(MAX_SLOTS)]
    }
}

/// Slots for a port in place of what there is: as programmed, else as the kernel was found.
fn order(old: Option<AppliedPort<'_>>, port: &PortPlan, kernel: &impl Kernel) -> Vec<u16> {
    let of_set = |set: EndpointSet| {
        let wanted = set.of(port);
        let positions = match old {
            Some(old) => {
                let stay = positions(set.of(old.plan), wanted);
                old.slots.of(old.plan, set).slots.iter().map(|i| stay[usize::from(*i)]).collect()
            }
            None => found(port, set, kernel),
        };
        assign(positions, wanted.len())
    };
    SETS.map(of_set).concat()
}

impl<'a> Slots<'a> {
    fn of(self, port: &'a PortPlan, set: EndpointSet) -> Order<'a> {
        let (cluster, local) = self.0.split_at(EndpointSet::Cluster.of(port).len());
        let slots = match set {
            EndpointSet::Cluster => cluster,
            EndpointSet::Local => local,
        };
        Order { slots, backends: set.of(port) }
    }
}

/// Where each of the sorted `old` backends is among the sorted `new` ones.
fn positions(old: &[Backend], new: &[Backend]) -> Vec<Option<u16>> {
    let mut new = (0u16..).zip(new).peekable();
    old.iter()
        .map(|old| {
            while new.next_if(|(_, backend)| backend.address < old.address).is_some() {}
            new.peek().filter(|(_, backend)| backend.address == old.address).map(|(i, _)| *i)
        })
        .collect()
}

/// The slots that the kernel was found to have, by position in the port's sorted list.
fn found(port: &PortPlan, set: EndpointSet, kernel: &impl Kernel) -> Vec<Option<u16>> {
    let wanted = set.of(port);
    let mut placed = vec![false; wanted.len()];
    let mut position = |address: SocketAddr| {
        let i = wanted.binary_search_by(|backend| backend.address.cmp(&address.into())).ok()?;
        // Twice in the kernel can only be somebody else's doing; the second place counts as a gap.
        (!std::mem::replace(&mut placed[i], true)).then(|| u16::try_from(i).ok())?
    };
    let Some(held) = port.frontends.iter().find_map(|frontend| {
        let held = layout(frontend).1.iter().position(|used| *used == Some(set))?;
        Some(Target::new(port, frontend).slots[held])
    }) else {
        return Vec::new();
    };
    let slots = (0..MAX_SLOTS as u32).map_while(|slot| kernel.backend(&held.slot(slot)));
    slots.map(&mut position).collect()
}

/// Gives each of `wanted` backends a slot so that as few of the current slots as possible change: who stays keeps
/// its slot, newcomers fill the gaps, and the last ones move into gaps that are left.
fn assign(mut slots: Vec<Option<u16>>, wanted: usize) -> Vec<u16> {
    let mut placed = vec![false; wanted];
    for slot in &mut slots {
        *slot = slot.filter(|i| usize::from(*i) < wanted);
        if let Some(i) = slot {
            placed[usize::from(*i)] = true;
        }
    }
    let mut newcomers = (0u16..).zip(placed).filter(|(_, placed)| !placed).map(|(i, _)| i);
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

/// An endpoint set by slot.
#[derive(Clone, Copy, Default)]
struct Order<'a> {
    slots: &'a [u16],
    backends: &'a [Backend],
}

impl Order<'_> {
    fn len(self) -> u32 {
        self.slots.len() as u32
    }

    fn at(self, slot: u32) -> Option<AddressPort> {
        let i = self.slots.get(slot as usize)?;
        self.backends.get(usize::from(*i)).map(|backend| backend.address)
    }
}

/// The sets that name frontends. Each kind of frontend uses some of them.
const NAMING: [Set; 11] = [
    Set::Vips,
    Set::VipsLocal,
    Set::VipsMasq,
    Set::VipsReject,
    Set::Nps,
    Set::NpsLocal,
    Set::NpsReject,
    Set::Ranged,
    Set::Affinity,
    Set::AffinityLocalOnly,
    Set::NpAffinity,
];

/// The sets that name a frontend, and its endpoint sets in each of [`Target::slots`].
fn layout(frontend: &Frontend) -> (&'static [Set], [Option<EndpointSet>; 2]) {
    use EndpointSet as E;
    use FrontendAddress::{NodePort, Vip};
    match (frontend.at, frontend.kind, frontend.verdict) {
        (Vip(_), _, Verdict::Reject) => (&[Set::VipsReject], [None, None]),
        (Vip(_), FrontendKind::ClusterIp, Verdict::Cluster) => (&[Set::Vips], [Some(E::Cluster), None]),
        (Vip(_), FrontendKind::ClusterIp, Verdict::Local) => (&[Set::Vips], [Some(E::Local), None]),
        (Vip(_), _, Verdict::Cluster) => (&[Set::Vips, Set::VipsMasq], [Some(E::Cluster), None]),
        (Vip(_), _, Verdict::Local) => (&[Set::Vips, Set::VipsLocal], [Some(E::Cluster), Some(E::Local)]),
        (NodePort(_), _, Verdict::Reject) => (&[Set::NpsReject], [None, None]),
        (NodePort(_), _, Verdict::Cluster) => (&[Set::Nps], [Some(E::Cluster), None]),
        (NodePort(_), _, Verdict::Local) => (&[Set::Nps, Set::NpsLocal], [Some(E::Cluster), Some(E::Local)]),
    }
}

/// How many slots a frontend has in each of [`Target::slots`]; `None`: nobody draws there.
pub(crate) fn sizes(port: &PortPlan, frontend: &Frontend) -> [Option<usize>; 2] {
    layout(frontend).1.map(|set| set.map(|set| set.of(port).len()))
}

/// What a frontend is in the kernel; the default: nothing.
#[derive(Clone, Copy, Default)]
struct Shape<'a> {
    /// The sets that name it, `ranged` and those below apart.
    named: &'static [Set],
    /// Those that name it for its session affinity.
    affinity: &'static [Set],
    /// Its endpoint sets, in each of [`Target::slots`].
    endpoints: [Order<'a>; 2],
    /// Who may dial it; `None`: everybody.
    ranges: Option<&'a [IpNetwork]>,
}

impl<'a> Shape<'a> {
    fn new(frontend: &Frontend, port: &'a PortPlan, slots: Slots<'a>) -> Self {
        let (named, sets) = layout(frontend);
        let endpoints = sets.map(|set| set.map(|set| slots.of(port, set)).unwrap_or_default());
        let ranges = port.source_ranges.as_deref().filter(|_| frontend.kind == FrontendKind::LoadBalancer);
        Self { named, affinity: affinity::named(port, frontend), endpoints, ranges }
    }

    fn is_in(&self, set: Set) -> bool {
        let is_named = self.named.contains(&set) || self.affinity.contains(&set);
        is_named || (set == Set::Ranged && self.ranges.is_some())
    }
}

/// Where a frontend's elements are.
pub(crate) struct Target {
    /// Where it is refused.
    pub(crate) refusals: Place,
    /// Where its slots are: the first, and those for clients from outside where it leads them to its Local set.
    pub(crate) slots: [SlotsAt; 2],
    has_ranges: bool,
}

/// Where the slots of one endpoint set of a frontend are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotsAt {
    /// Where the frontend is named if it has them.
    pub(crate) named: Place,
    /// The beginning of all their keys.
    pub(crate) all: Place,
    /// The same of how many there are.
    more: Place,
}

impl SlotsAt {
    /// Those of the frontend with this name; `None`: nothing is picked because of that set of names.
    pub(crate) fn of(name: &Place) -> Option<Self> {
        let sets = VIP_SLOTS.into_iter().chain(NODEPORT_SLOTS).find(|sets| sets.named == name.set)?;
        Some(Self::new(sets, |set| Place { set, ..*name }))
    }

    fn new(sets: SlotSets, place: impl Fn(Set) -> Place) -> Self {
        Self { named: place(sets.named), all: place(sets.slots), more: place(sets.more) }
    }

    /// A slot.
    pub(crate) fn slot(self, slot: u32) -> Place {
        Place { key: self.all.key.slot(slot), ..self.all }
    }

    /// Where it says that there are more slots than this.
    pub(crate) fn more(self, than: u32) -> Place {
        Place { key: self.more.key.slot(than), ..self.more }
    }
}

impl Target {
    /// Where those of this frontend are.
    pub(crate) fn new(port: &PortPlan, frontend: &Frontend) -> Self {
        let (family, protocol) = (port.family, port.protocol);
        let (key, refusals, slots) = match frontend.at {
            FrontendAddress::Vip(address) => {
                (Key::vip(address.socket(), protocol), Set::VipsReject, VIP_SLOTS)
            }
            FrontendAddress::NodePort(port) => {
                (Key::nodeport(port, protocol), Set::NpsReject, NODEPORT_SLOTS)
            }
        };
        let place = |set| Place { family, set, key };
        Self {
            refusals: place(refusals),
            slots: slots.map(|sets| SlotsAt::new(sets, place)),
            has_ranges: matches!(frontend.at, FrontendAddress::Vip(_)),
        }
    }

    /// It in one of the sets that name it.
    fn named(&self, set: Set) -> Place {
        Place { set, ..self.refusals }
    }
}

/// The change of one frontend.
struct Change<'a, K> {
    at: Target,
    comment: &'a Arc<str>,
    kernel: &'a K,
}

impl<K: Kernel> Change<'_, K> {
    /// Adds to `out` what leads from one shape to another. Whatever else the kernel was found to hold of the frontend
    /// goes.
    fn lower(&self, old: Shape<'_>, new: Shape<'_>, out: &mut Lowered) {
        for set in NAMING {
            self.toggle(self.at.named(set), old.is_in(set), new.is_in(set), out);
        }
        for ((at, old), new) in self.at.slots.into_iter().zip(old.endpoints).zip(new.endpoints) {
            self.slots(at, old, new, out);
            for step in (0..CLASSES - 1).map(|i| 1 << i) {
                self.toggle(at.more(step), old.len() > step, new.len() > step, out);
            }
        }
        if self.at.has_ranges {
            self.ranges(old.ranges.unwrap_or_default(), new.ranges.unwrap_or_default(), out);
        }
    }

    fn toggle(&self, place: Place, old: bool, new: bool, out: &mut Lowered) {
        match (old, new) {
            (false, true) => self.add(place, None, out),
            (true, false) => out.removed.push(place),
            (false, false) if self.kernel.holds(&place) => out.removed.push(place),
            _ => {}
        }
    }

    fn slots(&self, at: SlotsAt, old: Order<'_>, new: Order<'_>, out: &mut Lowered) {
        for slot in 0.. {
            let (old, new, place) = (old.at(slot), new.at(slot), at.slot(slot));
            let stale = (old, new) == (None, None);
            if stale && !self.kernel.holds(&place) {
                break;
            }
            if stale || (old.is_some() && old != new) {
                out.removed.push(place);
            }
            if let Some(backend) = new.filter(|_| old != new) {
                self.add(place, Some(Data::backend(backend.socket())), out);
            }
        }
    }

    fn ranges(&self, old: &[IpNetwork], new: &[IpNetwork], out: &mut Lowered) {
        let all = self.at.named(Set::Ranges);
        let place = |network: &IpNetwork| Place { key: all.key.clients(*network), ..all };
        let stale = self.kernel.below(all).map(|(place, _)| place);
        out.removed.extend(stale.filter(|held| new.iter().all(|network| place(network) != *held)));
        out.removed.extend(only_in(old, new).map(place));
        for network in only_in(new, old) {
            self.add(place(network), None, out);
        }
    }

    fn add(&self, place: Place, data: Option<Data>, out: &mut Lowered) {
        out.added.push(Element { place, data, comment: Some(Arc::clone(self.comment)) });
    }
}

#[cfg(test)]
#[path = "lower_tests.rs"]
mod tests;
