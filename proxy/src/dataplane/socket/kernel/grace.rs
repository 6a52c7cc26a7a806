//! A thread that waits for grace periods, so that no commit does, and sweeps what clients no longer come back for.
//!
//! Owns nothing that programs decide on. What is retired is given back when no program that may have seen it still
//! runs.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use tracing::warn;

use super::affinity::Memories;
use super::sys::GracePeriod;

/// How often memories are swept, the first time at the start: an expired one costs room alone.
const SWEEP: Duration = Duration::from_secs(60);
/// After the kernel could not wait.
const PAUSE: Duration = Duration::from_millis(100);

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Grace<T> {
    retired: Sender<T>,
    returned: Receiver<T>,
    /// Handed over and not given back yet.
    waiting: usize,
}

impl<T: Send + 'static> Grace<T> {
    /// Starts the thread.
    pub(super) fn start(period: GracePeriod, memories: Memories) -> io::Result<Self> {
        let (retired, inbox) = mpsc::channel();
        let (outbox, returned) = mpsc::channel();
        thread::Builder::new()
            .name("socket-grace".into())
            .spawn(move || serve(&period, &memories, &inbox, &outbox))?;
        Ok(Self { retired, returned, waiting: 0 })
    }

    /// Takes what no map names any more.
    pub(super) fn retire(&mut self, retired: T) {
        // Where the thread has gone nothing is reused: the maps fill up, and Services are left to nftables.
        if self.retired.send(retired).is_ok() {
            self.waiting += 1;
        }
    }

    /// What may be used again by now.
    pub(super) fn returned(&mut self) -> Vec<T> {
        let returned: Vec<_> = self.returned.try_iter().collect();
        self.waiting -= returned.len();
        returned
    }

    /// The same for all that was handed over: waits for it, at most a few milliseconds.
    pub(super) fn wait(&mut self) -> Vec<T> {
        let mut returned = Vec::new();
        while self.waiting > 0 {
            let Ok(one) = self.returned.recv() else { break };
            self.waiting -= 1;
            returned.push(one);
        }
        returned
    }
}

fn serve<T>(period: &GracePeriod, memories: &Memories, inbox: &Receiver<T>, outbox: &Sender<T>) {
    let mut due = Instant::now();
    loop {
        if Instant::now() >= due {
            if let Err(error) = memories.sweep() {
                warn!(error = &error as &dyn std::error::Error, "cannot sweep session affinity's memory");
            }
            due = Instant::now() + SWEEP;
        }
        let first = match inbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(first) => first,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let all: Vec<_> = std::iter::once(first).chain(inbox.try_iter()).collect();
        while let Err(error) = period.wait() {
            warn!(error = &error as &dyn std::error::Error, "cannot wait for a grace period");
            thread::sleep(PAUSE);
        }
        if all.into_iter().try_for_each(|one| outbox.send(one)).is_err() {
            return;
        }
    }
}
