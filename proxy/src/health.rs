//! The small HTTP servers of kube-proxy: health (`/healthz`, `/livez`), metrics (`/metrics`, `/proxyMode`), and one for
//! each `healthCheckNodePort`.
//!
//! Owns listening and answering. Never decides what is healthy beyond the clock: the controller publishes a
//! [`HealthState`] and this reads it.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Router, routing::get};
use k8s_openapi::jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde::Serialize;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::config::{Config, Mode};
use crate::observability::events::{Events, Reason};
use crate::observability::metrics::KUBE_PROXY;
use crate::observability::socket::SocketLayer;

mod ports;
mod services;

pub use self::ports::{AwaitedPort, AwaitedPorts};
use self::ports::{Awaiting, RETRY};
pub use self::services::ServiceHealth;

/// A change that has waited this long to be committed makes the agent unhealthy: twice kube-proxy's `syncPeriod`.
const LATE: Duration = Duration::from_secs(60);
/// How long the process's last Event may hold up its end.
const FLUSH: Duration = Duration::from_secs(2);

/// What the controller knows of its own health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthState {
    /// Everything that the sources listed at the start has been programmed.
    pub synced: bool,
    /// When the last commit succeeded.
    pub last_updated: Option<Timestamp>,
    /// Since when a change has been waiting for a commit to succeed; `None`: nothing waits.
    pub pending_since: Option<Moment>,
    /// Whether load balancers should send traffic here: false where the own Node is unknown or about to be deleted.
    pub node_eligible: bool,
}

impl Default for HealthState {
    /// Nothing programmed yet, nothing waiting.
    fn default() -> Self {
        Self { synced: false, last_updated: None, pending_since: None, node_eligible: true }
    }
}

/// A moment on two clocks: the wall clock, to show it, and a monotonic clock, to measure from it. A wall clock that
/// somebody sets forward must not make a change late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// On the wall clock.
    pub time: Timestamp,
    instant: Instant,
}

impl Moment {
    /// This moment.
    pub fn now() -> Self {
        Self { time: Timestamp::now(), instant: Instant::now() }
    }

    #[cfg(test)]
    pub(crate) fn ago(seconds: u64) -> Self {
        let instant = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        Self { time: Timestamp::now(), instant }
    }
}

/// Why an agent fails a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unhealthy {
    /// A change waits for too long.
    #[error(
        "a change has waited for {} s to be committed to the kernel; at most {} s is healthy. `kube-lane status` and the \
         log tell why",
        .0.as_secs(), LATE.as_secs()
    )]
    Late(Duration),
    /// The agent has not done its first work yet.
    #[error(
        "the first sync is not complete: not all Services are listed and programmed yet. `kube-lane status` and the log \
         tell why"
    )]
    NotSynced,
}

impl HealthState {
    /// Whether the agent needs no restart, as `/livez` tells: no change is late.
    ///
    /// # Errors
    /// With the reason why it does.
    pub fn live(&self) -> Result<(), Unhealthy> {
        match self.pending_since.map(|since| since.instant.elapsed()) {
            Some(waited) if waited >= LATE => Err(Unhealthy::Late(waited)),
            _ => Ok(()),
        }
    }

    /// Whether Services work on this node: everything is programmed and no change is late. Unlike `/healthz` this
    /// leaves out whether load balancers should send traffic to the node, which says nothing about the agent.
    ///
    /// # Errors
    /// With the reason why they may not.
    pub fn ready(&self) -> Result<(), Unhealthy> {
        if !self.synced {
            return Err(Unhealthy::NotSynced);
        }
        self.live()
    }
}

/// An address that cannot be bound, with `bindAddressHardFail`.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve {what} on {address}: {source}; choose another address or unset bindAddressHardFail")]
pub struct BindError {
    what: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// The two servers, ready to run.
#[derive(Debug)]
pub struct Servers {
    healthz: Option<SocketAddr>,
    metrics: Option<SocketAddr>,
    hard_fail: bool,
    layer: SocketLayer,
    requests: Requests,
    ports: AwaitedPorts,
}

impl Servers {
    /// Prepares the servers and registers their own counters. Addresses that another program has are listed in `ports`;
    /// `layer` tells which mode runs.
    pub fn new(config: &Config, registry: &mut Registry, ports: AwaitedPorts, layer: SocketLayer) -> Self {
        Self {
            healthz: config.healthz_address,
            metrics: config.metrics_address,
            hard_fail: config.bind_address_hard_fail,
            layer,
            requests: Requests::register(registry),
            ports,
        }
    }

    /// Serves for ever. An address that cannot be bound is reported once and tried again.
    ///
    /// # Errors
    /// Only with `bindAddressHardFail`, when an address cannot be bound.
    pub async fn run(
        self,
        health: watch::Receiver<HealthState>,
        registry: Arc<Registry>,
        events: Events,
    ) -> Result<Infallible, BindError> {
        let trouble = |reason| Trouble {
            hard_fail: self.hard_fail,
            events: events.clone(),
            reason,
            ports: self.ports.clone(),
        };
        let healthz = trouble(Reason::FailedToStartProxierHealthcheck);
        let healthz = serve("health", self.healthz, healthz, health_routes(health, self.requests));
        let metrics = trouble(Reason::FailedToStartMetricServer);
        let metrics = serve("metrics", self.metrics, metrics, metrics_routes(self.layer, registry));
        let (never, _) = tokio::try_join!(healthz, metrics)?;
        Ok(never)
    }
}

/// What an address that cannot be bound leads to.
struct Trouble {
    hard_fail: bool,
    events: Events,
    reason: Reason,
    ports: AwaitedPorts,
}

async fn serve(
    what: &'static str,
    address: Option<SocketAddr>,
    trouble: Trouble,
    routes: Router,
) -> Result<Infallible, BindError> {
    let Some(address) = address else { return std::future::pending().await };
    let mut reported: Option<(io::ErrorKind, Awaiting)> = None;
    loop {
        let failure = match TcpListener::bind(address).await {
            Ok(listener) => {
                let again = if reported.take().is_some() { ": the address is free now" } else { "" };
                info!(%address, "serving {what}{again}");
                axum::serve(listener, routes.clone()).await.err()
            }
            Err(source) if trouble.hard_fail => {
                let error = BindError { what, address, source };
                trouble.events.node(trouble.reason, error.to_string());
                trouble.events.flush(FLUSH).await;
                return Err(error);
            }
            Err(source) => Some(source),
        };
        if let Some(failure) = failure
            && reported.as_ref().map(|(kind, _)| *kind) != Some(failure.kind())
        {
            let hint = if failure.kind() == io::ErrorKind::AddrInUse {
                "another program has the port: kube-proxy, as long as it runs on this node?"
            } else {
                "is this an address of the node?"
            };
            warn!(
                %address,
                error = %failure,
                hint,
                "cannot serve {what}; trying again every {} s. `kube-lane probe` needs no port",
                RETRY.as_secs()
            );
            trouble.events.node(trouble.reason, format!("cannot serve {what} on {address}: {failure}"));
            drop(reported.take());
            reported = Some((failure.kind(), trouble.ports.add(address, what, &failure)));
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Answers counted by status code.
#[derive(Clone, Debug, Default)]
struct Requests {
    healthz: Family<Code, Counter>,
    livez: Family<Code, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: u16,
}

impl Requests {
    fn register(registry: &mut Registry) -> Self {
        let requests = Self::default();
        let registry = registry.sub_registry_with_prefix(KUBE_PROXY);
        registry.register("proxy_healthz", "Answers of /healthz by status code", requests.healthz.clone());
        registry.register("proxy_livez", "Answers of /livez by status code", requests.livez.clone());
        requests
    }
}

#[derive(Clone)]
struct Health {
    state: watch::Receiver<HealthState>,
    requests: Requests,
}

fn health_routes(state: watch::Receiver<HealthState>, requests: Requests) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(livez))
        .with_state(Health { state, requests })
}

/// Ready for traffic: everything programmed, nothing late, and the node is there to stay.
async fn healthz(State(health): State<Health>) -> Response {
    let state = *health.state.borrow();
    let now = Timestamp::now();
    let healthy = state.ready().is_ok();
    let answer = Answer::new(&state, now, healthy, healthy && state.node_eligible, Some(state.node_eligible));
    answer.counted(&health.requests.healthz)
}

/// Not in need of a restart: nothing late.
async fn livez(State(health): State<Health>) -> Response {
    let state = *health.state.borrow();
    let now = Timestamp::now();
    let healthy = state.live().is_ok();
    Answer::new(&state, now, healthy, healthy, None).counted(&health.requests.livez)
}

/// kube-proxy's JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    #[serde(skip)]
    code: StatusCode,
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "serde_json::Value::is_null")]
    status: serde_json::Value,
}

impl Answer {
    fn new(
        state: &HealthState,
        now: Timestamp,
        healthy: bool,
        success: bool,
        node_eligible: Option<bool>,
    ) -> Self {
        let code = if success { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        // Go's zero time, for what has never happened. A good answer is as fresh as the question.
        let time = |at: Option<Timestamp>| at.map_or("0001-01-01T00:00:00Z".to_owned(), |at| at.to_string());
        let updated = if success { Some(now) } else { state.last_updated };
        // One commit programs both families.
        let family = json!({ "lastUpdated": time(state.last_updated), "healthy": healthy });
        let status = match state.last_updated {
            Some(_) => json!({ "IPv4": family, "IPv6": family }),
            None => serde_json::Value::Null,
        };
        Self {
            code,
            last_updated: time(updated),
            current_time: time(Some(now)),
            node_eligible,
            healthy,
            status,
        }
    }

    fn counted(self, requests: &Family<Code, Counter>) -> Response {
        requests.get_or_create(&Code { code: self.code.as_u16() }).inc();
        let headers = [(header::CONTENT_TYPE, "application/json"), NOSNIFF];
        (self.code, headers, json!(self).to_string()).into_response()
    }
}

const NOSNIFF: (HeaderName, &str) = (header::X_CONTENT_TYPE_OPTIONS, "nosniff");

/// `/proxyMode` tells which mode runs at this moment: `ebpf` while the socket layer is in place.
fn metrics_routes(layer: SocketLayer, registry: Arc<Registry>) -> Router {
    let mode = move || if layer.is_in_place() { Mode::Ebpf } else { Mode::Nftables };
    Router::new()
        .route("/healthz", get(async || ([NOSNIFF], "ok")))
        .route("/proxyMode", get(async move || ([NOSNIFF], mode().as_str())))
        .route("/metrics", get(metrics))
        .with_state(registry)
}

async fn metrics(State(registry): State<Arc<Registry>>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => {
            let openmetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, openmetrics)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::dataplane::InFront;
    use crate::observability::metrics;

    /// The status code, the headers and the body that a server answers with.
    pub(super) async fn get(address: SocketAddr, path: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_lowercase(), body.to_owned())
    }

    async fn json(address: SocketAddr, path: &str) -> (u16, serde_json::Value) {
        let (code, head, body) = get(address, path).await;
        assert!(head.contains("content-type: application/json"), "{head}");
        assert!(head.contains("x-content-type-options: nosniff"), "{head}");
        (code, serde_json::from_str(&body).unwrap())
    }

    async fn listen(routes: Router) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, routes).await });
        address
    }

    #[tokio::test]
    async fn health_follows_the_state() {
        let (state, receiver) = watch::channel(HealthState::default());
        let mut registry = metrics::registry("nftables");
        let requests = Requests::register(&mut registry);
        let address = listen(health_routes(receiver, requests)).await;

        let (code, body) = json(address, "/healthz").await;
        assert_eq!((code, &body["healthy"]), (503, &json!(false)), "nothing is programmed yet");
        assert_eq!(body["lastUpdated"], "0001-01-01T00:00:00Z");
        assert_eq!(json(address, "/livez").await.0, 200, "which is no reason to restart");

        let now = Timestamp::now();
        let synced = HealthState { synced: true, last_updated: Some(now), ..HealthState::default() };
        state.send_replace(synced);
        let (code, body) = json(address, "/healthz").await;
        assert_eq!((code, &body["healthy"], &body["nodeEligible"]), (200, &json!(true), &json!(true)));
        assert_eq!(body["status"]["IPv6"]["lastUpdated"], json!(now.to_string()));
        assert_eq!(body["lastUpdated"], body["currentTime"]);
        assert_eq!(json(address, "/livez").await.1.get("nodeEligible"), None);

        state.send_replace(HealthState { node_eligible: false, ..synced });
        let (code, body) = json(address, "/healthz").await;
        assert_eq!((code, &body["healthy"]), (503, &json!(true)), "healthy, but not to be sent traffic");
        assert_eq!(json(address, "/livez").await.0, 200);

        for (seconds, code) in [(59, 200), (61, 503)] {
            let pending_since = Some(Moment::ago(seconds));
            state.send_replace(HealthState { pending_since, ..synced });
            assert_eq!(json(address, "/livez").await.0, code, "waiting for {seconds} s");
            assert_eq!(json(address, "/healthz").await.0, code, "waiting for {seconds} s");
        }
        assert_eq!(get(address, "/metrics").await.0, 404);
    }

    #[tokio::test]
    async fn metrics_and_mode() {
        let mut registry = metrics::registry("nftables");
        let requests = Requests::register(&mut registry);
        requests.livez.get_or_create(&Code { code: 200 }).inc();
        let layer = SocketLayer::register(&mut registry, true);
        let address = listen(metrics_routes(layer.clone(), Arc::new(registry))).await;
        for (in_place, mode) in [(false, "nftables"), (true, "ebpf"), (false, "nftables")] {
            layer.tell(InFront { in_place, left_over: false, shared: false, troubles: 0 });
            assert_eq!(get(address, "/proxyMode").await.2, mode, "what runs, not what was asked for");
        }
        assert_eq!(get(address, "/healthz").await.2, "ok");
        let (code, _, body) = get(address, "/metrics").await;
        assert_eq!(code, 200);
        assert!(body.contains("kubeproxy_proxy_livez_total{code=\"200\"} 1\n"), "{body}");
    }

    fn trouble(hard_fail: bool) -> Trouble {
        let (reason, ports) = (Reason::FailedToStartProxierHealthcheck, AwaitedPorts::default());
        Trouble { hard_fail, events: Events::off(), reason, ports }
    }

    #[tokio::test]
    async fn an_address_in_use_is_fatal_only_where_asked_for() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let error =
            serve("health", Some(address), trouble(true), Router::new()).await.unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("bindAddressHardFail"), "{error}");

        let trying = serve("health", Some(address), trouble(false), Router::new());
        assert!(tokio::time::timeout(Duration::from_millis(50), trying).await.is_err(), "still trying");
        let off = serve("health", None, trouble(true), Router::new());
        assert!(tokio::time::timeout(Duration::from_millis(50), off).await.is_err(), "off is no failure");
    }

    #[tokio::test]
    async fn an_address_is_taken_over_when_it_comes_free() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let trouble = trouble(false);
        let ports = trouble.ports.clone();
        let mut registry = metrics::registry("nftables");
        let layer = SocketLayer::register(&mut registry, false);
        let routes = metrics_routes(layer, Arc::new(registry));
        let server = tokio::spawn(serve("metrics", Some(address), trouble, routes));
        while ports.list().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let [port] = &ports.list()[..] else { panic!("{:?}", ports.list()) };
        assert_eq!((port.address, port.server.as_str()), (address, "metrics"));
        drop(taken);
        while !ports.list().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(get(address, "/proxyMode").await.2, "nftables");
        server.abort();
    }
}
