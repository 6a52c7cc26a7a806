//! Connections that go astray because a Service changed are forgotten by the kernel, at once and no others.
//!
//! The kernel keeps translating a tracked UDP flow as it did its first packet, as long as packets come: a client that
//! never pauses would talk to an endpoint that is gone, or past the Service, for ever. So after a commit the flows to
//! what changed are looked at, and the stale ones are deleted; their next packet meets the ruleset as a new flow.
//!
//! Owns stale entries of the kernel's connection tracking. Never touches TCP, and SCTP only where it is asked to; never
//! deletes on the word of a reading that failed or was interrupted. It works on a thread of its own: reading walks the
//! kernel's whole table, and commits do not wait for it.
//!
//! | file | owns |
//! |---|---|
//! | `tracker` | what is stale, and what has to be looked at (pure) |
//! | `ctnetlink` | the netlink socket |

mod ctnetlink;
mod tracker;
#[cfg(test)]
mod tracker_tests;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tracing::{debug, info, warn};

use self::ctnetlink::{Ctnetlink, DELETIONS, Entry};
use self::tracker::{Filter, Look, Tracker};
use super::{Batch, Follower, Outcome};
use crate::backoff::backoff;
use crate::model::input::Family;

/// A packet that met the old elements may still be on its way when the first look ends: there is a second one.
const SECOND_LOOK: Duration = Duration::from_millis(200);
/// How often a reading that was interrupted is tried at once.
const ATTEMPTS: usize = 5;
/// How long after a look that failed the next is tried, and the most that grows to.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// What a look at one family's flows took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Looked {
    /// Which flows.
    pub family: Family,
    /// Flows that the kernel copied to us.
    pub read: u64,
    /// Flows that were deleted.
    pub deleted: u64,
    /// How long it took.
    pub took: Duration,
}

/// Follows commits and keeps the kernel's flows in accord with them. Dropping it ends its thread.
#[derive(Debug)]
pub struct Conntrack(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug)]
struct State {
    tracker: Tracker,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Conntrack {
    /// Looks after the flows of the current network namespace: UDP, and SCTP if asked to. `report` is told of each look.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn spawn(sctp: bool, report: impl Fn(Looked) + Send + 'static) -> io::Result<Self> {
        let state = Mutex::new(State { tracker: Tracker::new(sctp), closed: false });
        let shared = Arc::new(Shared { state, wake: Condvar::new() });
        let worker = Worker {
            shared: Arc::clone(&shared),
            socket: None,
            second_looks: VecDeque::new(),
            failures: 0,
            not_before: Instant::now(),
            report,
        };
        thread::Builder::new().name("conntrack".into()).spawn(|| worker.work())?;
        Ok(Self(shared))
    }

    fn update(&self, change: impl FnOnce(&mut Tracker)) {
        let mut state = self.0.lock();
        change(&mut state.tracker);
        // Most commits change no flow: the thread sleeps on.
        if state.tracker.has_pending() {
            self.0.wake.notify_one();
        }
    }
}

impl Follower for Conntrack {
    fn committing(&mut self, batch: &Batch) {
        self.0.lock().tracker.committing(batch);
    }

    fn committed(&mut self, batch: &Batch, outcome: &Outcome) {
        self.update(|tracker| tracker.committed(batch, outcome));
    }

    fn repaired(&mut self) {
        self.update(Tracker::look_at_everything);
    }
}

impl Drop for Conntrack {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.wake.notify_one();
    }
}

/// The thread.
struct Worker<R> {
    shared: Arc<Shared>,
    /// `None` until it is needed, and after an error: an answer to what was asked before may still come on it.
    socket: Option<Ctnetlink>,
    /// Looks that were done once, and when they are done again.
    second_looks: VecDeque<(Instant, Look)>,
    /// Looks that failed in a row.
    failures: u32,
    /// No look at what is new before this.
    not_before: Instant,
    report: R,
}

impl<R: Fn(Looked)> Worker<R> {
    fn work(mut self) {
        while let Some((look, first)) = self.next() {
            match self.look(&look) {
                Ok(()) => {
                    if self.failures > 0 {
                        info!("connection tracking can be read again");
                    }
                    self.failures = 0;
                    if first {
                        self.second_looks.push_back((Instant::now() + SECOND_LOOK, look));
                    }
                }
                Err(errno) => self.failed(look, errno),
            }
        }
    }

    fn failed(&mut self, look: Look, errno: Errno) {
        if self.failures == 0 {
            warn!(
                error = %errno,
                "cannot read connection tracking: stale UDP flows stay until it works again"
            );
        }
        self.socket = None;
        self.not_before = Instant::now() + backoff(RETRY, RETRY_MAX, self.failures);
        self.failures = self.failures.saturating_add(1);
        self.shared.lock().tracker.put_back(look);
    }

    /// Waits for what is to be looked at next, and whether it is the first look at that; `None`: there is nobody left
    /// to look for.
    fn next(&mut self) -> Option<(Look, bool)> {
        let mut state = self.shared.lock();
        loop {
            if state.closed {
                return None;
            }
            let now = Instant::now();
            let waits = state.tracker.has_pending();
            if waits && self.not_before <= now {
                return Some((state.tracker.take(), true));
            }
            if let Some((_, look)) = self.second_looks.pop_front_if(|(due, _)| *due <= now) {
                return Some((look, false));
            }
            let due = self.second_looks.front().map(|(due, _)| *due);
            let due = due.into_iter().chain(waits.then_some(self.not_before)).min();
            state = match due {
                Some(due) => {
                    let wait = self.shared.wake.wait_timeout(state, due.saturating_duration_since(now));
                    wait.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Looks, and deletes what is stale.
    fn look(&mut self, look: &Look) -> Result<(), Errno> {
        let filters = self.shared.lock().tracker.filters(look);
        for family in Family::ALL {
            let filters: Vec<_> = filters.iter().filter(|filter| filter.family == family).collect();
            if filters.is_empty() {
                continue;
            }
            let begun = Instant::now();
            let mut looked = Looked { family, read: 0, deleted: 0, took: Duration::ZERO };
            for filter in filters {
                let stale = self.read(filter, look, &mut looked)?;
                looked.deleted += self.delete(stale, look)?;
            }
            looked.took = begun.elapsed();
            debug!(%family, read = looked.read, deleted = looked.deleted, "looked at tracked flows");
            (self.report)(looked);
        }
        Ok(())
    }

    /// The stale flows that match the filter.
    fn read(&mut self, filter: &Filter, look: &Look, looked: &mut Looked) -> Result<Vec<Entry>, Errno> {
        for _ in 1..ATTEMPTS {
            match self.read_once(filter, look, looked) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
        self.read_once(filter, look, looked)
    }

    fn read_once(&mut self, filter: &Filter, look: &Look, looked: &mut Looked) -> Result<Vec<Entry>, Errno> {
        let mut stale = Vec::new();
        let shared = &self.shared;
        looked.read += socket(&mut self.socket)?.dump(filter, |entries| {
            let state = shared.lock();
            stale.extend(entries.filter(|entry| state.tracker.is_stale(&entry.flow, look)));
        })?;
        Ok(stale)
    }

    /// Deletes flows that were found stale, and still are: an endpoint may have come back.
    fn delete(&mut self, mut stale: Vec<Entry>, look: &Look) -> Result<u64, Errno> {
        let socket = socket(&mut self.socket)?;
        let mut deleted = 0;
        while !stale.is_empty() {
            let mut part = stale.split_off(stale.len().saturating_sub(DELETIONS));
            // Held until they are gone: no endpoint comes back meanwhile.
            let state = self.shared.lock();
            part.retain(|entry| state.tracker.is_stale(&entry.flow, look));
            deleted += socket.delete(&part)?;
        }
        Ok(deleted)
    }
}

/// Has the kernel load what connection tracking needs, so that its sysctls are there.
///
/// # Errors
/// When the kernel has none, or the process may not ask.
pub fn load() -> io::Result<()> {
    Ctnetlink::open()?.touch().map_err(io::Error::from)
}

fn socket(open: &mut Option<Ctnetlink>) -> Result<&mut Ctnetlink, Errno> {
    match open {
        Some(socket) => Ok(socket),
        None => {
            let socket = Ctnetlink::open();
            let socket = socket.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
            Ok(open.insert(socket))
        }
    }
}
