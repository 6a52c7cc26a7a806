//! Load: clients that dial again and again until they are stopped.
//!
//! Owns the dialling threads and their counts.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::client::{Dial, Flow, Outcome, Tally};
use crate::error::Result;
use crate::host::Host;

/// Clients that dial until [`stop`](Self::stop).
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    progress: Arc<Mutex<Progress>>,
    workers: Vec<JoinHandle<()>>,
}

/// What a load met.
#[derive(Clone, Debug)]
pub struct Report {
    /// Every outcome.
    pub tally: Tally,
    /// How many connections were dialled.
    pub dialled: usize,
    /// The longest time in which no connection at all was answered.
    pub max_gap: Duration,
    /// The longest that one answered connection took.
    pub slowest: Duration,
    /// From start to stop.
    pub elapsed: Duration,
}

#[derive(Debug)]
struct Progress {
    tally: Tally,
    dialled: usize,
    started: Instant,
    answered: Instant,
    max_gap: Duration,
    slowest: Duration,
}

impl Progress {
    fn add(&mut self, outcome: Outcome, took: Duration) {
        if outcome.by().is_some() {
            let now = Instant::now();
            self.max_gap = self.max_gap.max(now - self.answered);
            self.answered = now;
            self.slowest = self.slowest.max(took);
        }
        self.tally.add(outcome);
    }
}

impl Load {
    /// Starts `concurrency` clients on a host, each of which waits for `pause` between one dial and the next.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(host: &Host, dial: Dial, concurrency: usize, pause: Duration) -> Result<Self> {
        Self::start_clients(host, concurrency, pause, move || move || (dial.ask(), 1))
    }

    /// Starts `concurrency` clients on a host, each of which keeps one connection, asks on it again and again, and dials
    /// anew only once a request has failed.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start_kept(host: &Host, dial: Dial, concurrency: usize, pause: Duration) -> Result<Self> {
        Self::start_clients(host, concurrency, pause, move || {
            let mut kept: Option<Flow> = None;
            move || {
                let (flow, dialled) = match kept.take() {
                    Some(flow) => (Ok(flow), 0),
                    None => (Flow::open(&dial), 1),
                };
                let outcome = flow.map_or_else(
                    |outcome| outcome,
                    |mut flow| {
                        let outcome = flow.ask();
                        kept = outcome.by().is_some().then_some(flow);
                        outcome
                    },
                );
                (outcome, dialled)
            }
        })
    }

    /// Starts clients; what one of them asks is a request's outcome, and how many connections it dialled for that.
    fn start_clients<C: FnMut() -> (Outcome, usize) + Send + 'static>(
        host: &Host,
        concurrency: usize,
        pause: Duration,
        client: impl Fn() -> C,
    ) -> Result<Self> {
        let now = Instant::now();
        let progress = Progress {
            tally: Tally::default(),
            dialled: 0,
            started: now,
            answered: now,
            max_gap: Duration::ZERO,
            slowest: Duration::ZERO,
        };
        let mut load = Self {
            stop: Arc::default(),
            progress: Arc::new(Mutex::new(progress)),
            workers: Vec::with_capacity(concurrency),
        };
        for _ in 0..concurrency {
            let (stop, progress) = (Arc::clone(&load.stop), Arc::clone(&load.progress));
            let mut ask = client();
            let worker = move || {
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    let (outcome, dialled) = ask();
                    let took = begun.elapsed();
                    let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
                    progress.dialled += dialled;
                    progress.add(outcome, took);
                    drop(progress);
                    if !pause.is_zero() {
                        std::thread::sleep(pause);
                    }
                }
            };
            load.workers.push(host.namespace().thread(worker)?);
        }
        Ok(load)
    }

    /// What it has met so far.
    pub fn report(&self) -> Report {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        Report {
            tally: progress.tally.clone(),
            dialled: progress.dialled,
            max_gap: progress.max_gap.max(progress.answered.elapsed()),
            slowest: progress.slowest,
            elapsed: progress.started.elapsed(),
        }
    }

    /// Lets every client finish its dial, and says what they met.
    pub fn stop(mut self) -> Report {
        // What is under way may yet end a gap.
        self.join();
        self.report()
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.join();
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tally, dialled: _, max_gap, slowest, elapsed } = self;
        write!(f, "{} answered {:?}", tally.answers(), tally.answered)?;
        write!(f, ", {} refused, {} unreachable", tally.refused, tally.unreachable)?;
        write!(f, ", {} timed out, {} reset", tally.timed_out, tally.reset)?;
        write!(f, ", {:?} failed", tally.failed)?;
        write!(f, "; longest gap {max_gap:?}, slowest {slowest:?}, in {elapsed:?}")
    }
}
