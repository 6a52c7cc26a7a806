//! Answering on the agent's socket.
//!
//! Owns the connections: a line in, an answer out. Root alone is answered, since everybody in the network namespace can
//! dial an abstract socket.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::geteuid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::{About, Agent, Facts, Head, Query, Report, Request};
use crate::config::ConfigStatus;
use crate::health::{AwaitedPorts, HealthState};
use crate::model::input::ServiceKey;
use crate::source::kube::ServerStatus;
use crate::source::manifest::Condition;

/// The longest request: room for some ten thousand names.
const REQUEST: u64 = 1 << 20;
/// How long the peer may take for its line, and for each page of the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is told of the agent without asking the controller.
#[derive(Debug)]
pub struct Conditions {
    /// Of the agent.
    pub health: watch::Receiver<HealthState>,
    /// Of the manifest folder.
    pub manifests: watch::Receiver<Condition>,
    /// Of the connection to the API server, where there is one.
    pub server: Option<watch::Receiver<ServerStatus>>,
    /// The ports that another program has.
    pub ports: AwaitedPorts,
    /// Of the configuration.
    pub config: watch::Receiver<ConfigStatus>,
}

struct Server {
    facts: Facts,
    conditions: Conditions,
    queries: mpsc::Sender<Query>,
}

/// Answers until the process ends.
///
/// # Errors
/// When the runtime cannot watch the socket.
pub async fn serve(
    listener: StdListener,
    facts: Facts,
    conditions: Conditions,
    queries: mpsc::Sender<Query>,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let server = Arc::new(Server { facts, conditions, queries });
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let server = Arc::clone(&server);
                tokio::spawn(async move {
                    if let Err(error) = server.answer(stream).await {
                        debug!(%error, "a question for the status was not answered");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "cannot take questions for the status; trying again");
                sleep(PATIENCE).await;
            }
        }
    }
}

impl Server {
    async fn answer(&self, mut stream: UnixStream) -> io::Result<()> {
        let uid = stream.peer_cred()?.uid();
        if uid != 0 && uid != geteuid().as_raw() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let (reading, mut writing) = stream.split();
        let mut line = String::new();
        let mut reading = BufReader::new(reading.take(REQUEST));
        timeout(PATIENCE, reading.read_line(&mut line)).await??;
        if line.is_empty() {
            // Somebody looks whether there is an agent.
            return Ok(());
        }
        let request: Request = serde_json::from_str(&line)?;
        if let Some(probe) = request.probe {
            // Without the controller, which may be in the midst of a long commit.
            let server = self.conditions.server.as_ref().map(|server| server.borrow().clone());
            let verdict = probe.judge(&self.conditions.health.borrow(), server.as_ref());
            let answer = serde_json::to_string(&verdict)? + "\n";
            return timeout(PATIENCE, writing.write_all(answer.as_bytes())).await?;
        }

        let keys = request.services.iter().filter_map(|name| name.split_once('/'));
        let keys = keys.map(|(namespace, name)| ServiceKey::new(namespace, name)).collect();
        let mut page = self.ask(About::These(keys)).await?;
        let known = |name: &String| page.services.iter().any(|known| known.plan.service.as_str() == name);
        let unknown = request.services.iter().filter(|name| !known(name)).cloned().collect();
        let mut text = serde_json::to_string(&Head { unknown })? + "\n";
        let Conditions { health, manifests, server, ports, config } = &self.conditions;
        let config = config.borrow().clone();
        let (health, manifests) = (*health.borrow(), manifests.borrow().clone());
        let server = server.as_ref().map(|server| server.borrow().clone());
        let agent = Agent {
            facts: &self.facts,
            config: &config,
            health: &health,
            manifests: &manifests,
            server: server.as_ref(),
            ports: &ports.list(),
            report: &page,
        };
        text += &if request.json {
            format!("{{\"agent\":{},\"services\":[", agent.to_json())
        } else {
            agent.to_string()
        };
        if request.all {
            page = self.ask(About::After(None)).await?;
        }
        let mut separator = "";
        loop {
            for known in &page.services {
                let refused = page.refused.get(&known.plan.service);
                if request.json {
                    text += separator;
                    text += &known.to_json(refused).to_string();
                    separator = ",\n";
                } else {
                    text += &known.to_text(refused);
                }
            }
            timeout(PATIENCE, writing.write_all(text.as_bytes())).await??;
            text.clear();
            let Some(last) = page.services.last().filter(|_| request.all) else { break };
            page = self.ask(About::After(Some(last.plan.service.clone()))).await?;
        }
        if request.json {
            writing.write_all(b"]}\n").await?;
        }
        Ok(())
    }

    async fn ask(&self, about: About) -> io::Result<Report> {
        let (answer, answered) = oneshot::channel();
        let gone = || io::Error::other("the controller has ended");
        self.queries.send(Query { about, answer }).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Mode;
    use crate::health::Moment;
    use crate::status::{Probe, Verdict};

    /// What the agent answers to a probe.
    async fn ask(at: &std::path::Path, probe: Probe) -> Option<String> {
        let mut stream = UnixStream::connect(at).await.unwrap();
        let request = Request { probe: Some(probe), ..Request::default() };
        stream.write_all((serde_json::to_string(&request).unwrap() + "\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let verdict: Verdict = serde_json::from_str(&answer).unwrap();
        verdict.failure
    }

    #[tokio::test]
    async fn probes_are_answered_without_the_controller() {
        let at = std::env::temp_dir().join(format!("kube-lane-probe-{}", std::process::id()));
        let listener = StdListener::bind(&at).unwrap();
        let facts = Facts { node: "node-a".into(), mode: Mode::Nftables, why: None };
        let (health, state) = watch::channel(HealthState::default());
        let (_manifests, condition) = watch::channel(Condition::default());
        // The controller takes no question: it is in the midst of a commit.
        let (queries, _asked) = mpsc::channel(1);
        let server = ServerStatus {
            address: "https://a".into(),
            failure: Some("refused".into()),
            ..ServerStatus::default()
        };
        let (_server, server) = watch::channel(server);
        let ports = AwaitedPorts::default();
        let (_config, config) = watch::channel(ConfigStatus::default());
        let conditions =
            Conditions { health: state, manifests: condition, server: Some(server), ports, config };
        tokio::spawn(serve(listener, facts, conditions, queries));
        let probes = [Probe::Startup, Probe::Live, Probe::Ready];
        let told = || futures::future::join_all(probes.map(|probe| ask(&at, probe)));

        let [startup, live, ready] = told().await.try_into().unwrap();
        assert_eq!((startup, live), (None, None), "it has started, and needs no restart");
        let ready = ready.unwrap();
        assert!(
            ready.contains("first sync") && ready.contains("https://a") && ready.contains("refused"),
            "{ready}"
        );
        // Load balancers have to avoid the node, which is nothing that is wrong with the agent.
        health.send_modify(|state| (state.synced, state.node_eligible) = (true, false));
        assert_eq!(told().await, [None, None, None]);
        health.send_modify(|state| state.pending_since = Some(Moment::now()));
        assert_eq!(told().await, [None, None, None], "a change that waits is not late yet");
        health.send_modify(|state| state.pending_since = Some(Moment::ago(61)));
        for failure in told().await {
            assert!(
                failure.as_ref().is_some_and(|failure| failure.contains("has waited for 61 s")),
                "{failure:?}"
            );
        }
        std::fs::remove_file(at).unwrap();
    }
}
