//! What a manifest folder holds, file by file and object by object.
//!
//! Owns which content is in force: a file that does not parse keeps its last good one, and of two files that name
//! the same object the first by name wins. Never watches: its caller says what to look at again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Condition;
use super::body::Format;
use super::document::{Content, Contents, Id, Reader};
use crate::model::input::{Change, Event, Origin, ServiceKey, ServicePort};
use crate::source::convert::Ignored;
use crate::source::problem::{Place, Problem, shorten};

/// A file larger than this is reported and not read: no one writes such a manifest on purpose.
const LARGEST_FILE: u64 = 256 << 20;

/// The folder as it was last read.
pub(super) struct Folder {
    dir: PathBuf,
    reader: Reader,
    files: BTreeMap<Arc<str>, File>,
    /// Every object and the files that name it: the first is in force.
    objects: BTreeMap<Id, BTreeMap<Arc<str>, Content>>,
    /// What of it is said of objects that several files name.
    doubles: BTreeMap<Id, Vec<Problem>>,
    /// Why the folder itself cannot be listed.
    unlisted: Option<Problem>,
    /// Whether it could be at least once.
    known: bool,
    /// What was last said of [`Self::is_complete`].
    complete: bool,
}

#[derive(Default)]
struct File {
    /// `None` where the file could not be read.
    stamp: Option<Stamp>,
    ids: BTreeSet<Id>,
    /// The objects that it names and that are not in force as it has them now.
    bad: BTreeSet<Id>,
    /// Those that are not for a Service proxy.
    ignored: BTreeMap<Id, Ignored>,
    /// Why its present content is not in force.
    failed: Option<Problem>,
    /// What is wrong in the content that is.
    problems: Vec<Problem>,
    /// All that it holds could be read at least once.
    read: bool,
}

impl File {
    /// Whether it has a document of an object that is not in force.
    fn names(&self, id: &Id) -> bool {
        self.bad.contains(id) || self.ignored.contains_key(id)
    }
}

/// What tells one version of a file from another without reading it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// What to look at again.
pub(super) enum Scope {
    /// Every file whose stamp is another one.
    Folder,
    /// These files, whatever their stamps say.
    Files(BTreeSet<String>),
}

/// What was found.
#[derive(Default)]
pub(super) struct Found {
    pub(super) events: Vec<Event>,
    /// What is wrong and was not before.
    pub(super) problems: Vec<Problem>,
    /// What was wrong before and no longer is, in words.
    pub(super) over: Vec<String>,
    /// Something was read, or has gone.
    pub(super) stirred: bool,
}

impl Found {
    /// What is wrong with something now, and was before.
    fn note(&mut self, now: &[Problem], before: &[Problem]) {
        self.stirred = true;
        let before: BTreeSet<_> = before.iter().map(Problem::identity).collect();
        self.problems.extend(now.iter().filter(|problem| !before.contains(&problem.identity())).cloned());
    }
}

/// What each touched object was before.
type Touched = BTreeMap<Id, Option<Content>>;

impl Folder {
    pub(super) fn new(dir: PathBuf, node: Option<String>) -> Self {
        let reader = Reader::new(node);
        let (files, objects, doubles) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { dir, reader, files, objects, doubles, unlisted: None, known: false, complete: true }
    }

    /// Reads what changed and says what that means.
    pub(super) fn scan(&mut self, scope: Scope) -> Found {
        let mut found = Found::default();
        let mut touched = Touched::new();
        match scope {
            Scope::Files(names) => {
                for name in names {
                    self.refresh(&name.into(), true, &mut touched, &mut found);
                }
            }
            Scope::Folder => match self.list() {
                Ok(names) => {
                    if self.unlisted.take().is_some() {
                        found.stirred = true;
                        found.over.push(format!("{}: the folder is read again", self.dir.display()));
                    }
                    self.known = true;
                    let known: Vec<Arc<str>> = self.files.keys().cloned().collect();
                    for name in known.into_iter().filter(|name| !names.contains(name)) {
                        self.forget(&name, &mut touched, &mut found);
                    }
                    for name in names {
                        self.refresh(&name, false, &mut touched, &mut found);
                    }
                }
                Err(error) => self.unlisted(&error, &mut touched, &mut found),
            },
        }
        self.report_doubles(&touched, &mut found);
        found.events = self.events(touched);
        let complete = self.is_complete();
        if std::mem::replace(&mut self.complete, complete) != complete {
            found.events.push(Event::Source { origin: Origin::Static, change: Change::Complete(complete) });
        }
        found
    }

    /// Whether the folder was ever there, and all of every file could be read at least once: what a file holds of which that
    /// is not so, nobody knows.
    fn is_complete(&self) -> bool {
        self.known && self.files.values().all(|file| file.read)
    }

    /// All that is wrong, whether or not it was said before.
    pub(super) fn condition(&self) -> Condition {
        let files = self.files.values();
        let unread = self.unlisted.iter().chain(files.clone().filter_map(|file| file.failed.as_ref()));
        let odd = files.flat_map(|file| &file.problems).chain(self.doubles.values().flatten());
        Condition { complete: self.complete, unread: unread.cloned().collect(), odd: odd.cloned().collect() }
    }

    /// The names of the manifest files.
    fn list(&self) -> io::Result<BTreeSet<Arc<str>>> {
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&self.dir)? {
            if let Some(name) = entry?.file_name().to_str()
                && format_of(name).is_some()
            {
                names.insert(name.into());
            }
        }
        Ok(names)
    }

    fn unlisted(&mut self, error: &io::Error, touched: &mut Touched, found: &mut Found) {
        let absent = error.kind() == io::ErrorKind::NotFound;
        if absent {
            let known: Vec<Arc<str>> = self.files.keys().cloned().collect();
            for name in known {
                self.forget(&name, touched, found);
            }
        }
        let remedy = if absent {
            "the folder does not exist: its objects are read when it is created".to_owned()
        } else {
            format!("the folder cannot be listed: {error}; its last content stays in force")
        };
        let problem = at_file(&Arc::new(self.dir.clone()), remedy);
        found.note(std::slice::from_ref(&problem), self.unlisted.as_slice());
        self.unlisted = Some(problem);
    }

    /// Looks at one file again.
    fn refresh(&mut self, name: &Arc<str>, force: bool, touched: &mut Touched, found: &mut Found) {
        let Some(format) = format_of(name) else { return };
        let path = Arc::new(self.dir.join(&**name));
        // Stamped before it is read: a change while it is read gives another stamp the next time.
        let stamp = match fs::metadata(&*path) {
            Ok(metadata) if metadata.is_dir() => return self.forget(name, touched, found),
            Ok(metadata) => Ok(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.forget(name, touched, found);
            }
            Err(error) => Err(error),
        };
        let read = stamp.and_then(|metadata| {
            let stamp = Stamp::of(&metadata);
            let known = self.files.get(name).is_some_and(|file| file.stamp == Some(stamp));
            if known && !force {
                return Ok(None);
            }
            if !metadata.is_file() {
                return Err(io::Error::other("it is not a regular file"));
            }
            if metadata.size() > LARGEST_FILE {
                return Err(io::Error::other("it is larger than 256 MiB"));
            }
            Ok(Some((stamp, fs::read(&*path)?)))
        });
        let (stamp, contents) = match read {
            Ok(None) => return,
            Ok(Some((stamp, bytes))) => match std::str::from_utf8(&bytes) {
                Ok(text) => (Some(stamp), self.reader.read(&path, text, format)),
                Err(error) => {
                    let line = bytes[..error.valid_up_to()].split(|byte| *byte == b'\n').count() as u64;
                    let remedy = "not UTF-8; what was in force before stays".to_owned();
                    let place = Place { file: Arc::clone(&path), line, column: 0 };
                    (Some(stamp), Err(Problem { place: Some(place), ..at_file(&path, remedy) }))
                }
            },
            Err(error) => {
                let remedy = format!("cannot be read: {error}; what was in force before stays");
                (None, Err(at_file(&path, remedy)))
            }
        };
        let file = self.files.entry(Arc::clone(name)).or_default();
        file.stamp = stamp;
        let problems = std::mem::take(&mut self.reader.problems);
        match contents {
            Ok(contents) => {
                found.note(&problems, &file.problems);
                file.problems = problems;
                if file.failed.take().is_some() {
                    found.over.push(format!("{}: good again, its new content is in force", path.display()));
                }
                self.replace(name, contents, touched);
            }
            Err(problem) => {
                found.note(std::slice::from_ref(&problem), file.failed.as_slice());
                file.failed = Some(problem);
            }
        }
    }

    /// Puts a file's new content in force.
    fn replace(&mut self, name: &Arc<str>, contents: Contents, touched: &mut Touched) {
        let Contents { objects, malformed, mut bad, ignored, unknown } = contents;
        let file = self.files.entry(Arc::clone(name)).or_default();
        let before = std::mem::take(&mut file.ids);
        let kept = |id: &Id| objects.contains_key(id) || malformed.contains(id) || unknown;
        // What it holds beside what is in force, nobody knows, unless it was known before.
        file.read |= !unknown && malformed.is_subset(&before);
        let (kept, dropped): (BTreeSet<Id>, BTreeSet<Id>) = before.into_iter().partition(kept);
        file.ids = kept;
        file.ids.extend(objects.keys().cloned());
        bad.extend(malformed);
        (file.bad, file.ignored) = (bad, ignored);
        for id in dropped {
            self.drop_object(id, name, touched);
        }
        for (id, content) in objects {
            let holders = self.objects.entry(id.clone()).or_default();
            touched.entry(id).or_insert_with(|| holders.values().next().cloned());
            holders.insert(Arc::clone(name), content);
        }
    }

    /// Drops a file that is no more.
    fn forget(&mut self, name: &Arc<str>, touched: &mut Touched, found: &mut Found) {
        let Some(File { ids, failed, .. }) = self.files.remove(name) else { return };
        found.stirred = true;
        if failed.is_some() {
            let path = self.dir.join(&**name);
            found.over.push(format!("{}: gone, and with it what was in force of it", path.display()));
        }
        for id in ids {
            self.drop_object(id, name, touched);
        }
    }

    fn drop_object(&mut self, id: Id, name: &Arc<str>, touched: &mut Touched) {
        if let Some(holders) = self.objects.get_mut(&id) {
            let before = holders.values().next().cloned();
            holders.remove(name);
            if holders.is_empty() {
                self.objects.remove(&id);
            }
            touched.entry(id).or_insert(before);
        }
    }

    fn report_doubles(&mut self, touched: &Touched, found: &mut Found) {
        for id in touched.keys() {
            let mut names = self.objects.get(id).into_iter().flat_map(BTreeMap::keys);
            let winner = names.next().map(|name| self.dir.join(&**name));
            // A file that is being renamed is there under both names for a moment.
            let winner = winner.filter(|winner| winner.exists());
            let double = |loser: &Arc<str>| {
                let remedy =
                    format!("also in {}, which wins: remove one of them", winner.as_ref()?.display());
                let problem = at_file(&Arc::new(self.dir.join(&**loser)), remedy);
                Some(Problem { object: Some(id.to_string()), ..problem })
            };
            let doubles: Vec<Problem> = names.filter_map(double).collect();
            let before = self.doubles.remove(id).unwrap_or_default();
            found.note(&doubles, &before);
            if !doubles.is_empty() {
                self.doubles.insert(id.clone(), doubles);
            }
        }
    }

    /// The slices that lead nowhere: their Service, or one of its ports, is not in the folder.
    pub(super) fn unmatched(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (id, holders) in &self.objects {
            let Some((file, Content::Slice(slice))) = holders.first_key_value() else { continue };
            let mut add = |field: &str, value: Option<&str>, remedy: String| {
                let problem = at_file(&Arc::new(self.dir.join(&**file)), remedy);
                let (object, value) = (Some(id.to_string()), value.map(shorten));
                problems.push(Problem { object, field: field.to_owned(), value, ..problem });
            };
            let service = Id::Service(slice.service.clone());
            match self.objects.get(&service).and_then(|holders| holders.values().next()) {
                Some(Content::Service(service)) => {
                    for port in &*slice.ports {
                        let matches = |other: &ServicePort| {
                            (&other.name, other.protocol) == (&port.name, port.protocol)
                        };
                        if !service.ports.iter().any(matches) {
                            let of = &slice.service;
                            let remedy = format!("Service {of} has no {} port of this name", port.protocol);
                            add("ports[].name", Some(&port.name), remedy);
                        }
                    }
                }
                _ if self.files.values().any(|file| file.names(&service)) => {}
                _ => {
                    let remedy = "no Service of this name is in the folder".to_owned();
                    add("metadata.labels[kubernetes.io/service-name]", Some(slice.service.name()), remedy);
                }
            }
        }
        problems
    }

    /// The Services that are not for a Service proxy, and why.
    pub(super) fn not_for_us(&self) -> Vec<(ServiceKey, &'static str)> {
        let ignored = self.files.values().flat_map(|file| &file.ignored);
        let mut found: Vec<_> = ignored
            .filter_map(|(id, why)| match id {
                Id::Service(service) if !self.objects.contains_key(id) => {
                    Some((service.clone(), why.meaning()))
                }
                _ => None,
            })
            .collect();
        found.sort_unstable();
        found
    }

    fn events(&self, touched: Touched) -> Vec<Event> {
        let mut changes = Vec::with_capacity(touched.len());
        let mut cidrs_changed = false;
        for (id, before) in touched {
            let now = self.objects.get(&id).and_then(|holders| holders.values().next());
            if now == before.as_ref() {
                continue;
            }
            changes.push(match (id, now) {
                (_, Some(Content::Service(service))) => Change::Service(service.clone()),
                (_, Some(Content::Slice(slice))) => Change::Slice(slice.clone()),
                (_, Some(Content::Node(node))) => Change::Node(Some(node.clone())),
                (Id::Service(key), None) => Change::ServiceGone(key),
                (Id::Slice(key), None) => Change::SliceGone(key),
                (Id::Node, None) => Change::Node(None),
                (Id::ServiceCidr(_), None) | (_, Some(Content::ServiceCidr(_))) => {
                    cidrs_changed = true;
                    continue;
                }
            });
        }
        if cidrs_changed {
            let mut cidrs = Vec::new();
            for holders in self.objects.values() {
                if let Some(Content::ServiceCidr(some)) = holders.values().next() {
                    cidrs.extend_from_slice(some);
                }
            }
            changes.push(Change::ServiceCidrs(cidrs));
        }
        changes.into_iter().map(|change| Event::Source { origin: Origin::Static, change }).collect()
    }
}

/// How to read a file of this name; `None` where it is no manifest: editors' temporary files, dotfiles, others.
pub(super) fn format_of(name: &str) -> Option<Format> {
    if name.starts_with(['.', '#']) {
        return None;
    }
    match Path::new(name).extension()?.to_str()? {
        "yaml" | "yml" => Some(Format::Yaml),
        "json" => Some(Format::Json),
        _ => None,
    }
}

fn at_file(path: &Arc<PathBuf>, remedy: String) -> Problem {
    let place = Place { file: Arc::clone(path), line: 0, column: 0 };
    Problem { place: Some(place), object: None, field: String::new(), value: None, remedy }
}
