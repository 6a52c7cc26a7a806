//! Notices that files of a folder changed: manifests, and the agent's own configuration.
//!
//! Owns the inotify watches: on the folder, and on the directory above it, so that a folder that is created later or
//! replaced is noticed. Never reads a file.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use futures::{FutureExt, StreamExt};
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask};

/// Inotify events are at most 16 + 256 bytes: this reads some hundred at once.
const BUFFER: usize = 64 << 10;

/// Watches on one folder.
pub(crate) struct Watch {
    dir: PathBuf,
    /// Whether a file of this name counts.
    is_wanted: Box<dyn Fn(&str) -> bool + Send + Sync>,
    events: EventStream<Vec<u8>>,
    /// The watch above the folder, and the name there that leads to it.
    above: Option<(WatchDescriptor, OsString)>,
}

/// What changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    /// The folder itself is another one, or events were lost: watch anew and look at everything.
    pub(crate) anew: bool,
    /// Look at all files whose stamp is another one.
    pub(crate) all: bool,
    /// Files that are whole now.
    pub(crate) written: BTreeSet<String>,
    /// Files that vanished, or are being written: what they are shows in a moment.
    pub(crate) unsettled: BTreeSet<String>,
}

impl Watch {
    /// Watches the files of `dir` whose names are wanted, or waits for `dir` in the nearest directory above that exists.
    pub(crate) fn new(
        dir: &Path,
        is_wanted: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let mut watches = inotify.watches();
        let entries = WatchMask::CREATE | WatchMask::MOVE | WatchMask::DELETE | WatchMask::ONLYDIR;
        let folder = entries | WatchMask::CLOSE_WRITE | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF;
        // Above first: a folder that appears in between is then seen by one watch or the other.
        let above = 'above: loop {
            let mut child = dir;
            while let (Some(parent), Some(name)) = (child.parent(), child.file_name()) {
                match watches.add(parent, entries) {
                    // It appeared in between: start lower.
                    Ok(_) if child != dir && child.exists() => continue 'above,
                    Ok(watch) => break 'above Some((watch, name.to_owned())),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => child = parent,
                    Err(error) => return Err(error),
                }
            }
            break None;
        };
        match watches.add(dir, folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let events = inotify.into_event_stream(vec![0; BUFFER])?;
        Ok(Self { dir: dir.to_owned(), is_wanted: Box::new(is_wanted), events, above })
    }

    /// Waits until something changed, and takes all that the kernel has told by then.
    pub(crate) async fn changed(&mut self) -> io::Result<Changed> {
        let mut changed = Changed::default();
        loop {
            let Some(event) = self.events.next().await else {
                return Err(io::Error::other("inotify ended"));
            };
            self.note(event?, &mut changed);
            while let Some(Some(event)) = self.events.next().now_or_never() {
                self.note(event?, &mut changed);
            }
            if changed != Changed::default() {
                return Ok(changed);
            }
        }
    }

    fn note(&self, event: EventOwned, changed: &mut Changed) {
        let lost = EventMask::Q_OVERFLOW | EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT;
        if event.mask.intersects(lost) {
            changed.anew = true;
            return;
        }
        let Some(name) = event.name else { return };
        if let Some((above, child)) = &self.above
            && event.wd == *above
        {
            changed.anew |= name == *child;
            return;
        }
        // A mounted ConfigMap changes by one rename of `..data`, which the links of its files lead through.
        if name == "..data" {
            changed.all = true;
            return;
        }
        let Some(name) = name.to_str().filter(|name| (self.is_wanted)(name)) else { return };
        let whole = if event.mask.contains(EventMask::CREATE) {
            // A link is whole at once; a file is written after it was created.
            self.dir.join(name).symlink_metadata().is_ok_and(|metadata| metadata.is_symlink())
        } else {
            event.mask.intersects(EventMask::CLOSE_WRITE | EventMask::MOVED_TO)
        };
        if whole {
            changed.unsettled.remove(name);
            changed.written.insert(name.to_owned());
        } else {
            changed.written.remove(name);
            changed.unsettled.insert(name.to_owned());
        }
    }
}
