//! Which endpoints of a Service's slices a new connection may reach.
//!
//! Owns the join of slices to a Service port, the ready, serving and terminating rules, and the Cluster and Local sets.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::input::{Family, Protocol};
use super::objects::{Slice, State};
use super::plan::{AddressPort, Backend, MAX_BACKENDS};
use super::topology::Topology;

/// The slices of one Service in one family, as this node sees them.
#[derive(Clone, Copy)]
pub(super) struct Slices<'a> {
    pub(super) slices: &'a [&'a Slice],
    pub(super) family: Family,
    /// The own zone.
    pub(super) zone: Option<&'a str>,
}

/// Which sets the frontends of a port use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Used {
    pub(super) cluster: bool,
    pub(super) local: bool,
}

/// The endpoints of one port in one family: sorted, no address:port twice, at most [`MAX_BACKENDS`] in a set; a set that is
/// not used is empty.
#[derive(Debug)]
pub(super) struct Endpoints {
    /// The Ready ones that the hints leave to this node; where nothing is Ready, all that still serve while they
    /// terminate.
    pub(super) cluster: Box<[Backend]>,
    /// The Ready ones of this node; where there is none, those of this node that still serve while they terminate.
    pub(super) local: Box<[Backend]>,
    /// The others that still serve. Only of connectionless protocols: nobody asks for those of TCP.
    pub(super) draining: Box<[AddressPort]>,
    /// There is a usable one on some node.
    pub(super) any: bool,
    /// How many the larger set would have without a limit.
    pub(super) wanted: usize,
}

impl<'a> Slices<'a> {
    /// The endpoints of the port of this name and protocol.
    pub(super) fn endpoints(self, name: &str, protocol: Protocol, used: Used) -> Endpoints {
        let candidates = self.candidates(name, protocol);
        let states = || candidates.iter().map(|(_, state)| *state);
        let topology = Topology::of(states().filter(|state| state.ready()));
        let any_ready = states().any(State::ready);
        let any_local_ready = states().any(|state| state.local() && state.ready());
        let in_cluster = |state: State| {
            used.cluster
                && if any_ready { state.ready() && topology.allows(state) } else { state.last_resort() }
        };
        let in_local = |state: State| {
            used.local && state.local() && if any_local_ready { state.ready() } else { state.last_resort() }
        };
        let backends = |within: &dyn Fn(State) -> bool| -> Box<[Backend]> {
            let chosen = candidates.iter().filter(|(_, state)| within(*state));
            let backends = chosen.map(|(address, state)| Backend { address: *address, local: state.local() });
            backends.take(MAX_BACKENDS).collect()
        };
        let (cluster, local) = (backends(&in_cluster), backends(&in_local));
        let is_in = |set: &[Backend], address| set.binary_search_by_key(&address, |b| b.address).is_ok();
        let drains = |address: AddressPort, state: State| {
            protocol != Protocol::Tcp
                && state.serving()
                && !is_in(&cluster, address)
                && !is_in(&local, address)
        };
        let draining = candidates.iter().filter(|(address, state)| drains(*address, *state));
        let draining = draining.map(|(address, _)| *address).collect();
        let would_be = |within: &dyn Fn(State) -> bool| states().filter(|state| within(*state)).count();
        let wanted = would_be(&in_cluster).max(would_be(&in_local));
        let any = any_ready || states().any(State::last_resort);
        Endpoints { cluster, local, draining, any, wanted }
    }

    /// How many addresses have a Ready endpoint on this node, whatever the port.
    pub(super) fn local_ready_addresses(self) -> u32 {
        let ports: BTreeSet<(&str, Protocol)> = self
            .of_family()
            .flat_map(|slice| slice.ports.iter().map(|port| (&*port.name, port.protocol)))
            .collect();
        let mut addresses: BTreeSet<IpAddr> = BTreeSet::new();
        for (name, protocol) in ports {
            let ready = self.candidates(name, protocol);
            let ready = ready.iter().filter(|(_, state)| state.local() && state.ready());
            addresses.extend(ready.map(|(address, _)| address.ip));
        }
        u32::try_from(addresses.len()).unwrap_or(u32::MAX)
    }

    /// The endpoints that the slices have for a port, joined by name and protocol, each address:port once. Of duplicates
    /// the one that is not terminating counts, then the one that is ready, then serving, then local, then hinted here.
    fn candidates(self, name: &str, protocol: Protocol) -> Vec<(AddressPort, State)> {
        let mut candidates = Vec::new();
        for slice in self.of_family() {
            for number in slice.ports.iter().filter(|port| (&*port.name, port.protocol) == (name, protocol)) {
                let addressed = |(ip, state)| (AddressPort { ip, port: number.port }, state);
                candidates.extend(slice.endpoints(self.zone).map(addressed));
            }
        }
        candidates.sort_unstable_by_key(|(address, state)| (*address, state.rank()));
        candidates.dedup_by_key(|(address, _)| *address);
        candidates
    }

    fn of_family(self) -> impl Iterator<Item = &'a Slice> {
        self.slices.iter().copied().filter(move |slice| slice.family() == self.family)
    }
}
