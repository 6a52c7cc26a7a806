//! Which endpoints of a Service's slices a new connection may reach.
//!
//! Owns the join of slices to a Service port and the ready, serving and terminating rules.

use std::net::SocketAddr;

use super::input::{Family, ServicePort};
use super::objects::{Endpoint, Slice};
use super::plan::Backend;

/// The Cluster set of one port in one family: the Ready endpoints, or where there is none the ones that still serve
/// while they terminate. Sorted, no address:port twice.
pub(super) fn cluster_set(port: &ServicePort, family: Family, slices: &[&Slice]) -> Box<[Backend]> {
    let candidates = candidates(port, family, slices);
    let backends = |usable: fn(&Endpoint) -> bool| -> Box<[Backend]> {
        let usable = candidates.iter().filter(|(_, endpoint)| usable(endpoint));
        usable.map(|(address, endpoint)| Backend { address: *address, local: endpoint.local }).collect()
    };
    let ready = backends(|endpoint| endpoint.ready);
    if ready.is_empty() { backends(|endpoint| endpoint.serving && endpoint.terminating) } else { ready }
}

/// The endpoints that slices have for a port, joined by name and protocol, each address:port once. Of duplicates the
/// one that is not terminating counts, then the one that is ready, then serving, then local.
fn candidates<'a>(
    port: &ServicePort,
    family: Family,
    slices: &[&'a Slice],
) -> Vec<(SocketAddr, &'a Endpoint)> {
    let mut candidates = Vec::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        let joined = |name, protocol| name == &port.name && protocol == port.protocol;
        for number in slice.ports.iter().filter(|other| joined(&other.name, other.protocol)) {
            let addressed =
                |endpoint: &'a Endpoint| (SocketAddr::new(endpoint.address, number.port), endpoint);
            candidates.extend(slice.endpoints.iter().map(addressed));
        }
    }
    candidates.sort_unstable_by_key(|(address, endpoint)| {
        (*address, endpoint.terminating, !endpoint.ready, !endpoint.serving, !endpoint.local)
    });
    candidates.dedup_by_key(|(address, _)| *address);
    candidates
}
