//! Which flows are stale: a flow against the frontends that are programmed.
//!
//! Owns what is known of the frontends, and what has to be looked at. Pure: it never asks the kernel.
//!
//! A flow is *right* as long as who answers it is an endpoint behind the address that its client dialled, whether new
//! connections would get that endpoint or it only drains. All else at an address of ours is stale, also what was never
//! translated: it was made before the Service was programmed, and its packets go astray as long as they keep coming.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::dataplane::{Batch, Outcome};
use crate::model::input::{Family, Protocol, ServiceKey};
use crate::model::plan::{AddressPort, FrontendAddress, Plan, PortPlan};

/// With more places than this to look at, all flows of a protocol are read in one go: each reading walks the kernel's
/// whole table, whatever it brings.
const SINGLE_PLACES: usize = 8;

/// A connection as the kernel tracks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) protocol: Protocol,
    /// Where the client's first packet went.
    pub(super) to: AddressPort,
    /// Who answers.
    pub(super) from: AddressPort,
    /// Its destination was translated, by whomever.
    pub(super) translated: bool,
}

/// Where flows may go: a frontend, present or former.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    family: Family,
    protocol: Protocol,
    at: FrontendAddress,
}

/// What the kernel is asked for: the flows whose original destination is this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Filter {
    pub(super) family: Family,
    pub(super) protocol: Protocol,
    /// `None`: any.
    pub(super) address: Option<IpAddr>,
    /// `None`: any.
    pub(super) port: Option<u16>,
}

/// What has to be looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Look {
    everything: bool,
    /// The frontends that changed.
    places: BTreeSet<Place>,
    /// Those of them that were frontends before.
    gone: BTreeSet<Place>,
}

impl Look {
    fn is_empty(&self) -> bool {
        !self.everything && self.places.is_empty()
    }

    fn merge(&mut self, other: Self) {
        self.everything |= other.everything;
        self.places.extend(other.places);
        self.gone.extend(other.gone);
    }
}

/// The port of a Service behind a frontend.
#[derive(Clone, Debug)]
struct Target {
    plan: Arc<Plan>,
    port: usize,
}

impl Target {
    fn port(&self) -> &PortPlan {
        &self.plan.ports[self.port]
    }

    fn has_endpoints(&self) -> bool {
        let port = self.port();
        !port.backends.is_empty() || !port.local_backends.is_empty()
    }

    fn has(&self, address: &AddressPort) -> bool {
        let port = self.port();
        let selected = [&port.backends, &port.local_backends];
        selected.into_iter().any(|set| set.binary_search_by(|b| b.address.cmp(address)).is_ok())
            || port.draining.binary_search(address).is_ok()
    }

    fn addresses(&self) -> impl Iterator<Item = &AddressPort> {
        let port = self.port();
        let selected = port.backends.iter().chain(&port.local_backends).map(|backend| &backend.address);
        selected.chain(&port.draining)
    }

    /// Whether flows that were right before are not now.
    fn lost_any_of(&self, before: &Self) -> bool {
        let (old, new) = (before.port(), self.port());
        let same = (&old.backends, &old.local_backends, &old.draining)
            == (&new.backends, &new.local_backends, &new.draining);
        !same && before.addresses().any(|address| !self.has(address))
    }
}

type Frontends = HashMap<Place, Target>;

/// The frontends whose flows are looked after.
#[derive(Debug)]
pub(super) struct Tracker {
    sctp: bool,
    /// The Services that have such frontends.
    services: BTreeMap<ServiceKey, Arc<Plan>>,
    frontends: Frontends,
    /// What is being committed: right already, while what it replaces is right still.
    incoming: Frontends,
    /// Where NodePorts answer: sorted.
    node_addresses: Vec<IpAddr>,
    pending: Look,
}

impl Tracker {
    /// Looks after UDP, and after SCTP where it is asked for.
    pub(super) fn new(sctp: bool) -> Self {
        Self {
            sctp,
            services: BTreeMap::new(),
            frontends: HashMap::new(),
            incoming: HashMap::new(),
            node_addresses: Vec::new(),
            pending: Look::default(),
        }
    }

    fn tracks(&self, protocol: Protocol) -> bool {
        match protocol {
            Protocol::Tcp => false,
            Protocol::Udp => true,
            Protocol::Sctp => self.sctp,
        }
    }

    /// The frontends of a plan that are looked after.
    fn frontends_of(&self, plan: &Arc<Plan>) -> impl Iterator<Item = (Place, Target)> {
        let ports =
            plan.ports.iter().enumerate().filter(|(_, PortPlan { protocol, .. })| self.tracks(*protocol));
        ports.flat_map(move |(port, PortPlan { family, protocol, frontends, .. })| {
            frontends.iter().map(move |frontend| {
                let place = Place { family: *family, protocol: *protocol, at: frontend.at };
                (place, Target { plan: Arc::clone(plan), port })
            })
        })
    }

    /// This is about to be committed.
    pub(super) fn committing(&mut self, batch: &Batch) {
        let plans = batch.services.iter().filter_map(|(_, plan)| plan.as_ref());
        self.incoming = plans.flat_map(|plan| self.frontends_of(plan)).collect();
    }

    /// This was committed: notes what has to be looked at for it.
    pub(super) fn committed(&mut self, batch: &Batch, outcome: &Outcome) {
        self.incoming.clear();
        let changed = batch.programmed(outcome);
        // First all that goes: what one Service gives up another one may get.
        let mut before = Frontends::new();
        for (key, _) in changed.clone() {
            if let Some(plan) = self.services.remove(key) {
                before.extend(self.frontends_of(&plan));
            }
        }
        before.keys().for_each(|place| drop(self.frontends.remove(place)));
        for (key, plan) in changed {
            let Some(plan) = plan else { continue };
            let frontends: Vec<_> = self.frontends_of(plan).collect();
            if !frontends.is_empty() {
                self.services.insert(key.clone(), Arc::clone(plan));
            }
            for (place, target) in frontends {
                let old = before.remove(&place);
                if old.map_or(target.has_endpoints(), |old| {
                    target.lost_any_of(&old) || target.has_endpoints() && !old.has_endpoints()
                }) {
                    self.pending.places.insert(place);
                }
                self.frontends.insert(place, target);
            }
        }
        self.pending.places.extend(before.keys());
        self.pending.gone.extend(before.into_keys());
        if let Some(node) = &batch.node
            && self.node_addresses != node.nodeport_addresses
        {
            self.node_addresses.clone_from(&node.nodeport_addresses);
            let node_ports = self.frontends.iter().filter(|(place, target)| {
                matches!(place.at, FrontendAddress::NodePort(_)) && target.has_endpoints()
            });
            self.pending.places.extend(node_ports.map(|(place, _)| place));
        }
        for &(family, protocol, at) in &outcome.swept {
            let place = Place { family, protocol, at };
            if self.tracks(protocol) && !self.frontends.contains_key(&place) {
                self.pending.places.insert(place);
                self.pending.gone.insert(place);
            }
        }
        if batch.sweep {
            self.look_at_everything();
        }
    }

    /// Flows may have been made that met nothing of ours.
    pub(super) fn look_at_everything(&mut self) {
        self.pending.everything = true;
    }

    /// There is something to look at.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Takes what has to be looked at.
    pub(super) fn take(&mut self) -> Look {
        std::mem::take(&mut self.pending)
    }

    /// A look failed: it is to be done again.
    pub(super) fn put_back(&mut self, look: Look) {
        self.pending.merge(look);
    }

    /// What the kernel is asked for.
    pub(super) fn filters(&self, look: &Look) -> BTreeSet<Filter> {
        if !look.everything && look.places.len() <= SINGLE_PLACES {
            return look.places.iter().map(Place::filter).collect();
        }
        let present = self.frontends.keys().filter(|_| look.everything);
        let places = look.places.iter().chain(present);
        places.map(|place| Filter { address: None, port: None, ..place.filter() }).collect()
    }

    /// Whether a flow that such a look brought must go.
    pub(super) fn is_stale(&self, flow: &Flow, look: &Look) -> bool {
        self.places_of(flow)
            .find_map(|place| {
                if self.incoming.get(&place).is_some_and(|target| target.has(&flow.from)) {
                    return Some(false);
                }
                match self.frontends.get(&place) {
                    // A flow past a frontend that refuses is nobody's that can be told.
                    Some(target) => {
                        Some(!target.has(&flow.from) && (flow.translated || target.has_endpoints()))
                    }
                    None => look.gone.contains(&place).then_some(flow.translated),
                }
            })
            .unwrap_or(false)
    }

    /// The frontends that a flow may be of: one address of a Service goes before a NodePort.
    fn places_of(&self, flow: &Flow) -> impl Iterator<Item = Place> {
        let place = |at| Place { family: Family::of(flow.to.ip), protocol: flow.protocol, at };
        let node_port = self.node_addresses.binary_search(&flow.to.ip).is_ok();
        let node_port = node_port.then(|| place(FrontendAddress::NodePort(flow.to.port)));
        std::iter::once(place(FrontendAddress::Vip(flow.to))).chain(node_port)
    }
}

impl Place {
    fn filter(&self) -> Filter {
        let (address, port) = match self.at {
            FrontendAddress::Vip(AddressPort { ip, port }) => (Some(ip), port),
            FrontendAddress::NodePort(port) => (None, port),
        };
        Filter { family: self.family, protocol: self.protocol, address, port: Some(port) }
    }
}
