//! What can be wrong with a configuration: each error names the field, the value and the remedy.

use std::fmt;
use std::path::{Path, PathBuf};

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A configuration file that cannot be read or written.
    #[error("configuration file {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A configuration file that is no KubeProxyConfiguration.
    #[error("configuration file {}, {place}: {problem}; {remedy}", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// The line, and the field where one is known.
        place: String,
        /// What is wrong there.
        problem: String,
        /// What to write instead.
        remedy: &'static str,
    },
    /// A configuration file with fields that are misspelt.
    #[error(
        "configuration file {}, {}; correct the names, or have unknown fields ignored with --config-lenient",
        path.display(),
        fields.join("; ")
    )]
    Misspelt {
        /// The file.
        path: PathBuf,
        /// Each with its line and what it may be meant to be; never empty.
        fields: Vec<String>,
    },
    /// Fields whose values cannot be used; never empty.
    #[error("{}", Lines(.0))]
    Invalid(Vec<InvalidField>),
}

/// One field whose value cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{field}: {value:?} {problem}; {remedy}", In(.source_file.as_deref()))]
pub struct InvalidField {
    /// The file that sets the field, where one does.
    pub source_file: Option<PathBuf>,
    /// The field, as the file writes it, with the flag that sets it.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// What is wrong with it.
    pub problem: String,
    /// What to write instead.
    pub remedy: &'static str,
}

impl InvalidField {
    /// Its dotted path, without the flag.
    pub(super) fn path(&self) -> &'static str {
        self.field.split(' ').next().unwrap_or_default()
    }
}

struct In<'a>(Option<&'a Path>);

impl fmt::Display for In<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |path| write!(f, "configuration file {}, ", path.display()))
    }
}

struct Lines<'a>(&'a [InvalidField]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, field) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            fmt::Display::fmt(field, f)?;
        }
        Ok(())
    }
}
