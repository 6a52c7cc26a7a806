//! The configuration of an agent that is only thought of: `kube-lane render`.

use clap::Args;

use super::error::ConfigError;
use super::file::KubeProxyConfiguration;
use super::flags::read;
use super::resolve::{Environment, Overrides, Resolved, resolve};
use super::values::go_bool;
use super::{AnswerFlags, Mode, NetworkFlags};

/// The agents' configuration file, and flags that go before it.
#[derive(Args, Clone, Debug, Default)]
pub struct PlanFlags {
    /// The agents' configuration file; flags go before it
    #[arg(long, value_name = "FILE")]
    config: Option<String>,
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
    /// Reads the file, where one is named, and resolves it with the flags. There are no warnings without a file.
    ///
    /// # Errors
    /// When the file cannot be read or decoded, or when a value cannot be used.
    pub fn resolve(&self, environment: &Environment) -> Result<Resolved, ConfigError> {
        let (mut file, mut warnings) = (KubeProxyConfiguration::default(), Vec::new());
        let path = self.config.as_deref().filter(|path| !path.is_empty());
        if let Some(path) = path {
            let parsed = read(path.as_ref())?;
            file = parsed.file;
            warnings.extend(parsed.warnings.into_iter().map(|warning| format!("{path}, {warning}")));
        }
        file.hostname_override = self.node_name.clone().or(file.hostname_override);
        file.mode = self.proxy_mode.map(|mode| mode.as_str().to_owned()).or(file.mode);
        file.nftables.masquerade_all = self.masquerade_all.or(file.nftables.masquerade_all);
        file.iptables.masquerade_all = self.masquerade_all.or(file.iptables.masquerade_all);
        self.network.fill(&mut file);
        self.answer.fill(&mut file);
        let overrides = Overrides { no_source: true, ..Overrides::default() };
        let mut resolved = resolve(file, &overrides, environment, str::to_owned)?;
        warnings.append(&mut resolved.warnings);
        resolved.warnings = if path.is_some() { warnings } else { Vec::new() };
        Ok(resolved)
    }
}
