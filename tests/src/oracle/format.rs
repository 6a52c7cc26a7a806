//! The scenario files: what may stand in one, and what it means. `tests/scenarios/README.md` documents it for authors.
//!
//! Owns reading and checking them, with file and line in every error. Knows no lab and starts nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kube_lane_lab::Proto;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_saphyr::Spanned;

/// What a scenario runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proxy {
    /// The agent of this repository.
    KubeLane,
    /// The same with eBPF: `--proxy-mode ebpf`.
    Ebpf,
    /// kube-proxy in its mode nftables.
    Nftables,
    /// kube-proxy in its mode iptables.
    Iptables,
}

impl Proxy {
    /// In the order in which they are shown.
    pub const ALL: [Self; 4] = [Self::KubeLane, Self::Ebpf, Self::Nftables, Self::Iptables];
    /// Those of this repository.
    pub const OURS: [Self; 2] = [Self::KubeLane, Self::Ebpf];

    /// Whether it is of this repository.
    pub fn is_ours(self) -> bool {
        Self::OURS.contains(&self)
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::KubeLane => "kube-lane",
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        })
    }
}

/// An address family, named as in Kubernetes' API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum Family {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

impl Family {
    /// Both, IPv4 first.
    pub const ALL: [Self; 2] = [Self::IPv4, Self::IPv6];

    /// Its place in pairs of addresses.
    pub fn index(self) -> usize {
        usize::from(self == Self::IPv6)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(if *self == Self::IPv4 { "IPv4" } else { "IPv6" })
    }
}

/// Which layer of the agent answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// The programs at `connect()`; clients that they cannot see meet nftables nevertheless.
    Socket,
    /// The rules.
    Nftables,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Socket { "the socket" } else { "nftables" })
    }
}

/// Where a scenario's objects are put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The API server that all proxies watch.
    #[default]
    Api,
    /// kube-lane's manifest folder: for objects that the API server refuses.
    Manifests,
}

/// A bridge of each node to which its pods are attached, as CNI's plugin `bridge` does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bridge {
    /// What is bridged meets the rules of IP (`bridge-nf-call-iptables` is 1).
    Filtered,
    /// It does not.
    Unfiltered,
}

/// A scenario.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The file's name without `.yaml`.
    pub name: String,
    /// What it shows, in a paragraph.
    pub about: String,
    /// Fields of the proxies' KubeProxyConfiguration: proxies are started once for all scenarios with equal ones.
    pub config: Value,
    /// How pods are attached; `None`: each by a link of its own, or as `config` demands.
    pub bridge: Option<Bridge>,
    /// It runs once for each of these, at the same time.
    pub families: Vec<Family>,
    /// The proxies that it does not run over, and why.
    pub skips: BTreeMap<Proxy, String>,
    /// The first minor release of kube-proxy that takes `config`.
    pub since: Option<Minor>,
    /// Where its objects are put.
    pub source: Source,
    /// Whether kube-lane has to come to the same end through other orders; not so where an end depends on the past.
    pub orders: bool,
    /// Which layer answers with eBPF, where a flow does not say.
    pub layer: Option<Layer>,
    /// What happens; the first step is made of `objects` and `flows`.
    pub steps: Vec<Step>,
}

/// One step: changes, and what is true after them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// What happens, in a few words.
    #[serde(default, rename = "do")]
    pub what: String,
    /// Objects that are created, or become what is given.
    #[serde(default)]
    pub apply: Vec<Value>,
    /// Objects of which some fields change, as with `kubectl patch --type merge`.
    #[serde(default)]
    pub change: Vec<Value>,
    /// Objects that go: `Service/web`.
    #[serde(default)]
    pub delete: Vec<String>,
    /// How long to wait, once the changes are in place.
    #[serde(default, deserialize_with = "duration")]
    pub wait: Option<Duration>,
    /// What is met then.
    #[serde(default)]
    pub flows: Vec<Spanned<Flow>>,
}

/// Connections of one kind, and what they meet. A flow is counted for each combination of `from`, `to` and `proto`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flow {
    /// Hosts of the lab.
    #[serde(default, deserialize_with = "one_or_many")]
    pub from: Vec<String>,
    /// `$vip1:80`, with a colon before the port.
    #[serde(default, deserialize_with = "one_or_many")]
    pub to: Vec<String>,
    /// TCP unless stated.
    #[serde(default = "tcp", deserialize_with = "protocols")]
    pub proto: Vec<Proto>,
    /// Only for this family.
    #[serde(default)]
    pub family: Option<Family>,
    /// Who answers, or why nobody does.
    pub gets: Gets,
    /// Whom the server sees.
    #[serde(default, rename = "as")]
    pub seen: Seen,
    /// Bytes that the answer has.
    #[serde(default)]
    pub bytes: usize,
    /// The pause between dials.
    #[serde(default, deserialize_with = "duration")]
    pub every: Option<Duration>,
    /// All dials from one client with this label are answered by the same server, whatever they dial.
    #[serde(default)]
    pub sticks: Option<String>,
    /// The connection stays open under this label.
    #[serde(default)]
    pub hold: Option<String>,
    /// Asks once more on the connection of this label.
    #[serde(default)]
    pub held: Option<String>,
    /// Which layer answers with eBPF; unless stated, the socket where a pod or a node dials a cluster IP by TCP.
    #[serde(default)]
    pub layer: Option<Layer>,
    /// What a proxy does differently, and why.
    #[serde(default)]
    pub differs: BTreeMap<Proxy, Difference>,
}

/// What a flow meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gets {
    /// Exactly these hosts answer.
    Answers(Vec<String>),
    /// An HTTP server answers a GET with this status.
    Status(u16),
    /// ICMP port unreachable, or a TCP reset.
    Refused,
    /// Nothing at all.
    Dropped,
    /// Another ICMP error, or no route.
    Unreachable,
    /// Not looked at: what a proxy does here changes from run to run.
    Anything,
}

/// Whom a server sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// This host, or `client`.
    All(String),
    /// For each server that sees another than the client, whom.
    Each(BTreeMap<String, String>),
}

/// Another outcome, with its reason.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Difference {
    /// What is met instead.
    pub gets: Gets,
    /// Whom the server sees.
    #[serde(default, rename = "as")]
    pub seen: Seen,
    /// The reason.
    pub why: String,
    /// The last minor release of kube-proxy that differs, as in `"1.36"`; all do unless stated.
    #[serde(default)]
    pub until: Option<Minor>,
}

/// A minor release of Kubernetes: 1.N.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Minor(u32);

impl TryFrom<String> for Minor {
    type Error = String;

    /// Reads `1.36`, or the version that a program says of itself: `v1.36.3`.
    fn try_from(text: String) -> Result<Self, String> {
        let minor = text.trim_start_matches('v').strip_prefix("1.").and_then(|rest| rest.split('.').next());
        let minor = minor.and_then(|minor| minor.parse().ok());
        minor.map(Self).ok_or_else(|| format!("{text:?} is no release of Kubernetes, such as \"1.36\""))
    }
}

impl Scenario {
    /// The scenario as this release of kube-proxy meets it: what only earlier ones do differently is left out, and so is
    /// kube-proxy itself where it cannot read the configuration yet.
    #[must_use]
    pub fn for_release(&self, release: Minor) -> Self {
        let mut scenario = self.clone();
        for flow in scenario.steps.iter_mut().flat_map(|step| &mut step.flows) {
            flow.value.differs.retain(|_, difference| difference.until.is_none_or(|until| release <= until));
        }
        if let Some(since) = self.since.filter(|since| release < *since) {
            for proxy in Proxy::ALL.into_iter().filter(|proxy| !proxy.is_ours()) {
                let why = format!("kube-proxy takes this configuration since 1.{}", since.0);
                scenario.skips.insert(proxy, why);
            }
        }
        scenario
    }
}

impl Flow {
    /// What a proxy's clients meet, and the reason where that is not what the others' meet.
    pub fn expected(&self, proxy: Proxy) -> (&Gets, &Seen, Option<&str>) {
        match self.differs.get(&proxy) {
            Some(other) => (&other.gets, &other.seen, Some(&other.why)),
            None => (&self.gets, &self.seen, None),
        }
    }
}

impl Seen {
    /// Whom this server sees: a host's name, or `client`.
    pub fn by(&self, server: &str) -> &str {
        match self {
            Self::All(whom) => whom,
            Self::Each(map) => map.get(server).map_or(CLIENT, String::as_str),
        }
    }
}

const CLIENT: &str = "client";

impl Default for Seen {
    fn default() -> Self {
        Self::All(CLIENT.into())
    }
}

/// A scenario as it stands in its file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    about: String,
    #[serde(default)]
    config: Value,
    #[serde(default)]
    bridge: Option<Bridge>,
    #[serde(default = "both_families")]
    families: Vec<Family>,
    #[serde(default)]
    skips: BTreeMap<Proxy, String>,
    #[serde(default)]
    since: Option<Minor>,
    #[serde(default)]
    source: Source,
    #[serde(default = "yes")]
    orders: bool,
    #[serde(default)]
    layer: Option<Layer>,
    #[serde(default)]
    objects: Vec<Value>,
    #[serde(default)]
    flows: Vec<Spanned<Flow>>,
    #[serde(default)]
    then: Vec<Step>,
}

impl Scenario {
    /// All scenarios of a folder, by name.
    ///
    /// # Errors
    /// With file and line, when one is not as it has to be.
    pub fn load_all(folder: &Path) -> Result<Vec<Self>> {
        let mut scenarios = Vec::new();
        let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                scenarios.push(Self::load(&path)?);
            }
        }
        scenarios.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(scenarios)
    }

    fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Self::parse(&name, &text).with_context(|| path.display().to_string())
    }

    /// Reads one file's text.
    ///
    /// # Errors
    /// With the line, when it is not as it has to be.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let file: File = serde_saphyr::from_str(text)?;
        let first = Step { apply: file.objects, flows: file.flows, ..Step::default() };
        let steps: Vec<_> = std::iter::once(first).chain(file.then).collect();
        for flow in steps.iter().flat_map(|step| &step.flows) {
            check(&flow.value).with_context(|| format!("line {}", flow.referenced.line()))?;
        }
        Ok(Self {
            name: name.to_owned(),
            about: file.about.split_whitespace().collect::<Vec<_>>().join(" "),
            config: file.config,
            bridge: file.bridge,
            families: file.families,
            skips: file.skips,
            since: file.since,
            source: file.source,
            orders: file.orders,
            layer: file.layer,
            steps,
        })
    }
}

fn check(flow: &Flow) -> Result<()> {
    let dials = !flow.from.is_empty() && !flow.to.is_empty();
    match (&flow.held, &flow.hold) {
        (Some(_), Some(_)) => bail!("a flow is to `hold` or is `held`, not both"),
        (Some(_), None) => ensure!(
            flow.from.is_empty() && flow.to.is_empty(),
            "a flow that is `held` has its `from` and `to` already"
        ),
        (None, Some(_)) => {
            let one = flow.from.len() * flow.to.len() * flow.proto.len() == 1;
            ensure!(one, "a flow to `hold` is one connection: one `from`, one `to`, one `proto`");
        }
        (None, None) => ensure!(dials, "a flow has a `from` and a `to`"),
    }
    if let Gets::Answers(hosts) = &flow.gets {
        ensure!(!hosts.is_empty(), "`gets` names nobody: `dropped` or `refused`?");
    }
    for (proxy, difference) in &flow.differs {
        let same = difference.gets == flow.gets && difference.seen == flow.seen;
        ensure!(!same, "{proxy} is said to differ, and does not");
        ensure!(!difference.why.trim().is_empty(), "no `why` for {proxy}");
    }
    Ok(())
}

fn both_families() -> Vec<Family> {
    Family::ALL.to_vec()
}

fn yes() -> bool {
    true
}

fn tcp() -> Vec<Proto> {
    vec![Proto::Tcp]
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(one) => vec![one],
        OneOrMany::Many(many) => many,
    })
}

fn protocols<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Proto>, D::Error> {
    let names = one_or_many(deserializer)?;
    let protocol = |name: &String| match name.as_str() {
        "TCP" => Ok(Proto::Tcp),
        "UDP" => Ok(Proto::Udp),
        "SCTP" => Ok(Proto::Sctp),
        _ => Err(serde::de::Error::custom(format!("`{name}`: a protocol is TCP, UDP or SCTP"))),
    };
    names.iter().map(protocol).collect()
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let seconds = text.strip_suffix('s').and_then(|number| number.parse().ok());
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let malformed = || serde::de::Error::custom(format!("`{text}`: a time is in seconds, as in 1.5s"));
    duration.map(Some).ok_or_else(malformed)
}

impl<'de> Deserialize<'de> for Gets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Status(u16),
            One(String),
            Many(Vec<String>),
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::Status(status) => Self::Status(status),
            Raw::Many(hosts) => Self::Answers(hosts),
            Raw::One(word) => match word.as_str() {
                "refused" => Self::Refused,
                "dropped" => Self::Dropped,
                "unreachable" => Self::Unreachable,
                "anything" => Self::Anything,
                _ => Self::Answers(vec![word]),
            },
        })
    }
}

impl<'de> Deserialize<'de> for Seen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            All(String),
            Each(BTreeMap<String, String>),
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::All(whom) => Self::All(whom),
            Raw::Each(map) => Self::Each(map),
        })
    }
}

impl fmt::Display for Gets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answers(hosts) => write!(f, "answers of {}", hosts.join(", ")),
            Self::Status(status) => write!(f, "status {status}"),
            Self::Refused => f.write_str("refused"),
            Self::Dropped => f.write_str("dropped"),
            Self::Unreachable => f.write_str("unreachable"),
            Self::Anything => f.write_str("anything"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "about: |\n  One\n  thing.\nflows:\n- {from: pod0c, to: [$vip1:80], gets: pod0a}\n";

    #[test]
    fn a_scenario_is_read() {
        let scenario = Scenario::parse("one", GOOD).unwrap();
        assert_eq!((scenario.about.as_str(), scenario.steps.len()), ("One thing.", 1));
        let flow = &scenario.steps[0].flows[0].value;
        assert_eq!(flow.expected(Proxy::Nftables).0, &Gets::Answers(vec!["pod0a".into()]));
        assert_eq!((flow.proto.as_slice(), flow.seen.by("pod0a")), (&[Proto::Tcp][..], "client"));
    }

    #[test]
    fn what_differs_may_depend_on_the_release() {
        let flow = "- {from: a, to: x, gets: refused, differs: {nftables: {gets: dropped, until: \"1.36\", why: y}}}";
        let scenario = Scenario::parse("one", &format!("{GOOD}{flow}\nsince: \"1.36\"\n")).unwrap();
        let seen = |version: &str| {
            let scenario = scenario.for_release(Minor::try_from(version.to_owned()).unwrap());
            let gets = scenario.steps[0].flows[1].value.expected(Proxy::Nftables).0.clone();
            (gets, scenario.skips.into_keys().collect::<Vec<_>>())
        };
        assert_eq!(seen("v1.37.2"), (Gets::Refused, vec![]));
        assert_eq!(seen("1.36"), (Gets::Dropped, vec![]));
        assert_eq!(seen("v1.9.0"), (Gets::Dropped, vec![Proxy::Nftables, Proxy::Iptables]));
        assert!(Minor::try_from("2.0".to_owned()).unwrap_err().contains("\"2.0\""));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (wrong, words) in [
            ("- {from: pod0c, to: x, gets: pod0a, sees: y}", "sees"),
            ("- {from: pod0c, gets: refused}", "a `from` and a `to`"),
            ("- {from: pod0c, to: x, gets: refused, every: 3}", "1.5s"),
            ("- {from: pod0c, to: x, gets: refused, proto: ICMP}", "ICMP"),
            ("- {from: a, to: x, gets: refused, differs: {nftables: {gets: refused, why: y}}}", "does not"),
            ("- {from: a, to: x, gets: refused, differs: {nftables: {gets: dropped}}}", "why"),
        ] {
            let error = format!("{:#}", Scenario::parse("one", &format!("{GOOD}{wrong}\n")).unwrap_err());
            assert!(error.contains(words) && error.contains("line 6"), "{wrong}: {error}");
        }
    }
}
