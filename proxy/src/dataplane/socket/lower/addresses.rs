//! Whose addresses meet: backends that are frontends themselves, and VIPs that stand before a NodePort.
//!
//! Owns an index of what all Services are dialled at, in whichever layer, and of all their backends, so that a change
//! names the few Services that it touches. Never decides what becomes of them.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

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

/// The addresses of all Services.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    frontends: HashMap<FrontendKey, Handle>,
    /// The backends of each port, by its position in the plan.
    backends: BTreeSet<(AddressPort, Handle, u16)>,
    /// Where NodePorts answer.
    node: BTreeSet<IpAddr>,
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
        addresses.move_node(node);
        for (handle, plan) in (0..).zip(plans) {
            addresses.replace(handle, None, Some(plan), &mut BTreeSet::new());
        }
        addresses
    }

    /// NodePorts answer at the node's addresses from now on; `true`: that is a change, which may touch every Service.
    pub(super) fn move_node(&mut self, node: &NodePlan) -> bool {
        let addresses = node.nodeport_addresses.iter().copied().collect();
        let changed = self.node != addresses;
        self.node = addresses;
        changed
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

    /// A Service's plan takes another's place. Adds to `touched` the Services that have to be looked at again for it.
    pub(super) fn replace(
        &mut self,
        service: Handle,
        old: Option<&Plan>,
        new: Option<&Plan>,
        touched: &mut BTreeSet<Handle>,
    ) {
        self.replace_frontends(service, old, new, touched);
        for (position, pair) in (0..).zip(ports(old).zip_longest(ports(new))) {
            let (old, new) = pair.left_and_right();
            for change in all_backends(old).merge_join_by(all_backends(new), Ord::cmp) {
                match change {
                    EitherOrBoth::Left(gone) => drop(self.backends.remove(&(gone, service, position))),
                    EitherOrBoth::Right(come) => drop(self.backends.insert((come, service, position))),
                    EitherOrBoth::Both(..) => {}
                }
            }
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
        let mut led_to = |at: AddressPort| {
            let owners = self.backends.range((at, 0, 0)..=(at, Handle::MAX, u16::MAX));
            touched.extend(owners.map(|(_, owner, _)| *owner));
        };
        match at {
            FrontendAddress::Vip(vip) => {
                led_to(vip);
                if self.node.contains(&vip.ip) {
                    let behind = nodeport_key(port.family, vip.port, port.protocol);
                    touched.extend(self.frontends.get(&behind));
                }
            }
            FrontendAddress::NodePort(number) => {
                self.of_family(port.family).for_each(|ip| led_to(AddressPort { ip: *ip, port: number }));
            }
        }
    }
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
