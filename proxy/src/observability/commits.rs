//! The metric families of commits to the kernel, under kube-proxy's names where it has them.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::metrics::{KUBE_LANE, KUBE_PROXY, durations};
use crate::dataplane::Outcome;

/// Counts commits and what they wrote.
#[derive(Debug)]
pub struct Commits {
    duration: Histogram,
    full_duration: Histogram,
    partial_duration: Histogram,
    failures: Counter,
    added: Counter,
    removed: Counter,
    messages: Counter,
    bytes: Counter,
    refused: Gauge,
    warnings: Gauge,
    socket_duration: Histogram,
    socket_writes: Counter,
}

impl Commits {
    /// Registers the families.
    pub fn register(registry: &mut Registry) -> Self {
        let commits = Self {
            duration: durations(),
            full_duration: durations(),
            partial_duration: durations(),
            failures: Counter::default(),
            added: Counter::default(),
            removed: Counter::default(),
            messages: Counter::default(),
            bytes: Counter::default(),
            refused: Gauge::default(),
            warnings: Gauge::default(),
            socket_duration: durations(),
            socket_writes: Counter::default(),
        };
        let kube_proxy = registry.sub_registry_with_prefix(KUBE_PROXY);
        kube_proxy.register(
            "sync_proxy_rules_duration_seconds",
            "How long a commit to the kernel took",
            commits.duration.clone(),
        );
        kube_proxy.register(
            "sync_full_proxy_rules_duration_seconds",
            "How long a commit took that was compared with what was read back of the kernel",
            commits.full_duration.clone(),
        );
        kube_proxy.register(
            "sync_partial_proxy_rules_duration_seconds",
            "How long any other commit took",
            commits.partial_duration.clone(),
        );
        kube_proxy.register(
            "sync_proxy_rules_nftables_sync_failures",
            "Commits that failed as a whole",
            commits.failures.clone(),
        );
        let own = registry.sub_registry_with_prefix(KUBE_LANE);
        own.register("nftables_elements_added", "Elements added to the kernel", commits.added.clone());
        own.register(
            "nftables_elements_removed",
            "Elements removed from the kernel",
            commits.removed.clone(),
        );
        own.register("nftables_messages", "Netlink messages sent in commits", commits.messages.clone());
        own.register("nftables_message_bytes", "Bytes of those messages", commits.bytes.clone());
        own.register("services_refused", "Services that the kernel refused", commits.refused.clone());
        own.register(
            "warnings",
            "Warnings about Services and the node: what they ask for and do not have, what is cut",
            commits.warnings.clone(),
        );
        own.register(
            "socket_sync_duration_seconds",
            "How long the socket layer took to follow a commit",
            commits.socket_duration.clone(),
        );
        own.register(
            "socket_writes",
            "Words and elements written to the socket layer's maps",
            commits.socket_writes.clone(),
        );
        commits
    }

    /// A commit took effect.
    pub fn succeeded(&self, outcome: &Outcome, took: Duration) {
        self.duration.observe(took.as_secs_f64());
        let duration = if outcome.full { &self.full_duration } else { &self.partial_duration };
        duration.observe(took.as_secs_f64());
        self.added.inc_by(outcome.added as u64);
        self.removed.inc_by(outcome.removed as u64);
        self.messages.inc_by(outcome.messages as u64);
        self.bytes.inc_by(outcome.bytes as u64);
        if let Some(socket) = outcome.socket {
            self.socket_duration.observe(socket.took.as_secs_f64());
            self.socket_writes.inc_by(socket.writes as u64);
        }
    }

    /// A commit failed as a whole.
    pub fn failed(&self) {
        self.failures.inc();
    }

    /// There is so much to warn of at present.
    pub fn warned(&self, warnings: usize) {
        self.warnings.set(warnings as i64);
    }

    /// So many Services are refused at present.
    pub fn refused(&self, services: usize) {
        self.refused.set(services as i64);
    }
}
