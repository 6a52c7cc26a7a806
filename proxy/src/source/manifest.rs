//! The manifest folder: Services, EndpointSlices, ServiceCIDRs and the own Node from YAML and JSON files.
//!
//! Owns when the folder is read. Never lets a bad file take away what a good one gave: what does not parse is
//! reported and leaves the last good content in force.

mod body;
mod document;
mod folder;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use self::folder::{Folder, Found, Scope, format_of};
use super::problem::Problem;
use crate::model::input::{Change, Event, Origin, ServiceKey};
use crate::watch::Watch;

/// How long a file may be gone before its objects are: editors that replace a file remove the old one first.
const GRACE: Duration = Duration::from_millis(250);

/// How often the folder is looked at where it cannot be watched.
const POLL: Duration = Duration::from_secs(5);

/// How a folder fares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The folder was there, and each of its files good, at least once. Until then what an earlier run left in the kernel
    /// stays, since it may be theirs, and `/healthz` says 503.
    pub complete: bool,
    /// The folder, and files of which the present content cannot be read: what was in force before is.
    pub unread: Vec<Problem>,
    /// What is wrong with objects and fields of the content that is in force.
    pub odd: Vec<Problem>,
}

impl Default for Condition {
    /// Of no folder.
    fn default() -> Self {
        Self { complete: true, unread: Vec::new(), odd: Vec::new() }
    }
}

/// Reads a folder once. The events end with [`Change::Synced`].
///
/// `node` is the own node's name: the Node of that name is read, others are not.
pub fn read_dir(dir: &Path, node: Option<&str>) -> (Vec<Event>, Vec<Problem>) {
    read(&mut Folder::new(dir.to_owned(), node.map(str::to_owned)))
}

/// What a folder holds that is all there is.
#[derive(Debug)]
pub struct Checked {
    /// They end with [`Change::Synced`].
    pub events: Vec<Event>,
    /// What is wrong; slices whose Service or port is not in the folder, too.
    pub problems: Vec<Problem>,
    /// The Services of which nothing is programmed, and why, in the order of their keys.
    pub not_served: Vec<(ServiceKey, &'static str)>,
}

/// As [`read_dir`], where the folder is all that there is.
pub fn check_dir(dir: &Path, node: Option<&str>) -> Checked {
    let mut folder = Folder::new(dir.to_owned(), node.map(str::to_owned));
    let (events, mut problems) = read(&mut folder);
    problems.extend(folder.unmatched());
    Checked { events, problems, not_served: folder.not_for_us() }
}

fn read(folder: &mut Folder) -> (Vec<Event>, Vec<Problem>) {
    let Found { mut events, problems, .. } = folder.scan(Scope::Folder);
    events.push(synced());
    (events, problems)
}

/// Follows a folder until the receiver is dropped. Must be called within a tokio runtime.
///
/// `node` is the own node's name: the Node of that name is read, others are not. `alone`: there is no other source, so
/// that slices which lead nowhere at the start are worth a word. `told` hears how the folder fares whenever something of
/// it was read.
pub fn spawn(
    dir: PathBuf,
    node: Option<String>,
    alone: bool,
    events: mpsc::Sender<Vec<Event>>,
    told: impl Fn(Condition) + Send + Sync + 'static,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        // A relative path has another meaning after a chdir, and no parent to watch.
        let dir = std::path::absolute(&dir).unwrap_or(dir);
        let mut followed = Followed { folder: Some(Folder::new(dir.clone(), node)), told: Box::new(told) };
        tokio::select! {
            () = events.closed() => {}
            () = follow(dir, &mut followed, alone, &events) => {}
        }
    })
}

/// A folder that is followed.
struct Followed {
    /// `None` while it is read.
    folder: Option<Folder>,
    told: Box<dyn Fn(Condition) + Send + Sync>,
}

fn synced() -> Event {
    Event::Source { origin: Origin::Static, change: Change::Synced }
}

/// Returns when the receiver is gone.
async fn follow(dir: PathBuf, followed: &mut Followed, alone: bool, events: &mpsc::Sender<Vec<Event>>) {
    let mut is_first = true;
    let mut is_watched = true;
    loop {
        // Watched before it is read: nothing that happens in between is missed.
        let mut watch = Watch::new(&dir, |name| format_of(name).is_some());
        match &watch {
            Ok(_) => is_watched = true,
            Err(error) if is_watched => {
                is_watched = false;
                warn!(folder = %dir.display(), %error, "the manifest folder cannot be watched, it is read every 5 s; \
                    is fs.inotify.max_user_instances too low?");
            }
            Err(_) => {}
        }
        let Some(mut found) = followed.scan(Scope::Folder).await else { return };
        if std::mem::take(&mut is_first) {
            found.push(synced());
            let unmatched = followed.folder.as_ref().filter(|_| alone).map(Folder::unmatched);
            unmatched.into_iter().flatten().for_each(|problem| warn!("{problem}"));
        }
        if !found.is_empty() && events.send(found).await.is_err() {
            return;
        }
        let ended = match &mut watch {
            Ok(watch) => watched(watch, followed, events).await,
            Err(_) => {
                sleep(POLL).await;
                Some(Ok(()))
            }
        };
        match ended {
            None => return,
            Some(Ok(())) => {}
            Some(Err(error)) => {
                warn!(folder = %dir.display(), %error, "the watch on the manifest folder failed and is set up again");
                sleep(POLL).await;
            }
        }
        if !dir.exists() {
            sleep(GRACE).await;
        }
    }
}

/// Reads what changes until the folder must be watched anew; `None` when the receiver is gone.
async fn watched(
    watch: &mut Watch,
    followed: &mut Followed,
    events: &mpsc::Sender<Vec<Event>>,
) -> Option<io::Result<()>> {
    let mut unsettled: BTreeMap<String, Instant> = BTreeMap::new();
    loop {
        let due = unsettled.values().min().copied();
        let scope = tokio::select! {
            changed = watch.changed() => {
                let changed = match changed {
                    Ok(changed) if changed.anew => return Some(Ok(())),
                    Ok(changed) => changed,
                    Err(error) => return Some(Err(error)),
                };
                for name in changed.unsettled {
                    unsettled.entry(name).or_insert(Instant::now() + GRACE);
                }
                for name in &changed.written {
                    unsettled.remove(name);
                }
                if changed.all { Scope::Folder } else { Scope::Files(changed.written) }
            }
            () = settle(due) => {
                let now = Instant::now();
                let ready: BTreeSet<String> =
                    unsettled.iter().filter(|(_, due)| **due <= now).map(|(name, _)| name.clone()).collect();
                unsettled.retain(|_, due| *due > now);
                Scope::Files(ready)
            }
        };
        let found = followed.scan(scope).await?;
        if !found.is_empty() && events.send(found).await.is_err() {
            return None;
        }
    }
}

async fn settle(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => future::pending().await,
    }
}

impl Followed {
    /// Reads off the runtime's threads and tells what is wrong; `None` when the runtime shuts down.
    async fn scan(&mut self, scope: Scope) -> Option<Vec<Event>> {
        let mut folder = self.folder.take()?;
        let (folder, found) = tokio::task::spawn_blocking(move || {
            let found = folder.scan(scope);
            (folder, found)
        })
        .await
        .ok()?;
        let Found { events, problems, over, stirred } = found;
        if stirred {
            (self.told)(folder.condition());
        }
        self.folder = Some(folder);
        for problem in problems {
            warn!("{problem}");
        }
        for words in over {
            info!("{words}");
        }
        Some(events)
    }
}
