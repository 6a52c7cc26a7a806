//! Which endpoints `internalTrafficPolicy` and `externalTrafficPolicy` give to which frontend.

use super::endpoint::Used;
use super::input::{Service, ServiceType, TrafficPolicy};
use super::plan::{FrontendKind, Verdict};

/// The traffic policies of a Service, as they count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policies {
    internal: TrafficPolicy,
    external: TrafficPolicy,
}

impl Policies {
    /// `externalTrafficPolicy` counts only where the Service is meant to be reached from outside.
    pub(super) fn of(service: &Service) -> Self {
        let external_ips = service.external.as_ref().is_some_and(|external| !external.ips.is_empty());
        let accessible = match service.kind {
            ServiceType::ClusterIp => external_ips,
            ServiceType::NodePort | ServiceType::LoadBalancer => true,
        };
        let external = if accessible { service.external_policy } else { TrafficPolicy::Cluster };
        Self { internal: service.internal_policy, external }
    }

    /// Load balancers must ask which nodes have endpoints.
    pub(super) fn external_is_local(self) -> bool {
        self.external == TrafficPolicy::Local
    }

    fn at(self, kind: FrontendKind) -> TrafficPolicy {
        match kind {
            FrontendKind::ClusterIp => self.internal,
            FrontendKind::LoadBalancer | FrontendKind::ExternalIp | FrontendKind::NodePort => self.external,
        }
    }

    /// The sets that frontends of these kinds use. From outside, also a Local one uses the Cluster set: for the pods
    /// and processes of this node.
    pub(super) fn used(self, mut kinds: impl Iterator<Item = FrontendKind> + Clone) -> Used {
        Used {
            local: kinds.clone().any(|kind| self.at(kind) == TrafficPolicy::Local),
            cluster: kinds
                .any(|kind| kind != FrontendKind::ClusterIp || self.at(kind) == TrafficPolicy::Cluster),
        }
    }

    /// What a new connection meets at a frontend of this kind; `any`: there is a usable endpoint on some node.
    pub(super) fn verdict(self, kind: FrontendKind, any: bool) -> Verdict {
        match self.at(kind) {
            _ if !any => Verdict::Reject,
            TrafficPolicy::Cluster => Verdict::Cluster,
            TrafficPolicy::Local => Verdict::Local,
        }
    }
}
