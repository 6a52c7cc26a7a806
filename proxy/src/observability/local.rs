//! How many service ports take no traffic on this node because their policy wants local endpoints and there are none.

use std::collections::BTreeMap;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family as Metrics;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::metrics::{IpFamily, KUBE_PROXY};
use crate::dataplane::{Batch, Follower, Outcome};
use crate::model::input::{Family, ServiceKey};
use crate::model::plan::{FrontendKind, Plan, PortPlan, Verdict};

/// Follows commits and keeps kube-proxy's gauge.
#[derive(Debug, Default)]
pub struct NoLocalEndpoints {
    gauge: Metrics<Labels, Gauge>,
    /// The Services that have such ports, and how many.
    services: BTreeMap<ServiceKey, Counts>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    traffic_policy: &'static str,
    #[prometheus(flatten)]
    ip_family: IpFamily,
}

type Counts = [[i64; 2]; 2];
const POLICIES: [&str; 2] = ["internal", "external"];

impl NoLocalEndpoints {
    /// Registers the family.
    pub fn register(registry: &mut Registry) -> Self {
        let own = Self::default();
        registry.sub_registry_with_prefix(KUBE_PROXY).register(
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with a Local policy and no local endpoint",
            own.gauge.clone(),
        );
        for policy in 0..POLICIES.len() {
            for family in Family::ALL {
                own.add(policy, family, 0);
            }
        }
        own
    }

    fn add(&self, policy: usize, family: Family, difference: i64) {
        let labels = Labels { traffic_policy: POLICIES[policy], ip_family: family.into() };
        self.gauge.get_or_create(&labels).inc_by(difference);
    }
}

impl Follower for NoLocalEndpoints {
    fn committed(&mut self, batch: &Batch, outcome: &Outcome) {
        for (key, plan) in batch.programmed(outcome) {
            let after = plan.as_ref().map(|plan| counts(plan)).unwrap_or_default();
            let before = if after == Counts::default() {
                self.services.remove(key)
            } else {
                self.services.insert(key.clone(), after)
            };
            let before = before.unwrap_or_default();
            for policy in 0..POLICIES.len() {
                for (index, family) in Family::ALL.into_iter().enumerate() {
                    self.add(policy, family, after[policy][index] - before[policy][index]);
                }
            }
        }
    }
}

/// By policy and family.
fn counts(plan: &Plan) -> Counts {
    let mut counts = Counts::default();
    for port in plan.ports.iter().filter(|port| port.local_backends.is_empty()) {
        for (policy, internal) in [true, false].into_iter().enumerate() {
            counts[policy][port.family as usize] += i64::from(is_local(port, internal));
        }
    }
    counts
}

fn is_local(port: &PortPlan, internal: bool) -> bool {
    port.frontends.iter().any(|frontend| {
        frontend.verdict == Verdict::Local && (frontend.kind == FrontendKind::ClusterIp) == internal
    })
}
