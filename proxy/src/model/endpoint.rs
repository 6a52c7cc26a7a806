//! Which endpoints of a Service's slices a new connection may reach.
//!
//! Owns the join of slices to a Service port and the ready, serving and terminating rules.

use std::net::SocketAddr;

use super::input::{Family, ServicePort};
use super::objects::{Slice, State};
use super::plan::Backend;

/// The Cluster set of one port in one family: the Ready endpoints, or where there is none the ones that still serve
/// while they terminate. Sorted, no address:port twice.
pub(super) fn cluster_set(port: &ServicePort, family: Family, slices: &[&Slice]) -> Box<[Backend]> {
    let candidates = candidates(port, family, slices);
    let backends = |usable: fn(State) -> bool| -> Box<[Backend]> {
        let usable = candidates.iter().filter(|(_, state)| usable(*state));
        usable.map(|(address, state)| Backend { address: (*address).into(), local: state.local() }).collect()
    };
    let ready = backends(State::ready);
    if ready.is_empty() { backends(|state| state.serving() && state.terminating()) } else { ready }
}

/// The endpoints that slices have for a port, joined by name and protocol, each address:port once. Of duplicates the
/// one that is not terminating counts, then the one that is ready, then serving, then local.
fn candidates(port: &ServicePort, family: Family, slices: &[&Slice]) -> Vec<(SocketAddr, State)> {
    let mut candidates = Vec::new();
    for slice in slices.iter().filter(|slice| slice.family() == family) {
        for number in slice.ports.iter().filter(|p| (&p.name, p.protocol) == (&port.name, port.protocol)) {
            let addressed = |(address, state)| (SocketAddr::new(address, number.port), state);
            candidates.extend(slice.endpoints().map(addressed));
        }
    }
    candidates.sort_unstable_by_key(|(address, state)| {
        (*address, state.terminating(), !state.ready(), !state.serving(), !state.local())
    });
    candidates.dedup_by_key(|(address, _)| *address);
    candidates
}
