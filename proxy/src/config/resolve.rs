//! From what was written to what it means: defaults, validation, and one warning for all that has no effect.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;
use itertools::Itertools as _;
use serde_json::{Value, json};

use super::check::{Checker, text};
use super::duration::GoDuration;
use super::error::ConfigError;
use super::file::{KubeProxyConfiguration, leaves};
use super::layers::{BaseState, Layers, Source};
use super::migration;
use super::network::PRIMARY;
use super::settings::{Setting, is_zero, settings};
use super::{Api, Config, Conntrack, LogFormat, Logging, Mode, Network, SocketLb};

const HEALTHZ_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;

/// Fields that take effect, or that ask for what always holds here (no log buffer).
const HONOURED: &[&str] = &[
    "apiVersion",
    "kind",
    "bindAddress",
    "bindAddressHardFail",
    "clientConnection.kubeconfig",
    "clusterCIDR",
    "conntrack.",
    "detectLocal.",
    "detectLocalMode",
    "healthzBindAddress",
    "hostnameOverride",
    "iptables.masqueradeAll",
    "kubeLane.",
    "logging.flushFrequency",
    "logging.format",
    "logging.verbosity",
    "metricsBindAddress",
    "mode",
    "nftables.masqueradeAll",
    "nftables.minSyncPeriod",
    "nodePortAddresses",
    // kube-proxy on Linux ignores these as well.
    "portRange",
    "winkernel.",
    "windowsRunAsService",
];

/// What a file cannot say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Overrides {
    /// `--master`.
    pub(super) master: Option<String>,
    /// `--healthz-bind-address=` or `--healthz-port=0`.
    pub(super) no_healthz: bool,
    /// `--metrics-bind-address=` or `--metrics-port=0`.
    pub(super) no_metrics: bool,
    /// What is asked for needs no source of Services.
    pub(super) no_source: bool,
    /// It serves none either: what there is to say of serving them is said by the agent.
    pub(super) no_service: bool,
}

/// What the process finds around it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// The machine's host name.
    pub hostname: String,
    /// The process runs in a pod (`KUBERNETES_SERVICE_HOST` is set).
    pub in_cluster: bool,
}

impl Environment {
    /// Asks the system.
    pub fn read() -> Self {
        Self {
            hostname: nix::unistd::gethostname()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            in_cluster: std::env::var_os("KUBERNETES_SERVICE_HOST").is_some(),
        }
    }
}

/// A configuration, what to tell the user about it, and what it looks like in full.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The configuration.
    pub config: Config,
    /// One line each, for the log.
    pub warnings: Vec<String>,
    /// What is worth a word and nothing to warn of, one line each.
    pub notes: Vec<String>,
    /// What became of `--config-base`.
    pub base: BaseState,
    /// The settings that were written, and where.
    pub settings: Vec<Setting>,
    pub(super) file: KubeProxyConfiguration,
}

impl Resolved {
    /// The configuration as a KubeProxyConfiguration in YAML, with the defaults of the fields that take effect.
    /// `--config` reads it back to the same [`Config`], except that a file cannot say an address is off. The machine's
    /// own name is not in it: one file may serve every node.
    pub fn to_yaml(&self) -> String {
        let mut value = self.file.to_value();
        let Config {
            healthz_address, metrics_address, min_sync_period, conntrack, network, socket_lb, ..
        } = &self.config;
        let address = |address: &Option<SocketAddr>| address.map(|address| address.to_string());
        let primary = network.nodeport_addresses.primary.then(|| PRIMARY.to_owned());
        let networks = network.nodeport_addresses.networks.iter().map(ToString::to_string);
        let nodeport_addresses: Vec<_> = primary.into_iter().chain(networks).collect();
        let timeout = |timeout: Option<Duration>| json!(GoDuration(timeout.unwrap_or_default()));
        for (path, default) in [
            ("/apiVersion", json!(super::file::API_VERSION)),
            ("/kind", json!(super::file::KIND)),
            ("/mode", json!(self.config.mode.as_str())),
            ("/healthzBindAddress", json!(address(healthz_address))),
            ("/metricsBindAddress", json!(address(metrics_address))),
            ("/bindAddressHardFail", json!(self.config.bind_address_hard_fail)),
            ("/nftables/masqueradeAll", json!(self.config.masquerade_all)),
            ("/nftables/minSyncPeriod", json!(GoDuration(*min_sync_period))),
            ("/detectLocalMode", json!(text(&self.file.detect_local_mode).unwrap_or("ClusterCIDR"))),
            ("/nodePortAddresses", json!(nodeport_addresses)),
            ("/conntrack/maxPerCore", json!(conntrack.max_per_core.unwrap_or_default())),
            ("/conntrack/min", json!(conntrack.min)),
            ("/conntrack/tcpEstablishedTimeout", timeout(conntrack.tcp_established)),
            ("/conntrack/tcpCloseWaitTimeout", timeout(conntrack.tcp_close_wait)),
            ("/conntrack/tcpBeLiberal", json!(conntrack.tcp_be_liberal)),
            ("/conntrack/udpTimeout", timeout(conntrack.udp)),
            ("/conntrack/udpStreamTimeout", timeout(conntrack.udp_stream)),
        ] {
            set(&mut value, path, default);
        }
        if self.config.mode == Mode::Ebpf {
            for (path, default) in [
                ("/kubeLane/bpfRoot", json!(socket_lb.bpf_root)),
                ("/kubeLane/socketLB/udp", json!(socket_lb.udp)),
                ("/kubeLane/socketLB/external", json!(socket_lb.external)),
                ("/kubeLane/socketLB/loopbackNodePorts", json!(socket_lb.loopback_nodeports)),
                ("/kubeLane/socketLB/hostNamespaceOnly", json!(socket_lb.host_namespace_only)),
                ("/kubeLane/socketLB/leaveAlone", json!(socket_lb.leave_alone)),
                ("/kubeLane/socketLB/podCgroups", json!(socket_lb.pod_cgroups)),
                ("/kubeLane/socketLB/maxFrontends", json!(socket_lb.max_frontends)),
                ("/kubeLane/socketLB/maxServicePorts", json!(socket_lb.max_service_ports)),
                ("/kubeLane/socketLB/maxEndpoints", json!(socket_lb.max_endpoints)),
                ("/kubeLane/socketLB/maxAffinityClients", json!(socket_lb.max_affinity_clients)),
            ] {
                set(&mut value, path, default);
            }
        }
        if text(&self.file.hostname_override).is_some() {
            set(&mut value, "/hostnameOverride", json!(self.config.node_name));
        }
        serde_saphyr::to_string(&value).unwrap_or_default()
    }
}

/// Sets one field, making the section it stands in.
fn set(value: &mut Value, path: &str, field: Value) {
    let mut at = value;
    for name in path.split('/').skip(1) {
        if !at.is_object() {
            *at = json!({});
        }
        at = &mut at[name];
    }
    *at = field;
}

/// Resolves what was written. A base whose settings cannot be used is left out, which a warning says: kube-proxy's
/// file must not keep the node from being served.
///
/// # Errors
/// [`ConfigError::Invalid`], with every field whose value cannot be used.
pub(super) fn resolve(
    layers: Layers,
    overrides: &Overrides,
    environment: &Environment,
) -> Result<Resolved, ConfigError> {
    let resolved = match resolve_layers(&layers, overrides, environment) {
        Err(error) if layers.base_state == BaseState::Read => {
            // Where it is not the base's, the error is the same without it.
            let layers = layers.without_base(error.to_string().replace('\n', "; "));
            resolve_layers(&layers, overrides, environment).map_err(|_| error)
        }
        resolved => resolved,
    };
    resolved.map(|mut resolved| {
        if let BaseState::Refused(why) = &resolved.base {
            resolved.warnings.insert(0, format!("--config-base is not used: {why}"));
        }
        resolved
    })
}

fn resolve_layers(
    layers: &Layers,
    overrides: &Overrides,
    environment: &Environment,
) -> Result<Resolved, ConfigError> {
    let (file, sources) = (layers.merged(), layers.sources());
    let mut warnings = layers.warnings.clone();
    let mut check = Checker::default();

    let written_mode = text(&file.mode);
    let mode = match written_mode {
        None | Some("nftables") => Mode::Nftables,
        Some("ebpf") => Mode::Ebpf,
        Some(mode @ ("iptables" | "ipvs")) => {
            warnings.push(format!("mode {mode}: kube-lane serves with its nftables dataplane instead"));
            Mode::Nftables
        }
        Some(mode) => {
            check.invalid(
                "mode (--proxy-mode)",
                mode,
                "is no proxy mode",
                "use nftables (the default) or ebpf; iptables and ipvs are served by nftables",
            );
            Mode::Nftables
        }
    };
    // Each mode of kube-proxy reads a section of its own. Without a mode kube-proxy runs iptables and we nftables:
    // masquerading asked for in either section is meant.
    let nftables_all = file.nftables.masquerade_all == Some(true);
    let iptables_all = file.iptables.masquerade_all == Some(true);
    let masquerade_all = match written_mode {
        None => nftables_all || iptables_all,
        Some("iptables" | "ipvs") => iptables_all,
        Some(_) => nftables_all,
    };

    let mut of_service = Vec::new();
    let network = Network::resolve(&file, &mut check, &mut of_service);
    let (any, loopback): (IpAddr, IpAddr) = match network.bind_address {
        Some(IpAddr::V6(_)) => (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into()),
        _ => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into()),
    };
    let healthz_address = check.address(
        "healthzBindAddress (--healthz-bind-address)",
        text(&file.healthz_bind_address),
        SocketAddr::new(any, HEALTHZ_PORT),
    );
    let metrics_address = check.address(
        "metricsBindAddress (--metrics-bind-address)",
        text(&file.metrics_bind_address),
        SocketAddr::new(loopback, METRICS_PORT),
    );

    let conntrack = Conntrack::resolve(&file.conntrack, &file.kube_lane, &mut check);
    let socket_lb = SocketLb::resolve(&file.kube_lane, &mut check);
    let node_name = check.node_name(file.hostname_override.as_deref(), &environment.hostname);

    let manifests = file.kube_lane.manifests.clone().filter(|path| !path.as_os_str().is_empty());
    let mut api = Api {
        kubeconfig: text(&file.client_connection.kubeconfig).map(PathBuf::from),
        master: check.server_url("--master", text(&overrides.master)),
        base_kubeconfig: None,
    };
    if let Some(Source::Base(_)) = sources.of("clientConnection.kubeconfig") {
        api.base_kubeconfig = api.kubeconfig.take();
    }
    let api = if api != Api::default() || environment.in_cluster {
        Some(api)
    } else if manifests.is_some() || overrides.no_source {
        None
    } else {
        check.invalid(
            "clientConnection.kubeconfig (--kubeconfig)",
            "",
            "leaves no source of Services, since this is not a pod",
            "name a kubeconfig file, or a folder of manifests (--manifests) to work without an API server",
        );
        None
    };

    let format = match text(&file.logging.format) {
        None | Some("text" | "human") => LogFormat::Human,
        Some("json") => LogFormat::Json,
        Some(format) => {
            check.invalid("logging.format (--log-format)", format, "is no log format", "use text or json");
            LogFormat::Human
        }
    };

    let mut invalid = check.into_invalid();
    if !invalid.is_empty() {
        for field in &mut invalid {
            field.source_file = match sources.of(field.path()) {
                Some(Source::Base(path) | Source::File(path)) => Some(path),
                Some(Source::Flag(_)) | None => None,
            };
        }
        return Err(ConfigError::Invalid(invalid));
    }
    of_service.extend(socket_lb.warnings(mode, &network.detector, masquerade_all));
    if !overrides.no_service {
        warnings.append(&mut of_service);
    }
    let named = |path: &str| match sources.of(path)? {
        // In the base, a section of another mode of kube-proxy is nobody's wish.
        Source::Base(_) if path.starts_with("iptables.") || path.starts_with("ipvs.") => None,
        Source::Base(file) => Some(format!("{path} ({})", file.display())),
        Source::File(_) => Some(path.to_owned()),
        flag @ Source::Flag(_) => Some(flag.to_string()),
    };
    let mut idle: Vec<_> =
        without_effect(&file.to_value(), written_mode).iter().filter_map(|path| named(path)).collect();
    // The kernel takes a connection to a loopback address nowhere else, unless a program at the socket changes its
    // destination.
    let served =
        |network: &&IpNetwork| mode == Mode::Ebpf && socket_lb.loopback_nodeports && network.is_ipv4();
    let loopback = network.nodeport_addresses.loopback().filter(|network| !served(network)).join(", ");
    if !loopback.is_empty() {
        idle.extend(named("nodePortAddresses").map(|name| format!("{name} (its {loopback})")));
    }
    if !idle.is_empty() {
        warnings
            .push(format!("kube-lane does not support these settings and ignores them: {}", idle.join(", ")));
    }
    let notes = (!overrides.no_service).then(|| migration::note(layers)).flatten();
    let missing = layers.missing_kubeconfig.iter().map(|path| {
        format!("the kubeconfig that --config-base names does not exist and is not used: {}", path.display())
    });
    let config = Config {
        mode,
        node_name,
        api,
        manifests,
        state_dir: file.kube_lane.state_dir.clone().filter(|path| !path.as_os_str().is_empty()),
        network,
        socket_lb,
        masquerade_all,
        count_connections: file.kube_lane.count_connections.unwrap_or_default(),
        drop_invalid: file.kube_lane.drop_invalid.unwrap_or_default(),
        min_sync_period: file.nftables.min_sync_period.unwrap_or_default().0,
        healthz_address: (!overrides.no_healthz).then_some(healthz_address),
        metrics_address: (!overrides.no_metrics).then_some(metrics_address),
        bind_address_hard_fail: file.bind_address_hard_fail.unwrap_or_default(),
        conntrack,
        logging: Logging {
            format,
            verbosity: file.logging.verbosity.unwrap_or_default(),
            level: file.kube_lane.log_level.clone().filter(|level| !level.is_empty()),
        },
    };
    Ok(Resolved {
        config,
        warnings,
        notes: missing.chain(notes).collect(),
        base: layers.base_state.clone(),
        settings: settings(layers, text(&overrides.master)),
        file,
    })
}

/// The fields that are set to something else than kube-proxy's default, and that nothing here reads. A zero value
/// (off, empty, leave as it is) is what kube-lane does anyway.
fn without_effect(file: &Value, mode: Option<&str>) -> Vec<String> {
    let defaults = json!({
        "clientConnection": {
            "contentType": "application/vnd.kubernetes.protobuf", "qps": 5.0, "burst": 10,
        },
        "configSyncPeriod": "15m0s",
        "oomScoreAdj": -999,
        "iptables": {
            "localhostNodePorts": true, "masqueradeBit": 14, "minSyncPeriod": "1s", "syncPeriod": "30s",
        },
        "ipvs": { "syncPeriod": "30s" },
        "nftables": { "masqueradeBit": 14, "syncPeriod": "30s" },
    });
    let is_read = |path: &str| {
        let honoured = HONOURED
            .iter()
            .any(|&honoured| path == honoured || honoured.ends_with('.') && path.starts_with(honoured));
        let other_mode = match path.split_once('.') {
            Some(("iptables", _)) => !matches!(mode, None | Some("iptables" | "ipvs")),
            Some(("nftables", _)) => matches!(mode, Some("iptables" | "ipvs")),
            _ => false,
        };
        honoured || other_mode
    };
    let is_default =
        |path: &str, value: &Value| defaults.pointer(&format!("/{}", path.replace('.', "/"))) == Some(value);
    leaves(file)
        .into_iter()
        .filter(|(path, value)| !is_read(path) && !is_default(path, value) && !is_zero(value))
        .map(|(path, _)| path)
        .collect()
}
