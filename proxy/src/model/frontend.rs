//! What a Service asks for: one frontend for each address and NodePort of each port, and the port of its health check.
//!
//! Reads the Service alone, so that its claims do not move when its endpoints do. Never decides between two Services.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::claims::Claim;
use super::input::{External, Family, Protocol, Service, ServicePort, ServiceType};
use super::plan::{AddressPort, FrontendAddress, FrontendKind};
use super::traffic_policy::Policies;

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
    let addresses = addresses(service, warnings);
    let mut named = BTreeSet::new();
    let mut claimed = BTreeMap::new();
    let mut asks = Vec::new();
    for port in &*service.ports {
        if !named.insert((port.protocol, &port.name)) {
            warnings.push(format!("a second {} port named {:?} is ignored", port.protocol, port.name));
            continue;
        }
        for ask in asks_of_port(&addresses, families(service), port) {
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

/// The port that load balancers ask for the health of a Service: they ask where `externalTrafficPolicy` is `Local`.
pub(super) fn health_check_port(service: &Service) -> Option<u16> {
    let asked = service.kind == ServiceType::LoadBalancer && Policies::of(service).external_is_local();
    service.external.as_deref()?.health_check_node_port.filter(|_| asked)
}

/// What a Service claims for its health check, which is a TCP port of the node in each family that it is served in.
pub(super) fn health_check_claims(service: &Service) -> impl Iterator<Item = (Family, Claim)> {
    let port = health_check_port(service);
    families(service).filter_map(move |family| Some((family, Claim::NodePort(Protocol::Tcp, family, port?))))
}

/// The families that a Service is served in: those of its cluster IPs.
fn families(service: &Service) -> impl Iterator<Item = Family> + Clone {
    let served = |family: &Family| service.cluster_ips.iter().any(|ip| Family::of(*ip) == *family);
    Family::ALL.into_iter().filter(served)
}

/// The addresses that a Service names, each once: where two fields name the same, the one that promises most counts.
fn addresses(service: &Service, warnings: &mut Vec<String>) -> BTreeMap<IpAddr, FrontendKind> {
    let mut addresses: BTreeMap<_, _> =
        service.cluster_ips.iter().map(|ip| (*ip, FrontendKind::ClusterIp)).collect();
    let Some(External { ips, load_balancer_ips, .. }) = service.external.as_deref() else { return addresses };
    let load_balancer_ips = load_balancer_ips.iter().map(|ip| (*ip, FrontendKind::LoadBalancer));
    for (ip, kind) in load_balancer_ips.chain(ips.iter().map(|ip| (*ip, FrontendKind::ExternalIp))) {
        let family = Family::of(ip);
        if families(service).any(|served| served == family) {
            addresses.entry(ip).or_insert(kind);
        } else {
            warnings
                .push(format!("{kind} address {ip} is not served: the Service has no {family} cluster IP"));
        }
    }
    addresses
}

fn asks_of_port<'a>(
    addresses: &BTreeMap<IpAddr, FrontendKind>,
    families: impl Iterator<Item = Family>,
    port: &'a ServicePort,
) -> impl Iterator<Item = Ask<'a>> {
    let vips = addresses.iter().map(|(ip, kind)| Ask {
        family: Family::of(*ip),
        port,
        at: FrontendAddress::Vip(AddressPort { ip: *ip, port: port.port }),
        kind: *kind,
    });
    let node_ports = families.filter_map(|family| {
        let at = FrontendAddress::NodePort(port.node_port?);
        Some(Ask { family, port, at, kind: FrontendKind::NodePort })
    });
    vips.chain(node_ports)
}
