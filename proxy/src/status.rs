//! What the agent says of itself when it is asked: `kube-lane status`.
//!
//! Owns the questions to the controller and the forms of the answers. The controller hands out what it has, a page of
//! Services at a time, so that a question never holds it up; everything else happens beside it. No decision reads it.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::config::{ConfigStatus, Mode, Setting};
use crate::dataplane::Inspection;
use crate::health::{AwaitedPort, HealthState, Unhealthy};
use crate::model::input::ServiceKey;
use crate::model::plan::{NodePlan, Plan};
use crate::model::render::Annotated;
use crate::source::Problem;
use crate::source::kube::ServerStatus;
use crate::source::manifest::Condition;
use crate::version::{COMMIT, VERSION};

mod server;

pub use self::server::{Conditions, serve};

/// How many Services the controller hands out at a time.
pub const PAGE: usize = 256;
/// How many problems of manifests, and how many warnings about Services, are told in the text; the rest is in the JSON, and
/// in the log.
pub const NAMED: usize = 20;

/// A question to the controller.
#[derive(Debug)]
pub struct Query {
    /// Of which Services.
    pub about: About,
    /// Who is told.
    pub answer: oneshot::Sender<Report>,
}

/// Of which Services to tell. Of those that exist, in the order of their keys.
#[derive(Clone, Debug)]
pub enum About {
    /// Of these.
    These(Vec<ServiceKey>),
    /// Of the first [`PAGE`] that come after this one, or of all.
    After(Option<ServiceKey>),
}

/// What the controller knows.
#[derive(Debug, Default)]
pub struct Report {
    /// How many Services there are.
    pub count: usize,
    /// The Services that were asked for.
    pub services: Vec<Known>,
    /// What belongs to the node; `None` until a source has synced.
    pub node: Option<NodePlan>,
    /// Services that the kernel refuses, and its words.
    pub refused: BTreeMap<ServiceKey, String>,
    /// The first [`NAMED`] warnings about Services.
    pub warnings: Vec<(ServiceKey, String)>,
    /// How many there are.
    pub warning_count: usize,
    /// What is wrong with a layer in front of nftables.
    pub troubles: Vec<String>,
    /// The cgroups that such a layer leaves alone, and whether each exists.
    pub left_alone: Vec<(PathBuf, bool)>,
}

/// What is known of one Service.
#[derive(Debug)]
pub struct Known {
    /// Its plan.
    pub plan: Arc<Plan>,
    /// What the dataplane adds.
    pub inspection: Inspection,
}

/// What does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The own Node's name.
    pub node: String,
    /// What runs.
    pub mode: Mode,
    /// Why that is less than what was asked for.
    pub why: Option<String>,
}

/// What `kube-lane status` and `kube-lane probe` ask, in one line of JSON.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Request {
    /// `namespace/name` of the Services to tell of.
    pub services: Vec<String>,
    /// Tell of every Service.
    pub all: bool,
    /// Answer in JSON, not in text.
    pub json: bool,
    /// Answer this probe with a [`Verdict`], and nothing else.
    pub probe: Option<Probe>,
}

/// A probe of the kubelet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// The agent has started: as `live`
    Startup,
    /// The agent needs no restart: it answers, and no change has waited for a minute or longer to be committed
    Live,
    /// Services work on this node: all are programmed, and no change has waited for a minute or longer
    Ready,
}

/// The answer to a probe, in one line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Why the probe fails; `None`: it succeeds.
    pub failure: Option<String>,
}

impl Probe {
    fn judge(self, health: &HealthState, server: Option<&ServerStatus>) -> Verdict {
        let result = match self {
            Self::Startup | Self::Live => health.live(),
            Self::Ready => health.ready(),
        };
        let Err(unhealthy) = result else { return Verdict { failure: None } };
        let mut failure = unhealthy.to_string();
        if unhealthy == Unhealthy::NotSynced
            && let Some(server) = server
            && let Some(why) = &server.failure
        {
            failure += &format!(". The API server {} cannot be reached: {why}", server.address);
        }
        Verdict { failure: Some(failure) }
    }
}

/// The first line of the answer, in JSON; the rest is to be printed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Head {
    /// The Services asked for that the agent does not know.
    pub unknown: Vec<String>,
}

/// The agent as a whole.
#[derive(Clone, Copy, Debug)]
struct Agent<'a> {
    facts: &'a Facts,
    config: &'a ConfigStatus,
    health: &'a HealthState,
    manifests: &'a Condition,
    /// `None`: there is no API server.
    server: Option<&'a ServerStatus>,
    ports: &'a [AwaitedPort],
    report: &'a Report,
}

impl Agent<'_> {
    fn to_json(self) -> Value {
        let Self { facts, config, health, manifests, server, ports, report } = self;
        let problem = |is_read: bool| {
            move |problem: &Problem| {
                let place = problem.place.as_ref();
                let line = place.map(|place| place.line).filter(|line| *line > 0);
                let file = place.map(|place| place.file.as_path());
                json!({ "file": file, "line": line, "isRead": is_read, "words": problem.to_string() })
            }
        };
        let unread = manifests.unread.iter().map(problem(false));
        let problems: Vec<_> = unread.chain(manifests.odd.iter().map(problem(true))).collect();
        let refused = |(service, words)| json!({ "service": service, "words": words });
        let warning = |(service, words): &(ServiceKey, String)| json!({ "service": service, "words": words });
        let left_alone = |(cgroup, exists): &(PathBuf, bool)| json!({ "cgroup": cgroup, "exists": exists });
        json!({
            "version": VERSION,
            "commit": COMMIT,
            "nodeName": facts.node,
            "mode": facts.mode.as_str(),
            "whyNotEbpf": facts.why,
            "synced": health.synced,
            "lastUpdated": health.last_updated.map(|time| time.to_string()),
            "pendingSince": health.pending_since.map(|since| since.time.to_string()),
            "services": report.count,
            "refused": report.refused.iter().map(refused).collect::<Vec<_>>(),
            "warnings": report.warnings.iter().map(warning).collect::<Vec<_>>(),
            "warningCount": report.warning_count,
            "troubles": report.troubles,
            "apiServer": server,
            "awaitedPorts": ports,
            "manifests": { "complete": manifests.complete, "problems": problems },
            "leftAlone": report.left_alone.iter().map(left_alone).collect::<Vec<_>>(),
            "settings": config.settings.iter().map(Setting::to_json).collect::<Vec<_>>(),
            "configuration": {
                "baseNotUsed": config.base_problem,
                "filesNotInForce": config.pending_problem,
            },
            "node": report.node,
        })
    }
}

impl Display for Agent<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { facts, config, health, manifests, server, ports, report } = self;
        writeln!(f, "kube-lane v{VERSION}, node {}, mode {}", facts.node, facts.mode.as_str())?;
        if let Some(why) = &facts.why {
            writeln!(f, "  not ebpf: {why}")?;
        }
        if let Some(why) = &config.pending_problem {
            writeln!(f, "  the configuration on disk is not in force: {why}")?;
        }
        if let Some(why) = &config.base_problem {
            writeln!(f, "  --config-base is not used: {why}")?;
        }
        let synced = match (health.synced, health.pending_since) {
            (true, None) => "all programmed",
            (true, Some(_)) => "not all as they should be",
            (false, _) => "not all listed or programmed yet",
        };
        writeln!(f, "  {} Services, {synced}", report.count)?;
        if let Some(time) = health.last_updated {
            writeln!(f, "  last commit {time:.0}")?;
        }
        if let Some(since) = health.pending_since {
            writeln!(f, "  a change waits since {:.0}", since.time)?;
        }
        if !manifests.complete {
            writeln!(
                f,
                "  not all manifests were read yet: what an earlier run left stays, and /healthz says 503"
            )?;
        }
        let problems = manifests.unread.iter().chain(&manifests.odd);
        problems.clone().take(NAMED).try_for_each(|problem| writeln!(f, "  {problem}"))?;
        if let Some(more @ 1..) = problems.count().checked_sub(NAMED) {
            writeln!(f, "  and {more} more that is wrong with manifests: the log names it")?;
        }
        report.troubles.iter().try_for_each(|trouble| writeln!(f, "  {trouble}"))?;
        ports.iter().try_for_each(|port| writeln!(f, "  {port}"))?;
        for (cgroup, exists) in &report.left_alone {
            let absent = if *exists { "" } else { " (not there)" };
            writeln!(f, "  left alone at the socket: {}{absent}", cgroup.display())?;
        }
        for (service, words) in &report.refused {
            writeln!(f, "  the kernel refuses {service}: {words}")?;
        }
        for (service, words) in &report.warnings {
            writeln!(f, "  {service}: {words}")?;
        }
        if let Some(more @ 1..) = report.warning_count.checked_sub(report.warnings.len()) {
            writeln!(
                f,
                "  and {more} more warnings about Services: `kube-lane status --all` and the log tell them"
            )?;
        }
        if let Some(server) = server {
            write_server(f, server)?;
        }
        if !config.settings.is_empty() {
            writeln!(f, "settings")?;
            config.settings.iter().try_for_each(|setting| writeln!(f, "  {setting}"))?;
        }
        report.node.as_ref().map_or(Ok(()), |node| node.fmt(f))
    }
}

/// How the API server is reached.
fn write_server(f: &mut Formatter<'_>, server: &ServerStatus) -> fmt::Result {
    writeln!(f, "api server\n  {} from {}", server.address, server.source)?;
    match server.in_use {
        Some(address) => {
            let service = if server.through_service { ", an address of a Service" } else { "" };
            let fallback = if server.fallback { ", since the preferred address does not answer" } else { "" };
            writeln!(f, "  in use: {address}{service}{fallback}")?;
        }
        None => writeln!(f, "  in use: none so far")?,
    }
    if let Some(proxy) = &server.proxy {
        writeln!(f, "  by way of proxy {proxy}")?;
    }
    if let Some(failure) = &server.failure {
        writeln!(f, "  the last connection failed: {failure}")?;
    }
    if let Some(trouble) = &server.trouble {
        writeln!(f, "  cannot be watched: {trouble}")?;
    }
    if !server.endpoints.is_empty() {
        let endpoints: Vec<_> = server.endpoints.iter().map(ToString::to_string).collect();
        writeln!(f, "  known endpoints: {}", endpoints.join(", "))?;
    }
    Ok(())
}

impl Known {
    fn to_json(&self, refused: Option<&String>) -> Value {
        let mut value = self.inspection.annotate(&self.plan);
        if let Some(words) = refused {
            value["refused"] = words.as_str().into();
        }
        value
    }

    fn to_text(&self, refused: Option<&String>) -> String {
        let refused = refused.map(|words| format!("  the kernel refuses this, what it had stays: {words}\n"));
        Annotated(&self.plan, &self.inspection).to_string() + &refused.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Source;
    use crate::source::Place;

    #[test]
    fn the_agent_is_told_as_text_and_as_json() {
        let why = Some("no eBPF".to_owned());
        let facts = Facts { node: "node-a".into(), mode: Mode::Nftables, why };
        let refused = BTreeMap::from([(ServiceKey::new("a", "b"), "No space".to_owned())]);
        let report = Report {
            count: 2,
            node: Some(NodePlan::default()),
            refused,
            warnings: vec![(ServiceKey::new("a", "c"), "cut".to_owned())],
            warning_count: 3,
            troubles: vec!["a map is full".into()],
            left_alone: vec![("/cg/a".into(), true), ("/cg/b".into(), false)],
            ..Report::default()
        };
        let health = HealthState::default();
        let place = Place { file: Arc::new("/m/web.yaml".into()), line: 7, column: 0 };
        let (object, field, value) = (None, String::new(), None);
        let problem = Problem { place: Some(place), object, field, value, remedy: "no YAML".into() };
        let manifests =
            Condition { complete: false, unread: vec![problem.clone()], odd: vec![problem; NAMED] };
        let setting = Setting {
            field: "clusterCIDR".into(),
            value: "10.0.0.0/8".into(),
            source: Source::Base("/b".into()),
        };
        let config = ConfigStatus {
            settings: vec![setting],
            base_problem: Some("no YAML".into()),
            pending_problem: Some("gone".into()),
        };
        let server = ServerStatus {
            address: "https://10.96.0.1/".into(),
            source: "Service default/kubernetes".into(),
            in_use: Some("10.96.0.1:443".parse().unwrap()),
            fallback: true,
            through_service: true,
            endpoints: vec!["192.0.2.1:6443".parse().unwrap()],
            trouble: Some("nodes: words (403) (a hint)".into()),
            ..ServerStatus::default()
        };
        let ports = [AwaitedPort {
            address: "[::]:10256".parse().unwrap(),
            server: "health".into(),
            error: "in use".into(),
        }];
        let agent = Agent {
            facts: &facts,
            config: &config,
            health: &health,
            manifests: &manifests,
            server: Some(&server),
            ports: &ports,
            report: &report,
        };
        let problems = "  /m/web.yaml:7: no YAML\n".repeat(NAMED);
        assert_eq!(
            agent.to_string(),
            concat!("kube-lane v", env!("CARGO_PKG_VERSION"), ", node node-a, mode nftables\n").to_owned()
                + "  not ebpf: no eBPF\n  the configuration on disk is not in force: gone\n  --config-base is not used: no YAML\n  2 Services, not all listed or programmed yet\n  not all manifests were read yet: what \
                   an earlier run left stays, and /healthz says 503\n"
                + &problems
                + "  and 1 more that is wrong with manifests: the log names it\n  a map is full\n  health cannot be \
                   served on [::]:10256: in use\n  left alone at the \
                   socket: /cg/a\n  left alone at the socket: /cg/b (not there)\n  \
                   the kernel refuses a/b: No space\n  a/c: cut\n  and 2 more warnings about Services: \
                   `kube-lane status --all` and the log tell them\napi server\n  https://10.96.0.1/ from Service default/kubernetes\n  \
                   in use: 10.96.0.1:443, an address of a Service, since the preferred address does not answer\n  \
                   cannot be watched: nodes: words (403) (a hint)\n  \
                   known endpoints: 192.0.2.1:6443\nsettings\n  clusterCIDR: 10.0.0.0/8 (/b)\nnode\n"
        );
        let json = agent.to_json();
        let setting = json!({"field": "clusterCIDR", "value": "10.0.0.0/8", "source": "/b"});
        assert_eq!(
            (&json["settings"], &json["configuration"]["filesNotInForce"]),
            (&json!([setting]), &json!("gone"))
        );
        assert_eq!(json["refused"], json!([{"service": "a/b", "words": "No space"}]));
        assert_eq!(json["warnings"], json!([{"service": "a/c", "words": "cut"}]));
        assert_eq!(json["warningCount"], 3);
        let problem =
            json!({"file": "/m/web.yaml", "line": 7, "isRead": false, "words": "/m/web.yaml:7: no YAML"});
        assert_eq!(json["manifests"]["problems"][0], problem);
        assert_eq!(json["apiServer"]["throughService"], true);
        assert_eq!(json["apiServer"]["inUse"], "10.96.0.1:443");
        assert_eq!(
            json["awaitedPorts"],
            json!([{"address": "[::]:10256", "server": "health", "error": "in use"}])
        );
        assert_eq!(json["leftAlone"][1], json!({"cgroup": "/cg/b", "exists": false}));
        assert_eq!((&json["mode"], &json["whyNotEbpf"]), (&json!("nftables"), &json!("no eBPF")));
    }
}
