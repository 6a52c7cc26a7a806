//! `kube-lane run`: the agent, and the actions that need its configuration.

use std::future::Future;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use prometheus_client::registry::Registry;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use super::follow::ConfigFollower;
use super::{bridges, instance, rights, settings, sysctls};
use crate::causes::with_causes;
use crate::config::flags::RunFlags;
use crate::config::{BaseState, Config, Environment, Mode, Resolved};
use crate::controller::Controller;
use crate::dataplane::conntrack::Conntrack;
use crate::dataplane::nftables::{self, Mark, Marks, Nftables};
use crate::dataplane::socket::{self, Removal, Socket, SocketError};
use crate::dataplane::{AtConnect, Awaited, Follower, Layers, Refusal, Turn, Withdrawal};
use crate::health::{AwaitedPorts, HealthState, Servers, ServiceHealth};
use crate::model::input::{Event, Family, Origin};
use crate::model::planner::Planner;
use crate::observability::changes::Changes;
use crate::observability::commits::Commits;
use crate::observability::configuration::Configuration;
use crate::observability::events::{Events, Reason};
use crate::observability::flows::Flows;
use crate::observability::local::NoLocalEndpoints;
use crate::observability::manifests::Manifests;
use crate::observability::socket::SocketLayer;
use crate::observability::{api_server, metrics, telemetry};
use crate::source::SOURCE_RANGES;
use crate::source::kube::{self, ApiServers, Complaint, KubeSourceConfig};
use crate::source::manifest::Condition;
use crate::source::{host, manifest};
use crate::status::{self, Conditions, Facts, Query};
use crate::version::{COMMIT, VERSION};
use crate::{memory, ready};

/// Messages of the sources that may wait for the controller; each holds a batch of events.
const EVENTS: usize = 256;

/// Serves until SIGTERM or SIGINT, which leave everything in the kernel as it is.
pub(super) fn run(flags: &RunFlags) -> anyhow::Result<ExitCode> {
    memory::share_arena();
    let environment = Environment::read();
    let resolved = flags.resolve(&environment)?;
    say(&resolved)?;
    let listener = instance::claim()?;
    let (config, front) = open_front(resolved.config.clone())?;
    // One thread for the controller and one for the rest is all there is to do.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("runtime")?;
    let files = Files { flags: flags.clone(), environment, resolved };
    let result = runtime.block_on(serve(config, front, listener, files));
    // A commit that is under way must not be waited for: the next start repairs what it left.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

/// Sets the node's sysctls, and has the kernel check the ruleset, for which it loads what modules that takes. `run` then
/// needs fewer rights.
pub(super) fn init_only(flags: &RunFlags) -> anyhow::Result<ExitCode> {
    let resolved = flags.resolve_to_prepare(&Environment::read())?;
    say(&resolved)?;
    let config = resolved.config;
    sysctls::apply(&config.conntrack);
    let nftables = settings::nftables(&config);
    nftables::try_ruleset(&nftables, Family::V4).context("the node cannot be prepared")?;
    if let Err(error) = nftables::try_ruleset(&nftables, Family::V6) {
        warn!(error = with_causes(&error), "Services with an IPv6 address cannot be served here");
    }
    info!("--init-only: the node is prepared");
    Ok(ExitCode::SUCCESS)
}

/// Writes the resolved configuration to a file.
pub(super) fn write_config(flags: &RunFlags, path: &Path) -> anyhow::Result<ExitCode> {
    let resolved = flags.resolve_for_node(&Environment::read())?;
    std::fs::write(path, resolved.to_yaml())
        .with_context(|| format!("--write-config-to {}", path.display()))?;
    telemetry::init(&resolved.config.logging)?;
    resolved.warnings.iter().for_each(|warning| warn!("{warning}"));
    info!(file = %path.display(), "configuration written");
    Ok(ExitCode::SUCCESS)
}

/// Where the configuration comes from.
struct Files {
    flags: RunFlags,
    environment: Environment,
    resolved: Resolved,
}

/// Starts the logs and says what there is to say about the configuration.
fn say(resolved: &Resolved) -> anyhow::Result<()> {
    telemetry::init(&resolved.config.logging)?;
    resolved.warnings.iter().for_each(|warning| warn!("{warning}"));
    resolved.notes.iter().for_each(|note| info!("{note}"));
    if resolved.base == BaseState::Missing {
        debug!("--config-base: the file does not exist");
    }
    Ok(())
}

/// What is in front of nftables, and why it is less than what was asked for.
type Front = (AtConnect, Option<String>);

/// Opens the socket layer where it is asked for; the configuration then has the mode that could be had. Otherwise what an
/// earlier run left goes.
fn open_front(mut config: Config) -> anyhow::Result<(Config, Front)> {
    let mut marks = Marks::open()?;
    let bpf_root = config.socket_lb.bpf_root.clone();
    let mut why = None;
    if config.mode == Mode::Ebpf {
        withdraw_elsewhere(&mut marks, &bpf_root);
        let mut turn = Turn::default();
        match open_socket(&config, &mut turn, &mut marks) {
            Ok(socket) => return Ok((config, (AtConnect::Socket(Box::new(socket), marks, bpf_root), None))),
            Err(error) if is_passing(&error) => {
                let again = config.clone();
                let open = Box::new(move |marks: &mut Marks| {
                    open_socket(&again, &mut turn, marks).map_err(|error| refusal(&error, marks))
                });
                let why = refusal(&error, &mut marks);
                let awaited = Awaited::new(marks, bpf_root, open, why);
                return Ok((config, (AtConnect::Awaited(awaited), None)));
            }
            Err(error) => {
                let words = rights::explain(rights::EBPF, error.as_ref());
                warn!(
                    "mode ebpf cannot be had: {words}; nftables alone serves (`kube-lane check --proxy-mode ebpf` tells more)"
                );
                config.mode = Mode::Nftables;
                why = Some(words);
            }
        }
    }
    Ok((config, (AtConnect::Nothing(Withdrawal::begin(marks, &bpf_root)), why)))
}

/// Whether others may end what is in the way: another agent that has the place of the socket layer, a BPF file system
/// that is not mounted yet.
fn is_passing(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(SocketError::Owned { .. } | SocketError::Left { .. } | SocketError::NoBpfFileSystem(_))
    )
}

/// Why the socket layer cannot be had.
fn refusal(error: &anyhow::Error, marks: &mut Marks) -> Refusal {
    let mut words = rights::explain(rights::EBPF, error.as_ref());
    let is_unseen = matches!(error.downcast_ref(), Some(SocketError::NoBpfFileSystem(_)));
    let left = if is_unseen { marks.read().ok().flatten() } else { None };
    if let Some(mark) = &left {
        let more =
            format!("; an earlier run's, pinned at {mark}, may lead clients to endpoints that are gone");
        words.push_str(&more);
    }
    Refusal { words, is_passing: is_passing(error), is_left_over: left.is_some() }
}

/// What an earlier run on this node left in another place would stand before or behind what comes now.
fn withdraw_elsewhere(marks: &mut Marks, bpf_root: &Path) {
    // Where the mark cannot be read, it cannot be put either, and there will be no layer.
    let Some(mark) = marks.read().ok().flatten().filter(|mark| !mark.is_of(bpf_root)) else { return };
    let Some(elsewhere) = mark.bpf_root() else {
        if mark != Mark::Untold {
            warn!(
                bpf_root = %mark,
                "the socket layer of an earlier run may be left: that is on no BPF file system that is mounted here"
            );
        }
        return;
    };
    let at = elsewhere.display();
    match socket::withdraw(&elsewhere, true) {
        Ok(Removal::Unseen) => {
            warn!(bpf_root = %at, "the socket layer of an earlier run may be left: that is on no BPF file system");
            return;
        }
        Ok(Removal::Done) => info!(bpf_root = %at, "removed the socket layer that an earlier run had there"),
        Ok(Removal::Nothing) => {}
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            warn!(bpf_root = %at, error, "the socket layer of an earlier run cannot be removed");
            return;
        }
    }
    if let Err(error) = marks.remove() {
        debug!(error = &error as &dyn std::error::Error, "the mark of the socket layer stays");
    }
}

/// Opens the socket layer; the mark is there before anything is attached.
fn open_socket(config: &Config, turn: &mut Turn, marks: &mut Marks) -> anyhow::Result<Socket> {
    let bpf_root = &config.socket_lb.bpf_root;
    let owner = turn.claim(bpf_root, marks)?;
    marks.put(bpf_root)?;
    let options = settings::socket(&config.socket_lb, &config.network.detector, config.masquerade_all);
    Ok(Socket::open(options, owner)?)
}

async fn serve(
    config: Config,
    front: Front,
    listener: Option<UnixListener>,
    Files { flags, environment, resolved }: Files,
) -> anyhow::Result<()> {
    let mut terminated = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupted = signal(SignalKind::interrupt()).context("SIGINT")?;
    info!(
        version = VERSION,
        commit = COMMIT,
        mode = config.mode.as_str(),
        node = config.node_name,
        "kube-lane starts"
    );

    sysctls::apply(&config.conntrack);
    bridges::warn(&config.network.detector, config.mode);
    let (health, health_state) = watch::channel(HealthState::default());
    let mut registry = metrics::registry(config.mode.as_str());
    let ports = AwaitedPorts::register(&mut registry);
    let is_wanted = front.1.is_some() || !matches!(front.0, AtConnect::Nothing(_));
    let layer = SocketLayer::register(&mut registry, is_wanted);
    let servers = Servers::new(&config, &mut registry, ports.clone(), layer.clone());
    // Whatever asks the API server shares what is known of its addresses.
    let (complaints, complained) = mpsc::unbounded_channel();
    let api = config.api.as_ref().map(|api| settings::source(&config, api));
    let api = api.map(|source| KubeSourceConfig { complaints: Some(complaints), ..source });
    let api = api.map(|source| (ApiServers::open(&source), source));
    if let Some((api_servers, _)) = &api {
        api_server::register(&mut registry, api_servers.status());
    }
    let server_status = api.as_ref().map(|(api_servers, _)| api_servers.status());
    let events = start_events(&config, api.as_ref(), &mut registry).await?;
    tokio::spawn(tell_of_services(complained, events.clone()));
    let (queries, asked) = mpsc::channel(1);
    let facts = Facts { node: config.node_name.clone(), mode: config.mode, why: front.1.clone() };
    let (manifests, condition) = watch::channel(Condition::default());
    let (status, config_status) = watch::channel(resolved.status());
    let metric = Configuration::register(&mut registry);
    let follower = ConfigFollower { flags, environment, running: resolved, status, metric };
    let told = Told { health, manifests, layer };
    let conditions = Conditions {
        health: health_state.clone(),
        manifests: condition,
        server: server_status,
        ports: ports.clone(),
        config: config_status,
    };
    let cluster = Cluster { api, events: events.clone(), ports };
    let agent = agent(config, front.0, told, asked, cluster, &mut registry);
    // Tasks of their own: a commit blocks this one.
    if let Some(listener) = listener {
        let answering = status::serve(listener, facts, conditions, queries);
        tokio::spawn(async move {
            if let Err(error) = answering.await {
                warn!(%error, "`kube-lane status` cannot be answered");
            }
        });
    }
    tokio::spawn(follower.run());
    let servers = tokio::spawn(servers.run(health_state, Arc::new(registry), events));
    let signal = tokio::select! {
        result = agent => return result,
        result = servers => match result.context("health and metrics servers")?? {},
        _ = terminated.recv() => "SIGTERM",
        _ = interrupted.recv() => "SIGINT",
    };
    info!(signal, "leaving; Services stay in place");
    Ok(())
}

/// Who is told how the agent fares.
struct Told {
    health: watch::Sender<HealthState>,
    manifests: watch::Sender<Condition>,
    layer: SocketLayer,
}

/// What connects the agent with its cluster.
struct Cluster {
    api: Option<Connection>,
    events: Events,
    ports: AwaitedPorts,
}

/// The addresses of an API server, and how to use them.
type Connection = (ApiServers, KubeSourceConfig);

/// The agent proper: sources, model, dataplane, and the controller that joins them.
fn agent(
    config: Config,
    at_connect: AtConnect,
    Told { health, manifests, layer }: Told,
    queries: mpsc::Receiver<Query>,
    Cluster { api, events: kubernetes, ports }: Cluster,
    registry: &mut Registry,
) -> impl Future<Output = anyhow::Result<()>> + use<> {
    // Modules register their metrics before the first await.
    let commits = Commits::register(registry);
    let changes = Changes::register(registry);
    let flows = Flows::register(registry);
    let no_local_endpoints = NoLocalEndpoints::register(registry);
    let files = Manifests::register(registry);
    async move {
        let (events, inbox) = mpsc::channel(EVENTS);
        let followed = move |condition| {
            files.tell(&condition);
            manifests.send_replace(condition);
        };
        let origins = start_sources(&config, api, events, followed).await?;
        let planner = Planner::new(settings::planner(&config, origins));
        let nftables = Nftables::open(settings::nftables(&config))?;
        let foreign = ready::readable(nftables.descriptor()?)?;
        let told = move |front| layer.tell(front);
        let dataplane = Layers::new(nftables, at_connect, told);
        let behind = dataplane.descriptor()?.map(ready::readable).transpose()?;
        let conntrack = Conntrack::spawn(config.conntrack.clean_sctp, move |looked| flows.looked(&looked))?;
        let service_health = ServiceHealth::spawn(health.subscribe(), kubernetes, ports);
        let followers: Vec<Box<dyn Follower>> =
            vec![Box::new(conntrack), Box::new(service_health), Box::new(no_local_endpoints)];
        Controller::new(planner, dataplane, followers, config.min_sync_period, health, commits, changes)
            .run(inbox, queries, foreign, behind)
            .await;
        anyhow::bail!("all sources ended")
    }
}

/// Starts what the configuration names; tells which origins there are. `followed` hears how the manifests fare.
async fn start_sources(
    config: &Config,
    api: Option<Connection>,
    events: mpsc::Sender<Vec<Event>>,
    followed: impl Fn(Condition) + Send + Sync + 'static,
) -> anyhow::Result<Vec<Origin>> {
    let mut origins = Vec::new();
    if let Some(dir) = &config.manifests {
        origins.push(Origin::Static);
        let node = Some(config.node_name.clone());
        manifest::spawn(dir.clone(), node, config.api.is_none(), events.clone(), followed);
    }
    if let Some((servers, source)) = api {
        origins.push(Origin::Api);
        kube::spawn(source, servers, events.clone()).await?;
    }
    host::spawn(events).context("following the host's addresses")?;
    Ok(origins)
}

/// Where Kubernetes Events go, the first of which says that the agent starts.
async fn start_events(
    config: &Config,
    api: Option<&Connection>,
    registry: &mut Registry,
) -> anyhow::Result<Events> {
    let Some((servers, source)) = api else { return Ok(Events::off()) };
    let events = Events::spawn(kube::client(source, servers).await?, &config.node_name, registry);
    events.node(Reason::Starting, String::new());
    Ok(events)
}

/// An Event for each Service of the API server that everybody may dial, since none of its source ranges can be read.
async fn tell_of_services(mut complained: mpsc::UnboundedReceiver<Complaint>, events: Events) {
    while let Some(Complaint { service, problem }) = complained.recv().await {
        if problem.field == SOURCE_RANGES {
            events.service(&service, Reason::InvalidSourceRanges, problem.to_string());
        }
    }
}
