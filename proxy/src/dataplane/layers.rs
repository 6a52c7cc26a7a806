//! nftables, which is a complete proxy, and the socket layer in front of it where there is one.
//!
//! Owns the order of the two, and what trouble in front means: it is told and tried again, and never keeps anything from
//! nftables. The socket layer leads nobody where nftables would not.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};

use super::nftables::{Marks, Nftables, NftablesError};
use super::socket::Socket;
use super::socket::answers::{Answer, Limit, Why};
use super::{AtSocket, Awaited, Batch, Dataplane, Inspection, Outcome, Withdrawal};
use crate::backoff::backoff;
use crate::causes::with_causes;
use crate::model::input::ServiceKey;
use crate::model::plan::Plan;

/// How long after a failure the socket layer is tried again, and the most that grows to.
const RETRY: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// How often the socket layer looks by itself for what nobody tells: whether it is still where it was put, room for
/// Services that had none, cgroups to leave alone that have come or gone.
const LOOK: Duration = Duration::from_secs(1);
/// Whom the socket layer leaves alone for want of room to remember them.
const FORGOTTEN: &str =
    "further clients of Services with session affinity: kubeLane.socketLB.maxAffinityClients are remembered";
/// What it means that nobody is known to be a pod.
const NO_PODS: &str = "nftables alone answers pods; kubeLane.socketLB.podCgroups (--socket-lb-pod-cgroups) names the \
                       cgroup that they run below";
/// What it means that another's programs are there.
const SHARED: &str = "whichever came first answers alone: give each agent a --cgroup-root of its own, or take away with \
                      `kube-lane cleanup --bpf-root` what no agent follows";
/// How many Services without room a commit names in the log.
const NAMED: usize = 10;

/// Both layers.
pub struct Layers {
    nftables: Nftables,
    front: Option<Front>,
    awaited: Option<Awaited>,
    withdrawal: Option<Withdrawal>,
    told: Box<dyn Fn(InFront)>,
}

/// What is in front of nftables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFront {
    /// The socket layer.
    pub in_place: bool,
    /// That of an earlier run may be there, and nobody can take it away.
    pub left_over: bool,
    /// That of another agent is at the same cgroup.
    pub shared: bool,
    /// How many [`troubles`](Dataplane::troubles) there are.
    pub troubles: usize,
}

/// What there is in front of nftables.
pub enum AtConnect {
    /// The socket layer, marked as pinned there.
    Socket(Box<Socket>, Marks, PathBuf),
    /// The socket layer, as soon as it can be had. Nobody is told then of a descriptor: what it follows that comes in no
    /// batch, it looks for each second.
    Awaited(Awaited),
    /// Nothing, once what an earlier run left has gone.
    Nothing(Withdrawal),
}

/// The socket layer and how it fares.
struct Front {
    socket: Box<Socket>,
    marks: Marks,
    bpf_root: PathBuf,
    /// What went wrong the last time, and how often in a row.
    trouble: Option<(String, u32)>,
    /// Services that there is no room for.
    full: BTreeMap<ServiceKey, Limit>,
    /// It has no room to remember more clients.
    is_forgetful: bool,
    /// Why it answers no pods.
    missing_pods: Option<String>,
    /// Whose programs are there as well.
    others: Option<String>,
    /// When it looks next for what nobody tells.
    look: Instant,
    /// When it has something to do by itself; `None`: not before the first batch.
    due: Option<Instant>,
}

impl Layers {
    /// nftables, and what is in front of it; `told` hears of that again and again.
    pub fn new(nftables: Nftables, at_connect: AtConnect, told: impl Fn(InFront) + 'static) -> Self {
        let (mut front, mut awaited, mut withdrawal) = (None, None, None);
        match at_connect {
            AtConnect::Socket(socket, marks, bpf_root) => front = Some(Front::new(socket, marks, bpf_root)),
            AtConnect::Awaited(layer) => awaited = Some(layer),
            AtConnect::Nothing(left) => withdrawal = Some(left),
        }
        let layers = Self { nftables, front, awaited, withdrawal, told: Box::new(told) };
        layers.tell();
        layers
    }

    fn tell(&self) {
        (self.told)(InFront {
            in_place: self.front.as_ref().is_some_and(|front| front.socket.is_in_place()),
            left_over: self.withdrawal.as_ref().is_some_and(|withdrawal| withdrawal.trouble().is_some())
                || self.awaited.as_ref().is_some_and(Awaited::is_left_over),
            shared: self.front.as_ref().is_some_and(|front| front.others.is_some()),
            troubles: self.trouble_count(),
        });
    }

    /// As many as [`Dataplane::troubles`] names.
    fn trouble_count(&self) -> usize {
        let Some(front) = &self.front else {
            let left = self.withdrawal.as_ref().and_then(Withdrawal::trouble);
            return usize::from(self.awaited.is_some()) + usize::from(left.is_some());
        };
        let others = [
            front.trouble.is_some(),
            front.is_forgetful,
            front.missing_pods.is_some(),
            front.others.is_some(),
        ];
        front.full.len() + others.into_iter().filter(|is_there| *is_there).count()
    }

    /// Brings the socket layer into use once it can be had, with all that nftables has: that is known by then.
    fn take_awaited(&mut self) {
        let is_programmed = self.nftables.is_programmed();
        let Some(socket) = self.awaited.as_mut().and_then(|awaited| awaited.attempt(is_programmed)) else {
            return;
        };
        if let Some(Awaited { marks, bpf_root, .. }) = self.awaited.take() {
            let front = self.front.insert(Front::new(Box::new(socket), marks, bpf_root));
            front.apply(&self.nftables.programmed(), &Outcome::default());
        }
    }

    /// A descriptor that becomes readable when the socket layer has something to follow that comes in no batch: then call
    /// [`Dataplane::catch_up`].
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn descriptor(&self) -> io::Result<Option<OwnedFd>> {
        self.front.as_ref().map_or(Ok(None), |front| front.socket.descriptor())
    }
}

impl Dataplane for Layers {
    type Error = NftablesError;

    fn apply(&mut self, batch: &Batch) -> Result<Outcome, NftablesError> {
        let Self { nftables, front, .. } = self;
        let mut outcome = thread::scope(|scope| {
            // Larger maps take their time and change nothing by themselves.
            if let Some(front) = front.as_mut().filter(|front| front.socket.is_too_small_for(batch)) {
                let grow = || front.socket.grow_for(batch);
                // Without a thread they are made afterwards.
                let _ = thread::Builder::new().name("socket-room".into()).spawn_scoped(scope, grow);
            }
            nftables.apply(batch)
        })?;
        // Before the first batch that has something nothing is known of the node, and what an earlier run left goes on.
        let is_empty = batch.node.is_none() && batch.services.is_empty() && !batch.sweep;
        if let Some(front) = self.front.as_mut().filter(|_| !is_empty) {
            outcome.socket = front.apply(batch, &outcome);
            self.tell();
        }
        Ok(outcome)
    }

    fn repair(&mut self) -> Result<Option<Outcome>, NftablesError> {
        self.nftables.repair()
    }

    fn due(&self) -> Option<Instant> {
        let front = self.front.as_ref().and_then(|front| front.due);
        let awaited = self.awaited.as_ref().map(Awaited::due);
        front.or(awaited).or_else(|| self.withdrawal.as_ref()?.due())
    }

    fn catch_up(&mut self) {
        // It may be too early: see `apply`.
        if let Some(front) = self.front.as_mut().filter(|front| front.due.is_some()) {
            front.apply(&Batch::default(), &Outcome::default());
        }
        if let Some(withdrawal) = &mut self.withdrawal {
            withdrawal.attempt();
        }
        self.take_awaited();
        self.tell();
    }

    fn inspect(&mut self, plan: &Plan) -> Inspection {
        let in_place = self.front.as_ref().filter(|front| front.socket.is_in_place());
        let mut inspection = in_place.map(|front| front.socket.inspect(&plan.service)).unwrap_or_default();
        if let Some(counts) = self.nftables.counts(plan) {
            inspection.in_nftables = counts;
        }
        inspection
    }

    fn left_alone(&self) -> Vec<(PathBuf, bool)> {
        self.front.as_ref().map(|front| front.socket.left_alone()).unwrap_or_default()
    }

    fn troubles(&self) -> Vec<String> {
        let Some(front) = &self.front else {
            let left = self.withdrawal.iter().filter_map(Withdrawal::trouble);
            return self.awaited.iter().map(Awaited::trouble).chain(left).collect();
        };
        let trouble =
            front.trouble.iter().map(|(words, _)| format!("the socket layer {}: {words}", front.state()));
        let full =
            front.full.iter().map(|(service, limit)| format!("nftables alone answers {service}: {limit}"));
        let forgetful = front.is_forgetful.then(|| format!("nftables alone answers {FORGOTTEN}"));
        let pods = front.missing_pods.iter().map(|missing| format!("{missing}: {NO_PODS}"));
        let others = front.others.iter().map(|others| format!("{others}: {SHARED}"));
        trouble.chain(full).chain(forgetful).chain(pods).chain(others).collect()
    }
}

impl Front {
    fn new(socket: Box<Socket>, marks: Marks, bpf_root: PathBuf) -> Self {
        Self {
            socket,
            marks,
            bpf_root,
            trouble: None,
            full: BTreeMap::new(),
            is_forgetful: false,
            missing_pods: None,
            others: None,
            look: Instant::now() + LOOK,
            due: None,
        }
    }

    /// Follows what nftables did; `None` where it lags behind.
    fn apply(&mut self, batch: &Batch, outcome: &Outcome) -> Option<AtSocket> {
        let now = Instant::now();
        if now >= self.look {
            self.look = now + LOOK;
            self.mark();
            if let Some(missing) = self.socket.look() {
                warn!("{missing}: the socket layer is put in place again");
            }
        }
        let was_in_place = self.socket.is_in_place();
        match self.socket.apply(&batch.in_force(outcome)) {
            Ok(applied) => {
                if !was_in_place {
                    // It may be on another file system now.
                    self.mark();
                }
                if self.trouble.take().is_some() || !was_in_place {
                    info!("the socket layer follows again");
                } else if self.due.is_none() {
                    info!("the socket layer is in place");
                }
                self.note_full(applied.full);
                self.note_forgetful();
                self.note_pods();
                self.note_others();
                self.due = Some(self.look);
                Some(AtSocket { writes: applied.writes, took: now.elapsed() })
            }
            Err(error) => {
                let words = with_causes(&error);
                let failures = self.trouble.as_ref().map_or(0, |(_, failures)| *failures);
                if failures == 0 {
                    error!(error = words, "the socket layer {}; trying again", self.state());
                }
                self.due = Some(Instant::now() + backoff(RETRY, RETRY_MAX, failures));
                self.trouble = Some((words, failures.saturating_add(1)));
                None
            }
        }
    }

    /// Says in nftables where the layer is.
    fn mark(&mut self) {
        if let Err(error) = self.marks.put(&self.bpf_root) {
            // An agent that does without the layer may not hear of it. The next look tries again.
            debug!(error = &error as &dyn std::error::Error, "the socket layer cannot be marked");
        }
    }

    /// How it fares where there is trouble.
    fn state(&self) -> &'static str {
        if self.socket.is_in_place() { "lags behind" } else { "is not in place, nftables alone answers" }
    }

    /// Says which Services have lost their room, and that all have it again.
    fn note_full(&mut self, full: Vec<(ServiceKey, Limit)>) {
        let was_full = !self.full.is_empty();
        let is_full = |service: &ServiceKey| {
            let answers = self.socket.inspect(service).answers;
            answers.iter().flatten().any(|answer| matches!(answer, Answer::Nftables(Why::Full(_))))
        };
        self.full.retain(|service, _| is_full(service));
        for (service, limit) in full.iter().take(NAMED) {
            warn!(%service, "no room at the socket ({limit}): nftables alone answers this Service");
        }
        if let Some(more) = full.len().checked_sub(NAMED + 1) {
            warn!("no room at the socket for {} Services more; `kube-lane status` names them", more + 1);
        }
        self.full.extend(full);
        if was_full && self.full.is_empty() {
            info!("there is room at the socket for every Service again");
        }
    }

    /// Says that there is no room for more clients, and that there is again.
    fn note_forgetful(&mut self) {
        let was_forgetful = std::mem::replace(&mut self.is_forgetful, self.socket.is_forgetful());
        if self.is_forgetful && !was_forgetful {
            warn!("no room at the socket: nftables alone answers {FORGOTTEN}");
        } else if was_forgetful && !self.is_forgetful {
            info!("there is room at the socket for clients of Services with session affinity again");
        }
    }

    /// Says that nobody is known to be a pod, and that there are pods again.
    fn note_pods(&mut self) {
        let were_missing = std::mem::replace(&mut self.missing_pods, self.socket.missing_pods()).is_some();
        match &self.missing_pods {
            Some(missing) if !were_missing => warn!("{missing}: {NO_PODS}"),
            None if were_missing => info!("there is a cgroup of pods: pods are answered at the socket"),
            _ => {}
        }
    }

    /// Says that another agent's programs are there, and that they are no more.
    fn note_others(&mut self) {
        let before = std::mem::replace(&mut self.others, self.socket.others());
        match &self.others {
            Some(others) if before.as_ref() != Some(others) => warn!("{others}: {SHARED}"),
            None if before.is_some() => info!("no other socket layer is attached there any more"),
            _ => {}
        }
    }
}
