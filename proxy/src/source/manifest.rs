//! The manifest folder: Services, EndpointSlices, ServiceCIDRs and the own Node from YAML and JSON files.
//!
//! Owns when the folder is read. Never lets a bad file take away what a good one gave: what does not parse is
//! reported and leaves the last good content in force.

mod body;
mod document;
mod folder;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use self::folder::{Folder, Found, Scope};
use self::watch::Watch;
use super::problem::Problem;
use crate::model::input::{Change, Event, Origin};

/// How long a file may be gone before its objects are: editors that replace a file remove the old one first.
const GRACE: Duration = Duration::from_millis(250);

/// How often the folder is looked at where it cannot be watched.
const POLL: Duration = Duration::from_secs(5);

/// Reads a folder once. The events end with [`Change::Synced`].
///
/// `node` is the own node's name: the Node of that name is read, others are not.
pub fn read_dir(dir: &Path, node: Option<&str>) -> (Vec<Event>, Vec<Problem>) {
    read(&mut Folder::new(dir.to_owned(), node.map(str::to_owned)))
}

/// As [`read_dir`], where the folder is all that there is: slices whose Service or port is not in it are problems, too.
pub fn check_dir(dir: &Path, node: Option<&str>) -> (Vec<Event>, Vec<Problem>) {
    let mut folder = Folder::new(dir.to_owned(), node.map(str::to_owned));
    let (events, mut problems) = read(&mut folder);
    problems.extend(folder.unmatched());
    (events, problems)
}

fn read(folder: &mut Folder) -> (Vec<Event>, Vec<Problem>) {
    let Found { mut events, problems, .. } = folder.scan(Scope::Folder);
    events.push(synced());
    (events, problems)
}

/// Follows a folder until the receiver is dropped. Must be called within a tokio runtime.
///
/// `node` is the own node's name: the Node of that name is read, others are not. `alone`: there is no other source, so
/// that slices which lead nowhere at the start are worth a word.
pub fn spawn(
    dir: PathBuf,
    node: Option<String>,
    alone: bool,
    events: mpsc::Sender<Vec<Event>>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        // A relative path has another meaning after a chdir, and no parent to watch.
        let dir = std::path::absolute(&dir).unwrap_or(dir);
        tokio::select! {
            () = events.closed() => {}
            () = follow(dir, node, alone, &events) => {}
        }
    })
}

fn synced() -> Event {
    Event::Source { origin: Origin::Static, change: Change::Synced }
}

/// Returns when the receiver is gone.
async fn follow(dir: PathBuf, node: Option<String>, alone: bool, events: &mpsc::Sender<Vec<Event>>) {
    let mut folder = Some(Folder::new(dir.clone(), node));
    let mut is_first = true;
    let mut is_watched = true;
    loop {
        // Watched before it is read: nothing that happens in between is missed.
        let mut watch = Watch::new(&dir);
        match &watch {
            Ok(_) => is_watched = true,
            Err(error) if is_watched => {
                is_watched = false;
                warn!(folder = %dir.display(), %error, "the manifest folder cannot be watched, it is read every 5 s; \
                    is fs.inotify.max_user_instances too low?");
            }
            Err(_) => {}
        }
        let Some(mut found) = scan(&mut folder, Scope::Folder).await else { return };
        if std::mem::take(&mut is_first) {
            found.push(synced());
            let unmatched = folder.as_ref().filter(|_| alone).map(Folder::unmatched);
            unmatched.into_iter().flatten().for_each(|problem| warn!("{problem}"));
        }
        if !found.is_empty() && events.send(found).await.is_err() {
            return;
        }
        let ended = match &mut watch {
            Ok(watch) => watched(watch, &mut folder, events).await,
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
    folder: &mut Option<Folder>,
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
        let found = scan(folder, scope).await?;
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

/// Reads off the runtime's threads and logs what is wrong; `None` when the runtime shuts down.
async fn scan(folder: &mut Option<Folder>, scope: Scope) -> Option<Vec<Event>> {
    let mut taken = folder.take()?;
    let (taken, found) = tokio::task::spawn_blocking(move || {
        let found = taken.scan(scope);
        (taken, found)
    })
    .await
    .ok()?;
    *folder = Some(taken);
    let Found { events, problems, over } = found;
    for problem in problems {
        warn!("{problem}");
    }
    for words in over {
        info!("{words}");
    }
    Some(events)
}
