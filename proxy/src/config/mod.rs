//! What the user asked for: kube-proxy's flags and `KubeProxyConfiguration`, resolved into one plain [`Config`].
//!
//! ```text
//! flags               ┐
//! --config FILE       ├→ layers → KubeProxyConfiguration → resolve → Config + warnings
//! --config-base FILE  ┘
//! ```
//!
//! Owns reading, precedence, defaults and validation. Never touches the kernel, the API server or the logs: warnings
//! are handed back as text, because how to log is itself configured here.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

mod check;
mod conntrack;
mod duration;
mod error;
mod file;
pub mod flags;
mod layers;
mod migration;
mod misspelt;
mod names;
mod network;
mod parse;
mod plan_flags;
mod resolve;
mod settings;
mod socket_lb;
#[cfg(test)]
mod tests;
pub(crate) mod values;

pub use conntrack::Conntrack;
pub use error::{ConfigError, InvalidField};
pub use layers::{BaseState, FileFlags, Source};
use network::NetworkFlags;
pub use network::{Detector, Network, NodePortAddresses};
pub use plan_flags::PlanFlags;
pub use resolve::{Environment, Resolved};
pub use settings::{ConfigStatus, Reread, Setting};
use socket_lb::AnswerFlags;
pub use socket_lb::SocketLb;

/// The resolved configuration of an agent.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Which dataplanes run.
    pub mode: Mode,
    /// `metadata.name` of the own Node.
    pub node_name: String,
    /// How to reach the API server; `None`: Services come from the manifest folder alone, or none are needed.
    pub api: Option<Api>,
    /// The manifest folder.
    pub manifests: Option<PathBuf>,
    /// Where the agent keeps what it remembers between runs; `None`: nowhere.
    pub state_dir: Option<PathBuf>,
    /// Whose addresses are whose.
    pub network: Network,
    /// How the socket layer works.
    pub socket_lb: SocketLb,
    /// Masquerade every connection to a cluster IP.
    pub masquerade_all: bool,
    /// Count in nftables, too, how many connections each backend gets (`kubeLane.countConnections`).
    pub count_connections: bool,
    /// Drop forwarded packets that belong to no connection as conntrack knows it (`kubeLane.dropInvalid`).
    pub drop_invalid: bool,
    /// The least time between two commits; zero: commit at once.
    pub min_sync_period: Duration,
    /// Where `/healthz` and `/livez` are served; `None`: nowhere.
    pub healthz_address: Option<SocketAddr>,
    /// Where `/metrics` and `/proxyMode` are served; `None`: nowhere.
    pub metrics_address: Option<SocketAddr>,
    /// An address that cannot be bound ends the process instead of being tried again.
    pub bind_address_hard_fail: bool,
    /// Limits and timeouts of connection tracking.
    pub conntrack: Conntrack,
    /// How to log.
    pub logging: Logging,
}

/// Which dataplanes run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// nftables alone.
    Nftables,
    /// nftables, and eBPF in front of it.
    Ebpf,
}

impl Mode {
    /// As `--proxy-mode` and `/proxyMode` write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Ebpf => "ebpf",
        }
    }
}

/// How to reach the API server. No field set: from inside the cluster, by the pod's ServiceAccount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Api {
    /// The kubeconfig file that `--kubeconfig` or `--config` names.
    pub kubeconfig: Option<PathBuf>,
    /// The server's URL, in place of the one that the kubeconfig names.
    pub master: Option<String>,
    /// The kubeconfig file that `--config-base` names, where `kubeconfig` is not set. It existed when this was resolved.
    pub base_kubeconfig: Option<PathBuf>,
}

/// How to log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Logging {
    /// For people or for machines.
    pub format: LogFormat,
    /// `-v`, klog's verbosity.
    pub verbosity: u32,
    /// `--log-level`: a level or a filter like `info,kube_lane::source=debug`; goes before `verbosity`.
    pub level: Option<String>,
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Text.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}
