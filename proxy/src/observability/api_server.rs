//! The metrics of the connection to the API server.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use super::metrics::KUBE_LANE;
use crate::source::kube::ServerStatus;

/// Reads how the API server is reached whenever metrics are asked for.
#[derive(Debug)]
struct ApiServer(watch::Receiver<ServerStatus>);

/// Registers the families.
pub fn register(registry: &mut Registry, status: watch::Receiver<ServerStatus>) {
    registry.sub_registry_with_prefix(KUBE_LANE).register_collector(Box::new(ApiServer(status)));
}

impl Collector for ApiServer {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (through_service, fallback) = {
            let status = self.0.borrow();
            (status.through_service, status.fallback)
        };
        for (name, help, value) in [
            (
                "api_server_through_service",
                "Whether the address of the API server that is in use is a Service's, which a proxy on this node serves",
                through_service,
            ),
            (
                "api_server_fallback",
                "Whether the preferred address of the API server does not answer, and another one is in use",
                fallback,
            ),
        ] {
            let gauge = ConstGauge::new(i64::from(value));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}
