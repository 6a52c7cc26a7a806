//! The metrics of the manifest folder.

use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::metrics::KUBE_LANE;
use crate::source::manifest::Condition;

/// How many manifests are not as they should be.
#[derive(Clone, Debug, Default)]
pub struct Manifests {
    unread: Gauge,
    odd: Gauge,
}

impl Manifests {
    /// Registers the families.
    pub fn register(registry: &mut Registry) -> Self {
        let manifests = Self::default();
        let registry = registry.sub_registry_with_prefix(KUBE_LANE);
        registry.register(
            "manifests_unread",
            "Manifest files that cannot be read, or the folder: what was in force before is",
            manifests.unread.clone(),
        );
        registry.register(
            "manifest_problems",
            "Objects and fields of manifests in force that are wrong",
            manifests.odd.clone(),
        );
        manifests
    }

    /// How the folder fares now.
    pub fn tell(&self, condition: &Condition) {
        self.unread.set(condition.unread.len() as i64);
        self.odd.set(condition.odd.len() as i64);
    }
}
