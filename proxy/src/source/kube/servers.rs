//! Where the API server can be reached: the configured address, and the real endpoints that the agent remembers.
//!
//! Owns the order of the candidates, which of them is in use, and what is logged about that. The agent must not depend
//! on itself unnoticed: the address of Service `default/kubernetes` works only while a proxy serves it on this node, and a
//! kubeconfig may name a machine that goes away. Never connects (`dial` does), and decides nothing about Services.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;
use serde::Serialize;
use tokio::sync::watch;
use tracing::{info, warn};

use super::KubeSourceConfig;
use super::memory;
use crate::model::input::{Change, EndpointSlice, Protocol, Service, ServiceKey, SliceKey};

#[cfg(test)]
mod tests;

/// The Service of the API server itself.
const SERVICE: &str = "default/kubernetes";
/// The name of its port.
const PORT: &str = "https";

/// What the container's environment says about the API server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `KUBERNETES_SERVICE_HOST`: the kubelet sets it to the Service's address, and a ConfigMap may set it to another.
    pub host: Option<String>,
    /// `KUBERNETES_PORT_443_TCP_ADDR`: the Service's address, which the kubelet alone sets.
    pub service: Option<String>,
}

impl Environment {
    /// Reads the process's environment.
    pub fn read() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self { host: variable("KUBERNETES_SERVICE_HOST"), service: variable("KUBERNETES_PORT_443_TCP_ADDR") }
    }

    /// `KUBERNETES_SERVICE_HOST` names something else than the Service.
    pub(super) fn names_a_server(&self) -> bool {
        self.host.as_ref().is_some_and(|host| self.service.as_ref() != Some(host))
    }
}

/// Where the configured address comes from, in the order in which it is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// `--master`.
    Master,
    /// `--kubeconfig`, or `clientConnection.kubeconfig` of `--config`.
    Kubeconfig(PathBuf),
    /// `KUBERNETES_SERVICE_HOST`, where it is not the Service's.
    Environment,
    /// The kubeconfig that `--config-base` names.
    Base(PathBuf),
    /// The Service's own address, as every pod gets it.
    Service,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Master => f.write_str("--master"),
            Self::Kubeconfig(path) => write!(f, "kubeconfig {}", path.display()),
            Self::Environment => f.write_str("environment variable KUBERNETES_SERVICE_HOST"),
            Self::Base(path) => write!(f, "kubeconfig {} of --config-base", path.display()),
            Self::Service => f.write_str("Service default/kubernetes"),
        }
    }
}

/// What is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) url: http::Uri,
    pub(super) source: Source,
    /// Other addresses than the configured one may be dialed: TLS verifies who answers, and no proxy is in between.
    pub(super) may_fall_back: bool,
    /// The proxy in between.
    pub(super) proxy: Option<String>,
    /// Why the proxy that the environment names is not used.
    pub(super) ignored_proxy: Option<String>,
    /// Why the kubeconfig of `--config-base` is not used, where it should have been.
    pub(super) unusable_base: Option<String>,
}

/// An address that may be dialed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Candidate {
    /// The configured address.
    Configured,
    /// An endpoint of `default/kubernetes`.
    Endpoint(SocketAddr),
}

/// How the API server is reached at present.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerStatus {
    /// The configured URL.
    pub address: String,
    /// Where that comes from.
    pub source: String,
    /// The proxy in between, without its password.
    pub proxy: Option<String>,
    /// What the last connection was made to: the proxy, where there is one.
    pub in_use: Option<SocketAddr>,
    /// That is not the address that is tried first.
    pub fallback: bool,
    /// That is an address of a Service, which a proxy on this node has to serve.
    pub through_service: bool,
    /// The remembered endpoints.
    pub endpoints: Vec<SocketAddr>,
    /// Why no address could be reached, the last time that one was tried.
    pub failure: Option<String>,
    /// Why the server cannot be watched, and what to look at.
    pub trouble: Option<String>,
}

/// What all connections to one API server share. A clone shares it too.
#[derive(Clone)]
pub struct ApiServers(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    status: watch::Sender<ServerStatus>,
    /// A better address answers than the one in use: watches connect anew.
    moves: watch::Sender<()>,
    file: Option<memory::File>,
}

#[derive(Default)]
struct State {
    target: Option<Target>,
    endpoints: Vec<SocketAddr>,
    /// The endpoint that is tried first: not every node asks the same server.
    first: usize,
    /// Those of the EndpointSlices, as far as they are listed.
    slices: BTreeMap<SliceKey, Vec<SocketAddr>>,
    /// They have changed since they were last looked at as a whole.
    to_remember: bool,
    /// Addresses that did not answer, while another did: they come last, until they are found to answer.
    failed: BTreeSet<Candidate>,
    in_use: Option<(Candidate, SocketAddr)>,
    failure: Option<String>,
    trouble: Option<String>,
    services: ServiceAddresses,
    fallback: bool,
    /// `None`: nothing was said so far.
    through_service: Option<bool>,
}

/// Which addresses are those of Services. All ClusterIPs come from the ServiceCIDRs; a cluster that serves none has the
/// one of `default/kubernetes`, which is what pods are given.
#[derive(Default)]
struct ServiceAddresses {
    environment: Option<IpAddr>,
    cidrs: Vec<IpNetwork>,
    kubernetes: Vec<IpAddr>,
    external: BTreeMap<ServiceKey, Vec<IpAddr>>,
}

impl ServiceAddresses {
    fn contain(&self, address: IpAddr) -> bool {
        self.environment == Some(address)
            || self.kubernetes.contains(&address)
            || self.cidrs.iter().any(|cidr| cidr.contains(address))
            || self.external.values().any(|addresses| addresses.contains(&address))
    }

    fn put(&mut self, service: &Service) -> bool {
        let mut changed = false;
        if service.key.as_str() == SERVICE && *self.kubernetes != *service.cluster_ips {
            self.kubernetes = service.cluster_ips.to_vec();
            changed = true;
        }
        let external = service.external.as_ref();
        let external = external.map(|external| [&external.ips[..], &external.load_balancer_ips].concat());
        match external.filter(|addresses| !addresses.is_empty()) {
            Some(addresses) => {
                let same = self.external.get(&service.key) == Some(&addresses);
                self.external.insert(service.key.clone(), addresses);
                !same || changed
            }
            None => self.external.remove(&service.key).is_some() || changed,
        }
    }
}

impl State {
    /// The addresses in the order in which they are dialed. A real endpoint comes before the Service's address, which only
    /// a proxy makes answer; any other configured address comes before what is remembered.
    fn candidates(&self) -> Vec<Candidate> {
        let Some(target) = &self.target else { return vec![Candidate::Configured] };
        if !target.may_fall_back {
            return vec![Candidate::Configured];
        }
        let configured = named(&target.url);
        let known = self.endpoints.iter().filter(|endpoint| Some(**endpoint) != configured);
        let mut candidates: Vec<_> = known.copied().map(Candidate::Endpoint).collect();
        if !candidates.is_empty() {
            let first = self.first % candidates.len();
            candidates.rotate_left(first);
        }
        match target.source {
            Source::Service => candidates.push(Candidate::Configured),
            _ => candidates.insert(0, Candidate::Configured),
        }
        candidates.sort_by_key(|candidate| self.failed.contains(candidate));
        candidates
    }

    /// Among the addresses that come first as long as all answer.
    fn is_preferred(&self, candidate: Candidate) -> bool {
        let by_service = self.target.as_ref().is_some_and(|target| target.source == Source::Service);
        match candidate {
            Candidate::Configured => !by_service || self.endpoints.is_empty(),
            Candidate::Endpoint(_) => by_service,
        }
    }

    fn connected(&mut self, candidate: Candidate, address: SocketAddr, failures: &str) {
        self.failed.remove(&candidate);
        self.in_use = Some((candidate, address));
        self.failure = None;
        let fallback = !self.is_preferred(candidate);
        let url = self.url();
        match (std::mem::replace(&mut self.fallback, fallback), fallback) {
            (false, true) => warn!(
                server = url,
                %address,
                error = failures,
                "the preferred address of the API server does not answer: using another one",
            ),
            (true, false) => {
                info!(server = url, %address, "the preferred address of the API server answers again");
            }
            _ => {}
        }
        self.judge();
    }

    /// Whether the address in use is a Service's; says so when that changes.
    fn judge(&mut self) {
        let Some((candidate, address)) = self.in_use else { return };
        let by_service = self.target.as_ref().is_some_and(|target| target.source == Source::Service);
        let through = by_service && candidate == Candidate::Configured || self.services.contain(address.ip());
        let before = self.through_service.replace(through);
        if before == Some(through) {
            return;
        }
        if through {
            // Where the endpoints do not answer, that has been said.
            if !(by_service && self.fallback) {
                self.warn_of_service();
            }
        } else if before == Some(true) || by_service {
            info!(server = self.url(), %address, "the API server is reached at a real endpoint, not through a Service");
        }
    }

    fn warn_of_service(&self) {
        warn!(
            server = self.url(),
            "the address of the API server is a Service's, which a proxy on this node has to serve: after a reboot nothing \
             does. Set --state-dir (kubeLane.stateDir), so that the agent remembers the real endpoints, or name a real \
             address: --kubeconfig, or ConfigMap kubernetes-services-endpoint"
        );
    }

    fn url(&self) -> String {
        self.target.as_ref().map(|target| target.url.to_string()).unwrap_or_default()
    }

    fn status(&self) -> ServerStatus {
        ServerStatus {
            address: self.url(),
            source: self.target.as_ref().map(|target| target.source.to_string()).unwrap_or_default(),
            proxy: self.target.as_ref().and_then(|target| target.proxy.clone()),
            in_use: self.in_use.map(|(_, address)| address),
            fallback: self.fallback,
            through_service: self.through_service == Some(true),
            endpoints: self.endpoints.clone(),
            failure: self.failure.clone(),
            trouble: self.trouble.clone(),
        }
    }
}

/// The address and port that a URL names, where it names an address.
fn named(url: &http::Uri) -> Option<SocketAddr> {
    let address = url.host()?.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
    let default = if url.scheme_str() == Some("http") { 80 } else { 443 };
    Some(SocketAddr::new(address, url.port_u16().unwrap_or(default)))
}

/// Where a slice of `default/kubernetes` says that API servers answer.
fn endpoints(slice: &EndpointSlice) -> Vec<SocketAddr> {
    let is_named = |port: &&crate::model::input::SlicePort| &*port.name == PORT;
    let tcp = || slice.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
    let Some(port) = tcp().find(is_named).or_else(|| tcp().next()) else { return Vec::new() };
    let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready);
    ready.map(|endpoint| SocketAddr::new(endpoint.address, port.port)).collect()
}

impl ApiServers {
    /// Reads what an earlier run remembered. A file that cannot be used is warned of, and replaced later.
    pub fn open(config: &KubeSourceConfig) -> Self {
        let file = config.state_dir.as_deref().map(memory::File::open);
        let (file, endpoints) = file.unzip();
        let mut state = State {
            endpoints: endpoints.unwrap_or_default(),
            first: fastrand::usize(..),
            ..State::default()
        };
        state.services.environment =
            config.environment.service.as_ref().and_then(|address| address.parse().ok());
        let (status, moves) = (watch::Sender::new(state.status()), watch::Sender::new(()));
        Self(Arc::new(Shared { state: Mutex::new(state), status, moves, file }))
    }

    /// How the API server is reached, now and later.
    pub fn status(&self) -> watch::Receiver<ServerStatus> {
        self.0.status.subscribe()
    }

    /// Hears when watches should connect anew.
    pub(super) fn moves(&self) -> watch::Receiver<()> {
        self.0.moves.subscribe()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &State) {
        let status = state.status();
        self.0.status.send_if_modified(|known| std::mem::replace(known, status.clone()) != status);
    }

    /// What is configured, each time that it is read.
    pub(super) fn configured(&self, target: Target) {
        let mut state = self.state();
        if state.target.as_ref() == Some(&target) {
            return;
        }
        info!(server = %target.url, source = %target.source, remembered = state.endpoints.len(), "the address of the API server");
        if let Some(proxy) = &target.proxy {
            info!(proxy, "the API server is reached by way of a proxy");
        }
        if let Some(error) = &target.ignored_proxy {
            warn!(
                error,
                "HTTPS_PROXY or HTTP_PROXY cannot be used: the API server is dialed without a proxy"
            );
        }
        if let Some(error) = &target.unusable_base {
            warn!(%error, "the kubeconfig of --config-base is not used: going on with the service account");
        }
        let by_service = target.source == Source::Service && state.endpoints.is_empty();
        state.target = Some(target);
        if by_service && state.through_service != Some(true) {
            state.through_service = Some(true);
            state.warn_of_service();
        }
        self.publish(&state);
    }

    /// The addresses in the order in which they are dialed, at least one.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        self.state().candidates()
    }

    /// A candidate answers as the API server that is configured; `failures`: why those before it do not.
    pub(super) fn connected(&self, candidate: Candidate, address: SocketAddr, failures: &str) {
        let mut state = self.state();
        state.connected(candidate, address, failures);
        self.publish(&state);
    }

    /// A candidate does not answer, and the next one is tried.
    pub(super) fn failed(&self, candidate: Candidate) {
        self.state().failed.insert(candidate);
    }

    /// No candidate answers: the next attempt begins with the preferred ones.
    pub(super) fn all_failed(&self, failures: String) {
        let mut state = self.state();
        state.failed.clear();
        state.failure = Some(failures);
        self.publish(&state);
    }

    /// Why the server cannot be watched; `None`: it can.
    pub(super) fn troubled(&self, trouble: Option<String>) {
        let mut state = self.state();
        state.trouble = trouble;
        self.publish(&state);
    }

    /// The candidates that are dialed last, since they did not answer.
    pub(super) fn silent(&self) -> Vec<Candidate> {
        self.state().failed.iter().copied().collect()
    }

    /// A candidate that did not answer does again.
    pub(super) fn answers_again(&self, candidate: Candidate) {
        let mut state = self.state();
        state.failed.remove(&candidate);
        if state.fallback && state.is_preferred(candidate) {
            self.0.moves.send_replace(());
        }
    }

    /// Takes note of what concerns the API server itself. `complete`: all EndpointSlices have been listed.
    pub(super) fn observe(&self, changes: &[Change], complete: bool) {
        let mut guard = self.state();
        let state = &mut *guard;
        let (mut addresses, mut slices) = (false, false);
        for change in changes {
            match change {
                Change::Service(service) => addresses |= state.services.put(service),
                Change::ServiceGone(key) => addresses |= state.services.external.remove(key).is_some(),
                Change::ServiceCidrs(cidrs) => {
                    state.services.cidrs.clone_from(cidrs);
                    addresses = true;
                }
                Change::Slice(slice) if slice.service.as_str() == SERVICE => {
                    state.slices.insert(slice.key.clone(), endpoints(slice));
                    slices = true;
                }
                // A slice may be handed to another Service.
                Change::Slice(EndpointSlice { key, .. }) | Change::SliceGone(key) => {
                    slices |= state.slices.remove(key).is_some();
                }
                Change::Node(_) | Change::Triggered(..) | Change::Complete(_) | Change::Synced => {}
            }
        }
        state.to_remember |= slices;
        if addresses {
            state.judge();
        }
        if complete && std::mem::take(&mut state.to_remember) {
            self.remember(state);
            addresses = true;
        }
        if addresses {
            self.publish(state);
        }
    }

    /// Remembers the endpoints that the slices name. None is no news: an API server that answers exists.
    fn remember(&self, state: &mut State) {
        let known: BTreeSet<SocketAddr> = state.slices.values().flatten().copied().collect();
        let count = known.len();
        let known: Vec<SocketAddr> = known.into_iter().take(memory::LIMIT).collect();
        if known.is_empty() || known == state.endpoints {
            return;
        }
        if count > known.len() {
            info!(
                "of {count} endpoints of the API server the first {} by address are remembered",
                known.len()
            );
        }
        let is_kept =
            |candidate: &Candidate| !matches!(candidate, Candidate::Endpoint(at) if !known.contains(at));
        state.failed.retain(is_kept);
        state.endpoints.clone_from(&known);
        if let Some(file) = &self.0.file {
            file.write(known);
        }
        let uses_service = state.in_use.is_none_or(|(candidate, _)| candidate == Candidate::Configured)
            && state.candidates().first() != Some(&Candidate::Configured);
        if uses_service {
            self.0.moves.send_replace(());
        }
    }
}
