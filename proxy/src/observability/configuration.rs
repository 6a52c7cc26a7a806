//! The metric of the configuration files.

use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::metrics::KUBE_LANE;
use crate::config::ConfigStatus;

/// Whether the configuration on disk is in force.
#[derive(Clone, Debug, Default)]
pub struct Configuration {
    stale: Gauge,
}

impl Configuration {
    /// Registers the family.
    pub fn register(registry: &mut Registry) -> Self {
        let configuration = Self::default();
        registry.sub_registry_with_prefix(KUBE_LANE).register(
            "configuration_stale",
            "1 while the configuration files on disk cannot be used and the agent goes on with what it read before",
            configuration.stale.clone(),
        );
        configuration
    }

    /// What the agent says of its configuration now.
    pub fn tell(&self, status: &ConfigStatus) {
        self.stale.set(status.pending_problem.is_some().into());
    }
}
