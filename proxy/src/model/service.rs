//! The plan of one Service: a pure function of the Service, its slices and who owns the addresses it asks for.

use super::claims::Claim;
use super::endpoint::cluster_set;
use super::frontend::{Ask, asks};
use super::input::{Service, ServiceKey};
use super::objects::Slice;
use super::plan::{Frontend, Plan, PortPlan, Verdict};

/// Plans one Service. `owner` names the Service that has a claimed address.
pub(super) fn plan<'a>(
    service: &Service,
    slices: &[&Slice],
    owner: impl Fn(&Claim) -> Option<&'a ServiceKey>,
) -> Plan {
    let mut warnings = Vec::new();
    let mut asks = asks(service, &mut warnings);
    asks.retain(|ask| {
        let claim = ask.claim();
        let winner = owner(&claim).filter(|winner| **winner != service.key);
        if let Some(winner) = winner {
            warnings.push(format!("{claim} belongs to Service {winner}"));
        }
        winner.is_none()
    });
    let ports = asks.chunk_by(|a, b| a.port_key() == b.port_key()).filter_map(|asks| port_plan(asks, slices));
    Plan {
        service: service.key.clone(),
        ports: ports.collect(),
        health_check: None,
        warnings: warnings.into_boxed_slice(),
    }
}

fn port_plan(asks: &[Ask<'_>], slices: &[&Slice]) -> Option<PortPlan> {
    let Ask { family, port, .. } = *asks.first()?;
    let backends = cluster_set(port, family, slices);
    let verdict = if backends.is_empty() { Verdict::Reject } else { Verdict::Cluster };
    Some(PortPlan {
        family,
        protocol: port.protocol,
        name: port.name.clone(),
        frontends: asks.iter().map(|ask| Frontend { at: ask.at, kind: ask.kind, verdict }).collect(),
        affinity: None,
        source_ranges: None,
        backends,
        local_backends: Box::default(),
        draining: Box::default(),
    })
}
