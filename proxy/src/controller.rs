//! The one loop: events in, plans, one commit; what arrives during a commit is the next batch.
//!
//! Owns the order of things and the retries. Never decides policy (the model does) and never touches the kernel (the
//! dataplane does). There is no fixed delay: a change is committed as soon as it is known, and under load batches
//! grow by themselves.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, info, warn};

use crate::backoff::backoff;
use crate::dataplane::{Batch, Dataplane, Follower, Outcome};
use crate::health::{HealthState, Moment};
use crate::memory;
use crate::model::input::{Event, ServiceKey};
use crate::model::plan::{NodePlan, Plan};
use crate::model::planner::{Changes, Planner};
use crate::observability::changes::Changes as ChangeMetrics;
use crate::observability::commits::Commits;
use crate::status::{About, Known, NAMED, PAGE, Query, Report};

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
    followers: Vec<Box<dyn Follower>>,
    /// What the kernel still has to be told.
    pending: Pending,
    /// Services that the kernel refused, and its words.
    refused: BTreeMap<ServiceKey, String>,
    /// What was warned of, so that it is said once.
    warned: BTreeMap<ServiceKey, Box<[String]>>,
    warned_of_node: Vec<String>,
    /// How many warnings there are about Services.
    warnings: usize,
    min_sync_period: Duration,
    health: watch::Sender<HealthState>,
    commits: Commits,
    changes: ChangeMetrics,
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

/// What the kernel was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// Nothing: somebody else changed something, which is none of ours.
    Nothing,
    Changes,
    /// What somebody else had changed of ours, and whatever else there was.
    Repairs,
}

/// When what is done next.
struct Timers {
    /// Commits that failed in a row.
    attempts: u32,
    /// No commit before this.
    not_before: Instant,
    /// When the Services that the kernel refused are tried again.
    refused: Option<Instant>,
}

impl Timers {
    fn new() -> Self {
        Self { attempts: 0, not_before: Instant::now(), refused: None }
    }

    fn succeeded(&mut self, pause: Duration) {
        self.attempts = 0;
        self.not_before = Instant::now() + pause;
    }

    fn failed(&mut self) {
        self.not_before = Instant::now() + backoff(RETRY, RETRY_MAX, self.attempts);
        self.attempts = self.attempts.saturating_add(1);
    }
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
    /// none. The followers hear of each commit.
    pub fn new(
        planner: Planner,
        dataplane: D,
        followers: Vec<Box<dyn Follower>>,
        min_sync_period: Duration,
        health: watch::Sender<HealthState>,
        commits: Commits,
        changes: ChangeMetrics,
    ) -> Self {
        Self {
            planner,
            dataplane,
            followers,
            pending: Pending::default(),
            refused: BTreeMap::new(),
            warned: BTreeMap::new(),
            warned_of_node: Vec::new(),
            warnings: 0,
            min_sync_period,
            health,
            commits,
            changes,
            started: Instant::now(),
        }
    }

    /// Runs until all sources are gone. `foreign` becomes readable when somebody else may have changed our state;
    /// `behind`, when [`Dataplane::catch_up`] has something to do; `queries` are answered between two commits.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<Vec<Event>>,
        mut queries: mpsc::Receiver<Query>,
        foreign: AsyncFd<OwnedFd>,
        behind: Option<AsyncFd<OwnedFd>>,
    ) {
        let mut inbox = Vec::with_capacity(INBOX);
        let mut timers = Timers::new();
        // What depends on no Service is in place by the time the first lists have come.
        if let Err(error) = tokio::task::block_in_place(|| self.dataplane.apply(&Batch::default())) {
            let error = &error as &dyn std::error::Error;
            warn!(error, "cannot prepare the kernel; trying again with the first Services");
        }
        loop {
            let due = (!self.pending.is_empty()).then_some(timers.not_before);
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
                Some(query) = queries.recv() => {
                    // Who asked may have gone.
                    let _ = query.answer.send(self.report(query.about));
                    continue;
                }
                () = readable(behind.as_ref()) => {
                    tokio::task::block_in_place(|| self.dataplane.catch_up());
                    continue;
                }
                () = at(self.dataplane.due().map(Instant::from_std)) => {
                    tokio::task::block_in_place(|| self.dataplane.catch_up());
                    continue;
                }
                () = at(due) => {}
                () = at(timers.refused) => {
                    timers.refused = None;
                    self.requeue_refused();
                }
            }
            self.plan(inbox.drain(..).flatten());
            if !self.pending.is_empty() && Instant::now() >= timers.not_before {
                self.commit_in_time(&mut timers);
            }
        }
    }

    /// Takes events in and plans what they changed.
    fn plan(&mut self, events: impl Iterator<Item = Event>) {
        for event in events {
            self.changes.seen(&event);
            self.planner.apply(event);
        }
        let changes = self.planner.replan();
        self.report_warnings(&changes);
        if changes.node.is_some() || !changes.services.is_empty() {
            self.changes.queued();
        }
        self.pending.add(changes);
        if self.pending.sweep == Sweep::NotYet && self.planner.synced() {
            self.pending.sweep = Sweep::Due;
        }
        self.count_waiting();
        self.publish_pending();
    }

    /// What was taken in and led to no plan waits for nothing, unless it counts only once its origin has listed all.
    fn count_waiting(&mut self) {
        if self.pending.is_empty() && self.planner.listed() {
            self.changes.nothing_waits();
        }
    }

    /// Commits, and sets the timers by how that went.
    fn commit_in_time(&mut self, timers: &mut Timers) {
        // A commit is a system call of microseconds to a second; the other worker serves the sources meanwhile.
        match tokio::task::block_in_place(|| self.commit()) {
            Ok(told) => {
                if timers.attempts > 0 {
                    info!("the dataplane works again");
                }
                timers.succeeded(match told {
                    Told::Nothing => Duration::ZERO,
                    Told::Changes => self.min_sync_period,
                    Told::Repairs => self.min_sync_period.max(REPAIR_INTERVAL),
                });
            }
            Err(error) => {
                if timers.attempts == 0 {
                    let error = &error as &dyn std::error::Error;
                    error!(error, "cannot program the kernel; trying again");
                }
                self.commits.failed();
                timers.failed();
            }
        }
        if !self.refused.is_empty() {
            timers.refused.get_or_insert(Instant::now() + RETRY_REFUSED);
        }
    }

    /// Tells the kernel what it still has to be told.
    fn commit(&mut self) -> Result<Told, D::Error> {
        let begun = Instant::now();
        let mut total = Outcome::default();
        let mut told = Told::Changes;
        if self.pending.repair {
            if let Some(outcome) = self.dataplane.repair()? {
                info!(
                    added = outcome.added,
                    removed = outcome.removed,
                    "repaired what somebody else changed"
                );
                total.absorb(outcome);
                self.followers.iter_mut().for_each(|follower| follower.repaired());
                told = Told::Repairs;
            }
            self.pending.repair = false;
            if told != Told::Repairs && self.pending.is_empty() {
                self.count_waiting();
                self.publish_nothing_pending();
                return Ok(Told::Nothing);
            }
        }
        let sweep = self.pending.sweep == Sweep::Due;
        if !self.pending.services.is_empty() || self.pending.node.is_some() || sweep {
            total.absorb(self.apply(sweep)?);
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
            if let Some(unknown) = self.planner.unknown_node() {
                warn!("{unknown}; is --hostname-override the name of this machine's Node?");
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
        self.changes.committed();
        self.publish_committed();
        if sweep {
            memory::trim();
        }
        Ok(told)
    }

    /// Commits the pending batch; what failed as a whole stays pending.
    fn apply(&mut self, sweep: bool) -> Result<Outcome, D::Error> {
        let batch = Batch {
            node: self.pending.node.take(),
            services: std::mem::take(&mut self.pending.services).into_iter().collect(),
            sweep,
        };
        self.followers.iter_mut().for_each(|follower| follower.committing(&batch));
        let result = self.dataplane.apply(&batch);
        match &result {
            Ok(outcome) => {
                self.followers.iter_mut().for_each(|follower| follower.committed(&batch, outcome));
                let tried =
                    |key: &ServiceKey| batch.services.binary_search_by(|(tried, _)| tried.cmp(key)).is_ok();
                self.refused.retain(|key, _| !tried(key) || outcome.refused(key));
            }
            Err(_) => {
                self.pending.node = batch.node;
                self.pending.services = batch.services.into_iter().collect();
            }
        }
        result
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
            self.warnings = self.warnings + warnings.len() - known.len();
            for warning in warnings.iter().filter(|warning| !known.contains(warning)) {
                warn!(%service, "{warning}");
            }
            if warnings.is_empty() {
                if self.warned.remove(service).is_some() && plan.is_some() {
                    info!(%service, "nothing to warn of any more");
                }
            } else {
                self.warned.insert(service.clone(), warnings);
            }
        }
        if let Some(node) = &changes.node {
            for warning in node.warnings.iter().filter(|warning| !self.warned_of_node.contains(warning)) {
                warn!("{warning}");
            }
            self.warned_of_node.clone_from(&node.warnings);
        }
        if !changes.is_empty() {
            self.commits.warned(self.warnings + self.warned_of_node.len());
        }
    }

    /// What is known, and of a few Services in particular.
    fn report(&mut self, about: About) -> Report {
        let plans: Vec<_> = match about {
            About::These(keys) => keys.iter().filter_map(|key| self.planner.plan(key)).collect(),
            About::After(key) => self.planner.plans_after(key.as_ref()).take(PAGE).collect(),
        };
        let warnings =
            self.warned.iter().flat_map(|(key, words)| words.iter().map(move |words| (key, words)));
        let warnings = warnings.take(NAMED).map(|(key, words)| (key.clone(), words.clone())).collect();
        let dataplane = &mut self.dataplane;
        let known = |plan: &Arc<Plan>| Known { plan: Arc::clone(plan), inspection: dataplane.inspect(plan) };
        let services = plans.into_iter().map(known).collect();
        Report {
            count: self.planner.plans().len(),
            services,
            node: self.planner.node().cloned(),
            refused: self.refused.clone(),
            warnings,
            warning_count: self.warnings,
            troubles: self.dataplane.troubles(),
            left_alone: self.dataplane.left_alone(),
        }
    }

    fn publish_pending(&self) {
        let waits = !self.pending.is_empty();
        let node_eligible = self.planner.node_eligible();
        self.health.send_if_modified(|state| {
            let changed = waits && state.pending_since.is_none();
            if changed {
                state.pending_since = Some(Moment::now());
            }
            std::mem::replace(&mut state.node_eligible, node_eligible) != node_eligible || changed
        });
    }

    fn publish_nothing_pending(&self) {
        self.health.send_if_modified(|state| state.pending_since.take().is_some());
    }

    fn publish_committed(&self) {
        self.health.send_modify(|state| {
            state.synced = self.pending.sweep == Sweep::Done;
            state.last_updated = Some(Timestamp::now());
            state.pending_since = None;
        });
    }
}

/// Waits until a descriptor is readable, or for ever.
async fn readable(descriptor: Option<&AsyncFd<OwnedFd>>) {
    if let Some(descriptor) = descriptor
        && let Ok(mut ready) = descriptor.readable().await
    {
        return ready.clear_ready();
    }
    std::future::pending::<()>().await;
}

/// Waits for a moment, or for ever.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
