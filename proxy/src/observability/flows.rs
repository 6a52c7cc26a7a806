//! The metric families of tracked flows, under kube-proxy's names where it has them.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::metrics::{IpFamily, KUBE_LANE, KUBE_PROXY, durations};
use crate::dataplane::conntrack::Looked;

/// Counts looks at tracked flows and what was deleted.
#[derive(Clone, Debug)]
pub struct Flows {
    duration: Family<IpFamily, Histogram>,
    deleted: Family<IpFamily, Counter>,
    read: Family<IpFamily, Counter>,
}

impl Flows {
    /// Registers the families.
    pub fn register(registry: &mut Registry) -> Self {
        let flows = Self {
            duration: Family::new_with_constructor(durations),
            deleted: Family::default(),
            read: Family::default(),
        };
        let kube_proxy = registry.sub_registry_with_prefix(KUBE_PROXY);
        kube_proxy.register(
            "conntrack_reconciler_sync_duration_seconds",
            "How long a look at tracked flows took",
            flows.duration.clone(),
        );
        kube_proxy.register(
            "conntrack_reconciler_deleted_entries",
            "Stale flows that were deleted",
            flows.deleted.clone(),
        );
        let own = registry.sub_registry_with_prefix(KUBE_LANE);
        own.register(
            "conntrack_read",
            "Tracked flows that the kernel copied to the agent",
            flows.read.clone(),
        );
        flows
    }

    /// A look ended.
    pub fn looked(&self, looked: &Looked) {
        let family = looked.family.into();
        self.duration.get_or_create(&family).observe(looked.took.as_secs_f64());
        self.deleted.get_or_create(&family).inc_by(looked.deleted);
        self.read.get_or_create(&family).inc_by(looked.read);
    }
}
