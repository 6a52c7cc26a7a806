//! What counts as a commit, with a dataplane that has no kernel.

use std::convert::Infallible;

use prometheus_client::registry::Registry;

use super::*;
use crate::model::input::{Change, ObjectKey, Origin};
use crate::model::planner::{NodePortAddresses, PodCidrs, Settings};

/// Programs nothing, and finds this when it is told that somebody else changed something.
#[derive(Default)]
struct Nowhere {
    applied: usize,
    found: Option<Outcome>,
}

impl Dataplane for Nowhere {
    type Error = Infallible;

    fn apply(&mut self, _batch: &Batch) -> Result<Outcome, Infallible> {
        self.applied += 1;
        Ok(Outcome::default())
    }

    fn repair(&mut self) -> Result<Option<Outcome>, Infallible> {
        Ok(self.found.take())
    }
}

struct Agent {
    controller: Controller<Nowhere>,
    timers: Timers,
    registry: Registry,
    health: watch::Receiver<HealthState>,
}

impl Agent {
    fn new() -> Self {
        let planner = Planner::new(Settings {
            node_name: "node".into(),
            origins: vec![Origin::Static],
            node_address: None,
            pod_cidrs: PodCidrs::default(),
            nodeport_addresses: NodePortAddresses::default(),
            own_ports: Vec::new(),
        });
        let mut registry = Registry::default();
        let (commits, changes) = (Commits::register(&mut registry), ChangeMetrics::register(&mut registry));
        let (sender, health) = watch::channel(HealthState::default());
        let dataplane = Nowhere::default();
        let controller =
            Controller::new(planner, dataplane, Vec::new(), Duration::ZERO, sender, commits, changes);
        Self { controller, timers: Timers::new(), registry, health }
    }

    fn take_in<const N: usize>(&mut self, changes: [Change; N]) {
        let event = |change| Event::Source { origin: Origin::Static, change };
        self.controller.plan(changes.into_iter().map(event));
    }

    fn commit(&mut self) {
        self.controller.commit_in_time(&mut self.timers);
    }

    /// Somebody changes something of nftables.
    fn stir(&mut self, found: Option<Outcome>) {
        self.controller.dataplane.found = found;
        self.controller.pending.repair = true;
        self.take_in([]);
        assert!(self.health.borrow().pending_since.is_some());
        self.commit();
        assert!(self.health.borrow().pending_since.is_none() && self.controller.pending.is_empty());
    }

    /// The metrics but for the help on them.
    fn metrics(&self) -> Vec<String> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }

    fn metric(&self, name: &str) -> f64 {
        let metrics = self.metrics();
        let value = metrics.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("{name}: {metrics:?}")).parse().unwrap()
    }

    fn commits(&self) -> f64 {
        self.metric("kubeproxy_sync_proxy_rules_duration_seconds_count")
    }
}

#[test]
fn what_others_change_of_their_own_is_no_commit() {
    let mut agent = Agent::new();
    agent.take_in([Change::Synced]);
    agent.commit();
    assert_eq!((agent.commits(), agent.controller.dataplane.applied), (1.0, 1));
    let (metrics, health) = (agent.metrics(), *agent.health.borrow());
    for _ in 0..100 {
        agent.stir(None);
        assert!(agent.timers.not_before <= Instant::now(), "whatever comes next does not wait");
    }
    assert_eq!(agent.metrics(), metrics);
    assert_eq!(*agent.health.borrow(), health);

    agent.stir(Some(Outcome { added: 3, ..Outcome::default() }));
    assert_eq!((agent.commits(), agent.metric("kubelane_nftables_elements_added_total")), (2.0, 3.0));
    assert_eq!(agent.controller.dataplane.applied, 1);
    assert!(agent.timers.not_before > Instant::now(), "whoever fights is not fought without a pause");
}

#[test]
fn what_is_listed_waits_until_it_is_committed() {
    let mut agent = Agent::new();
    let slice = || Change::SliceGone(ObjectKey::new("default", "web-1"));
    let pending = "kubeproxy_sync_proxy_rules_endpoint_changes_pending";
    agent.take_in([slice()]);
    agent.stir(None);
    assert_eq!(agent.metric(pending), 1.0);
    agent.take_in([Change::Synced]);
    assert_eq!(agent.metric(pending), 1.0);
    agent.commit();
    assert_eq!(agent.metric(pending), 0.0);
    agent.take_in([slice()]);
    assert_eq!(agent.metric(pending), 0.0, "it changed nothing");
}
