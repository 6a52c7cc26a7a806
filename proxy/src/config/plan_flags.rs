//! The configuration of an agent that is only thought of: `kube-lane render`.

use clap::Args;

use super::error::ConfigError;
use super::file::KubeProxyConfiguration;
use super::layers::FileFlags;
use super::resolve::{Environment, Overrides, Resolved, resolve};
use super::values::go_bool;
use super::{AnswerFlags, Mode, NetworkFlags};

/// The agents' configuration files, and flags that override them.
#[derive(Args, Clone, Debug, Default)]
pub struct PlanFlags {
    #[command(flatten)]
    files: FileFlags,
    /// Plan for the node of this name [default: the configuration's, else the host name]
    #[arg(long, value_name = "NAME", alias = "hostname-override")]
    node_name: Option<String>,
    #[command(flatten)]
    network: NetworkFlags,
    /// With ebpf, say which layer answers each address, and why [default: the configuration's, else nftables]
    #[arg(long, value_enum)]
    proxy_mode: Option<Mode>,
    #[command(flatten)]
    answer: AnswerFlags,
    /// Masquerade every connection to a cluster IP
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    masquerade_all: Option<bool>,
}

impl PlanFlags {
    /// Reads the files that are named, and resolves them with the flags. There are no warnings without a file.
    ///
    /// # Errors
    /// When `--config` cannot be read or decoded, or when a value cannot be used.
    pub fn resolve(&self, environment: &Environment) -> Result<Resolved, ConfigError> {
        let mut layers = self.files.read()?;
        let mut flags = KubeProxyConfiguration {
            hostname_override: self.node_name.clone(),
            mode: self.proxy_mode.map(|mode| mode.as_str().to_owned()),
            ..KubeProxyConfiguration::default()
        };
        flags.nftables.masquerade_all = self.masquerade_all;
        flags.iptables.masquerade_all = self.masquerade_all;
        self.network.fill(&mut flags);
        self.answer.fill(&mut flags);
        layers.set_flags(flags);
        let overrides = Overrides { no_source: true, ..Overrides::default() };
        let mut resolved = resolve(layers, &overrides, environment)?;
        if self.files.config().or(self.files.config_base()).is_none() {
            resolved.warnings.clear();
        }
        Ok(resolved)
    }
}
