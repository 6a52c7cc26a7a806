//! From plans to writes: what the maps have to say of each Service, and what one change of it writes.
//!
//! Pure: reads plans and what the maps were found to hold, yields [`Write`]s in an order in which a program may read
//! between any two of them. Owns the ids. Never decides what is answered (`answers` does), never waits: what no map names
//! any more is handed out as `Retired`, and used again when it is given back.

mod addresses;
mod adopt;
#[cfg(test)]
mod history_tests;
mod ids;
mod image;
#[cfg(test)]
mod lower_tests;
mod members;
#[cfg(test)]
mod memory_tests;
mod port;

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::net::IpAddr;
use std::sync::Arc;

use itertools::{EitherOrBoth, Itertools as _};
use kube_lane_common::{FrontendKey, PodCgroups, Set, Settings};

use self::addresses::{Addresses, Change, Handle, all_backends, key};
use self::adopt::{FoundPort, adopt};
use self::ids::Range;
pub use self::ids::Retired;
use self::image::{Edit, Image, Placed};
use self::members::{Both, Difference, members};
use self::port::{Next, Port};
use super::answers::{Answer, Clashes, EndpointSet, Limit, Policy, Why, answers};
use super::write::{Found, Sizes, Write};
use crate::dataplane::Batch;
use crate::model::input::{Family, ServiceKey};
use crate::model::plan::{AddressPort, Frontend, NodePlan, Plan, PortPlan, Verdict};

/// How many Services that wait are tried in vain before a commit lets it be.
const RETRIES: u32 = 64;
/// What is known of the node before anybody has told of it.
static UNKNOWN: NodePlan = NodePlan {
    nodeport_addresses: Vec::new(),
    interface_addresses: Vec::new(),
    pod_cidrs: Vec::new(),
    service_cidrs: Vec::new(),
    warnings: Vec::new(),
};

/// What the socket layer says of all Services.
#[derive(Debug)]
pub struct Lowering {
    policy: Policy,
    /// `None`: nobody has told yet, and where an earlier run's NodePorts answer they still do.
    node: Option<NodePlan>,
    handles: BTreeMap<ServiceKey, Handle>,
    /// By handle; `None`: nobody has it.
    services: Vec<Option<Service>>,
    vacant: Vec<Handle>,
    addresses: Addresses,
    image: Image,
    /// What an earlier run left and nobody has claimed.
    found: BTreeMap<u32, FoundPort>,
    /// Services that there was no room for, and of what.
    waiting: BTreeMap<Handle, Limit>,
    /// The first of them to try next.
    next: Handle,
    /// Something was given up since one of them was tried.
    room: bool,
}

/// What one commit came to, its writes apart.
#[derive(Debug, Default)]
pub struct Lowered {
    /// The Services that there is no room for, and had it before or are new: nftables answers all of each.
    pub full: Vec<(ServiceKey, Limit)>,
    /// What may be used again after a grace period: [`Lowering::reclaim`].
    pub retired: Retired,
}

/// A port of a Service, as `status` and the counters want it.
#[derive(Debug)]
pub struct PortView<'a> {
    /// The port.
    pub plan: &'a PortPlan,
    /// Who answers each of its frontends, in their order.
    pub answers: Box<[Answer]>,
    /// Its id in the maps; 0: it is not there.
    pub id: u32,
    /// The ids of its backends.
    ids: &'a [u32],
    used: Both<bool>,
}

impl<'a> PortView<'a> {
    /// The backends that sockets may be led to, and their ids.
    pub fn backends(&self) -> impl Iterator<Item = (AddressPort, u32)> + use<'a> {
        members(self.plan, self.used).map(|member| member.address).zip(self.ids.iter().copied())
    }
}

/// A Service as it is in the maps.
#[derive(Debug)]
struct Service {
    plan: Arc<Plan>,
    /// For each port of the plan.
    ports: Box<[Port]>,
}

impl Lowering {
    /// Takes over what an earlier run left, and says what puts right what that left half done. The caller writes this, and
    /// waits for a grace period before it calls again, since programs may still hold what that run had retired.
    pub fn adopt(policy: Policy, found: Found, sizes: Sizes) -> (Self, Vec<Write>) {
        let mut writes = Vec::new();
        let (image, found) = adopt(found, sizes, &mut |write| writes.push(write));
        let lowering = Self {
            policy,
            node: None,
            handles: BTreeMap::new(),
            services: Vec::new(),
            vacant: Vec::new(),
            addresses: Addresses::default(),
            image,
            found,
            waiting: BTreeMap::new(),
            next: 0,
            room: false,
        };
        (lowering, writes)
    }

    /// What has to be written so that the maps say what the plans do.
    pub fn apply(&mut self, batch: &Batch, write: &mut dyn FnMut(Write)) -> Lowered {
        let mut lowered = Lowered::default();
        let mut touched = BTreeSet::new();
        if let Some(node) = &batch.node {
            self.move_node(node, &mut touched, write);
        }
        let mut turns = Vec::with_capacity(batch.services.len());
        for (key, plan) in &batch.services {
            turns.extend(self.handle(key, plan.is_some()).map(|handle| (handle, key, plan.as_ref())));
        }
        let changes = turns.iter().map(|&(service, _, plan)| {
            let old = self.services[service as usize].as_ref().map(|service| &*service.plan);
            Change { service, old, new: plan.map(|plan| &**plan) }
        });
        self.addresses.replace(&changes.collect::<Vec<_>>(), &mut touched);
        for (handle, key, plan) in turns {
            self.turn(handle, key, plan, touched.remove(&handle), write, &mut lowered);
        }
        for handle in touched {
            self.again(handle, true, write, &mut lowered);
        }
        if batch.sweep {
            self.sweep(write);
        }
        self.retry(write, &mut lowered);
        self.settle_node(write);
        lowered.full.retain(|(key, _)| self.is_full(key));
        lowered.retired = mem::take(&mut self.image.retired);
        lowered
    }

    /// A grace period has passed since these were retired.
    pub fn reclaim(&mut self, retired: Retired) {
        self.room |= !retired.is_empty();
        self.image.ports.give_back(retired.ports);
        self.image.backends.give_back(retired.backends);
        self.image.ranges.give_back(retired.ranges);
    }

    /// What the programs are to know of the node. `host` is the cookie of the host's network namespace.
    pub fn settings(&self, host: u64, pods: PodCgroups) -> Settings {
        self.policy.settings(self.node(), host, pods)
    }

    /// The ports of a Service; `None`: there is no such Service.
    pub fn service<'a>(&'a self, key: &ServiceKey) -> Option<impl Iterator<Item = PortView<'a>> + use<'a>> {
        let handle = self.handles.get(key)?;
        let service = self.services.get(*handle as usize)?.as_ref()?;
        let full = self.waiting.get(handle).copied();
        Some(service.plan.ports.iter().zip(&service.ports).map(move |(plan, port)| {
            let mut answers = self.answers(plan, self.clash(plan, None));
            if let Some(limit) = full {
                let socket = answers.iter_mut().filter(|answer| answer.set().is_some());
                socket.for_each(|answer| *answer = Answer::Nftables(Why::Full(limit)));
            }
            PortView { plan, answers, id: port.id, ids: &port.ids, used: port.used }
        }))
    }

    /// There is no room for a Service: nftables answers all of it.
    pub fn is_full(&self, key: &ServiceKey) -> bool {
        self.handles.get(key).is_some_and(|handle| self.waiting.contains_key(handle))
    }

    /// All that was ever applied, for a fresh start: none of the node where that was not.
    pub fn everything(&self) -> Batch {
        let services = self.services.iter().flatten();
        Batch {
            node: self.node.clone(),
            services: services
                .map(|service| (service.plan.service.clone(), Some(Arc::clone(&service.plan))))
                .collect(),
            sweep: false,
        }
    }

    fn handle(&mut self, key: &ServiceKey, create: bool) -> Option<Handle> {
        if let Some(handle) = self.handles.get(key) {
            return Some(*handle);
        }
        create.then(|| {
            let handle = self.vacant.pop().unwrap_or_else(|| {
                self.services.push(None);
                self.services.len() as Handle - 1
            });
            self.handles.insert(key.clone(), handle);
            handle
        })
    }

    /// The node has changed. Where that changes who is answered, every Service is looked at again; where it changes
    /// addresses, those that they concern.
    fn move_node(&mut self, node: &NodePlan, touched: &mut BTreeSet<Handle>, write: &mut dyn FnMut(Write)) {
        let detects = |node: &NodePlan| Family::ALL.map(|family| self.policy.detects(family, node));
        let detection = detects(node) != detects(self.node());
        self.node = Some(node.clone());
        self.addresses.move_node(node, touched);
        if detection {
            touched.extend(self.handles.values());
        }
        let gone: Vec<_> =
            self.image.node_addresses.iter().copied().filter(|ip| !self.answers_on(ip)).collect();
        let mut edit = Edit { image: &mut self.image, sink: write };
        gone.into_iter().for_each(|ip| edit.node_address(ip, false));
    }

    fn answers_on(&self, ip: &IpAddr) -> bool {
        self.policy.external && self.node().nodeport_addresses.contains(ip)
    }

    /// NodePorts answer on new addresses once they are all there.
    fn settle_node(&mut self, write: &mut dyn FnMut(Write)) {
        let come =
            self.node.iter().flat_map(|node| &node.nodeport_addresses).filter(|_| self.policy.external);
        let mut edit = Edit { image: &mut self.image, sink: write };
        come.for_each(|ip| edit.node_address(*ip, true));
    }

    /// Looks at a Service again whose plan has not changed.
    fn again(&mut self, handle: Handle, recheck: bool, write: &mut dyn FnMut(Write), lowered: &mut Lowered) {
        if let Some(service) = &self.services[handle as usize] {
            let plan = Arc::clone(&service.plan);
            self.turn(handle, &plan.service, Some(&plan), recheck, write, lowered);
        }
    }

    /// Programs one Service. `recheck`: other Services' addresses have changed so that it may be touched.
    fn turn(
        &mut self,
        handle: Handle,
        key: &ServiceKey,
        plan: Option<&Arc<Plan>>,
        recheck: bool,
        write: &mut dyn FnMut(Write),
        lowered: &mut Lowered,
    ) {
        let known = self.services[handle as usize].take();
        let recheck = recheck || known.is_none();
        let Some(plan) = plan else {
            self.emit(known, Vec::new(), write);
            self.waiting.remove(&handle);
            self.handles.remove(key);
            self.vacant.push(handle);
            return;
        };
        let old = known.or_else(|| self.claim(plan));
        let mut nexts = self.next(handle, old.as_ref(), plan, recheck, false);
        match self.reserve(old.as_ref(), &mut nexts) {
            Ok(()) => drop(self.waiting.remove(&handle)),
            Err(limit) => {
                nexts = self.next(handle, old.as_ref(), plan, recheck, true);
                if self.waiting.insert(handle, limit).is_none() {
                    lowered.full.push((key.clone(), limit));
                }
            }
        }
        let ports = self.emit(old, nexts, write);
        self.services[handle as usize] = Some(Service { plan: Arc::clone(plan), ports });
    }

    /// Tries the Services that wait, in turns, so that those which need much do not starve the others.
    fn retry(&mut self, write: &mut dyn FnMut(Write), lowered: &mut Lowered) {
        if !mem::take(&mut self.room) {
            return;
        }
        let mut failures = 0;
        for _ in 0..self.waiting.len() {
            let mut from_next = self.waiting.range(self.next..);
            let Some((&handle, _)) = from_next.next().or_else(|| self.waiting.first_key_value()) else {
                return;
            };
            self.next = handle + 1;
            self.again(handle, false, write, lowered);
            failures += u32::from(self.waiting.contains_key(&handle));
            if failures == RETRIES {
                return;
            }
        }
    }

    /// What an earlier run left of a Service, as if this were its plan then.
    fn claim(&mut self, plan: &Plan) -> Option<Service> {
        if self.found.is_empty() {
            return None;
        }
        let (mut plans, mut ports) = (Vec::new(), Vec::new());
        for port in &plan.ports {
            let (frontends, found) = (&self.image.frontends, &mut self.found);
            let left = port.frontends.iter().find_map(|frontend| {
                let id = Set::port_of(frontends.get(&key(port, frontend.at))?.set());
                found.remove(&id).map(|found| (id, found))
            });
            if let Some((id, found)) = left {
                plans.push(found.plan(port));
                ports.push(Port::found(id, &found));
            }
        }
        let plan = Plan::new(plan.service.clone(), plans);
        (!ports.is_empty()).then(|| Service { plan: Arc::new(plan), ports: ports.into() })
    }

    /// What nobody has claimed goes.
    fn sweep(&mut self, write: &mut dyn FnMut(Write)) {
        for (id, found) in mem::take(&mut self.found) {
            let mut edit = Edit { image: &mut self.image, sink: write };
            for key in &found.frontends {
                // A Service may have taken it over.
                let word = edit.image.frontends.get(key);
                if word.is_some_and(|word| Set::port_of(word.set()) == id) {
                    edit.frontend(*key, None);
                }
            }
            Port::found(id, &found).withdraw(&mut edit);
        }
    }

    /// What becomes of each port of a plan; `full`: there is no room for any.
    fn next<'p>(
        &self,
        handle: Handle,
        old: Option<&Service>,
        plan: &'p Plan,
        recheck: bool,
        full: bool,
    ) -> Vec<Next<'p>> {
        let pairs = pairs(old.map(|old| &*old.plan), plan);
        let next = |(port, pair): (&'p PortPlan, Option<usize>)| {
            let before = old.zip(pair).map(|(old, i)| (&old.plan.ports[i], &old.ports[i]));
            let clash = self.clash(port, before.filter(|_| !recheck));
            let answers = self.answers(port, clash);
            let id = before.map_or(0, |(_, port)| port.id);
            let leads = |(frontend, answer): (&'p Frontend, &Answer)| {
                let key = key(port, frontend.at);
                let set = answer.set().filter(|_| !full && self.addresses.owns(handle, &key))?;
                Some((frontend, self.set(frontend, set, &key, id)))
            };
            let frontends: Vec<_> = port.frontends.iter().zip(&answers).filter_map(leads).collect();
            let used = [0, 1].map(|set| frontends.iter().any(|(_, leads)| *leads == set));
            // A frontend that leaves a set which others stay with must not meet what becomes of that: then everything is
            // written anew, beside what there is.
            let leaves = frontends.iter().any(|(frontend, to)| {
                self.leads(&key(port, frontend.at), id).is_some_and(|from| from != *to && used[from])
            });
            let (old, id) = if leaves { (None, 0) } else { (pair, id) };
            let there = before.filter(|_| old.is_some()).into_iter();
            let difference =
                Difference::between(there.flat_map(|(plan, port)| port.members(plan)), members(port, used));
            let clash = clash.is_some();
            Next { plan: port, old, id, clash, frontends, used, difference, moves_to: [None; 2] }
        };
        plan.ports.iter().zip(pairs).map(next).collect()
    }

    /// Who answers each frontend of a port of which this backend, if any, cannot be led to.
    fn answers(&self, port: &PortPlan, backend: Option<Why>) -> Box<[Answer]> {
        let clashes = Clashes { backend, vip_on_node: self.addresses.vip_on_node(port) };
        answers(port, &self.policy, self.node(), clashes)
    }

    fn node(&self) -> &NodePlan {
        self.node.as_ref().unwrap_or(&UNKNOWN)
    }

    /// A backend of a port that the socket layer cannot lead to. `before`: the port as it was, where only backends that
    /// it did not have are in doubt.
    fn clash(&self, port: &PortPlan, before: Option<(&PortPlan, &Port)>) -> Option<Why> {
        match before {
            Some((old, Port { clash: false, .. })) => {
                let pairs = all_backends(Some(old)).merge_join_by(all_backends(Some(port)), Ord::cmp);
                let added = pairs.filter_map(|pair| match pair {
                    EitherOrBoth::Right(added) => Some(added),
                    EitherOrBoth::Left(_) | EitherOrBoth::Both(..) => None,
                });
                self.addresses.clash(port.protocol, added)
            }
            _ => self.addresses.clash(port.protocol, all_backends(Some(port))),
        }
    }

    /// The set that a frontend leads to. While there is no endpoint at all, it leads where it did, so that endpoints come
    /// and go by one store.
    fn set(&self, frontend: &Frontend, set: EndpointSet, key: &FrontendKey, id: u32) -> usize {
        let now = self.leads(key, id).filter(|_| frontend.verdict == Verdict::Reject);
        now.unwrap_or(set as usize)
    }

    /// Which set of a port a frontend leads to.
    fn leads(&self, key: &FrontendKey, port: u32) -> Option<usize> {
        if port == 0 {
            return None;
        }
        let set = self.image.frontends.get(key)?.set();
        (Set::port_of(set) == port).then_some((set & 1) as usize)
    }

    /// Takes the ids and ranges that are needed: all of them or none.
    fn reserve(&mut self, old: Option<&Service>, nexts: &mut [Next<'_>]) -> Result<(), Limit> {
        let reserved = self.try_reserve(old, nexts);
        if reserved.is_err() {
            for next in nexts {
                let fresh = port_of(old, next).is_none_or(|port| port.id == 0);
                self.image.ports.give_back(Some(next.id).filter(|id| fresh && *id != 0));
                let ids = next.difference.added.iter().map(|(i, _)| next.difference.ids[*i]);
                self.image.backends.give_back(ids.filter(|id| *id != 0));
                self.image.ranges.give_back(next.moves_to.into_iter().flatten());
            }
        }
        reserved
    }

    fn try_reserve(&mut self, old: Option<&Service>, nexts: &mut [Next<'_>]) -> Result<(), Limit> {
        let come = nexts.iter().flat_map(Next::keys).filter(|key| !self.image.frontends.contains_key(key));
        let frontends = self.image.frontends.len() + come.count() - self.stale(old, nexts).len();
        if frontends > self.image.sizes.frontends as usize {
            return Err(Limit::Frontends);
        }
        for next in nexts.iter_mut().filter(|next| next.answered()) {
            if next.id == 0 {
                next.id = self.image.ports.take().ok_or(Limit::Ports)?;
            }
            for (i, _) in &next.difference.added {
                next.difference.ids[*i] = self.image.backends.take().ok_or(Limit::Backends)?;
            }
            let room = port_of(old, next).map_or([0; 2], |port| port.sets.map(Placed::room));
            for (set, len) in next.difference.len.into_iter().enumerate() {
                if len > Set::MAX {
                    return Err(Limit::Slots);
                }
                if len > room[set] {
                    let range = self.image.ranges.take(Range::order_for(len));
                    next.moves_to[set] = Some(range.ok_or(Limit::Slots)?);
                }
            }
        }
        Ok(())
    }

    /// The frontends of a Service that are to go from the maps.
    fn stale(&self, old: Option<&Service>, nexts: &[Next<'_>]) -> Vec<FrontendKey> {
        if old.is_none() && self.found.is_empty() {
            return Vec::new();
        }
        let ours = |id: u32| {
            self.found.contains_key(&id) || old.is_some_and(|old| old.ports.iter().any(|port| port.id == id))
        };
        let old = old.into_iter().flat_map(|old| &old.plan.ports).chain(nexts.iter().map(|next| next.plan));
        let keys = old.flat_map(|port| port.frontends.iter().map(|frontend| key(port, frontend.at)));
        let there = |key: &FrontendKey| {
            // Another Service that has taken it over keeps it.
            let word = self.image.frontends.get(key);
            word.is_some_and(|word| ours(Set::port_of(word.set())))
        };
        let mut stale: Vec<_> = keys.filter(there).unique().collect();
        if !stale.is_empty() {
            let stay: BTreeSet<_> = nexts.iter().flat_map(Next::keys).collect();
            stale.retain(|key| !stay.contains(key));
        }
        stale
    }

    /// Writes what becomes of a Service: first of all, what is no longer answered is not led here any more.
    fn emit(
        &mut self,
        old: Option<Service>,
        nexts: Vec<Next<'_>>,
        write: &mut dyn FnMut(Write),
    ) -> Box<[Port]> {
        let stale = self.stale(old.as_ref(), &nexts);
        self.room |= !stale.is_empty();
        let mut edit = Edit { image: &mut self.image, sink: write };
        stale.into_iter().for_each(|key| edit.frontend(key, None));
        let mut old: Vec<Port> = old.map_or_else(Vec::new, |old| old.ports.into());
        let ports = nexts.into_iter().map(|next| {
            let port = next.old.and_then(|i| old.get_mut(i)).map(mem::take);
            port.unwrap_or_default().become_next(next, &mut edit)
        });
        let ports = ports.collect();
        old.into_iter().for_each(|port| port.withdraw(&mut edit));
        ports
    }
}

/// The port as it is.
fn port_of<'s>(old: Option<&'s Service>, next: &Next<'_>) -> Option<&'s Port> {
    old?.ports.get(next.old?)
}

/// The counterpart of each port: the one of the same name, else one that shares a frontend.
fn pairs(old: Option<&Plan>, new: &Plan) -> Vec<Option<usize>> {
    let old = old.map_or(&[][..], |old| &old.ports);
    let mut free = vec![true; old.len()];
    let mut pairs = vec![None; new.ports.len()];
    let same_name = |old: &PortPlan, new: &PortPlan| old.name == new.name;
    let shared = |old: &PortPlan, new: &PortPlan| {
        new.frontends.iter().any(|new| old.frontends.iter().any(|old| old.at == new.at))
    };
    for alike in [&same_name as &dyn Fn(&_, &_) -> _, &shared] {
        for (pair, new) in pairs.iter_mut().zip(&new.ports).filter(|(pair, _)| pair.is_none()) {
            *pair = old.iter().enumerate().position(|(i, old)| {
                free[i] && (old.family, old.protocol) == (new.family, new.protocol) && alike(old, new)
            });
            if let Some(i) = *pair {
                free[i] = false;
            }
        }
    }
    pairs
}
