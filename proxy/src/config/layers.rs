//! The layers of a configuration: the flags over `--config` over `--config-base`, field by field.
//!
//! Owns reading the files, which layer wins, and where each setting comes from. Never judges a value: that is
//! `resolve`'s.
//!
//! A section is merged with the section below it; a text, a number and a list replace what is below. `null` and an
//! absent field set nothing. An empty text or list does: it stands for the default, whatever a lower layer says.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use super::error::ConfigError;
use super::file::{KubeProxyConfiguration, Overlay, leaves};
use super::names;
use super::parse::{Parsed, parse};
use super::values::go_bool;

/// The configuration files, as every command takes them that reads the agent's configuration.
#[derive(Args, Clone, Debug, Default)]
pub struct FileFlags {
    /// The agent's configuration file (KubeProxyConfiguration v1alpha1, YAML or JSON)
    #[arg(long, value_name = "FILE")]
    config: Option<String>,
    /// A configuration file whose settings --config and the flags override, such as kube-proxy's own in a kubeadm
    /// cluster (/var/lib/kube-proxy/config.conf); it may be missing
    #[arg(long, value_name = "FILE")]
    config_base: Option<String>,
    /// Warn of unknown fields in --config that are written almost like known ones, instead of refusing the file
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    config_lenient: Option<bool>,
}

impl FileFlags {
    /// `--config`, unless it is empty.
    pub(super) fn config(&self) -> Option<&Path> {
        path(&self.config)
    }

    /// `--config-base`, unless it is empty.
    pub(super) fn config_base(&self) -> Option<&Path> {
        path(&self.config_base)
    }

    /// The files that are named.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.config().into_iter().chain(self.config_base())
    }

    /// The same files, of which no field has to be spelt right.
    pub(super) fn lenient(&self) -> Self {
        Self { config_lenient: Some(true), ..self.clone() }
    }

    /// Reads the files; the flags are added later. A base that cannot be read or decoded is left out; what it has of other
    /// versions' fields is nobody's mistake.
    ///
    /// # Errors
    /// When `--config` cannot be read or decoded, or has a misspelt field.
    pub(super) fn read(&self) -> Result<Layers, ConfigError> {
        let mut layers = Layers::default();
        if let Some(path) = self.config_base() {
            match read(path) {
                Ok(Parsed { file, warnings, misspelt }) => {
                    layers.warnings.extend(named(path, [warnings, misspelt].concat()));
                    layers.base = Some((path.to_owned(), with_own_masquerade(file)));
                    layers.base_state = BaseState::Read;
                }
                Err(ConfigError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    layers.base_state = BaseState::Missing;
                }
                Err(error) => layers.base_state = BaseState::Refused(error.to_string()),
            }
        }
        if let Some(path) = self.config() {
            let Parsed { file, warnings, misspelt } = read(path)?;
            if !misspelt.is_empty() && self.config_lenient != Some(true) {
                return Err(ConfigError::Misspelt { path: path.to_owned(), fields: misspelt });
            }
            layers.warnings.extend(named(path, [warnings, misspelt].concat()));
            layers.file = Some((path.to_owned(), file));
        }
        layers.pass_over_missing_kubeconfig();
        Ok(layers)
    }
}

fn path(flag: &Option<String>) -> Option<&Path> {
    flag.as_deref().filter(|path| !path.is_empty()).map(Path::new)
}

fn read(path: &Path) -> Result<Parsed, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
    parse(path, &text)
}

fn named(path: &Path, warnings: Vec<String>) -> impl Iterator<Item = String> {
    warnings.into_iter().map(move |warning| format!("{}, {warning}", path.display()))
}

/// kube-proxy reads `masqueradeAll` from the section of its mode. A layer above may set another mode: what the base asks
/// for has to survive that.
fn with_own_masquerade(mut base: KubeProxyConfiguration) -> KubeProxyConfiguration {
    if matches!(base.mode.as_deref(), None | Some("" | "iptables" | "ipvs"))
        && base.iptables.masquerade_all == Some(true)
    {
        base.nftables.masquerade_all = Some(true);
    }
    base
}

/// What became of `--config-base`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BaseState {
    /// There is no `--config-base`.
    #[default]
    NotNamed,
    /// The file does not exist.
    Missing,
    /// Its settings count, except where a higher layer has its own.
    Read,
    /// It cannot be used, for this reason.
    Refused(String),
}

/// Where a setting was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `--config-base`.
    Base(PathBuf),
    /// `--config`.
    File(PathBuf),
    /// This flag, without its dashes; a field that no flag is known to set stands for itself.
    Flag(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base(path) | Self::File(path) => path.display().fmt(f),
            Self::Flag(flag) if flag.len() == 1 => write!(f, "-{flag}"),
            Self::Flag(flag) => write!(f, "--{flag}"),
        }
    }
}

/// All that was written, layer by layer.
#[derive(Clone, Debug, Default)]
pub(super) struct Layers {
    base: Option<(PathBuf, KubeProxyConfiguration)>,
    file: Option<(PathBuf, KubeProxyConfiguration)>,
    flags: KubeProxyConfiguration,
    pub(super) base_state: BaseState,
    /// What is odd about the files, one line each.
    pub(super) warnings: Vec<String>,
    /// The kubeconfig that the base names and that does not exist.
    pub(super) missing_kubeconfig: Option<PathBuf>,
}

impl Layers {
    /// Puts the flags on top.
    pub(super) fn set_flags(&mut self, flags: KubeProxyConfiguration) {
        self.flags = flags;
    }

    /// Puts on top what counts beside `--config`: the host name, the logs and our own flags, as in kube-proxy. Names the
    /// flags that do not.
    pub(super) fn set_flags_beside_file(&mut self, flags: KubeProxyConfiguration) -> BTreeSet<String> {
        let counted = KubeProxyConfiguration {
            hostname_override: flags.hostname_override.clone(),
            logging: flags.logging.clone(),
            kube_lane: flags.kube_lane.clone(),
            ..KubeProxyConfiguration::default()
        };
        let (all, some) = (flags.to_value(), counted.to_value());
        let some = leaves(&some);
        self.flags = counted;
        leaves(&all).into_iter().filter(|leaf| !some.contains(leaf)).map(|(path, _)| flag(&path)).collect()
    }

    /// Whether `--config` is there.
    pub(super) fn has_file(&self) -> bool {
        self.file.is_some()
    }

    /// The file that was kube-proxy's: the base, else `--config`, and what it says.
    pub(super) fn of_kube_proxy(&self) -> Option<(&Path, &KubeProxyConfiguration)> {
        self.base.as_ref().or(self.file.as_ref()).map(|(path, content)| (path.as_path(), content))
    }

    /// Whether `--config-base` is among them.
    pub(super) fn has_base(&self) -> bool {
        self.base.is_some()
    }

    /// All layers in one.
    pub(super) fn merged(&self) -> KubeProxyConfiguration {
        let content = |layer: &Option<(PathBuf, KubeProxyConfiguration)>| {
            layer.as_ref().map(|(_, content)| content.clone()).unwrap_or_default()
        };
        self.flags.clone().over(content(&self.file)).over(content(&self.base))
    }

    /// The same layers without the base, and why.
    pub(super) fn without_base(self, why: String) -> Self {
        let of_base = self.base.as_ref().map(|(path, _)| format!("{}, ", path.display()));
        let is_of_base = |warning: &String| of_base.as_ref().is_some_and(|start| warning.starts_with(start));
        let mut warnings = self.warnings;
        warnings.retain(|warning| !is_of_base(warning));
        Self { base: None, base_state: BaseState::Refused(why), missing_kubeconfig: None, warnings, ..self }
    }

    /// Where the setting at this dotted path comes from.
    pub(super) fn sources(&self) -> Sources {
        let layer = |layer: &Option<(PathBuf, KubeProxyConfiguration)>| {
            layer.as_ref().map(|(path, content)| (path.clone(), content.to_value()))
        };
        Sources { base: layer(&self.base), file: layer(&self.file), flags: self.flags.to_value() }
    }

    /// kubeadm's kubeconfig lies beside its configuration. That of another cluster may not be there: its settings count
    /// all the same.
    fn pass_over_missing_kubeconfig(&mut self) {
        let written = |file: &KubeProxyConfiguration| file.client_connection.kubeconfig.clone();
        if self.file.as_ref().is_some_and(|(_, file)| written(file).is_some()) {
            return;
        }
        let Some((_, base)) = &mut self.base else { return };
        let kubeconfig = written(base).filter(|path| !path.is_empty()).map(PathBuf::from);
        if let Some(missing) = kubeconfig.filter(|path| !path.exists()) {
            base.client_connection.kubeconfig = None;
            self.missing_kubeconfig = Some(missing);
        }
    }
}

/// The layers by the dotted paths of their fields.
pub(super) struct Sources {
    base: Option<(PathBuf, Value)>,
    file: Option<(PathBuf, Value)>,
    flags: Value,
}

impl Sources {
    /// Where the setting at this dotted path comes from; `None`: no layer sets it.
    pub(super) fn of(&self, path: &str) -> Option<Source> {
        let pointer = format!("/{}", path.replace('.', "/"));
        let has = |layer: &Option<(PathBuf, Value)>| {
            let (path, value) = layer.as_ref()?;
            value.pointer(&pointer).map(|_| path.clone())
        };
        if self.flags.pointer(&pointer).is_some() {
            return Some(Source::Flag(flag(path)));
        }
        has(&self.file).map(Source::File).or_else(|| has(&self.base).map(Source::Base))
    }

    /// Whether several layers set this, not all to the same.
    pub(super) fn is_overridden(&self, path: &str) -> bool {
        let pointer = format!("/{}", path.replace('.', "/"));
        let files = [&self.file, &self.base].into_iter().flatten().map(|(_, value)| value);
        let mut values =
            std::iter::once(&self.flags).chain(files).filter_map(|layer| layer.pointer(&pointer));
        values.next().is_some_and(|first| values.any(|value| value != first))
    }
}

fn flag(path: &str) -> String {
    names::flag_of(path).unwrap_or(path).to_owned()
}
