//! kube-proxy's command line, flag for flag, and the few flags of our own.
//!
//! A flag only says which field of `KubeProxyConfiguration` it sets; what the field means is `resolve`'s.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::conntrack::ConntrackFlags;
use super::duration::GoDuration;
use super::error::ConfigError;
use super::file::{KubeProxyConfiguration, prune};
use super::layers::FileFlags;
use super::resolve::{Environment, Overrides, Resolved, resolve};
use super::socket_lb::{self, Roots, SocketLbFlags};
use super::values::{go_bool, not_empty};
use super::{LogFormat, Logging, NetworkFlags};
use crate::address::parse_ip;

/// The flags of `kube-lane run`, which are those of kube-proxy.
#[derive(Args, Clone, Debug, Default)]
pub struct RunFlags {
    #[command(flatten)]
    log: LogFlags,
    #[command(flatten)]
    network: NetworkFlags,
    #[command(flatten)]
    conntrack: ConntrackFlags,
    #[command(flatten)]
    socket_lb: SocketLbFlags,
    #[command(flatten)]
    tolerated: ToleratedFlags,

    /// Folder of static Services, EndpointSlices and Nodes, beside the API server or without one
    #[arg(long, value_name = "DIR")]
    manifests: Option<String>,
    /// Folder of this node in which the agent remembers the API servers' addresses
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,

    #[command(flatten)]
    files: FileFlags,
    /// Write the resolved configuration to this file and exit
    #[arg(long, value_name = "FILE")]
    write_config_to: Option<String>,
    /// Remove everything of kube-lane from the kernel and exit
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    cleanup: Option<bool>,
    /// Do only what the agent has no privileges for in a pod and exit: set the limits of connection tracking, have the
    /// kernel load what the ruleset needs
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    init_only: Option<bool>,
    /// Print the version and exit
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    version: Option<String>,

    /// Kubeconfig file; without it and without --master, the pod's ServiceAccount
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<String>,
    /// URL of the API server, in place of the kubeconfig's
    #[arg(long, value_name = "URL")]
    master: Option<String>,
    /// Name of this machine's Node object, where it is not the host name
    #[arg(long, value_name = "NAME")]
    hostname_override: Option<String>,
    /// nftables (default) or ebpf; iptables and ipvs are served by nftables
    #[arg(long, value_name = "MODE")]
    proxy_mode: Option<String>,
    /// Masquerade every connection to a cluster IP
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    masquerade_all: Option<bool>,
    /// Count new connections to each endpoint, and refused ones, in nftables, too (kube-lane status): each element that
    /// counts takes memory on every processor, and loads more slowly
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    count_connections: Option<bool>,
    /// Drop forwarded packets that belong to no connection as conntrack knows it (ct state invalid), as kube-proxy's
    /// iptables mode does
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    drop_invalid: Option<bool>,
    /// Least time between two commits; commits are not delayed unless this is set
    #[arg(long, value_name = "DURATION")]
    iptables_min_sync_period: Option<GoDuration>,
    /// Where /healthz and /livez are served; empty: nowhere [default: 0.0.0.0:10256]
    #[arg(long, value_name = "IP:PORT")]
    healthz_bind_address: Option<String>,
    /// Where /metrics and /proxyMode are served; empty: nowhere [default: 127.0.0.1:10249]
    #[arg(long, value_name = "IP:PORT")]
    metrics_bind_address: Option<String>,
    /// End the process when an address cannot be bound, instead of trying again
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    bind_address_hard_fail: Option<bool>,
    /// Port of --healthz-bind-address where that names none; 0: nowhere
    #[arg(long, hide = true)]
    healthz_port: Option<u16>,
    /// Port of --metrics-bind-address where that names none; 0: nowhere
    #[arg(long, hide = true)]
    metrics_port: Option<u16>,
}

/// What subcommands beside `run` are told of the agent's configuration.
#[derive(Args, Clone, Debug, Default)]
pub struct AgentFlags {
    #[command(flatten)]
    files: FileFlags,
    #[command(flatten)]
    roots: Roots,
}

impl AgentFlags {
    /// Whether there is a configuration file to read.
    pub fn names_file(&self) -> bool {
        self.files.config().or(self.files.config_base()).is_some()
    }
}

impl From<&AgentFlags> for RunFlags {
    fn from(flags: &AgentFlags) -> Self {
        let AgentFlags { files, roots } = flags.clone();
        Self { files, socket_lb: roots.into(), ..Self::default() }
    }
}

/// The flags about logs, which every subcommand has.
#[derive(Args, Clone, Debug, Default)]
pub struct LogFlags {
    /// Verbosity as in kube-proxy: 4 and above debug, 6 and above trace
    #[arg(short, long = "v", value_name = "N")]
    v: Option<u32>,
    /// Form of the log
    #[arg(long, alias = "logging-format", value_name = "human|json")]
    log_format: Option<String>,
    /// A level (error, warn, info, debug, trace) or a filter like info,kube_lane::source=debug
    #[arg(long, value_name = "LEVEL|FILTER")]
    log_level: Option<String>,
}

/// kube-proxy's flags that have no effect here so far.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = None)]
struct ToleratedFlags {
    #[arg(long, hide = true, value_parser = feature_gates, value_name = "K=BOOL,...")]
    feature_gates: Option<BTreeMap<String, bool>>,
    #[arg(long, hide = true)]
    kube_api_content_type: Option<String>,
    #[arg(long, hide = true)]
    kube_api_qps: Option<f32>,
    #[arg(long, hide = true)]
    kube_api_burst: Option<i32>,
    #[arg(long, hide = true, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    profiling: Option<bool>,
    #[arg(long, hide = true)]
    show_hidden_metrics_for_version: Option<String>,
    #[arg(long, hide = true)]
    iptables_masquerade_bit: Option<i32>,
    #[arg(long, hide = true, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    iptables_localhost_nodeports: Option<bool>,
    #[arg(long, hide = true)]
    iptables_sync_period: Option<GoDuration>,
    #[arg(long, hide = true)]
    ipvs_sync_period: Option<GoDuration>,
    #[arg(long, hide = true)]
    ipvs_min_sync_period: Option<GoDuration>,
    #[arg(long, hide = true)]
    ipvs_scheduler: Option<String>,
    #[arg(long, hide = true, value_delimiter = ',')]
    ipvs_exclude_cidrs: Option<Vec<String>>,
    #[arg(long, hide = true, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    ipvs_strict_arp: Option<bool>,
    #[arg(long, hide = true)]
    ipvs_tcp_timeout: Option<GoDuration>,
    #[arg(long, hide = true)]
    ipvs_tcpfin_timeout: Option<GoDuration>,
    #[arg(long, hide = true)]
    ipvs_udp_timeout: Option<GoDuration>,
    #[arg(long, hide = true, allow_negative_numbers = true)]
    oom_score_adj: Option<i32>,
    #[arg(long, hide = true)]
    config_sync_period: Option<GoDuration>,
    #[arg(long, hide = true)]
    vmodule: Option<String>,
    #[arg(long, hide = true)]
    log_flush_frequency: Option<GoDuration>,
    #[arg(long, hide = true, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    log_text_split_stream: Option<bool>,
    #[arg(long, hide = true)]
    log_text_info_buffer_size: Option<String>,
    #[arg(long, hide = true, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    log_json_split_stream: Option<bool>,
    #[arg(long, hide = true)]
    log_json_info_buffer_size: Option<String>,
}

/// What the flags ask for, apart from how it is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Serve until a signal ends it.
    Run,
    /// Prepare what needs full privileges, and exit.
    InitOnly,
    /// Remove everything of ours from the kernel.
    Cleanup,
    /// Print the version.
    Version,
    /// Write the resolved configuration to a file.
    WriteConfig(PathBuf),
}

impl RunFlags {
    /// What to do: as in kube-proxy, `--version` goes before `--write-config-to`, and that before `--cleanup`.
    pub fn action(&self) -> Action {
        match (&self.version, &self.write_config_to) {
            (Some(version), _) if version != "false" => Action::Version,
            (_, Some(path)) if !path.is_empty() => Action::WriteConfig(path.into()),
            _ if self.cleanup == Some(true) => Action::Cleanup,
            _ if self.init_only == Some(true) => Action::InitOnly,
            _ => Action::Run,
        }
    }

    /// The configuration files that are named.
    pub fn files(&self) -> Vec<PathBuf> {
        self.files.paths().map(Path::to_owned).collect()
    }

    /// How `--cleanup` and other actions without a configuration log.
    pub fn log(&self) -> &LogFlags {
        &self.log
    }

    /// Where `--cleanup` looks for the socket layer, where that is said. Nothing else of a configuration has to be usable for that.
    ///
    /// # Errors
    /// When the configuration file cannot be read or decoded.
    pub fn bpf_root(&self) -> Result<Option<PathBuf>, ConfigError> {
        let flag = self.to_file().kube_lane.bpf_root;
        let root =
            if flag.is_none() { self.files.lenient().read()?.merged().kube_lane.bpf_root } else { flag };
        Ok(socket_lb::not_empty(root))
    }

    /// Reads the configuration files that are named, and resolves them together with the flags.
    ///
    /// # Errors
    /// When the file cannot be read or decoded, or when a value cannot be used.
    pub fn resolve(&self, environment: &Environment) -> Result<Resolved, ConfigError> {
        self.resolve_with(environment, self.overrides())
    }

    /// The same for what concerns the node alone: no source of Services has to be named.
    ///
    /// # Errors
    /// As [`Self::resolve`].
    pub fn resolve_for_node(&self, environment: &Environment) -> Result<Resolved, ConfigError> {
        self.resolve_with(environment, Overrides { no_source: true, ..self.overrides() })
    }

    /// The same for what only prepares the node.
    ///
    /// # Errors
    /// As [`Self::resolve`].
    pub fn resolve_to_prepare(&self, environment: &Environment) -> Result<Resolved, ConfigError> {
        let overrides = Overrides { no_source: true, no_service: true, ..self.overrides() };
        self.resolve_with(environment, overrides)
    }

    fn resolve_with(&self, environment: &Environment, overrides: Overrides) -> Result<Resolved, ConfigError> {
        let mut layers = self.files.read()?;
        if !layers.has_file() {
            layers.set_flags(self.to_file());
            return resolve(layers, &overrides, environment);
        }
        let ignored = layers.set_flags_beside_file(self.to_file());
        if !ignored.is_empty() {
            let ignored: Vec<_> = ignored.iter().map(|flag| format!("--{flag}")).collect();
            layers
                .warnings
                .push(format!("--config is set, so these flags have no effect: {}", ignored.join(", ")));
        }
        // The addresses are the file's.
        let overrides = Overrides { no_healthz: false, no_metrics: false, ..overrides };
        resolve(layers, &overrides, environment)
    }

    fn overrides(&self) -> Overrides {
        let off = |address: &Option<String>, port| address.as_deref() == Some("") || port == Some(0);
        Overrides {
            master: self.master.clone(),
            no_healthz: off(&self.healthz_bind_address, self.healthz_port),
            no_metrics: off(&self.metrics_bind_address, self.metrics_port),
            no_source: false,
            no_service: false,
        }
    }

    /// The flags in the form of a file.
    fn to_file(&self) -> KubeProxyConfiguration {
        let tolerated = self.tolerated.clone();
        let mut file = KubeProxyConfiguration {
            feature_gates: tolerated.feature_gates,
            hostname_override: self.hostname_override.clone(),
            healthz_bind_address: self
                .healthz_bind_address
                .clone()
                .map(|at| with_port(at, self.healthz_port)),
            metrics_bind_address: self
                .metrics_bind_address
                .clone()
                .map(|at| with_port(at, self.metrics_port)),
            bind_address_hard_fail: self.bind_address_hard_fail,
            enable_profiling: tolerated.profiling,
            show_hidden_metrics_for_version: tolerated.show_hidden_metrics_for_version,
            mode: self.proxy_mode.clone(),
            oom_score_adj: tolerated.oom_score_adj,
            config_sync_period: tolerated.config_sync_period,
            ..KubeProxyConfiguration::default()
        };
        self.network.fill(&mut file);
        self.conntrack.fill(&mut file);
        self.socket_lb.fill(&mut file);
        file.client_connection.kubeconfig = self.kubeconfig.clone();
        file.client_connection.content_type = tolerated.kube_api_content_type;
        file.client_connection.qps = tolerated.kube_api_qps;
        file.client_connection.burst = tolerated.kube_api_burst;
        file.nftables.masquerade_all = self.masquerade_all;
        file.nftables.min_sync_period = self.iptables_min_sync_period;
        file.nftables.sync_period = tolerated.iptables_sync_period;
        file.iptables.masquerade_all = self.masquerade_all;
        file.iptables.masquerade_bit = tolerated.iptables_masquerade_bit;
        file.iptables.localhost_node_ports = tolerated.iptables_localhost_nodeports;
        file.ipvs.sync_period = tolerated.ipvs_sync_period;
        file.ipvs.min_sync_period = tolerated.ipvs_min_sync_period;
        file.ipvs.scheduler = tolerated.ipvs_scheduler;
        file.ipvs.exclude_cidrs = tolerated.ipvs_exclude_cidrs.map(not_empty);
        file.ipvs.strict_arp = tolerated.ipvs_strict_arp;
        file.ipvs.tcp_timeout = tolerated.ipvs_tcp_timeout;
        file.ipvs.tcp_fin_timeout = tolerated.ipvs_tcpfin_timeout;
        file.ipvs.udp_timeout = tolerated.ipvs_udp_timeout;
        file.logging.format = self.log.log_format.clone();
        file.logging.verbosity = self.log.v;
        file.logging.vmodule = tolerated.vmodule.map(Into::into);
        file.logging.flush_frequency = tolerated.log_flush_frequency.map(|period| period.to_string().into());
        let mut options = json!({
            "text": {
                "splitStream": tolerated.log_text_split_stream,
                "infoBufferSize": tolerated.log_text_info_buffer_size,
            },
            "json": {
                "splitStream": tolerated.log_json_split_stream,
                "infoBufferSize": tolerated.log_json_info_buffer_size,
            },
        });
        prune(&mut options);
        file.logging.options = (options != json!({})).then_some(options);
        file.kube_lane.manifests = self.manifests.as_ref().map(PathBuf::from);
        file.kube_lane.state_dir = self.state_dir.clone();
        file.kube_lane.count_connections = self.count_connections;
        file.kube_lane.drop_invalid = self.drop_invalid;
        file.kube_lane.log_level = self.log.log_level.clone();
        file
    }
}

impl LogFlags {
    /// How to log, for the subcommands that need no other configuration.
    pub fn logging(&self) -> Logging {
        Logging {
            format: if self.log_format.as_deref() == Some("json") {
                LogFormat::Json
            } else {
                LogFormat::Human
            },
            verbosity: self.v.unwrap_or_default(),
            level: self.log_level.clone(),
        }
    }
}

/// An IP address alone takes the port of the flag that kube-proxy keeps for that.
fn with_port(address: String, port: Option<u16>) -> String {
    match (parse_ip(&address), port) {
        (Some(ip), Some(port)) => std::net::SocketAddr::new(ip, port).to_string(),
        _ => address,
    }
}

fn feature_gates(text: &str) -> Result<BTreeMap<String, bool>, String> {
    text.split(',')
        .filter(|gate| !gate.trim().is_empty())
        .map(|gate| match gate.split_once('=').map(|(name, value)| (name, value.trim().parse())) {
            Some((name, Ok(value))) => Ok((name.trim().to_owned(), value)),
            _ => Err(format!("{gate:?} is not written like Gate=true")),
        })
        .collect()
}
