//! The metric families of changes on their way to the kernel, under kube-proxy's names.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;

use k8s_openapi::jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as Metrics;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::metrics::{IpFamily, KUBE_PROXY};
use crate::model::input::{Change, Event, Family};

/// How many changes are remembered until they are committed: while commits fail, the oldest are forgotten, and are
/// missing from the metric.
const TRIGGERED: usize = 1 << 14;

type Seconds = Gauge<f64, AtomicU64>;

/// Follows changes from the moment that they are taken in until they are committed.
#[derive(Debug)]
pub struct Changes {
    endpoints: Counted,
    services: Counted,
    last_queued: Seconds,
    last_synced: Seconds,
    programming: Metrics<IpFamily, Histogram>,
    /// When what is not committed yet was triggered, in microseconds since the epoch; the oldest first.
    triggered: VecDeque<(Family, i64)>,
}

/// Changes of one kind of object.
#[derive(Clone, Debug, Default)]
struct Counted {
    total: Counter,
    pending: Gauge,
}

impl Counted {
    fn register(registry: &mut Registry, of: &str) -> Self {
        let counted = Self::default();
        let name = |end| format!("sync_proxy_rules_{}_changes{end}", of.to_lowercase());
        registry.register(
            name("_pending"),
            format!("{of} changes that are not committed yet"),
            counted.pending.clone(),
        );
        registry.register(name(""), format!("{of} changes that were seen"), counted.total.clone());
        counted
    }

    fn add(&self) {
        self.total.inc();
        self.pending.inc();
    }
}

impl Changes {
    /// Registers the families.
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix(KUBE_PROXY);
        let changes = Self {
            endpoints: Counted::register(registry, "Endpoint"),
            services: Counted::register(registry, "Service"),
            last_queued: Seconds::default(),
            last_synced: Seconds::default(),
            programming: Metrics::new_with_constructor(programming),
            triggered: VecDeque::new(),
        };
        registry.register(
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "When a commit was last asked for, since the epoch",
            changes.last_queued.clone(),
        );
        registry.register(
            "sync_proxy_rules_last_timestamp_seconds",
            "When a commit last succeeded, since the epoch",
            changes.last_synced.clone(),
        );
        registry.register(
            "network_programming_duration_seconds",
            "From a change of a pod or a Service until it was committed",
            changes.programming.clone(),
        );
        changes
    }

    /// An event was taken in.
    pub fn seen(&mut self, event: &Event) {
        let Event::Source { change, .. } = event else { return };
        match change {
            Change::Slice(_) | Change::SliceGone(_) => self.endpoints.add(),
            Change::Service(_) | Change::ServiceGone(_) => self.services.add(),
            Change::Triggered(family, at) => {
                if self.triggered.len() == TRIGGERED {
                    self.triggered.pop_front();
                }
                self.triggered.push_back((*family, *at));
            }
            Change::Node(_) | Change::ServiceCidrs(_) | Change::Complete(_) | Change::Synced => {}
        }
    }

    /// What was taken in has to be committed.
    pub fn queued(&self) {
        self.last_queued.set(now());
    }

    /// What was taken in changed nothing.
    pub fn nothing_waits(&mut self) {
        self.triggered.clear();
        self.endpoints.pending.set(0);
        self.services.pending.set(0);
    }

    /// All that was planned is committed.
    pub fn committed(&mut self) {
        let now = now();
        self.last_synced.set(now);
        for (family, at) in self.triggered.drain(..) {
            let took = now - at as f64 / 1e6;
            self.programming.get_or_create(&family.into()).observe(took.max(0.0));
        }
        self.nothing_waits();
    }
}

fn now() -> f64 {
    Timestamp::now().as_microsecond() as f64 / 1e6
}

/// kube-proxy's buckets: 250 ms to 5 minutes.
fn programming() -> Histogram {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    Histogram::new([0.25, 0.5].into_iter().chain(seconds.map(f64::from)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::input::{ObjectKey, Origin};

    #[test]
    fn changes_wait_until_they_are_committed() {
        let mut registry = Registry::default();
        let mut changes = Changes::register(&mut registry);
        let lines = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        };
        let has = |line: &str| {
            let text = lines();
            assert!(text.lines().any(|printed| printed == line), "{line}: {text}");
        };
        let event = |change| Event::Source { origin: Origin::Api, change };
        let slice = || event(Change::SliceGone(ObjectKey::new("default", "web-1")));
        let at = Timestamp::now().as_microsecond() - 700_000;
        changes.seen(&slice());
        changes.seen(&event(Change::Triggered(Family::V4, at)));
        changes.queued();
        has("kubeproxy_sync_proxy_rules_endpoint_changes_pending 1");
        changes.committed();
        has("kubeproxy_sync_proxy_rules_endpoint_changes_pending 0");
        has("kubeproxy_sync_proxy_rules_endpoint_changes_total 1");
        for line in [
            "le=\"0.5\",ip_family=\"IPv4\"} 0",
            "le=\"1.0\",ip_family=\"IPv4\"} 1",
            "le=\"300.0\",ip_family=\"IPv4\"} 1",
        ] {
            has(&format!("kubeproxy_network_programming_duration_seconds_bucket{{{line}"));
        }
        assert_eq!(lines().matches("seconds_bucket{").count(), 2 + 59 + 12 + 7 + 1);

        // What changes nothing does not wait.
        changes.seen(&slice());
        changes.seen(&event(Change::Triggered(Family::V4, at)));
        changes.nothing_waits();
        has("kubeproxy_sync_proxy_rules_endpoint_changes_pending 0");
        changes.committed();
        has("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 1");

        // While commits fail, the oldest are forgotten.
        changes.seen(&event(Change::Triggered(Family::V4, at)));
        (0..TRIGGERED).for_each(|_| changes.seen(&event(Change::Triggered(Family::V6, at))));
        changes.committed();
        has("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 1");
        has(&format!(
            "kubeproxy_network_programming_duration_seconds_count{{ip_family=\"IPv6\"}} {TRIGGERED}"
        ));
    }
}
