//! The settings that were written, with the file or flag that each comes from, and what a change of the files means.
//!
//! Pure. Never reads a file.

use std::fmt;

use serde_json::{Value, json};

use super::error::ConfigError;
use super::file::leaves;
use super::layers::{BaseState, Layers, Source};
use super::resolve::Resolved;

/// One setting that somebody wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// Its dotted path in the file.
    pub field: String,
    /// Its value.
    pub value: Value,
    /// Where it comes from.
    pub source: Source,
}

impl Setting {
    /// As JSON.
    pub fn to_json(&self) -> Value {
        json!({ "field": self.field, "value": self.value, "source": self.source.to_string() })
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.field, Words(Some(&self.value)), self.source)
    }
}

/// A value as a person would write it; `None`: not set.
struct Words<'a>(Option<&'a Value>);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("not set"),
            Some(Value::String(text)) if !text.is_empty() => f.write_str(text),
            Some(value) => write!(f, "{value}"),
        }
    }
}

/// The settings that count, in the order of their names. kubeadm writes every field, most of them empty: an empty text or
/// list, false and zero are left out, except where they override a lower layer or are not the default.
pub(super) fn settings(layers: &Layers, master: Option<&str>) -> Vec<Setting> {
    let (merged, sources) = (layers.merged().to_value(), layers.sources());
    let is_shown = |field: &str, value: &Value| {
        !matches!(field, "apiVersion" | "kind")
            && (!is_zero(value) || MEANT_ZEROS.contains(&field) || sources.is_overridden(field))
    };
    let mut settings: Vec<_> = leaves(&merged)
        .into_iter()
        .filter(|(field, value)| is_shown(field, value))
        .filter_map(|(field, value)| {
            Some(Setting { source: sources.of(&field)?, value: value.clone(), field })
        })
        .collect();
    settings.extend(master.map(|url| Setting {
        field: "master".to_owned(),
        value: url.into(),
        source: Source::Flag("master".to_owned()),
    }));
    settings
}

/// Fields where zero is not the default: it leaves the kernel's own value.
const MEANT_ZEROS: &[&str] = &[
    "conntrack.maxPerCore",
    "conntrack.min",
    "conntrack.tcpCloseWaitTimeout",
    "conntrack.tcpEstablishedTimeout",
];

/// Off, empty, nothing.
pub(super) fn is_zero(value: &Value) -> bool {
    match value {
        Value::Bool(value) => !value,
        Value::Number(value) => value.as_f64() == Some(0.0),
        Value::String(value) => matches!(value.as_str(), "" | "0" | "0s"),
        Value::Array(value) => value.is_empty(),
        Value::Object(value) => value.is_empty(),
        Value::Null => true,
    }
}

/// What an agent says of its configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfigStatus {
    /// The settings in force.
    pub settings: Vec<Setting>,
    /// Why `--config-base` is not used.
    pub base_problem: Option<String>,
    /// Why the files on disk are not in force.
    pub pending_problem: Option<String>,
}

/// What the files say after a change of theirs.
#[derive(Debug)]
pub enum Reread {
    /// The same as what runs, perhaps written elsewhere.
    Same(ConfigStatus),
    /// Something else; each difference as `field: old -> new`.
    Different(Vec<String>),
    /// They cannot be used, for this reason.
    Unusable(String),
}

impl Resolved {
    /// What an agent of this configuration says of it.
    pub fn status(&self) -> ConfigStatus {
        let base_problem = match &self.base {
            BaseState::Refused(why) => Some(why.clone()),
            BaseState::NotNamed | BaseState::Missing | BaseState::Read => None,
        };
        ConfigStatus { settings: self.settings.clone(), base_problem, pending_problem: None }
    }

    /// Compares this, which runs, with what the files say now. A base that was used and that is gone or unusable is no
    /// reason to run without it: more likely than not nobody meant that.
    pub fn compare(&self, now: Result<Self, ConfigError>) -> Reread {
        let now = match now {
            Ok(now) => now,
            Err(error) => return Reread::Unusable(error.to_string().replace('\n', "; ")),
        };
        if self.base == BaseState::Read {
            match &now.base {
                BaseState::Refused(why) => return Reread::Unusable(why.clone()),
                BaseState::Missing => {
                    return Reread::Unusable(
                        "the file that --config-base names is gone; restore it, or write its settings into --config \
                         and restart the agent"
                            .to_owned(),
                    );
                }
                BaseState::NotNamed | BaseState::Read => {}
            }
        }
        if now.config == self.config {
            return Reread::Same(now.status());
        }
        Reread::Different(differences(&self.settings, &now.settings))
    }
}

fn differences(old: &[Setting], new: &[Setting]) -> Vec<String> {
    let find = |settings: &'_ [Setting], field: &str| {
        settings.iter().find(|setting| setting.field == field).map(|setting| setting.value.clone())
    };
    let mut fields: Vec<_> = old.iter().chain(new).map(|setting| setting.field.as_str()).collect();
    fields.sort_unstable();
    fields.dedup();
    fields
        .into_iter()
        .filter_map(|field| {
            let (old, new) = (find(old, field), find(new, field));
            (old != new).then(|| format!("{field}: {} -> {}", Words(old.as_ref()), Words(new.as_ref())))
        })
        .collect()
}
