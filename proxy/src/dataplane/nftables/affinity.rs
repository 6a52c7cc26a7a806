//! Session affinity: the objects of a port that leads its clients back to the backend they had, and what one change
//! does to them.
//!
//! Pure: reads plans, yields objects, rules and elements. Never does I/O; what the maps remember is read and edited by
//! [`super::remembered`].
//!
//! Such a port has a map client → backend (`aff/namespace/name/protocol/port/8080`), filled after the DNAT and consulted
//! before a pick: by two chains, reached by the frontends' elements in verdict maps. All its frontends share the map. The
//! timeout stands in the rule that learns. A map is of backends with one port, which its name and the rules say: nft
//! 1.0.6 lists a rule that puts IPv6 address and port into a map, and aborts when it is to take it back. So a port whose
//! backends listen on several ports has several maps.
//!
//! What is learned has to be in the endpoint set, whose members stand in a set of their own (`aff-members/…`): a packet
//! that was led to a backend before that left must not be remembered after, or whoever comes next is led there again.
//!
//! A port that uses its Cluster *and* its Local set (`externalTrafficPolicy: Local` with its short-circuit, or
//! `internalTrafficPolicy: Local` at the cluster IP alone) has maps and members of each, since a remembered backend counts
//! only where it is in the set that a client gets. What is learned goes to the map of each set that has the backend.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::sync::Arc;

use super::element::{Data, Element, Key, Place, fnv1a};
use super::expr::{Expr, LookupIn, Reg};
use super::kernel::Kernel;
use super::object::{Kind, Object, Scope};
use super::rules::{Chain, Keys};
use super::schema::Set;
use super::shared::only_in;
use crate::model::input::{Family, Protocol};
use crate::model::plan::{
    AddressPort, Backend, Frontend, FrontendAddress, FrontendKind, Plan, PortPlan, Verdict,
};

/// The register behind the longest address.
const SECOND: u32 = 16;

/// A port that remembers its clients.
#[derive(Clone, Debug)]
pub(crate) struct Port<'a> {
    plan: &'a PortPlan,
    name: Arc<str>,
    /// How long it remembers a client after the last new connection.
    pub(crate) timeout: NonZeroU32,
    uses: BTreeSet<Scope>,
}

impl<'a> Port<'a> {
    /// The port, if it has affinity and something to remember.
    pub(crate) fn new(plan: &Plan, port: &'a PortPlan) -> Option<Self> {
        let timeout = port.affinity?;
        let uses: BTreeSet<_> = port.frontends.iter().flat_map(scopes).map(|(_, scope)| scope).collect();
        (!uses.is_empty()).then(|| Self { plan: port, name: name(plan, port), timeout, uses })
    }

    /// The endpoint sets that its frontends use.
    pub(crate) fn scopes(&self) -> impl Iterator<Item = Scope> {
        self.uses.iter().copied()
    }

    /// Whether it uses both sets.
    fn is_mixed(&self) -> bool {
        self.uses.len() > 1
    }

    /// The sorted backends of one of its sets.
    fn backends(&self, scope: Scope) -> &'a [Backend] {
        match scope {
            Scope::Cluster => &self.plan.backends,
            Scope::Local => &self.plan.local_backends,
        }
    }

    /// Whether a backend is in the set.
    pub(crate) fn has(&self, scope: Scope, backend: AddressPort) -> bool {
        self.backends(scope).binary_search_by(|candidate| candidate.address.cmp(&backend)).is_ok()
    }

    fn object(&self, kind: Kind) -> Object {
        Object { kind, family: self.plan.family, port: Arc::clone(&self.name) }
    }

    /// Those in one of its sets, in order.
    pub(crate) fn members(&self, scope: Scope) -> Vec<AddressPort> {
        self.backends(scope).iter().map(|backend| backend.address).collect()
    }

    /// The set of these.
    pub(crate) fn members_set(&self, scope: Scope) -> Object {
        self.object(Kind::Members(scope))
    }

    /// The ports that a set's backends listen on: one for nearly every Service.
    pub(crate) fn targets(&self, scope: Scope) -> BTreeSet<u16> {
        self.backends(scope).iter().map(|backend| backend.address.port).collect()
    }

    /// The map of one of its sets for backends with this port.
    pub(crate) fn map(&self, scope: Scope, target: u16) -> Object {
        self.object(Kind::Map(scope, target))
    }

    /// The maps of one of its sets, in the order in which they are consulted.
    pub(crate) fn maps(&self, scope: Scope) -> impl Iterator<Item = Object> {
        self.targets(scope).into_iter().map(move |target| self.map(scope, target))
    }

    fn objects(&self) -> BTreeSet<Object> {
        let mut objects = BTreeSet::from([self.object(Kind::Learn)]);
        for scope in self.scopes() {
            objects.insert(self.object(Kind::Consult(scope)));
            objects.extend(self.maps(scope));
            objects.insert(self.members_set(scope));
        }
        objects
    }

    /// The chains and their rules.
    fn chains(&self) -> Vec<(Object, Vec<Vec<Expr>>)> {
        let (mut chains, mut learn) = (Vec::new(), Vec::new());
        for scope in self.scopes() {
            let targets = self.targets(scope);
            let consult = targets.iter().map(|target| self.consult(scope, *target)).collect();
            chains.push((self.object(Kind::Consult(scope)), consult));
            learn.extend(targets.iter().map(|target| self.learn(scope, *target)));
        }
        chains.push((self.object(Kind::Learn), learn));
        chains
    }

    fn keys(&self) -> Keys {
        Keys { family: self.plan.family }
    }

    /// `meta l4proto`: nft does not print ports without it.
    fn protocol(&self) -> [Expr; 2] {
        let reg = Reg(0);
        let bytes = vec![self.plan.protocol.number()];
        [Expr::Protocol { reg }, Expr::Compare { reg, bytes, invert: false }]
    }

    /// `dnat to ip saddr map @aff/…/8080:8080`: whoever is not remembered goes on to the pick.
    fn consult(&self, scope: Scope, target: u16) -> Vec<Expr> {
        let (keys, address, port) = (self.keys(), Reg(0), Reg(SECOND));
        let set = LookupIn::Named(self.map(scope, target).name());
        let mut rule = Vec::from(self.protocol());
        rule.extend([
            keys.source(Reg(0)),
            Expr::Lookup { set, key: Reg(0), data: Some(address), invert: false },
            Expr::Immediate { bytes: target.to_be_bytes().into(), reg: port },
            Expr::Dnat { v6: keys.v6(), address, port },
        ]);
        rule
    }

    /// `th dport 8080 ip daddr . th dport @aff-members/… update @aff/…/8080 { ip saddr timeout 3h : ip daddr }`.
    fn learn(&self, scope: Scope, target: u16) -> Vec<Expr> {
        let (keys, reg) = (self.keys(), Reg(0));
        let mut rule = Vec::from(self.protocol());
        rule.extend([
            Expr::DestinationPort { reg },
            Expr::Compare { reg, bytes: target.to_be_bytes().into(), invert: false },
        ]);
        let members = LookupIn::Named(self.members_set(scope).name());
        rule.extend([
            keys.destination(reg),
            Expr::DestinationPort { reg: keys.after_address() },
            Expr::Lookup { set: members, key: reg, data: None, invert: false },
        ]);
        let (map, timeout) = (self.map(scope, target).name(), self.timeout);
        rule.extend([
            keys.source(reg),
            keys.destination(Reg(SECOND)),
            Expr::Update { map, key: reg, data: Reg(SECOND), timeout },
        ]);
        rule
    }

    /// The frontends' elements: to consult before a pick, and to learn.
    fn elements(&self) -> BTreeMap<Place, Data> {
        let mut elements = BTreeMap::new();
        let (family, protocol): (Family, Protocol) = (self.plan.family, self.plan.protocol);
        for frontend in &self.plan.frontends {
            let mut put = |[vip, nodeport]: [Set; 2], data| {
                let (set, key) = match frontend.at {
                    FrontendAddress::Vip(address) => (vip, Key::vip(address.socket(), protocol)),
                    FrontendAddress::NodePort(port) => (nodeport, Key::nodeport(port, protocol)),
                };
                elements.insert(Place { family, set, key }, data);
            };
            let mut learns = false;
            for (sets, scope) in scopes(frontend) {
                put(sets, Data::Jump(self.object(Kind::Consult(scope)).name()));
                learns = true;
            }
            if learns {
                put([Set::AffLearn, Set::NpAffLearn], Data::Goto(self.object(Kind::Learn).name()));
            }
        }
        elements
    }
}

/// From which slots a frontend's clients pick, by the verdict maps that are searched before (VIPs, NodePorts), and
/// which endpoint set is there.
fn scopes(frontend: &Frontend) -> impl Iterator<Item = ([Set; 2], Scope)> + use<> {
    const FIRST: [Set; 2] = [Set::Aff, Set::NpAff];
    const SECOND: [Set; 2] = [Set::AffLocal, Set::NpAffLocal];
    let (first, second) = match (frontend.verdict, frontend.kind) {
        (Verdict::Cluster, _) => (Some((FIRST, Scope::Cluster)), None),
        (Verdict::Local, FrontendKind::ClusterIp) => (Some((FIRST, Scope::Local)), None),
        (Verdict::Local, _) => (Some((FIRST, Scope::Cluster)), Some((SECOND, Scope::Local))),
        (Verdict::Reject, _) => (None, None),
    };
    first.into_iter().chain(second)
}

/// `namespace/name/protocol/port`, as nft's grammar takes it in a name: where a manifest's name holds anything else,
/// with a hash behind it.
fn name(plan: &Plan, port: &PortPlan) -> Arc<str> {
    /// With the longest prefix before it, a name stays below the kernel's 255 bytes.
    const MAX: usize = 230;
    let mut name = format!("{}/{}", plan.service, port.protocol.to_string().to_lowercase());
    if !port.name.is_empty() {
        name.push('/');
        name.push_str(&port.name);
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || "/-_.".contains(c);
    if name.len() > MAX || !name.chars().all(fits) {
        let hash = fnv1a(name.as_bytes());
        let replaced = name.chars().map(|c| if fits(c) { c } else { '_' }).take(MAX - 17).collect::<String>();
        name = format!("{replaced}_{hash:016x}");
    }
    name.into()
}

/// What one Service's change does to its objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Change {
    /// Elements to remove, before anything else.
    pub(crate) removed: Vec<Place>,
    /// Objects to remove, in this order: chains before, sets and maps once the rules are written.
    pub(crate) dropped: Vec<Object>,
    /// Sets to remove before they are created anew, and the chain that names them.
    pub(crate) replaced: Vec<Object>,
    /// Objects to create, where they do not exist.
    pub(crate) created: Vec<Object>,
    /// Chains to fill with these rules, whatever they held.
    pub(crate) rules: Vec<(Object, Chain)>,
    /// Who is no longer, and who is from now on, a member; `None`: whoever it is, all of the set is replaced.
    pub(crate) members: Vec<(Object, Option<Vec<AddressPort>>, Vec<AddressPort>)>,
    /// Elements to add, after everything else.
    pub(crate) added: Vec<Element>,
    /// Ports whose maps have to be looked through.
    pub(crate) reviews: Vec<Review>,
}

/// The maps of a port have to be looked through: with the change, and once more after it, since a packet on its way may
/// be found to be remembered before, and be remembered after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Review {
    /// The port's position in its plan.
    pub(crate) port: usize,
    /// The maps that may remember something.
    pub(crate) sources: Vec<Object>,
}

impl Change {
    /// What has to change so that `next` has affinity as planned where `previous` is in force.
    pub(crate) fn between(
        previous: Option<&Arc<Plan>>,
        next: Option<&Arc<Plan>>,
        kernel: &impl Kernel,
    ) -> Self {
        let mut change = Self::default();
        for (i, port) in ports(next) {
            let old = previous.and_then(|plan| Some((plan, find(plan, port)?)));
            if old.is_none_or(|(_, old)| old != port) {
                let old = old.and_then(|(plan, old)| Port::new(plan, old));
                let new = next.and_then(|plan| Port::new(plan, port));
                change.port(old.as_ref(), new.as_ref().map(|new| (i, new)), kernel);
            }
        }
        for (_, port) in ports(previous) {
            if next.and_then(|plan| find(plan, port)).is_none_or(|port| port.affinity.is_none()) {
                let old = previous.and_then(|plan| Port::new(plan, port));
                change.port(old.as_ref(), None, kernel);
            }
        }
        // A removed chain must not be named by anything, nor a removed map by a chain.
        change.dropped.sort();
        change
    }

    fn port(&mut self, old: Option<&Port<'_>>, new: Option<(usize, &Port<'_>)>, kernel: &impl Kernel) {
        let elements = |port: Option<&Port<'_>>| port.map(Port::elements).unwrap_or_default();
        let objects = |port: Option<&Port<'_>>| port.map(Port::objects).unwrap_or_default();
        let position = new.map(|(i, _)| i);
        let new = new.map(|(_, port)| port);
        let (old_elements, new_elements) = (elements(old), elements(new));
        self.removed.extend(
            old_elements
                .iter()
                .filter(|(place, data)| new_elements.get(place) != Some(data))
                .map(|(p, _)| *p),
        );
        self.added.extend(
            new_elements
                .into_iter()
                .filter(|(place, data)| old_elements.get(place) != Some(data))
                .map(|(place, data)| Element { place, data: Some(data), comment: None }),
        );
        let (old_objects, new_objects) = (objects(old), objects(new));
        self.dropped.extend(old_objects.difference(&new_objects).cloned());
        self.created.extend(new_objects.difference(&old_objects).cloned());
        let Some((position, new)) = position.zip(new) else { return };
        let written = old.map(Port::chains).unwrap_or_default();
        for chain in new.chains().into_iter().filter(|chain| !written.contains(chain)) {
            let (object, rules) = chain;
            let chain = Chain { name: object.to_string(), base: None, rules };
            self.rules.push((object, chain));
        }
        // Members of both sets count the same connections, if they begin to count at the same time.
        let anew = kernel.counts() && old.is_some_and(|old| old.uses != new.uses);
        for scope in new.scopes() {
            let members = new.members_set(scope);
            let backends = new.members(scope);
            let known = old.filter(|old| old.uses.contains(&scope)).map(|old| old.members(scope));
            let known = known.or_else(|| kernel.members(&members).map(<[_]>::to_vec));
            if kernel.is_outdated(&members) {
                let learn = new.object(Kind::Learn);
                self.replaced.extend(kernel.holds_object(&learn).then_some(learn));
                self.replaced.push(members.clone());
                self.members.push((members, Some(Vec::new()), backends));
            } else if known.is_some() && anew || known.is_none() && kernel.holds_object(&members) {
                self.members.push((members, None, backends));
            } else {
                let known = known.unwrap_or_default();
                let only = |these: &[_], those: &[_]| only_in(these, those).copied().collect::<Vec<_>>();
                let (left, joined) = (only(&known, &backends), only(&backends, &known));
                if !(left.is_empty() && joined.is_empty()) {
                    self.members.push((members, Some(left), joined));
                }
            }
        }
        let sources = sources(old, new, kernel);
        if !sources.is_empty() {
            self.reviews.push(Review { port: position, sources });
        }
    }
}

/// The maps whose entries one change of a port concerns: those that exist, if a remembered backend may have gone, an
/// entry may have to live for another time, or one map's entries may have got a meaning for the other.
fn sources(old: Option<&Port<'_>>, new: &Port<'_>, kernel: &impl Kernel) -> Vec<Object> {
    let Some(old) = old else {
        let both = [Scope::Cluster, Scope::Local].into_iter();
        let targets: BTreeSet<_> = new.scopes().flat_map(|scope| new.targets(scope)).collect();
        let maps = both.flat_map(|scope| targets.iter().map(move |target| new.map(scope, *target)));
        return maps.filter(|map| kernel.holds_object(map)).collect();
    };
    let concerned = |scope| {
        let (left, joined) = difference(old.backends(scope), new.backends(scope));
        !left.is_empty() || (new.is_mixed() && !joined.is_empty())
    };
    let maps: Vec<_> = old.scopes().flat_map(|scope| old.maps(scope)).collect();
    // A map of an earlier run, of a set that this one has not used until now.
    let found = new.scopes().flat_map(|scope| new.maps(scope));
    let found: Vec<_> = found.filter(|map| !maps.contains(map) && kernel.holds_object(map)).collect();
    if old.timeout != new.timeout || old.uses != new.uses || new.scopes().any(concerned) || !found.is_empty()
    {
        [maps, found].concat()
    } else {
        Vec::new()
    }
}

/// The addresses that are only in the first, and only in the second, of two sorted sets.
fn difference(old: &[Backend], new: &[Backend]) -> (Vec<AddressPort>, Vec<AddressPort>) {
    let only = |these: &[Backend], those: &[Backend]| {
        let is_there = |backend: &&Backend| {
            those.binary_search_by(|candidate| candidate.address.cmp(&backend.address)).is_ok()
        };
        these.iter().filter(|backend| !is_there(backend)).map(|backend| backend.address).collect()
    };
    (only(old, new), only(new, old))
}

fn ports(plan: Option<&Arc<Plan>>) -> impl Iterator<Item = (usize, &PortPlan)> {
    let ports = plan.map(|plan| &*plan.ports).unwrap_or_default();
    ports.iter().enumerate().filter(|(_, port)| port.affinity.is_some())
}

/// The same port in another plan of the Service: ports are sorted by what makes them the same.
pub(crate) fn find<'a>(plan: &'a Plan, port: &PortPlan) -> Option<&'a PortPlan> {
    let identity = |port: &'a PortPlan| (port.family, port.protocol, &*port.name);
    let order = |candidate: &'a PortPlan| identity(candidate).cmp(&(port.family, port.protocol, &port.name));
    Some(&plan.ports[plan.ports.binary_search_by(order).ok()?])
}

#[cfg(test)]
#[path = "affinity_tests.rs"]
mod tests;
