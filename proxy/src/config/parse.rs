//! Reading the configuration file, strictly first and then, as kube-proxy does, leniently.
//!
//! What only strict reading refuses (unknown fields, fields written twice) is told with its line, and who reads the file
//! decides what it leads to; a wrong type is an error with its line, field and remedy.

use std::fmt;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::{DuplicateKeyPolicy, Error, Location, Options, Spanned};

use super::error::ConfigError;
use super::file::{API_VERSION, KIND, KubeProxyConfiguration};
use super::misspelt::meant;

/// A file that was read, and what is odd about it.
#[derive(Debug)]
pub(super) struct Parsed {
    /// The content.
    pub(super) file: KubeProxyConfiguration,
    /// Unknown fields that are like no other, and repeated ones, each with its line.
    pub(super) warnings: Vec<String>,
    /// Unknown fields that are almost like another, each with its line and what it may be meant to be.
    pub(super) misspelt: Vec<String>,
}

/// Parses the text of a configuration file, YAML or JSON. `path` serves the messages alone.
///
/// # Errors
/// [`ConfigError::Decode`], when the text is not YAML, not a `KubeProxyConfiguration` or has a field of a wrong type.
pub(super) fn parse(path: &Path, text: &str) -> Result<Parsed, ConfigError> {
    let mut warnings = Vec::new();
    let file = match decode(text, DuplicateKeyPolicy::Error) {
        Err(error) if matches!(error.without_snippet(), Error::DuplicateMappingKey { .. }) => {
            warnings.push(format!("{}: {}; the last one counts", line(error.location()), message(&error)));
            decode(text, DuplicateKeyPolicy::LastWins)
        }
        decoded => decoded,
    };
    let outline = outline(text);
    let file = file.map_err(|error| {
        let field = error.location().and_then(|at| outline.iter().rev().find(|key| key.starts_before(&at)));
        ConfigError::Decode {
            path: path.to_owned(),
            place: match field {
                Some(key) => format!("{}, field {}", line(error.location()), key.path),
                None => line(error.location()),
            },
            problem: message(&error),
            remedy: "write the value as kube-proxy's configuration reference (v1alpha1) shows it",
        }
    })?;
    expect(path, "kind", file.kind.as_deref(), KIND)?;
    expect(path, "apiVersion", file.api_version.as_deref(), API_VERSION)?;

    let schema = serde_json::to_value(KubeProxyConfiguration::default()).unwrap_or_default();
    let mut misspelt = Vec::new();
    for key in outline.iter().filter(|key| is_unknown(&schema, &key.path)) {
        let unknown = format!("line {}: unknown field {}", key.line, key.path);
        match meant(&schema, &key.path) {
            Some(field) => misspelt.push(format!("{unknown}, is {field} meant?")),
            None => warnings.push(unknown),
        }
    }
    Ok(Parsed { file, warnings, misspelt })
}

fn options(duplicate_keys: DuplicateKeyPolicy) -> Options {
    serde_saphyr::options! { duplicate_keys: duplicate_keys, with_snippet: false }
}

fn decode(text: &str, duplicate_keys: DuplicateKeyPolicy) -> Result<KubeProxyConfiguration, Error> {
    serde_saphyr::from_str_with_options(text, options(duplicate_keys))
}

fn line(location: Option<Location>) -> String {
    location.map_or_else(|| "whole file".to_owned(), |at| format!("line {}", at.line()))
}

/// The parser's message without the place, which we name ourselves.
fn message(error: &Error) -> String {
    if let Error::DuplicateMappingKey { key: Some(key), .. } = error.without_snippet() {
        return format!("field {key} is written twice");
    }
    let text = error.without_snippet().to_string();
    match text.rfind(" at line ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

fn expect(path: &Path, field: &str, found: Option<&str>, wanted: &str) -> Result<(), ConfigError> {
    if found == Some(wanted) {
        return Ok(());
    }
    Err(ConfigError::Decode {
        path: path.to_owned(),
        place: format!("field {field}"),
        problem: format!(
            "{} is not {wanted}",
            found.map_or("nothing".to_owned(), |found| format!("{found:?}"))
        ),
        remedy: "the file must hold one KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1",
    })
}

/// Whether `path` names a field that its section does not have. What lies below an unknown field is not unknown
/// again, and neither is what lies below a field whose keys the user chooses.
fn is_unknown(schema: &Value, path: &str) -> bool {
    let (section, name) = path.rsplit_once('.').unwrap_or(("", path));
    let section =
        section.split('.').filter(|part| !part.is_empty()).try_fold(schema, |at, part| at.get(part));
    matches!(section, Some(Value::Object(fields)) if !fields.contains_key(name))
}

/// One key of the file.
struct Key {
    /// Its dotted path.
    path: String,
    line: u64,
    column: u64,
}

impl Key {
    fn starts_before(&self, at: &Location) -> bool {
        (self.line, self.column) <= (at.line(), at.column())
    }
}

/// Every key of the file with its place, in the order of the file.
fn outline(text: &str) -> Vec<Key> {
    let mut keys = Vec::new();
    // What cannot be parsed has been reported by `decode`: here it only ends the outline.
    let _ = serde_saphyr::with_deserializer_from_str_with_options(
        text,
        options(DuplicateKeyPolicy::LastWins),
        |deserializer| Outline { prefix: "", keys: &mut keys }.deserialize(deserializer),
    );
    keys
}

struct Outline<'a> {
    prefix: &'a str,
    keys: &'a mut Vec<Key>,
}

impl<'de> DeserializeSeed<'de> for Outline<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Outline<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let path = match self.prefix {
                "" => key.value,
                prefix => format!("{prefix}.{}", key.value),
            };
            self.keys.push(Key {
                path: path.clone(),
                line: key.referenced.line(),
                column: key.referenced.column(),
            });
            map.next_value_seed(Outline { prefix: &path, keys: self.keys })?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }
}
