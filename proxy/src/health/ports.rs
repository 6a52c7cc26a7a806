//! The addresses that another program has: which they are, for `kube-lane status` and the metrics.
//!
//! Owns this list and how often such an address is tried again. kube-proxy may run here until it is removed, and has the
//! same ports: they are taken over as they come free. Never binds anything.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use serde::Serialize;

use crate::observability::metrics::KUBE_LANE;

/// How long to wait before an address that cannot be bound is tried again.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// An address that cannot be bound at present.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AwaitedPort {
    /// The address.
    pub address: SocketAddr,
    /// What is to be served there.
    pub server: String,
    /// The kernel's error.
    pub error: String,
}

impl fmt::Display for AwaitedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be served on {}: {}", self.server, self.address, self.error)
    }
}

/// All of them. A clone is the same list.
#[derive(Clone, Debug, Default)]
pub struct AwaitedPorts(Arc<Mutex<BTreeMap<(SocketAddr, String), String>>>);

impl AwaitedPorts {
    /// Registers their number as a metric.
    pub fn register(registry: &mut Registry) -> Self {
        let ports = Self::default();
        registry.sub_registry_with_prefix(KUBE_LANE).register_collector(Box::new(ports.clone()));
        ports
    }

    /// All of them, in the order of their addresses.
    pub fn list(&self) -> Vec<AwaitedPort> {
        let port = |((address, server), error): (&(SocketAddr, String), &String)| AwaitedPort {
            address: *address,
            server: server.clone(),
            error: error.clone(),
        };
        self.lock().iter().map(port).collect()
    }

    /// Lists an address until what is returned is dropped.
    pub(super) fn add(&self, address: SocketAddr, server: &str, error: &std::io::Error) -> Awaiting {
        let key = (address, server.to_owned());
        self.lock().insert(key.clone(), error.to_string());
        Awaiting { ports: self.clone(), key }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(SocketAddr, String), String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for AwaitedPorts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let gauge = ConstGauge::new(self.lock().len() as i64);
        let help = "Addresses of health, metrics and Services' health checks that another program has";
        gauge.encode(encoder.encode_descriptor("awaited_ports", help, None, gauge.metric_type())?)
    }
}

/// An address that is listed.
#[derive(Debug)]
pub(super) struct Awaiting {
    ports: AwaitedPorts,
    key: (SocketAddr, String),
}

impl Drop for Awaiting {
    fn drop(&mut self) {
        self.ports.lock().remove(&self.key);
    }
}
