//! Whose addresses meet: backends that are frontends themselves, VIPs that stand before a NodePort, and VIPs that an
//! interface of the node has.
//!
//! Owns an index of what all Services are dialled at, in whichever layer, and of all their backends, so that a change
//! names the few Services that it touches. Never decides what becomes of them.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use itertools::{EitherOrBoth, Itertools as _};
use kube_lane_common::{Address, FrontendKey, Port};

#[cfg(test)]
use super::super::answers::Clashes;
use super::super::answers::{Why, is_dialled_alike};
use super::members::members;
use crate::model::input::{Family, Protocol};
use crate::model::plan::{AddressPort, FrontendAddress, NodePlan, Plan, PortPlan};

/// What stands for a Service here: the caller's number.
pub(super) type Handle = u32;

/// A Service's plan takes another's place.
pub(super) struct Change<'a> {
    pub(super) service: Handle,
    pub(super) old: Option<&'a Plan>,
    pub(super) new: Option<&'a Plan>,
}

/// The addresses of all Services.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    /// Sorted, so that those of one address are found together.
    frontends: BTreeMap<FrontendKey, Handle>,
    backends: Backends,
    /// Where NodePorts answer.
    node: BTreeSet<IpAddr>,
    /// What the node's interfaces have.
    interfaces: BTreeSet<IpAddr>,
}

/// Who has which backends. There may be 250,000 of them, so each family takes the room that it needs.
#[derive(Debug, Default)]
struct Backends {
    v4: BTreeSet<Owned<Ipv4Addr>>,
    v6: BTreeSet<Owned<Ipv6Addr>>,
}

/// A backend's address and port; whose it is, and of which port, by its position in the plan.
type Owned<A> = (A, u16, Handle, u16);

/// Backends that are to be added.
#[derive(Default)]
struct Added {
    v4: Vec<Owned<Ipv4Addr>>,
    v6: Vec<Owned<Ipv6Addr>>,
}

impl Added {
    fn push(&mut self, at: AddressPort, owner: Handle, position: u16) {
        match at.ip {
            IpAddr::V4(ip) => self.v4.push((ip, at.port, owner, position)),
            IpAddr::V6(ip) => self.v6.push((ip, at.port, owner, position)),
        }
    }
}

impl Backends {
    fn add(&mut self, added: Added) {
        add(&mut self.v4, added.v4);
        add(&mut self.v6, added.v6);
    }

    fn remove(&mut self, at: AddressPort, owner: Handle, position: u16) {
        match at.ip {
            IpAddr::V4(ip) => self.v4.remove(&(ip, at.port, owner, position)),
            IpAddr::V6(ip) => self.v6.remove(&(ip, at.port, owner, position)),
        };
    }

    /// Adds to `found` those that have a backend at one of these ports of an address.
    fn owners(&self, ip: IpAddr, ports: RangeInclusive<u16>, found: &mut BTreeSet<Handle>) {
        match ip {
            IpAddr::V4(ip) => owners(&self.v4, ip, ports, found),
            IpAddr::V6(ip) => owners(&self.v6, ip, ports, found),
        }
    }
}

fn add<A: Ord>(set: &mut BTreeSet<Owned<A>>, added: Vec<Owned<A>>) {
    if added.len() > set.len() {
        // Builds the set anew, with full nodes: worth its cost for those that come first.
        *set = mem::take(set).into_iter().chain(added).collect();
    } else {
        set.extend(added);
    }
}

fn owners<A: Ord + Copy>(
    set: &BTreeSet<Owned<A>>,
    ip: A,
    ports: RangeInclusive<u16>,
    found: &mut BTreeSet<Handle>,
) {
    let all = (ip, *ports.start(), 0, 0)..=(ip, *ports.end(), Handle::MAX, u16::MAX);
    found.extend(set.range(all).map(|(_, _, owner, _)| *owner));
}

/// What a frontend is in the maps: a NodePort has the unspecified address.
pub(super) fn key(port: &PortPlan, at: FrontendAddress) -> FrontendKey {
    match at {
        FrontendAddress::Vip(vip) => address_key(vip, port.protocol),
        FrontendAddress::NodePort(number) => nodeport_key(port.family, number, port.protocol),
    }
}

fn address_key(at: AddressPort, protocol: Protocol) -> FrontendKey {
    FrontendKey::new(at.ip.into(), Port::from_host(at.port), protocol.number())
}

fn nodeport_key(family: Family, number: u16, protocol: Protocol) -> FrontendKey {
    let unspecified = match family {
        Family::V4 => Address::from_user_ip4(0),
        Family::V6 => Address::from_user_ip6([0; 4]),
    };
    FrontendKey::new(unspecified, Port::from_host(number), protocol.number())
}

impl Addresses {
    /// Those of some plans, on a node.
    #[cfg(test)]
    pub(super) fn of<'a>(plans: impl IntoIterator<Item = &'a Plan>, node: &NodePlan) -> Self {
        let mut addresses = Self::default();
        addresses.move_node(node, &mut BTreeSet::new());
        let change = |(service, plan)| Change { service, old: None, new: Some(plan) };
        let changes: Vec<_> = (0..).zip(plans).map(change).collect();
        addresses.replace(&changes, &mut BTreeSet::new());
        addresses
    }

    /// The node has these addresses from now on. Adds to `touched` the Services that have to be looked at again for it:
    /// those that meet an address which has come or gone.
    pub(super) fn move_node(&mut self, node: &NodePlan, touched: &mut BTreeSet<Handle>) {
        for ip in replace(&mut self.node, &node.nodeport_addresses) {
            for (vip, _) in self.at(ip) {
                touched.extend(self.frontends.get(&behind(vip)));
            }
            // A NodePort is an address of its Service there.
            self.backends.owners(ip, 0..=u16::MAX, touched);
        }
        for ip in replace(&mut self.interfaces, &node.interface_addresses) {
            touched.extend(self.at(ip).map(|(_, owner)| owner));
        }
    }

    /// What is dialled at an address, NodePorts apart, and whose it is.
    fn at(&self, ip: IpAddr) -> impl Iterator<Item = (&FrontendKey, Handle)> {
        let key = |port, protocol| FrontendKey::new(ip.into(), Port::from_host(port), protocol);
        let all = key(0, 0)..=key(u16::MAX, u8::MAX);
        self.frontends.range(all).map(|(key, owner)| (key, *owner))
    }

    /// What a port's addresses meet.
    #[cfg(test)]
    pub(super) fn clashes(&self, port: &PortPlan) -> Clashes {
        Clashes {
            backend: self.clash(port.protocol, all_backends(Some(port))),
            vip_on_node: self.vip_on_node(port),
        }
    }

    /// The first of these backends that the socket layer cannot lead to.
    pub(super) fn clash(
        &self,
        protocol: Protocol,
        mut backends: impl Iterator<Item = AddressPort>,
    ) -> Option<Why> {
        backends.find_map(|backend| {
            if !is_dialled_alike(backend.ip) {
                Some(Why::Backend(backend))
            } else if self.is_frontend(backend, protocol) {
                Some(Why::TranslatedTwice(backend))
            } else {
                None
            }
        })
    }

    fn is_frontend(&self, at: AddressPort, protocol: Protocol) -> bool {
        let nodeport = || nodeport_key(Family::of(at.ip), at.port, protocol);
        self.frontends.contains_key(&address_key(at, protocol))
            || self.node.contains(&at.ip) && self.frontends.contains_key(&nodeport())
    }

    /// A VIP has the number of the port's NodePort on an address where NodePorts answer.
    pub(super) fn vip_on_node(&self, port: &PortPlan) -> bool {
        let number = |at| match at {
            FrontendAddress::NodePort(number) => Some(number),
            FrontendAddress::Vip(_) => None,
        };
        let vip = |ip: &IpAddr, number| {
            let key = address_key(AddressPort { ip: *ip, port: number }, port.protocol);
            self.frontends.contains_key(&key)
        };
        let mut numbers = port.frontends.iter().filter_map(|frontend| number(frontend.at));
        numbers.any(|number| self.of_family(port.family).any(|ip| vip(ip, number)))
    }

    fn of_family(&self, family: Family) -> impl Iterator<Item = &IpAddr> {
        self.node.iter().filter(move |ip| Family::of(**ip) == family)
    }

    /// Plans of Services take others' place. Adds to `touched` the Services that have to be looked at again for it.
    pub(super) fn replace(&mut self, changes: &[Change<'_>], touched: &mut BTreeSet<Handle>) {
        let mut added = Added::default();
        for Change { service, old, new } in changes {
            for (position, pair) in (0..).zip(ports(*old).zip_longest(ports(*new))) {
                let (old, new) = pair.left_and_right();
                for change in all_backends(old).merge_join_by(all_backends(new), Ord::cmp) {
                    match change {
                        EitherOrBoth::Left(gone) => self.backends.remove(gone, *service, position),
                        EitherOrBoth::Right(come) => added.push(come, *service, position),
                        EitherOrBoth::Both(..) => {}
                    }
                }
            }
        }
        // Whoever is touched has the backend when this is over.
        self.backends.add(added);
        for Change { service, old, new } in changes {
            self.replace_frontends(*service, *old, *new, touched);
        }
    }

    fn replace_frontends(
        &mut self,
        service: Handle,
        old: Option<&Plan>,
        new: Option<&Plan>,
        touched: &mut BTreeSet<Handle>,
    ) {
        let keys = |plan| frontends(plan).map(|(port, at)| key(port, at));
        if keys(old).eq(keys(new)) {
            return;
        }
        let stay: BTreeSet<_> = keys(new).collect();
        for (port, at) in frontends(old) {
            let key = key(port, at);
            // Who has taken it over keeps it.
            if !stay.contains(&key) && self.owns(service, &key) {
                self.frontends.remove(&key);
                self.touch(port, at, touched);
            }
        }
        for (port, at) in frontends(new) {
            if self.frontends.insert(key(port, at), service).is_none() {
                self.touch(port, at, touched);
            }
        }
    }

    /// Whether a Service is dialled at an address, and no other that was told of later.
    pub(super) fn owns(&self, service: Handle, key: &FrontendKey) -> bool {
        self.frontends.get(key) == Some(&service)
    }

    /// A frontend has come or gone: those that have it as a backend, or as a NodePort behind it, are to know.
    fn touch(&self, port: &PortPlan, at: FrontendAddress, touched: &mut BTreeSet<Handle>) {
        let mut led_to = |at: AddressPort| self.backends.owners(at.ip, at.port..=at.port, touched);
        match at {
            FrontendAddress::Vip(vip) => {
                led_to(vip);
                if self.node.contains(&vip.ip) {
                    touched.extend(self.frontends.get(&behind(&key(port, at))));
                }
            }
            FrontendAddress::NodePort(number) => {
                self.of_family(port.family).for_each(|ip| led_to(AddressPort { ip: *ip, port: number }));
            }
        }
    }
}

/// Puts other addresses in place of those that there are; returns those that have come or gone.
fn replace(addresses: &mut BTreeSet<IpAddr>, others: &[IpAddr]) -> Vec<IpAddr> {
    let before = mem::replace(addresses, others.iter().copied().collect());
    before.symmetric_difference(addresses).copied().collect()
}

/// The NodePort that a VIP hides where NodePorts answer at its address.
fn behind(vip: &FrontendKey) -> FrontendKey {
    FrontendKey::new(vip.address.unspecified(), vip.port, vip.protocol)
}

fn ports(plan: Option<&Plan>) -> impl Iterator<Item = &PortPlan> {
    plan.into_iter().flat_map(|plan| plan.ports.iter())
}

fn frontends(plan: Option<&Plan>) -> impl Iterator<Item = (&PortPlan, FrontendAddress)> {
    ports(plan).flat_map(|port| port.frontends.iter().map(move |frontend| (port, frontend.at)))
}

/// A port's backends of both sets, sorted.
pub(super) fn all_backends(port: Option<&PortPlan>) -> impl Iterator<Item = AddressPort> {
    port.into_iter().flat_map(|port| members(port, [true, true])).map(|member| member.address)
}
