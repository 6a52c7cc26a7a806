//! The plan of one Service: a pure function of the Service, its slices, the node and the owners of what it asks for in
//! vain.

use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::claims::{Claim, Owner};
use super::endpoint::Slices;
use super::frontend::{Ask, asks, health_check_claims, health_check_port};
use super::input::{External, Family, Origin, Service};
use super::node::Facts;
use super::objects::Slice;
use super::plan::{Frontend, FrontendKind, HealthCheck, MAX_BACKENDS, Plan, PortPlan};
use super::source_ranges;
use super::traffic_policy::Policies;

/// The API server's range of NodePorts, where it is not told another.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;

/// Plans one Service. `owner` names who has what this Service claims, where that is another.
pub(super) fn plan<'a>(
    origin: Origin,
    service: &Service,
    slices: &[&Slice],
    node: &Facts,
    owner: impl Fn(&Claim) -> Option<Owner<'a>>,
) -> Plan {
    let mut warnings = Vec::new();
    let mut asks = asks(service, &mut warnings);
    let health_check_families = health_check_families(service, &asks, &owner, &mut warnings);
    asks.retain(|ask| {
        let claim = ask.claim();
        let owner = owner(&claim);
        if let Some(owner) = owner {
            warnings.push(format!("{owner} comes first at {claim}"));
        }
        owner.is_none()
    });
    if origin == Origin::Static {
        // Nobody has checked it.
        let odd =
            service.ports.iter().filter_map(|port| port.node_port).filter(|port| !NODE_PORTS.contains(port));
        warnings.extend(odd.map(|port| {
            format!(
                "nodePort {port} is outside 30000-32767: a server or a client of the node may want this port"
            )
        }));
        let held = service.cluster_ips.iter().filter(|ip| node.held.binary_search(ip).is_ok());
        warnings.extend(held.map(|ip| {
            format!(
                "clusterIP {ip} is an address of this node: the ports of the Service take connections away from \
                 the node's own servers, and pods find all its other ports closed; use an address that nothing has"
            )
        }));
    }
    let policies = Policies::of(service);
    let slices = |family| Slices { slices, family, zone: node.zone.as_deref() };
    let ranges = Family::ALL.map(|family| source_ranges(service, family, &asks, node, &mut warnings));
    let ports = asks.chunk_by(|a, b| a.port_key() == b.port_key()).filter_map(|asks| {
        let family = asks.first()?.family;
        port_plan(service, policies, asks, slices(family), ranges[family as usize].as_ref(), &mut warnings)
    });
    let ports = ports.collect();
    Plan {
        service: service.key.clone(),
        ports,
        health_check: health_check(service, &health_check_families, &asks, slices),
        warnings: warnings.into_boxed_slice(),
    }
}

fn port_plan(
    service: &Service,
    policies: Policies,
    asks: &[Ask<'_>],
    slices: Slices<'_>,
    source_ranges: Option<&Arc<[IpNetwork]>>,
    warnings: &mut Vec<String>,
) -> Option<PortPlan> {
    let Ask { family, port, .. } = *asks.first()?;
    let used = policies.used(asks.iter().map(|ask| ask.kind));
    let endpoints = slices.endpoints(&port.name, port.protocol, used);
    if endpoints.wanted > MAX_BACKENDS {
        let (name, protocol) = (&port.name, port.protocol);
        warnings.push(format!(
            "port {name:?} {protocol} {family} has {} endpoints: the first {MAX_BACKENDS} by address are used; split \
             the Service to use all",
            endpoints.wanted
        ));
    }
    let frontend = |ask: &Ask<'_>| Frontend {
        at: ask.at,
        kind: ask.kind,
        verdict: policies.verdict(ask.kind, endpoints.any),
    };
    Some(PortPlan {
        family,
        protocol: port.protocol,
        name: port.name.clone(),
        affinity: service.affinity,
        source_ranges: source_ranges.filter(|_| asks.iter().any(is_load_balancer)).cloned(),
        frontends: asks.iter().map(frontend).collect(),
        backends: endpoints.cluster,
        local_backends: endpoints.local,
        draining: endpoints.draining,
    })
}

/// Who may dial the load balancer addresses that the Service has in a family.
fn source_ranges(
    service: &Service,
    family: Family,
    asks: &[Ask<'_>],
    node: &Facts,
    warnings: &mut Vec<String>,
) -> Option<Arc<[IpNetwork]>> {
    let has_ranges = |external: &&External| external.ranges_unread || !external.source_ranges.is_empty();
    let external = service.external.as_deref().filter(has_ranges)?;
    if !asks.iter().any(|ask| ask.family == family && is_load_balancer(ask)) {
        return None;
    }
    if !external.source_ranges.iter().any(|range| Family::of(range.ip()) == family) {
        warnings.push(if external.ranges_unread {
            format!(
                "loadBalancerSourceRanges has no {family} range that can be read: no {family} client is let \
                 through"
            )
        } else {
            format!("loadBalancerSourceRanges has no {family} range: all {family} clients are let through")
        });
    }
    source_ranges::allowed(external, family, &node.addresses)
}

fn is_load_balancer(ask: &Ask<'_>) -> bool {
    ask.kind == FrontendKind::LoadBalancer
}

/// The families in which the Service has the port of its health check. `asks` is all that it asks to be dialled at.
fn health_check_families<'a>(
    service: &Service,
    asks: &[Ask<'_>],
    owner: impl Fn(&Claim) -> Option<Owner<'a>>,
    warnings: &mut Vec<String>,
) -> Vec<Family> {
    let mut families = Vec::new();
    for (family, claim) in health_check_claims(service) {
        let why = if let Some(owner) = owner(&claim) {
            format!("{owner} comes first at {claim}")
        } else if asks.iter().any(|ask| ask.claim() == claim) {
            format!("a port of the Service is at {claim}")
        } else {
            families.push(family);
            continue;
        };
        warnings.push(format!("load balancers cannot ask for the health of this Service: {why}"));
    }
    families
}

fn health_check<'a>(
    service: &Service,
    families: &[Family],
    asks: &[Ask<'_>],
    slices: impl Fn(Family) -> Slices<'a>,
) -> Option<Box<HealthCheck>> {
    let port = health_check_port(service)?;
    let endpoints = |family| {
        let served = families.contains(&family) && asks.iter().any(|ask| ask.family == family);
        served.then(|| slices(family).local_ready_addresses())
    };
    let health_check =
        HealthCheck { port, v4_endpoints: endpoints(Family::V4), v6_endpoints: endpoints(Family::V6) };
    let any = health_check.v4_endpoints.is_some() || health_check.v6_endpoints.is_some();
    any.then(|| Box::new(health_check))
}
