//! One resource: list it, watch it, list it again when the server has forgotten where we were.
//!
//! Owns the resource version, the fallback from lists in protobuf to lists in JSON, and the backoff. A list comes in
//! one answer from the server's cache: pages would each go to etcd. A watch is in JSON, each object decoded from the
//! line it arrives in, without a copy. kube's own watcher is not used: it resumes a broken watch silently, so nobody
//! can say when trouble is over, and it knows no protobuf.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{AsyncBufRead, AsyncBufReadExt, FutureExt};
use http::HeaderValue;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{ListParams, VersionMatch, WatchParams};
use kube::core::{Request, Status};
use prost::Message;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::client::{connect, fingerprint};
use super::health::{Health, Kind, Trouble};
use super::keeper::Keeper;
use super::list::{List, Part};
use super::protobuf::ListMetadata;
use super::servers::ApiServers;
use super::{KubeSourceConfig, api_event};
use crate::model::input::{Change, Event};
use crate::source::convert::triggered;
use crate::source::wire::{self, Object, Text};

/// What the objects of a list are asked for in.
const PROTOBUF: HeaderValue = HeaderValue::from_static("application/vnd.kubernetes.protobuf");
/// Changes sent in one message.
const BATCH: usize = 256;
/// The first pause after a failure; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A watch that lived so long was no failure.
const LIVED: Duration = Duration::from_secs(10);
/// How often a resource is asked for that the server did not have.
const ABSENT: Duration = Duration::from_secs(60);
/// How long a response may take to begin, and a plain list to arrive.
const ANSWER: Duration = Duration::from_secs(60);
/// A server sends a bookmark every minute: a watch that is silent for longer is resumed on a new connection.
const SILENCE: Duration = Duration::from_secs(90);
/// A server that has forgotten a version says so at once, though in a response that looks well.
const SETTLE: Duration = Duration::from_secs(1);
/// The server ends a watch after this many seconds, to which up to as many are added: not all nodes come at once.
const WATCH_SECONDS: u32 = 140;

/// What all watches of a source share.
pub(super) struct Shared {
    pub(super) config: KubeSourceConfig,
    pub(super) servers: ApiServers,
    pub(super) health: Health,
    pub(super) events: mpsc::Sender<Vec<Event>>,
    /// Resources that have not been listed yet.
    pub(super) unlisted: AtomicUsize,
}

/// The watch of one resource.
pub(super) struct Watch<K> {
    shared: Arc<Shared>,
    client: Client,
    /// What the client was made of.
    fingerprint: u64,
    /// A better address of the server answers than the one in use.
    moves: watch::Receiver<()>,
    keeper: K,
    /// Where to go on; `None` where a list is due.
    version: Option<String>,
    listed: bool,
    /// The server lists in protobuf.
    protobuf: bool,
    /// The server takes the field selector.
    selects: bool,
    /// The server does not give this resource.
    absent: bool,
    /// The watch that was resumed is one that the server goes on with.
    settled: bool,
    pauses: u32,
    started: Timestamp,
}

/// The receiver is gone, or the session came to an end that says why.
enum End {
    /// Nobody listens any more.
    Unheard,
    /// The watch ended as watches do: it is resumed.
    Over,
    /// It failed.
    Trouble(Trouble),
}

impl From<Trouble> for End {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

impl From<kube::Error> for End {
    fn from(error: kube::Error) -> Self {
        Self::Trouble(error.into())
    }
}

/// One line of a watch.
#[derive(Deserialize)]
struct Line<'a, T> {
    #[serde(borrow, rename = "type")]
    kind: Text<'a>,
    object: T,
}

/// A list in JSON.
#[derive(Deserialize)]
struct JsonList<'a, T> {
    /// Not of a list: a Status has one, and says why there is no list.
    status: Option<IgnoredAny>,
    #[serde(borrow)]
    metadata: wire::Metadata<'a>,
    items: Option<Vec<T>>,
}

impl<K: Keeper> Watch<K> {
    pub(super) fn new(shared: Arc<Shared>, (client, fingerprint): (Client, u64), keeper: K) -> Self {
        let moves = shared.servers.moves();
        Self {
            shared,
            client,
            fingerprint,
            moves,
            keeper,
            version: None,
            listed: false,
            protobuf: true,
            selects: true,
            absent: false,
            settled: false,
            pauses: 0,
            started: Timestamp::now(),
        }
    }

    /// Runs until the receiver is gone.
    pub(super) async fn run(mut self) {
        loop {
            let began = Instant::now();
            let end = self.session().await;
            if began.elapsed() > LIVED {
                self.pauses = 0;
            }
            let pause = match end {
                End::Unheard => return,
                End::Over if began.elapsed() > Duration::from_secs(1) => Duration::ZERO,
                End::Over => self.pause(),
                End::Trouble(trouble) => match self.consider(trouble).await {
                    Ok(pause) => pause,
                    Err(End::Unheard) => return,
                    Err(_) => self.pause(),
                },
            };
            tokio::select! {
                () = self.shared.events.closed() => return,
                () = sleep(pause) => {}
            }
        }
    }

    /// What to do about trouble, and how long to wait before the next attempt.
    async fn consider(&mut self, trouble: Trouble) -> Result<Duration, End> {
        match trouble.kind {
            Kind::Expired => {
                self.shared.health.relisting(K::RESOURCE);
                self.version = None;
                // It may have been upgraded.
                self.selects = true;
                return Ok(self.pause());
            }
            // Of several API servers, a newer one may list what an older one does not watch.
            Kind::Refused if self.may_be_the_selector(&trouble) => {
                info!(
                    resource = K::RESOURCE,
                    error = trouble.message,
                    "the API server cannot select by this field: going on without the field selector"
                );
                self.selects = false;
                self.version = None;
                return Ok(Duration::ZERO);
            }
            Kind::Refused if self.version.is_some() => self.version = None,
            Kind::Unauthorized => self.shared.config.plugin.refused().await,
            Kind::Forbidden | Kind::NotFound if K::OPTIONAL => {
                if !std::mem::replace(&mut self.absent, true) {
                    let (resource, error) = (K::RESOURCE, trouble.message);
                    if trouble.kind == Kind::NotFound {
                        // Its release does not have it yet, which is no fault.
                        info!(resource, error, "the API server has no such resource: going on without");
                    } else {
                        warn!(
                            resource,
                            error, "the API server does not give this resource: going on without"
                        );
                    }
                }
                self.shared.health.well(K::RESOURCE);
                if !self.listed {
                    self.keeper.list_begins();
                    let mut changes = Vec::new();
                    self.keeper.list_ends(&mut changes);
                    self.list_is_whole(changes).await?;
                }
                return Ok(ABSENT);
            }
            _ => {}
        }
        self.shared.health.failed(K::RESOURCE, &trouble);
        self.renew().await;
        Ok(self.pause())
    }

    /// Whether the server may refuse nothing but the field selector, and the keeper can do without.
    fn may_be_the_selector(&self, trouble: &Trouble) -> bool {
        K::FILTERS
            && self.selectors().0.is_some()
            && ["field label", "field selector"].iter().any(|words| trouble.message.contains(words))
    }

    /// A new client without connections: credentials, certificates and even the server's address may be others now.
    async fn renew(&mut self) {
        match connect(&self.shared.config, &self.shared.servers).await {
            Ok(connected) => (self.client, self.fingerprint) = (connected.client, connected.fingerprint),
            Err(error) => debug!(%error, "the credentials cannot be renewed"),
        }
    }

    /// The next pause: exponential, half of it random.
    fn pause(&mut self) -> Duration {
        let pause = PAUSE.saturating_mul(1 << self.pauses.min(16)).min(LONGEST_PAUSE);
        self.pauses = self.pauses.saturating_add(1);
        pause.mul_f64(0.5 + 0.5 * fastrand::f64())
    }

    /// Lists if need be, then watches until it ends.
    async fn session(&mut self) -> End {
        // Certificates may have been replaced, and what a plugin gave may expire. What cannot be read now is used as it was.
        if fingerprint(&self.shared.config).await.is_ok_and(|now| now != self.fingerprint) {
            debug!(resource = K::RESOURCE, "the credentials have changed: connecting anew");
            self.renew().await;
        }
        if self.version.is_none() {
            match self.list().await {
                Ok(()) => {}
                Err(end) => return end,
            }
        }
        match self.watch().await {
            Ok(()) => End::Over,
            Err(end) => end,
        }
    }

    /// The version to ask a list for: at start whatever the server's cache has, later what is newest, so that no
    /// server that lags behind takes us back in time.
    fn oldest(&self) -> Option<&'static str> {
        (!self.listed).then_some("0")
    }

    /// Lists in protobuf; in JSON where the server has none, or refuses: its words are text then.
    async fn list(&mut self) -> Result<(), End> {
        let mut changes = Vec::new();
        self.keeper.list_begins();
        let version = match self.list_protobuf(&mut changes).await? {
            Some(version) => version,
            // What is no list in JSON either says nothing of protobuf.
            None => self.list_json(&mut changes).await.inspect_err(|_| self.protobuf = true)?,
        };
        // Every list has a version. What has none says nothing of the objects that it does not name.
        if version.is_empty() {
            return Err(Trouble::new(
                Kind::Failing,
                "the answer is no list: it has no metadata.resourceVersion",
            )
            .into());
        }
        self.keeper.list_ends(&mut changes);
        self.version = Some(version);
        self.list_is_whole(changes).await
    }

    /// The field and label selectors that the server takes.
    fn selectors(&self) -> (Option<String>, Option<&'static str>) {
        let (fields, labels) = self.keeper.selectors();
        (fields.filter(|_| self.selects), labels)
    }

    fn list_request(&self) -> Result<http::Request<Vec<u8>>, End> {
        let (fields, labels) = self.selectors();
        let oldest = self.oldest();
        let params = ListParams {
            field_selector: fields,
            label_selector: labels.map(str::to_owned),
            resource_version: oldest.map(str::to_owned),
            version_match: oldest.map(|_| VersionMatch::NotOlderThan),
            ..ListParams::default()
        };
        Ok(Request::new(K::PATH).list(&params).map_err(kube::Error::BuildRequest)?)
    }

    /// Takes the objects in as they arrive; returns the list's version. `None`: not in protobuf.
    async fn list_protobuf(&mut self, changes: &mut Vec<Change>) -> Result<Option<String>, End> {
        if !self.protobuf {
            return Ok(None);
        }
        let mut request = self.list_request()?;
        request.headers_mut().insert(http::header::ACCEPT, PROTOBUF);
        let answer =
            timeout(ANSWER, self.client.request_stream(request)).await.map_err(|_| silent("list"))?;
        let body = match answer {
            Ok(body) => std::pin::pin!(body),
            // A refusal is in protobuf too: asked for again in JSON, it can be read.
            Err(kube::Error::Api(_) | kube::Error::FromUtf8(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let Some(mut list) = in_time(List::begin(body)).await? else {
            debug!(resource = K::RESOURCE, "no protobuf here: listing in JSON");
            self.protobuf = false;
            return Ok(None);
        };
        let mut version = String::new();
        while let Some(part) = in_time(list.next()).await? {
            match part {
                Part::Metadata(bytes) => {
                    version = ListMetadata::decode(bytes)
                        .map_err(|error| Trouble::undecodable(&error))?
                        .resource_version;
                }
                Part::Item(bytes) => {
                    let message = K::Message::decode(bytes).map_err(|error| Trouble::undecodable(&error))?;
                    self.keeper.put(&K::object(&message), changes);
                    if changes.len() >= BATCH {
                        self.send(changes).await?;
                    }
                }
            }
        }
        Ok(Some(version))
    }

    async fn list_json(&mut self, changes: &mut Vec<Change>) -> Result<String, End> {
        let request = self.list_request()?;
        let text = timeout(ANSWER, self.client.request_text(request)).await.map_err(|_| silent("list"))??;
        if !text.starts_with('{') {
            return Err(Trouble::foreign(200, &text).into());
        }
        let list: JsonList<'_, K::Object<'_>> =
            serde_json::from_str(&text).map_err(|error| Trouble::undecodable(&error))?;
        if list.status.is_some()
            && let Ok(status) = serde_json::from_str::<Status>(&text)
        {
            return Err(Trouble::of_status(&status).into());
        }
        for object in list.items.iter().flatten() {
            self.keeper.put(object, changes);
            if changes.len() >= BATCH {
                self.send(changes).await?;
            }
        }
        Ok(list.metadata.resource_version.as_deref().unwrap_or_default().to_owned())
    }

    async fn watch(&mut self) -> Result<(), End> {
        let (fields, labels) = self.selectors();
        let params = WatchParams {
            field_selector: fields,
            label_selector: labels.map(str::to_owned),
            timeout: Some(WATCH_SECONDS + fastrand::u32(0..WATCH_SECONDS)),
            bookmarks: true,
            send_initial_events: false,
        };
        let version = self.version.as_deref().unwrap_or_default();
        let request = Request::new(K::PATH).watch(&params, version).map_err(kube::Error::BuildRequest)?;
        let response =
            timeout(ANSWER, self.client.request_stream(request)).await.map_err(|_| silent("watch"))??;
        let mut response = std::pin::pin!(response);
        self.settled = false;
        let mut changes = Vec::new();
        let mut line = Vec::new();
        loop {
            line.clear();
            if !self.next_line(&mut response, &mut line, &mut changes).await? {
                self.send(&mut changes).await?;
                return Ok(());
            }
            self.take(&line, &mut changes)?;
            if !self.settled {
                self.is_well();
            }
            if changes.len() >= BATCH {
                self.send(&mut changes).await?;
            }
        }
    }

    /// Reads a line; while it waits, what was read before is on its way. False where the stream ended.
    async fn next_line(
        &mut self,
        response: &mut (impl AsyncBufRead + Unpin),
        line: &mut Vec<u8>,
        changes: &mut Vec<Change>,
    ) -> Result<bool, End> {
        let read = loop {
            // A read that is dropped leaves what it has in `line`, and the next goes on behind it.
            if let Some(read) = response.read_until(b'\n', line).now_or_never() {
                break read;
            }
            self.send(changes).await?;
            let patience = if self.settled { SILENCE } else { SETTLE };
            tokio::select! {
                () = self.shared.events.closed() => return Err(End::Unheard),
                Ok(()) = self.moves.changed() => {
                    self.renew().await;
                    return Ok(false);
                }
                read = timeout(patience, response.read_until(b'\n', line)) => match read {
                    Ok(read) => break read,
                    // A new connection tells whether the server is still there.
                    Err(_) if self.settled => return Ok(false),
                    Err(_) => self.is_well(),
                },
            }
        };
        match read {
            Ok(_) => Ok(line.ends_with(b"\n")),
            // Servers and load balancers cut watches off at any point; whether that is trouble shows when the watch
            // is resumed.
            Err(error) => {
                debug!(resource = K::RESOURCE, %error, "the watch was cut off");
                Ok(false)
            }
        }
    }

    /// Takes one line in.
    fn take(&mut self, line: &[u8], changes: &mut Vec<Change>) -> Result<(), End> {
        let decoded: Line<'_, K::Object<'_>> = match serde_json::from_slice(line) {
            Ok(decoded) => decoded,
            Err(error) => return self.take_odd(line, &error),
        };
        let metadata = decoded.object.metadata();
        let version = metadata.and_then(|metadata| metadata.resource_version.as_deref());
        match &*decoded.kind {
            "ADDED" | "MODIFIED" => {
                let before = changes.len();
                self.keeper.put(&decoded.object, changes);
                let slice = changes.get(before..).and_then(<[Change]>::last);
                changes.extend(slice.and_then(|slice| triggered(slice, metadata, self.started)));
            }
            "DELETED" => self.keeper.remove(&decoded.object, changes),
            // It brings a version alone.
            "BOOKMARK" => {}
            "ERROR" => return Err(status_of(line).into()),
            other => debug!(resource = K::RESOURCE, kind = other, "a watch event of unknown type"),
        }
        if let (Some(current), Some(version)) = (&mut self.version, version) {
            version.clone_into(current);
        }
        Ok(())
    }

    /// Takes in a line whose object cannot be read: of an object of this kind, what is known stays in force, and the watch goes
    /// on with the others.
    fn take_odd(&mut self, line: &[u8], error: &serde_json::Error) -> Result<(), End> {
        #[derive(Deserialize)]
        struct Named<'a> {
            #[serde(borrow)]
            metadata: wire::Metadata<'a>,
        }
        let Ok(named) = serde_json::from_slice::<Line<'_, Named<'_>>>(line) else {
            // An error's object is a Status, which need not read as an object of this kind.
            let is_error =
                serde_json::from_slice::<Line<'_, IgnoredAny>>(line).is_ok_and(|line| &*line.kind == "ERROR");
            return Err(if is_error { status_of(line) } else { Trouble::undecodable(error) }.into());
        };
        if &*named.kind == "ERROR" {
            return Err(status_of(line).into());
        }
        let metadata = named.object.metadata;
        let (name, namespace) = (metadata.name.as_deref(), metadata.namespace.as_deref());
        warn!(
            resource = K::RESOURCE,
            namespace, name, %error,
            "an object of the API server cannot be read: what was known of it stays in force",
        );
        if let (Some(current), Some(version)) = (&mut self.version, metadata.resource_version.as_deref()) {
            version.clone_into(current);
        }
        Ok(())
    }

    async fn send(&self, changes: &mut Vec<Change>) -> Result<(), End> {
        self.shared.servers.observe(changes, self.listed && K::LISTS_ENDPOINTS);
        if changes.is_empty() {
            return Ok(());
        }
        let events = changes.drain(..).map(api_event).collect();
        self.shared.events.send(events).await.map_err(|_| End::Unheard)
    }

    /// The list is whole: sends the rest of it, and that the source has synced where this was the last to come.
    async fn list_is_whole(&mut self, mut changes: Vec<Change>) -> Result<(), End> {
        if !std::mem::replace(&mut self.listed, true) {
            // What this task knows is sent before the count falls, so `Synced` comes last.
            self.send(&mut changes).await?;
            if self.shared.unlisted.fetch_sub(1, Ordering::AcqRel) == 1 {
                changes.push(Change::Synced);
            }
        }
        self.send(&mut changes).await?;
        if self.version.is_some() {
            self.is_well();
        }
        Ok(())
    }

    /// The server answers with what was asked for.
    fn is_well(&mut self) {
        self.settled = true;
        if std::mem::take(&mut self.absent) {
            info!(resource = K::RESOURCE, "the API server gives this resource now");
        }
        self.shared.health.well(K::RESOURCE);
    }
}

fn silent(what: &str) -> Trouble {
    Trouble::new(Kind::Unreachable, format!("no answer to a {what} for {} s", ANSWER.as_secs()))
}

/// Waits for a part of a list, though not for ever.
async fn in_time<T>(part: impl Future<Output = io::Result<T>>) -> Result<T, Trouble> {
    let read = timeout(ANSWER, part).await.map_err(|_| silent("list"))?;
    read.map_err(|error| Trouble::new(Kind::Unreachable, error.to_string()))
}

/// Why a watch ends, as its last line says.
fn status_of(line: &[u8]) -> Trouble {
    serde_json::from_slice::<Line<'_, Status>>(line)
        .map_or_else(|error| Trouble::undecodable(&error), |line| Trouble::of_status(&line.object))
}
