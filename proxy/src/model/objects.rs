//! The objects of both origins, and which of them count.
//!
//! Owns the latches, the rule that a static object wins over an API object of the same kind and name, and the index
//! from a Service to its slices. Keeps only what planning reads. Never plans and never knows of claims: it says what
//! counted before a change and what counts after it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use smallvec::SmallVec;

use super::input::{
    self, EndpointSlice, Family, Node, ObjectKey, Origin, Service, ServiceKey, SliceKey, SlicePort,
};

/// Everything that the sources have said.
#[derive(Debug)]
pub(super) struct Objects {
    node_name: Arc<str>,
    synced: Latches,
    services: Layers<Service>,
    slices: Layers<Slice>,
    /// Every slice of either origin, under the Service that its label names.
    index: BTreeMap<ServiceKey, SmallVec<[(SliceKey, Origin); 1]>>,
    nodes: [Option<Node>; 2],
    service_cidrs: [Vec<IpNetwork>; 2],
}

/// Which origins have synced, by [`Origin`].
type Latches = [bool; 2];

/// The object that counts under a key and its origin, or nothing.
pub(super) type Effective<V> = Option<(Origin, Arc<V>)>;

/// What counted under a key before a change and what counts now.
#[derive(Debug)]
pub(super) struct Replaced<V> {
    pub(super) before: Effective<V>,
    pub(super) after: Effective<V>,
}

/// An EndpointSlice as it is kept.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) service: ServiceKey,
    pub(super) ports: Arc<[SlicePort]>,
    endpoints: Endpoints,
    /// For which zones the endpoint of a position is meant: sorted, and empty where there are no hints.
    zone_hints: Box<[(u32, Arc<str>)]>,
}

/// The endpoints of a slice, in no more room than its family needs.
#[derive(Debug, PartialEq, Eq)]
enum Endpoints {
    V4(Box<[Endpoint<Ipv4Addr>]>),
    V6(Box<[Endpoint<Ipv6Addr>]>),
}

/// An endpoint as it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Endpoint<A> {
    address: A,
    state: State,
}

/// What counts of an endpoint beside its address: of its node, only whether it is this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State(u8);

impl State {
    const READY: u8 = 1;
    const SERVING: u8 = 2;
    const TERMINATING: u8 = 4;
    const LOCAL: u8 = 8;
    const NODE_HINTS: u8 = 16;
    const FOR_THIS_NODE: u8 = 32;
    const ZONE_HINTS: u8 = 64;
    /// Not kept: the zone can change, and is given by who reads.
    const FOR_THIS_ZONE: u8 = 128;

    fn new(endpoint: &input::Endpoint, node_name: &str) -> Self {
        let bit = |is: bool, bit: u8| if is { bit } else { 0 };
        let (nodes, zones) = endpoint.hints.as_deref().map_or((&[][..], &[][..]), |h| (&h.nodes, &h.zones));
        Self(
            bit(endpoint.ready, Self::READY)
                | bit(endpoint.serving, Self::SERVING)
                | bit(endpoint.terminating, Self::TERMINATING)
                | bit(endpoint.node.as_deref() == Some(node_name), Self::LOCAL)
                | bit(!nodes.is_empty(), Self::NODE_HINTS)
                | bit(nodes.iter().any(|node| **node == *node_name), Self::FOR_THIS_NODE)
                | bit(!zones.is_empty(), Self::ZONE_HINTS),
        )
    }

    fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }

    pub(super) fn ready(self) -> bool {
        self.has(Self::READY)
    }

    pub(super) fn serving(self) -> bool {
        self.has(Self::SERVING)
    }

    /// It still serves while it terminates: of use where nothing is ready.
    pub(super) fn last_resort(self) -> bool {
        self.serving() && self.has(Self::TERMINATING)
    }

    pub(super) fn local(self) -> bool {
        self.has(Self::LOCAL)
    }

    pub(super) fn has_node_hints(self) -> bool {
        self.has(Self::NODE_HINTS)
    }

    pub(super) fn for_this_node(self) -> bool {
        self.has(Self::FOR_THIS_NODE)
    }

    pub(super) fn has_zone_hints(self) -> bool {
        self.has(Self::ZONE_HINTS)
    }

    pub(super) fn for_this_zone(self) -> bool {
        self.has(Self::FOR_THIS_ZONE)
    }

    /// Of two endpoints of one address:port the lesser counts: the one that is not terminating, then the one that is
    /// ready, then serving, then local, then by its hints.
    pub(super) fn rank(self) -> impl Ord {
        (self.has(Self::TERMINATING), !self.ready(), !self.serving(), !self.local(), self.0)
    }
}

impl Slice {
    /// Keeps what planning reads; endpoints of another family than the slice's are not read.
    fn new(slice: EndpointSlice, service: ServiceKey, node_name: &str) -> Self {
        let of_family = || slice.endpoints.iter().filter(|e| Family::of(e.address) == slice.family);
        let mut zone_hints: Vec<(u32, Arc<str>)> = (0..)
            .zip(of_family())
            .filter_map(|(position, endpoint)| Some((position, endpoint.hints.as_deref()?)))
            .flat_map(|(position, hints)| hints.zones.iter().map(move |zone| (position, Arc::clone(zone))))
            .collect();
        zone_hints.sort_unstable();
        zone_hints.dedup();
        let endpoints = of_family().map(|endpoint| (endpoint.address, State::new(endpoint, node_name)));
        let endpoints = match slice.family {
            Family::V4 => Endpoints::V4(
                endpoints
                    .filter_map(|(address, state)| match address {
                        IpAddr::V4(address) => Some(Endpoint { address, state }),
                        IpAddr::V6(_) => None,
                    })
                    .collect(),
            ),
            Family::V6 => Endpoints::V6(
                endpoints
                    .filter_map(|(address, state)| match address {
                        IpAddr::V4(_) => None,
                        IpAddr::V6(address) => Some(Endpoint { address, state }),
                    })
                    .collect(),
            ),
        };
        Self { service, ports: slice.ports, endpoints, zone_hints: zone_hints.into_boxed_slice() }
    }

    pub(super) fn family(&self) -> Family {
        match self.endpoints {
            Endpoints::V4(_) => Family::V4,
            Endpoints::V6(_) => Family::V6,
        }
    }

    /// The endpoints, in the object's order, as a node of this zone sees them.
    pub(super) fn endpoints(&self, zone: Option<&str>) -> impl Iterator<Item = (IpAddr, State)> {
        let (v4, v6): (&[_], &[_]) = match &self.endpoints {
            Endpoints::V4(endpoints) => (endpoints, &[]),
            Endpoints::V6(endpoints) => (&[], endpoints),
        };
        let v4 = v4.iter().map(|endpoint| (endpoint.address.into(), endpoint.state));
        let all = v4.chain(v6.iter().map(|endpoint| (endpoint.address.into(), endpoint.state)));
        (0..).zip(all).map(move |(position, (address, state))| {
            let here = state.has_zone_hints() && zone.is_some_and(|zone| self.is_for_zone(position, zone));
            (address, if here { State(state.0 | State::FOR_THIS_ZONE) } else { state })
        })
    }

    fn is_for_zone(&self, position: u32, zone: &str) -> bool {
        let hint = |(at, name): &(u32, Arc<str>)| (*at, &**name).cmp(&(position, zone));
        self.zone_hints.binary_search_by(hint).is_ok()
    }
}

impl Objects {
    pub(super) fn new(node_name: Arc<str>) -> Self {
        Self {
            node_name,
            synced: Latches::default(),
            services: Layers::default(),
            slices: Layers::default(),
            index: BTreeMap::new(),
            nodes: Default::default(),
            service_cidrs: Default::default(),
        }
    }

    pub(super) fn is_synced(&self, origin: Origin) -> bool {
        self.synced[origin as usize]
    }

    /// The Service that counts under this key.
    pub(super) fn service(&self, key: &ServiceKey) -> Effective<Service> {
        self.services.effective(key, self.synced)
    }

    /// The slices that count for this Service, in the order of their keys.
    pub(super) fn slices_of(&self, service: &ServiceKey) -> Vec<&Slice> {
        let linked = self.index.get(service).map(SmallVec::as_slice).unwrap_or_default();
        linked
            .iter()
            .filter_map(|(key, origin)| {
                let (winner, slice) = self.slices.winner(key, self.synced)?;
                (winner == *origin).then_some(slice.as_ref())
            })
            .collect()
    }

    /// The own Node: the static one, else the API's. A Node is complete in itself, so it waits for no latch.
    pub(super) fn node(&self) -> Option<&Node> {
        self.nodes.iter().find_map(Option::as_ref)
    }

    /// Whether anything says that there is a node of the own name: its Node, or an endpoint on it; `None` where there is
    /// nothing that could.
    pub(super) fn knows_own_node(&self) -> Option<bool> {
        let mut slices = self.slices.all().peekable();
        let any = slices.peek().is_some();
        let local = |slice: &Slice| slice.endpoints(None).any(|(_, state)| state.local());
        let known = self.node().is_some() || slices.any(|(_, slice)| local(slice));
        (known || any).then_some(known)
    }

    /// The Services whose plans the own zone can change.
    pub(super) fn with_zone_hints(&self) -> impl Iterator<Item = &ServiceKey> {
        self.slices.all().filter(|(_, slice)| !slice.zone_hints.is_empty()).map(|(_, slice)| &slice.service)
    }

    /// The Services whose plans the node's own addresses can change.
    pub(super) fn with_source_ranges(&self) -> impl Iterator<Item = &ServiceKey> {
        let ranged =
            |service: &Service| service.external.as_ref().is_some_and(|e| !e.source_ranges.is_empty());
        self.services.all().filter(move |(_, service)| ranged(service)).map(|(key, _)| key)
    }

    /// The static Services that have one of these addresses as their own.
    pub(super) fn static_at<'a>(&'a self, addresses: &'a [IpAddr]) -> impl Iterator<Item = &'a ServiceKey> {
        let services = self.services.0[Origin::Static as usize].iter();
        let is_at = |service: &Service| service.cluster_ips.iter().any(|ip| addresses.contains(ip));
        services.filter(move |(_, service)| is_at(service)).map(|(key, _)| key)
    }

    /// The ServiceCIDRs of the origins that have synced: what no Service has in them is dropped, so they wait for
    /// the Services.
    pub(super) fn service_cidrs(&self) -> impl Iterator<Item = IpNetwork> {
        let open = self.service_cidrs.iter().zip(self.synced).filter(|(_, synced)| *synced);
        open.flat_map(|(cidrs, _)| cidrs.iter().copied())
    }

    /// Stores or removes a Service. `None` where nothing that counts has changed.
    pub(super) fn set_service(
        &mut self,
        origin: Origin,
        key: &ServiceKey,
        service: Option<Service>,
    ) -> Option<Replaced<Service>> {
        let key = self.shared(key);
        let service = service.map(|mut service| {
            service.key = key.clone();
            service
        });
        self.services.set(origin, &key, service, self.synced)
    }

    /// Stores or removes a slice. `None` where nothing that counts has changed.
    pub(super) fn set_slice(
        &mut self,
        origin: Origin,
        key: &SliceKey,
        slice: Option<EndpointSlice>,
    ) -> Option<Replaced<Slice>> {
        let slice = slice.map(|slice| {
            let service = self.shared(&slice.service);
            Slice::new(slice, service, &self.node_name)
        });
        let old = self.slices.get(origin, key).map(|slice| slice.service.clone());
        let new = slice.as_ref().map(|slice| slice.service.clone());
        if old != new {
            self.unlink(old, key, origin);
            self.link(new, key, origin);
        }
        self.slices.set(origin, key, slice, self.synced)
    }

    /// Stores the own Node.
    pub(super) fn set_node(&mut self, origin: Origin, node: Option<Node>) {
        self.nodes[origin as usize] = node;
    }

    /// Stores all ServiceCIDRs of one origin.
    pub(super) fn set_service_cidrs(&mut self, origin: Origin, cidrs: Vec<IpNetwork>) {
        self.service_cidrs[origin as usize] = cidrs;
    }

    /// Opens an origin's latch; the visitors hear of each object that counts from now on. A second time does nothing.
    pub(super) fn sync(
        &mut self,
        origin: Origin,
        service: impl FnMut(Replaced<Service>),
        slice: impl FnMut(Replaced<Slice>),
    ) {
        let before = self.synced;
        self.synced[origin as usize] = true;
        self.services.pack(origin);
        self.slices.pack(origin);
        self.index = std::mem::take(&mut self.index).into_iter().collect();
        self.services.opened(origin, before, self.synced).for_each(service);
        self.slices.opened(origin, before, self.synced).for_each(slice);
    }

    /// The copy of a Service's key that is already kept, so that a Service and its slices share one.
    fn shared(&self, key: &ServiceKey) -> ServiceKey {
        let linked = self.index.get_key_value(key).map(|(kept, _)| kept);
        linked.or_else(|| self.services.kept(key)).unwrap_or(key).clone()
    }

    fn link(&mut self, service: Option<ServiceKey>, key: &SliceKey, origin: Origin) {
        let Some(service) = service else { return };
        let slices = self.index.entry(service).or_default();
        let entry = (key.clone(), origin);
        if let Err(place) = slices.binary_search(&entry) {
            slices.insert(place, entry);
        }
    }

    fn unlink(&mut self, service: Option<ServiceKey>, key: &SliceKey, origin: Origin) {
        let Some(service) = service else { return };
        if let Some(slices) = self.index.get_mut(&service) {
            slices.retain(|(linked, from)| (&*linked, &*from) != (key, &origin));
            if slices.is_empty() {
                self.index.remove(&service);
            }
        }
    }
}

/// The objects of one kind, by origin: the first layer that is open and has a key wins.
#[derive(Debug)]
struct Layers<V>([BTreeMap<ObjectKey, Arc<V>>; 2]);

impl<V> Default for Layers<V> {
    fn default() -> Self {
        Self(Default::default())
    }
}

impl<V: PartialEq> Layers<V> {
    fn get(&self, origin: Origin, key: &ObjectKey) -> Option<&Arc<V>> {
        self.0[origin as usize].get(key)
    }

    /// The objects of both layers, whether or not they count.
    fn all(&self) -> impl Iterator<Item = (&ObjectKey, &V)> {
        self.0.iter().flatten().map(|(key, object)| (key, object.as_ref()))
    }

    /// Rebuilds a layer with full nodes: a list in the order of its keys leaves them half empty.
    fn pack(&mut self, origin: Origin) {
        let layer = &mut self.0[origin as usize];
        *layer = std::mem::take(layer).into_iter().collect();
    }

    /// The copy of a key that either layer keeps.
    fn kept(&self, key: &ObjectKey) -> Option<&ObjectKey> {
        self.0.iter().find_map(|layer| layer.get_key_value(key)).map(|(kept, _)| kept)
    }

    fn winner(&self, key: &ObjectKey, open: Latches) -> Option<(Origin, &Arc<V>)> {
        [Origin::Static, Origin::Api]
            .into_iter()
            .filter(|origin| open[*origin as usize])
            .find_map(|origin| Some((origin, self.get(origin, key)?)))
    }

    fn effective(&self, key: &ObjectKey, open: Latches) -> Effective<V> {
        self.winner(key, open).map(|(origin, object)| (origin, Arc::clone(object)))
    }

    fn set(
        &mut self,
        origin: Origin,
        key: &ObjectKey,
        object: Option<V>,
        open: Latches,
    ) -> Option<Replaced<V>> {
        if self.get(origin, key).map(Arc::as_ref) == object.as_ref() {
            return None;
        }
        let before = self.effective(key, open);
        let layer = &mut self.0[origin as usize];
        match object {
            Some(object) => layer.insert(key.clone(), Arc::new(object)),
            None => layer.remove(key),
        };
        let after = self.effective(key, open);
        let counts = [&before, &after].into_iter().flatten().any(|(winner, _)| *winner == origin);
        counts.then_some(Replaced { before, after })
    }

    /// What the opening of one layer replaces.
    fn opened(&self, origin: Origin, before: Latches, after: Latches) -> impl Iterator<Item = Replaced<V>> {
        self.0[origin as usize].keys().filter_map(move |key| {
            let replaced =
                Replaced { before: self.effective(key, before), after: self.effective(key, after) };
            let winners =
                [&replaced.before, &replaced.after].map(|side| side.as_ref().map(|(origin, _)| *origin));
            (winners[0] != winners[1]).then_some(replaced)
        })
    }
}
