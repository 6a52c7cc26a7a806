//! What a Service asks to be dialled at: one frontend for each cluster IP and NodePort of each port.
//!
//! Reads the Service alone, so that its claims do not move when its endpoints do. Never decides between two Services.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::claims::Claim;
use super::input::{Family, Protocol, Service, ServicePort};
use super::plan::{AddressPort, FrontendAddress, FrontendKind};

/// A frontend that a Service asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask<'a> {
    pub(super) family: Family,
    pub(super) port: &'a ServicePort,
    pub(super) at: FrontendAddress,
    pub(super) kind: FrontendKind,
}

impl<'a> Ask<'a> {
    pub(super) fn claim(&self) -> Claim {
        Claim::new(self.port.protocol, self.family, self.at)
    }

    /// What tells one port plan of a Service from another.
    pub(super) fn port_key(&self) -> (Family, Protocol, &'a str) {
        (self.family, self.port.protocol, &self.port.name)
    }
}

/// The frontends that a Service asks for, sorted by port plan and then as port plans sort theirs; no claim twice. Of
/// two ports that the API would not let stand together, the first in the object's order counts, with a warning.
pub(super) fn asks<'a>(service: &'a Service, warnings: &mut Vec<String>) -> Vec<Ask<'a>> {
    let cluster_ips: BTreeSet<IpAddr> = service.cluster_ips.iter().copied().collect();
    let mut named = BTreeSet::new();
    let mut claimed = BTreeMap::new();
    let mut asks = Vec::new();
    for port in &service.ports {
        if !named.insert((port.protocol, &port.name)) {
            warnings.push(format!("a second {} port named {:?} is ignored", port.protocol, port.name));
            continue;
        }
        for ask in asks_of_port(&cluster_ips, port) {
            match claimed.entry(ask.claim()) {
                Entry::Vacant(vacant) => {
                    vacant.insert(&port.name);
                    asks.push(ask);
                }
                Entry::Occupied(first) => {
                    let (claim, first) = (first.key(), first.get());
                    warnings.push(format!("port {:?} is not at {claim}: port {first:?} is", port.name));
                }
            }
        }
    }
    asks.sort_by_key(|ask| (ask.port_key(), ask.at, ask.kind));
    asks
}

fn asks_of_port<'a>(cluster_ips: &BTreeSet<IpAddr>, port: &'a ServicePort) -> impl Iterator<Item = Ask<'a>> {
    let vips = cluster_ips.iter().map(|ip| Ask {
        family: Family::of(*ip),
        port,
        at: FrontendAddress::Vip(AddressPort { ip: *ip, port: port.port }),
        kind: FrontendKind::ClusterIp,
    });
    let families: BTreeSet<Family> = cluster_ips.iter().copied().map(Family::of).collect();
    let node_ports = families.into_iter().filter_map(|family| {
        Some(Ask {
            family,
            port,
            at: FrontendAddress::NodePort(port.node_port?),
            kind: FrontendKind::NodePort,
        })
    });
    vips.chain(node_ports)
}
