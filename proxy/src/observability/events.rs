//! Kubernetes Events (`events.k8s.io/v1`) about the own Node and about Services: what kube-proxy says there.
//!
//! Owns sending them. Never holds anything up: without an API server there are none, and those that find none to take
//! them for a while are dropped, and counted.

use std::fmt;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::metrics::KUBE_LANE;
use crate::model::input::ServiceKey;

/// Events that may wait to be sent.
const QUEUE: usize = 64;
/// How long one request may take, how long after a failure the next is made, and how many there are.
const REQUEST: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(10);
const ATTEMPTS: usize = 12;
/// The API server takes no longer note.
const NOTE_BYTES: usize = 1024;

/// `reason` of an Event, in kube-proxy's words where it has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The agent starts on this node.
    Starting,
    /// `healthzBindAddress` cannot be bound.
    FailedToStartProxierHealthcheck,
    /// `metricsBindAddress` cannot be bound.
    FailedToStartMetricServer,
    /// A Service's `healthCheckNodePort` cannot be bound.
    FailedToStartServiceHealthcheck,
    /// None of a Service's `loadBalancerSourceRanges` can be read.
    InvalidSourceRanges,
}

impl Reason {
    fn event(self, note: String) -> Event {
        let (type_, reason, action) = match self {
            Self::Starting => (EventType::Normal, "Starting", "StartKubeProxy"),
            Self::FailedToStartProxierHealthcheck => {
                (EventType::Warning, "FailedToStartProxierHealthcheck", "StartKubeProxy")
            }
            Self::FailedToStartMetricServer => {
                (EventType::Warning, "FailedToStartMetricServer", "StartKubeProxy")
            }
            Self::FailedToStartServiceHealthcheck => {
                (EventType::Warning, "FailedToStartServiceHealthcheck", "Listen")
            }
            Self::InvalidSourceRanges => (EventType::Warning, "InvalidLoadBalancerSourceRanges", "Sync"),
        };
        let note = (!note.is_empty()).then(|| note[..note.floor_char_boundary(NOTE_BYTES)].to_owned());
        Event { type_, reason: reason.to_owned(), note, action: action.to_owned(), secondary: None }
    }
}

/// Where Events are handed in.
#[derive(Clone, Debug)]
pub struct Events(Option<Queue>);

#[derive(Clone, Debug)]
struct Queue {
    sender: mpsc::Sender<Message>,
    node: String,
    dropped: Counter,
}

enum Message {
    Event {
        regarding: Box<ObjectReference>,
        event: Box<Event>,
    },
    /// All before this is sent or given up.
    Flush(oneshot::Sender<()>),
}

impl Events {
    /// For an agent without an API server.
    pub fn off() -> Self {
        Self(None)
    }

    /// Sends through this client, in the name of the agent on this node, and registers how many are dropped.
    pub fn spawn(client: kube::Client, node: &str, registry: &mut Registry) -> Self {
        let dropped = Counter::default();
        let own = registry.sub_registry_with_prefix(KUBE_LANE);
        own.register("events_dropped", "Kubernetes Events that could not be sent", dropped.clone());
        let reporter = Reporter { controller: "kube-lane".to_owned(), instance: Some(node.to_owned()) };
        let (sender, queue) = mpsc::channel(QUEUE);
        tokio::spawn(send(Recorder::new(client, reporter), queue, dropped.clone()));
        Self(Some(Queue { sender, node: node.to_owned(), dropped }))
    }

    /// An Event about the own Node; an empty note is none.
    pub fn node(&self, reason: Reason, note: String) {
        self.push(reason, note, |node| ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            uid: Some(node.to_owned()),
            ..ObjectReference::default()
        });
    }

    /// An Event about a Service.
    pub fn service(&self, service: &ServiceKey, reason: Reason, note: String) {
        self.push(reason, format!("node {node}: {note}", node = self.node_name()), |_| ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(service.namespace().to_owned()),
            name: Some(service.name().to_owned()),
            uid: Some(service.to_string()),
            ..ObjectReference::default()
        });
    }

    fn node_name(&self) -> &str {
        self.0.as_ref().map_or("", |queue| &queue.node)
    }

    fn push(&self, reason: Reason, note: String, regarding: impl FnOnce(&str) -> ObjectReference) {
        let Some(Queue { sender, node, dropped }) = &self.0 else { return };
        let regarding = Box::new(regarding(node));
        let message = Message::Event { regarding, event: Box::new(reason.event(note)) };
        if sender.try_send(message).is_err() {
            drop_one(dropped, format_args!("{reason:?}: {QUEUE} others wait to be sent"));
        }
    }

    /// Waits until what was handed in is sent, at most this long.
    pub async fn flush(&self, at_most: Duration) {
        let Some(Queue { sender, .. }) = &self.0 else { return };
        let (done, flushed) = oneshot::channel();
        let flush = async {
            if sender.send(Message::Flush(done)).await.is_ok() {
                // Whoever would tell may be gone with the runtime.
                let _ = flushed.await;
            }
        };
        if timeout(at_most, flush).await.is_err() {
            debug!("Events were still waiting to be sent");
        }
    }
}

/// Says so of the first; the others are counted.
fn drop_one(dropped: &Counter, why: fmt::Arguments<'_>) {
    if dropped.inc() == 0 {
        warn!("an Event is dropped, {why}; kubelane_events_dropped_total counts them");
    }
}

async fn send(recorder: Recorder, mut queue: mpsc::Receiver<Message>, dropped: Counter) {
    while let Some(message) = queue.recv().await {
        match message {
            Message::Event { regarding, event } => publish(&recorder, &event, &regarding, &dropped).await,
            Message::Flush(done) => drop(done.send(())),
        }
    }
}

/// Sends one Event; one that the API server refuses, or that it is away for too long, is dropped.
async fn publish(recorder: &Recorder, event: &Event, regarding: &ObjectReference, dropped: &Counter) {
    for attempt in 1..=ATTEMPTS {
        match timeout(REQUEST, recorder.publish(event, regarding)).await {
            Ok(Ok(())) => return,
            Ok(Err(kube::Error::Api(status))) => {
                warn!(reason = event.reason, error = status.message, "the API server refuses an Event");
                dropped.inc();
                return;
            }
            Ok(Err(error)) => debug!(reason = event.reason, %error, attempt, "cannot send an Event"),
            Err(_) => debug!(reason = event.reason, attempt, "the API server takes too long over an Event"),
        }
        tokio::time::sleep(RETRY).await;
    }
    drop_one(dropped, format_args!("{}: {ATTEMPTS} attempts to send it failed", event.reason));
}
