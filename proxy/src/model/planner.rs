//! The incremental planner: events in, the plans that they change out.
//!
//! Owns the dirty set, the claims and the current plans. One event costs what the Service it touches costs, however
//! many Services there are. Never does I/O: its caller drains the sources, calls [`Planner::replan`] and commits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;

use super::claims::{Claim, Claimant, Claims, Owner};
use super::frontend::{Ask, asks, health_check_claims};
use super::input::{Change, Event, Family, Origin, Service, ServiceKey};
use super::node::Facts;
use super::objects::{Effective, Objects, Replaced, Slice};
use super::plan::{NodePlan, Plan};
pub use super::settings::{NodePortAddresses, OwnPort, PodCidrs, Settings};
use super::{node, service};

/// What changed since the last [`Planner::replan`].
#[derive(Debug, Default)]
pub struct Changes {
    /// The Services whose plan differs, in the order of their keys; `None`: the Service is gone.
    pub services: Vec<(ServiceKey, Option<Arc<Plan>>)>,
    /// The node's plan, where it differs.
    pub node: Option<NodePlan>,
}

impl Changes {
    /// Nothing changed.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && self.node.is_none()
    }
}

/// All objects of all origins and what they amount to on this node.
#[derive(Debug)]
pub struct Planner {
    settings: Settings,
    /// The origins that cannot read all that they have.
    incomplete: Vec<Origin>,
    objects: Objects,
    host_addresses: Vec<IpAddr>,
    claims: Claims,
    dirty: BTreeSet<ServiceKey>,
    /// The Node, the host's addresses or the ServiceCIDRs may differ from what was planned.
    node_dirty: bool,
    facts: Facts,
    plans: BTreeMap<ServiceKey, Arc<Plan>>,
    /// How many of the plans have a port in each family.
    served: [usize; 2],
    node: Option<NodePlan>,
    services_planned: u64,
}

impl Planner {
    /// A planner that knows of no object yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            incomplete: Vec::new(),
            objects: Objects::new(Arc::clone(&settings.node_name)),
            settings,
            host_addresses: Vec::new(),
            claims: Claims::default(),
            dirty: BTreeSet::new(),
            node_dirty: true,
            facts: Facts::default(),
            plans: BTreeMap::new(),
            served: [0; 2],
            node: None,
            services_planned: 0,
        }
    }

    /// Takes note of an event and of what must be planned again for it. Objects of an origin that has not synced are
    /// kept and do not count until it has.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Source { origin, change } => self.apply_change(origin, change),
            Event::HostAddresses(addresses) => {
                self.host_addresses = addresses;
                self.node_dirty = true;
            }
        }
    }

    fn apply_change(&mut self, origin: Origin, change: Change) {
        let Self { objects, claims, dirty, .. } = self;
        match change {
            Change::Service(service) => {
                let key = service.key.clone();
                let replaced = objects.set_service(origin, &key, Some(service));
                replaced.into_iter().for_each(|replaced| service_replaced(replaced, claims, dirty));
            }
            Change::ServiceGone(key) => {
                let replaced = objects.set_service(origin, &key, None);
                replaced.into_iter().for_each(|replaced| service_replaced(replaced, claims, dirty));
            }
            Change::Slice(slice) => {
                let key = slice.key.clone();
                let replaced = objects.set_slice(origin, &key, Some(slice));
                replaced.into_iter().for_each(|replaced| slice_replaced(replaced, dirty));
            }
            Change::SliceGone(key) => {
                let replaced = objects.set_slice(origin, &key, None);
                replaced.into_iter().for_each(|replaced| slice_replaced(replaced, dirty));
            }
            Change::Node(node) => {
                objects.set_node(origin, node);
                self.node_dirty = true;
            }
            Change::ServiceCidrs(cidrs) => {
                objects.set_service_cidrs(origin, cidrs);
                self.node_dirty = true;
            }
            Change::Triggered(..) => {}
            Change::Complete(complete) => {
                self.incomplete.retain(|other| *other != origin);
                self.incomplete.extend((!complete).then_some(origin));
            }
            Change::Synced => {
                let mut slices = BTreeSet::new();
                objects.sync(
                    origin,
                    |replaced| service_replaced(replaced, claims, dirty),
                    |replaced| slice_replaced(replaced, &mut slices),
                );
                dirty.append(&mut slices);
                claims.pack();
                self.node_dirty = true;
            }
        }
    }

    /// Plans again what is dirty. Afterwards the plans are those of a planner that was told the present objects alone.
    pub fn replan(&mut self) -> Changes {
        self.replan_facts();
        let mut services = Vec::new();
        for key in std::mem::take(&mut self.dirty) {
            let next = self.plan_service(&key);
            if self.plans.get(&key).map(Arc::as_ref) != next.as_ref() {
                services.push((key, next.map(Arc::new)));
            }
        }
        self.count_families(&services);
        self.adopt(&services);
        Changes { services, node: self.replan_node() }
    }

    /// The node's plan depends on whether there are Services of a family.
    fn count_families(&mut self, services: &[(ServiceKey, Option<Arc<Plan>>)]) {
        for family in Family::ALL {
            let has = |plan: &Arc<Plan>| plan.ports.iter().any(|port| port.family == family);
            let count = &mut self.served[family as usize];
            let before = *count;
            for (key, plan) in services {
                *count += usize::from(plan.as_ref().is_some_and(has));
                *count -= usize::from(self.plans.get(key).is_some_and(has));
            }
            self.node_dirty |= (before == 0) != (*count == 0);
        }
    }

    fn adopt(&mut self, services: &[(ServiceKey, Option<Arc<Plan>>)]) {
        let plans = services.iter().filter_map(|(_, plan)| plan.as_ref());
        let plans = plans.map(|plan| (plan.service.clone(), Arc::clone(plan)));
        for (key, _) in services.iter().filter(|(_, plan)| plan.is_none()) {
            self.plans.remove(key);
        }
        if services.len() > self.plans.len() {
            // Rebuilds the map, with full nodes: worth its cost for the first plans, which come in order.
            self.plans.append(&mut plans.collect());
        } else {
            self.plans.extend(plans);
        }
    }

    /// All configured origins have listed all their objects: what has no plan does not exist.
    pub fn synced(&self) -> bool {
        self.incomplete.is_empty() && self.listed()
    }

    /// All configured origins have listed what they can read: every object that was told of counts.
    pub fn listed(&self) -> bool {
        self.settings.origins.iter().all(|origin| self.objects.is_synced(*origin))
    }

    /// The current plans, in the order of their keys.
    pub fn plans(&self) -> impl ExactSizeIterator<Item = &Arc<Plan>> {
        self.plans.values()
    }

    /// The current plans whose keys come after this one, in their order; `None`: all.
    pub fn plans_after(&self, key: Option<&ServiceKey>) -> impl Iterator<Item = &Arc<Plan>> {
        let from = key.map_or(Bound::Unbounded, Bound::Excluded);
        self.plans.range::<ServiceKey, _>((from, Bound::Unbounded)).map(|(_, plan)| plan)
    }

    /// The current plan of one Service.
    pub fn plan(&self, service: &ServiceKey) -> Option<&Arc<Plan>> {
        self.plans.get(service)
    }

    /// The current plan of the node; `None` until the first origin has synced.
    pub fn node(&self) -> Option<&NodePlan> {
        self.node.as_ref()
    }

    /// Whether load balancers should send this node new connections: its Node exists and is not about to go. Without
    /// an API server to ask, a Node need not exist.
    pub fn node_eligible(&self) -> bool {
        let unknown = !self.settings.origins.contains(&Origin::Api);
        self.objects.node().map_or(unknown, |node| !node.leaving)
    }

    /// Words for a user whose node may have another name: nothing that the sources know is on a node of this one.
    pub fn unknown_node(&self) -> Option<String> {
        let with_api = self.settings.origins.contains(&Origin::Api);
        let known = self.objects.knows_own_node().unwrap_or(!with_api);
        (!known).then(|| {
            format!(
                "there is no Node {:?}, and no endpoint is on it: no endpoint counts as local",
                self.settings.node_name
            )
        })
    }

    /// How many times a Service was planned: the work done, whether or not it changed a plan.
    pub fn services_planned(&self) -> u64 {
        self.services_planned
    }

    fn plan_service(&mut self, key: &ServiceKey) -> Option<Plan> {
        let (origin, service) = self.objects.service(key)?;
        self.services_planned += 1;
        let claimant = Claimant::new(origin, &service);
        let owner = |claim: &Claim| {
            let own = self.settings.own_ports.iter().find(|port| port.is_at(claim));
            let service = || self.claims.owner(claim, &claimant).map(Owner::Service);
            own.map(|port| Owner::Agent(port.server)).or_else(service)
        };
        Some(service::plan(origin, &service, &self.objects.slices_of(key), &self.facts, owner))
    }

    /// Marks the Services whose plans depend on what has changed of the node.
    fn replan_facts(&mut self) {
        if !self.node_dirty {
            return;
        }
        let facts = node::facts(&self.settings, self.objects.node(), &self.host_addresses);
        if facts.zone != self.facts.zone {
            self.dirty.extend(self.objects.with_zone_hints().cloned());
        }
        if facts.addresses != self.facts.addresses {
            self.dirty.extend(self.objects.with_source_ranges().cloned());
        }
        if facts.held != self.facts.held {
            let moved = |a: &[IpAddr], b: &[IpAddr]| -> Vec<IpAddr> {
                a.iter().copied().filter(|address| b.binary_search(address).is_err()).collect()
            };
            let moved = [moved(&facts.held, &self.facts.held), moved(&self.facts.held, &facts.held)].concat();
            self.dirty.extend(self.objects.static_at(&moved).cloned());
        }
        self.facts = facts;
    }

    fn replan_node(&mut self) -> Option<NodePlan> {
        let any_synced =
            [Origin::Static, Origin::Api].into_iter().any(|origin| self.objects.is_synced(origin));
        if !any_synced || !std::mem::take(&mut self.node_dirty) {
            return None;
        }
        let (objects, host) = (&self.objects, &self.host_addresses);
        let served = self.served.map(|count| count > 0);
        let next = node::plan(&self.settings, objects.node(), host, objects.service_cidrs(), served);
        if self.node.as_ref() == Some(&next) {
            return None;
        }
        self.node = Some(next.clone());
        Some(next)
    }
}

/// Another Service object counts now: it and those whose claims it moves are planned again.
fn service_replaced(replaced: Replaced<Service>, claims: &mut Claims, dirty: &mut BTreeSet<ServiceKey>) {
    let [before, after] = [&replaced.before, &replaced.after].map(claimed_by);
    claims.replace(before.as_ref(), after.as_ref(), dirty);
    dirty.extend(replaced.after.or(replaced.before).map(|(_, service)| service.key.clone()));
}

/// Another slice counts now: the Services that it left and joined are planned again.
fn slice_replaced(replaced: Replaced<Slice>, dirty: &mut BTreeSet<ServiceKey>) {
    let sides = [replaced.before, replaced.after].into_iter().flatten();
    dirty.extend(sides.map(|(_, slice)| slice.service.clone()));
}

fn claimed_by(service: &Effective<Service>) -> Option<(Claimant, BTreeSet<Claim>)> {
    let (origin, service) = service.as_ref()?;
    let mut claims: BTreeSet<_> = asks(service, &mut Vec::new()).iter().map(Ask::claim).collect();
    claims.extend(health_check_claims(service).map(|(_, claim)| claim));
    Some((Claimant::new(*origin, service), claims))
}
