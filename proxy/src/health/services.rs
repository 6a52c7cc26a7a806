//! What load balancers ask a node about one Service: an HTTP server on each `healthCheckNodePort`.
//!
//! Owns these servers, as kube-proxy has them: one for each port and address that NodePorts answer on. They come, move
//! and go with what is committed. Never decides how many endpoints there are: the plans say so.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use super::ports::RETRY;
use super::{AwaitedPorts, HealthState, NOSNIFF};
use crate::dataplane::{Batch, Follower, Outcome};
use crate::model::input::{Family, ServiceKey};
use crate::model::plan::HealthCheck;
use crate::observability::events::{Events, Reason};

/// Connections that wait to be accepted, as many as tokio's own listeners keep.
const BACKLOG: u32 = 1024;
/// How many endpoints of the Service the node has: load balancers that know it share their traffic by it.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What the servers answer, as far as it is committed.
#[derive(Debug, Default)]
struct Checks {
    services: BTreeMap<ServiceKey, HealthCheck>,
    /// Where NodePorts answer.
    addresses: Vec<IpAddr>,
}

impl Checks {
    /// Where a server has to be, and for which Service. Two Services that ask for one port are both here.
    fn servers(&self) -> Vec<Server> {
        let mut servers = Vec::new();
        for (service, check) in &self.services {
            let has = |address: &&IpAddr| endpoints(check, Family::of(**address)).is_some();
            let at = self.addresses.iter().filter(has).map(|address| SocketAddr::new(*address, check.port));
            servers.extend(at.map(|at| (at, service.clone())));
        }
        servers
    }
}

type Server = (SocketAddr, ServiceKey);

fn endpoints(check: &HealthCheck, family: Family) -> Option<u32> {
    match family {
        Family::V4 => check.v4_endpoints,
        Family::V6 => check.v6_endpoints,
    }
}

/// Follows commits; its servers follow it. Dropping it ends them.
#[derive(Debug)]
pub struct ServiceHealth(watch::Sender<Checks>);

impl ServiceHealth {
    /// Starts without any server. They are where NodePorts answer. A port that cannot be bound becomes an Event, and is
    /// tried again.
    pub fn spawn(health: watch::Receiver<HealthState>, events: Events, ports: AwaitedPorts) -> Self {
        let (sender, checks) = watch::channel(Checks::default());
        tokio::spawn(keep(Context { checks, health, events, ports }));
        Self(sender)
    }
}

impl Follower for ServiceHealth {
    fn committed(&mut self, batch: &Batch, outcome: &Outcome) {
        self.0.send_if_modified(|checks| {
            let mut modified = false;
            for (key, plan) in batch.programmed(outcome) {
                let check = plan.as_ref().and_then(|plan| plan.health_check.as_deref().copied());
                let before = match check {
                    Some(check) => checks.services.insert(key.clone(), check),
                    None => checks.services.remove(key),
                };
                modified |= before != check;
            }
            if let Some(node) = &batch.node
                && checks.addresses != node.nodeport_addresses
            {
                checks.addresses.clone_from(&node.nodeport_addresses);
                modified = true;
            }
            modified
        });
    }
}

#[derive(Clone)]
struct Context {
    checks: watch::Receiver<Checks>,
    health: watch::Receiver<HealthState>,
    events: Events,
    ports: AwaitedPorts,
}

/// Keeps the servers that there should be.
async fn keep(mut context: Context) {
    let mut running: BTreeMap<Server, JoinHandle<()>> = BTreeMap::new();
    loop {
        let wanted = context.checks.borrow_and_update().servers();
        let stale: Vec<_> = running.extract_if(.., |server, _| !wanted.contains(server)).collect();
        for (_, server) in &stale {
            server.abort();
        }
        for (_, server) in stale {
            // Its port may be wanted by the next: it is free once the task is gone, which is an error by design.
            let _ = server.await;
        }
        for server in wanted {
            let start = || tokio::spawn(serve(server.0, server.1.clone(), context.clone()));
            running.entry(server.clone()).or_insert_with(start);
        }
        if context.checks.changed().await.is_err() {
            running.values().for_each(JoinHandle::abort);
            return;
        }
    }
}

/// Serves for ever; a port that cannot be bound is reported once and tried again.
async fn serve(at: SocketAddr, service: ServiceKey, context: Context) {
    let mut awaiting = None;
    loop {
        let failure = match listen(at) {
            Ok(listener) => {
                if awaiting.take().is_some() {
                    info!(address = %at, %service, "serving the health check of a Service: the address is free now");
                } else {
                    debug!(address = %at, %service, "serving the health check of a Service");
                }
                let family = Family::of(at.ip());
                let state = (context.clone(), service.clone(), family);
                axum::serve(listener, Router::new().fallback(answer).with_state(state)).await.err()
            }
            Err(error) => Some(error),
        };
        if let Some(error) = failure.filter(|_| awaiting.is_none()) {
            warn!(
                address = %at, %service, %error,
                "cannot serve the health check of a Service: another program has the port, probably kube-proxy; trying again \
                 every {} s",
                RETRY.as_secs()
            );
            awaiting = Some(context.ports.add(at, &format!("the health check of Service {service}"), &error));
            let note = format!("failed to start healthcheck {service} on {at}: {error}");
            context.events.service(&service, Reason::FailedToStartServiceHealthcheck, note);
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = match at {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => {
            let socket = TcpSocket::new_v6()?;
            // The IPv4 server of the same port has a socket of its own.
            setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
            socket
        }
    };
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

/// kube-proxy's answer, whatever the path.
async fn answer(State((context, service, family)): State<(Context, ServiceKey, Family)>) -> Response {
    let check = context.checks.borrow().services.get(&service).copied();
    let local = check.and_then(|check| endpoints(&check, family)).unwrap_or_default();
    // Eligible or not, which the node's own health says: connections of this Service may still come.
    let healthy = context.health.borrow().live().is_ok();
    let code = if local > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({
        "service": { "namespace": service.namespace(), "name": service.name() },
        "localEndpoints": local,
        "serviceProxyHealthy": healthy,
    });
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (NOSNIFF.0, NOSNIFF.1.to_owned()),
        (WEIGHT, local.to_string()),
        // A connection must not outlive its server.
        (header::CONNECTION, "close".to_owned()),
    ];
    (code, headers, body.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::health::Moment;
    use crate::health::tests::get;
    use crate::model::plan::{NodePlan, Plan};

    fn plan(name: &str, port: u16, v4: Option<u32>, v6: Option<u32>) -> (ServiceKey, Option<Arc<Plan>>) {
        let service = ServiceKey::new("ns", name);
        let health_check = Some(Box::new(HealthCheck { port, v4_endpoints: v4, v6_endpoints: v6 }));
        let plan =
            Plan { service: service.clone(), ports: Box::default(), health_check, warnings: Box::default() };
        (service, Some(Arc::new(plan)))
    }

    fn batch(services: Vec<(ServiceKey, Option<Arc<Plan>>)>) -> Batch {
        Batch { services, ..Batch::default() }
    }

    /// A port that nobody has on any address.
    async fn free_port() -> u16 {
        let listener = TcpListener::bind("[::]:0").await.unwrap();
        listener.local_addr().unwrap().port()
    }

    /// The answer once there is one, or nobody to answer: its status code, headers and body.
    async fn ask(at: SocketAddr, wanted: Option<u16>) -> (String, serde_json::Value) {
        for _ in 0..500 {
            let answer = match tokio::net::TcpStream::connect(at).await {
                Ok(_) => Some(get(at, "/any/path").await),
                Err(_) => None,
            };
            if answer.as_ref().map(|(code, ..)| *code) == wanted {
                let (_, head, body) = answer.unwrap_or_default();
                return (head, serde_json::from_str(&body).unwrap_or_default());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{at} never said {wanted:?}");
    }

    #[tokio::test]
    async fn servers_follow_what_is_committed() {
        let (state, health) = watch::channel(HealthState::default());
        let mut services = ServiceHealth::spawn(health, Events::off(), AwaitedPorts::default());
        let (port, other) = (free_port().await, free_port().await);
        let [v4, v6] = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
        let node = NodePlan { nodeport_addresses: vec![v4, v6], ..NodePlan::default() };

        let first = Batch { node: Some(node), ..batch(vec![plan("web", port, Some(2), Some(0))]) };
        services.committed(&first, &Outcome::default());
        let (head, body) = ask((v4, port).into(), Some(200)).await;
        for header in [
            "content-type: application/json",
            "nosniff",
            "x-load-balancing-endpoint-weight: 2",
            "connection: close",
        ] {
            assert!(head.contains(header), "{head}");
        }
        let service = json!({"namespace": "ns", "name": "web"});
        assert_eq!(body, json!({"service": service, "localEndpoints": 2, "serviceProxyHealthy": true}));
        ask((v6, port).into(), Some(503)).await;

        state.send_modify(|state| state.pending_since = Some(Moment::ago(61)));
        let (_, body) = ask((v4, port).into(), Some(503)).await;
        assert_eq!(body["serviceProxyHealthy"], json!(false));
        state.send_modify(|state| (state.pending_since, state.node_eligible) = (None, false));
        ask((v4, port).into(), Some(200)).await;

        let refused =
            Outcome { failed: vec![(ServiceKey::new("ns", "web"), String::new())], ..Outcome::default() };
        services.committed(&batch(vec![plan("web", other, Some(1), None)]), &refused);
        ask((v4, port).into(), Some(200)).await;
        // Another port, no IPv6 any more; what is left goes to the next Service at once.
        let services_now = vec![plan("next", port, None, Some(1)), plan("web", other, Some(1), None)];
        services.committed(&batch(services_now), &Outcome::default());
        ask((v4, other).into(), Some(200)).await;
        let (_, body) = ask((v6, port).into(), Some(200)).await;
        assert_eq!(body["service"]["name"], "next");
        ask((v4, port).into(), None).await;
        ask((v6, other).into(), None).await;
        services.committed(&batch(vec![(ServiceKey::new("ns", "web"), None)]), &Outcome::default());
        ask((v4, other).into(), None).await;
    }

    #[tokio::test]
    async fn servers_are_where_node_ports_are_and_wait_for_their_port() {
        let (_state, health) = watch::channel(HealthState::default());
        let ports = AwaitedPorts::default();
        let mut services = ServiceHealth::spawn(health, Events::off(), ports.clone());
        let port = free_port().await;
        let [one, two] = ["127.0.0.1", "127.0.0.2"].map(|text| text.parse::<IpAddr>().unwrap());
        let node = |addresses: &[IpAddr]| {
            Some(NodePlan { nodeport_addresses: addresses.to_vec(), ..NodePlan::default() })
        };
        services.committed(&batch(vec![plan("web", port, Some(1), None)]), &Outcome::default());
        services.committed(&Batch { node: node(&[one]), ..Batch::default() }, &Outcome::default());
        ask((one, port).into(), Some(200)).await;
        ask((two, port).into(), None).await;
        services.committed(&Batch { node: node(&[two]), ..Batch::default() }, &Outcome::default());
        ask((two, port).into(), Some(200)).await;
        ask((one, port).into(), None).await;

        // Another program has the port, as kube-proxy may.
        let taken = TcpListener::bind((one, port)).await.unwrap();
        services.committed(&Batch { node: node(&[one]), ..Batch::default() }, &Outcome::default());
        while ports.list().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(ports.list()[0].server, "the health check of Service ns/web");
        drop(taken);
        ask((one, port).into(), Some(200)).await;
        assert!(ports.list().is_empty(), "{:?}", ports.list());
        // What is no longer wanted is not waited for either.
        let taken = TcpListener::bind((two, port)).await.unwrap();
        services.committed(&Batch { node: node(&[two]), ..Batch::default() }, &Outcome::default());
        while ports.list().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        services.committed(&Batch { node: node(&[]), ..Batch::default() }, &Outcome::default());
        while !ports.list().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(taken);
    }
}
