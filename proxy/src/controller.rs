//! The one loop: events in, plans, one commit; what arrives during a commit is the next batch.
//!
//! Owns the order of things and the retries. Never decides policy (the model does) and never touches the kernel (the
//! dataplane does). There is no fixed delay: a change is committed as soon as it is known, and under load batches
//! grow by themselves.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, info, warn};

use crate::dataplane::{Batch, Dataplane, Outcome};
use crate::health::HealthState;
use crate::model::input::{Event, ServiceKey};
use crate::model::plan::{NodePlan, Plan};
use crate::model::planner::{Changes, Planner};
use crate::observability::commits::Commits;

/// How long after a commit that failed the next is tried, and the most that grows to.
const RETRY: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// How long after the kernel refused a Service it is tried again.
const RETRY_REFUSED: Duration = Duration::from_secs(30);
/// The least time between two repairs, so that a fight over our tables does not take the whole machine.
const REPAIR_INTERVAL: Duration = Duration::from_secs(1);
/// How many messages of the sources are taken at once.
const INBOX: usize = 1024;

/// The loop and what it knows.
pub struct Controller<D> {
    planner: Planner,
    dataplane: D,
    /// What the kernel still has to be told.
    pending: Pending,
    /// Services that the kernel refused, and its words.
    refused: BTreeMap<ServiceKey, String>,
    /// What was warned of, so that it is said once.
    warned: BTreeMap<ServiceKey, Box<[String]>>,
    min_sync_period: Duration,
    health: watch::Sender<HealthState>,
    commits: Commits,
    started: Instant,
}

#[derive(Default)]
struct Pending {
    services: BTreeMap<ServiceKey, Option<Arc<Plan>>>,
    node: Option<NodePlan>,
    /// Stale elements of an earlier run are still there.
    sweep: Sweep,
    /// Somebody else changed our state.
    repair: bool,
}

#[derive(Default, PartialEq, Eq)]
enum Sweep {
    #[default]
    NotYet,
    Due,
    Done,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.services.is_empty() && self.node.is_none() && self.sweep != Sweep::Due && !self.repair
    }

    fn add(&mut self, changes: Changes) {
        self.services.extend(changes.services);
        self.node = changes.node.or(self.node.take());
    }
}

impl<D: Dataplane> Controller<D> {
    /// A controller that has programmed nothing yet. `min_sync_period`: the least time between two commits; zero:
    /// none.
    pub fn new(
        planner: Planner,
        dataplane: D,
        min_sync_period: Duration,
        health: watch::Sender<HealthState>,
        commits: Commits,
    ) -> Self {
        Self {
            planner,
            dataplane,
            pending: Pending::default(),
            refused: BTreeMap::new(),
            warned: BTreeMap::new(),
            min_sync_period,
            health,
            commits,
            started: Instant::now(),
        }
    }

    /// Runs until all sources are gone. `foreign` becomes readable when somebody else may have changed our state.
    pub async fn run(mut self, mut events: mpsc::Receiver<Vec<Event>>, foreign: AsyncFd<OwnedFd>) {
        let mut inbox = Vec::with_capacity(INBOX);
        let mut attempts = 0u32;
        // When a commit may be made at the earliest.
        let mut not_before = Instant::now();
        let mut retry_refused = None;
        loop {
            let due = (!self.pending.is_empty()).then_some(not_before);
            tokio::select! {
                received = events.recv_many(&mut inbox, INBOX) => {
                    if received == 0 {
                        return;
                    }
                }
                Ok(mut ready) = foreign.readable() => {
                    ready.clear_ready();
                    self.pending.repair = true;
                }
                () = at(due) => {}
                () = at(retry_refused) => {
                    retry_refused = None;
                    self.requeue_refused();
                }
            }
            for event in inbox.drain(..).flatten() {
                self.planner.apply(event);
            }
            let changes = self.planner.replan();
            self.report_warnings(&changes);
            self.pending.add(changes);
            if self.pending.sweep == Sweep::NotYet && self.planner.synced() {
                self.pending.sweep = Sweep::Due;
            }
            self.publish_pending();
            if self.pending.is_empty() || Instant::now() < not_before {
                continue;
            }
            let was_repair = self.pending.repair;
            // A commit is a system call of microseconds to a second; the other worker serves the sources meanwhile.
            match tokio::task::block_in_place(|| self.commit()) {
                Ok(()) => {
                    if attempts > 0 {
                        info!("the dataplane works again");
                    }
                    attempts = 0;
                    let pause = if was_repair { REPAIR_INTERVAL } else { Duration::ZERO };
                    not_before = Instant::now() + pause.max(self.min_sync_period);
                }
                Err(error) => {
                    let pause = (RETRY * 2u32.saturating_pow(attempts)).min(RETRY_MAX);
                    if attempts == 0 {
                        error!(
                            error = &error as &dyn std::error::Error,
                            "cannot program the kernel; trying again"
                        );
                    }
                    attempts = attempts.saturating_add(1);
                    self.commits.failed();
                    not_before = Instant::now() + pause;
                }
            }
            if !self.refused.is_empty() && retry_refused.is_none() {
                retry_refused = Some(Instant::now() + RETRY_REFUSED);
            }
        }
    }

    /// Tells the kernel what it still has to be told.
    fn commit(&mut self) -> Result<(), D::Error> {
        let begun = Instant::now();
        let mut total = Outcome::default();
        if self.pending.repair {
            if let Some(outcome) = self.dataplane.repair()? {
                info!(
                    added = outcome.added,
                    removed = outcome.removed,
                    "repaired what somebody else changed"
                );
                total.absorb(outcome);
            }
            self.pending.repair = false;
        }
        let sweep = self.pending.sweep == Sweep::Due;
        if !self.pending.services.is_empty() || self.pending.node.is_some() || sweep {
            let batch = Batch {
                node: self.pending.node.take(),
                services: std::mem::take(&mut self.pending.services).into_iter().collect(),
                sweep,
            };
            match self.dataplane.apply(&batch) {
                Ok(outcome) => {
                    for (key, _) in &batch.services {
                        if self.refused.remove(key).is_some() {
                            debug!(service = %key, "tried again");
                        }
                    }
                    total.absorb(outcome);
                }
                Err(error) => {
                    self.pending.node = batch.node;
                    self.pending.services = batch.services.into_iter().collect();
                    return Err(error);
                }
            }
            if sweep {
                self.pending.sweep = Sweep::Done;
                info!(
                    services = self.planner.plans().count(),
                    elapsed_ms = self.started.elapsed().as_millis() as u64,
                    added = total.added,
                    removed = total.removed,
                    "all Services are programmed"
                );
            }
        }
        self.report_refused(&mut total);
        debug!(
            added = total.added,
            removed = total.removed,
            messages = total.messages,
            bytes = total.bytes,
            elapsed_us = begun.elapsed().as_micros() as u64,
            "committed"
        );
        self.commits.succeeded(&total, begun.elapsed());
        self.publish_committed();
        Ok(())
    }

    /// One line a Service, again only when the kernel's words change.
    fn report_refused(&mut self, outcome: &mut Outcome) {
        for (service, words) in outcome.failed.drain(..) {
            if self.refused.get(&service) != Some(&words) {
                error!(
                    %service,
                    "the kernel refuses this Service ({words}); what it had stays, and it is tried again"
                );
            }
            self.refused.insert(service, words);
        }
        self.commits.refused(self.refused.len());
    }

    fn requeue_refused(&mut self) {
        for key in self.refused.keys() {
            let plan = self.planner.plan(key).cloned();
            self.pending.services.entry(key.clone()).or_insert(plan);
        }
    }

    fn report_warnings(&mut self, changes: &Changes) {
        for (service, plan) in &changes.services {
            let warnings = plan.as_ref().map(|plan| plan.warnings.clone()).unwrap_or_default();
            let known = self.warned.get(service).map(AsRef::as_ref).unwrap_or_default();
            for warning in warnings.iter().filter(|warning| !known.contains(warning)) {
                warn!(%service, "{warning}");
            }
            if warnings.is_empty() {
                self.warned.remove(service);
            } else {
                self.warned.insert(service.clone(), warnings);
            }
        }
    }

    fn publish_pending(&self) {
        let waits = !self.pending.is_empty();
        self.health.send_if_modified(|state| {
            let changed = waits && state.pending_since.is_none();
            if changed {
                state.pending_since = Some(Timestamp::now());
            }
            changed
        });
    }

    fn publish_committed(&self) {
        self.health.send_modify(|state| {
            state.synced = self.pending.sweep == Sweep::Done;
            state.last_updated = Some(Timestamp::now());
            state.pending_since = None;
        });
    }
}

/// Waits for a moment, or for ever.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
