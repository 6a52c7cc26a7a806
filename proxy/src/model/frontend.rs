//! What a Service asks to be dialled at: one frontend for each cluster IP and NodePort of each port.
//!
//! Reads the Service alone, so that its claims do not move when its endpoints do. Never decides between two Services.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;

use super::claims::Claim;
use super::input::{Family, Protocol, Service, ServicePort};
use super::plan::{FrontendAddress, FrontendKind};

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
    let mut named = BTreeMap::new();
    let mut claimed = BTreeMap::new();
    let mut asks = Vec::new();
    for port in &service.ports {
        if named.insert((port.protocol, &*port.name), ()).is_some() {
            warnings.push(format!("a second {} port named {:?} is ignored", port.protocol, port.name));
            continue;
        }
        for ask in asks_of_port(service, port) {
            match claimed.entry(ask.claim()) {
                Entry::Vacant(vacant) => {
                    vacant.insert(port);
                    asks.push(ask);
                }
                // The same cluster IP twice says nothing new.
                Entry::Occupied(first) if std::ptr::eq(*first.get(), port) => {}
                Entry::Occupied(first) => warnings.push(format!(
                    "port {:?} is not at {}: port {:?} is",
                    port.name,
                    first.key(),
                    first.get().name
                )),
            }
        }
    }
    asks.sort_by_key(|ask| (ask.port_key(), ask.at, ask.kind));
    asks
}

fn asks_of_port<'a>(service: &'a Service, port: &'a ServicePort) -> impl Iterator<Item = Ask<'a>> {
    let cluster_ips = service.cluster_ips.iter().map(move |ip| Ask {
        family: Family::of(*ip),
        port,
        at: FrontendAddress::Vip(SocketAddr::new(*ip, port.port)),
        kind: FrontendKind::ClusterIp,
    });
    let families = Family::ALL
        .into_iter()
        .filter(|family| service.cluster_ips.iter().any(|ip| Family::of(*ip) == *family));
    let node_ports = families.filter_map(move |family| {
        Some(Ask {
            family,
            port,
            at: FrontendAddress::NodePort(port.node_port?),
            kind: FrontendKind::NodePort,
        })
    });
    cluster_ips.chain(node_ports)
}
