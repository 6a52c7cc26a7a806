//! One document of a manifest file, before anybody knows what it is.
//!
//! Owns YAML and JSON, the positions in them, and which fields Kubernetes does not have. Never touches the disk.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_ignored::Path;
use serde_json::Value;
use serde_saphyr::Spanned;

use crate::source::problem::shorten;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Yaml,
    Json,
}

/// Why a text is not a `T`.
pub(super) struct Malformed {
    /// From 1 within the text; 0 where unknown.
    pub(super) line: u64,
    /// From 1; 0 where unknown.
    pub(super) column: u64,
    pub(super) message: String,
}

/// One document's text, or an item of a list.
#[derive(Clone, Copy)]
pub(super) enum Body<'t> {
    Yaml(&'t str),
    Json(&'t str),
    Item(&'t Value),
}

impl<'t> Body<'t> {
    pub(super) fn read<T: Deserialize<'t>>(self) -> Result<T, Malformed> {
        match self {
            Self::Yaml(text) => read_yaml(text),
            Self::Json(text) => serde_json::from_str(text).map_err(|error| Malformed {
                line: error.line() as u64,
                column: error.column() as u64,
                message: without_position(&error.to_string()),
            }),
            Self::Item(value) => T::deserialize(value).map_err(|error| Malformed {
                line: 0,
                column: 0,
                message: error.to_string(),
            }),
        }
    }

    /// The items of a list, each with its first line within the text; 1 where that is unknown.
    pub(super) fn items(self) -> Result<Vec<(u64, Value)>, Malformed> {
        match self {
            Self::Yaml(_) => self.read::<YamlItems>().map(|list| {
                let items = list.items.unwrap_or_default().into_iter();
                items.map(|item| (item.referenced.line().max(1), item.value)).collect()
            }),
            Self::Json(_) | Self::Item(_) => self.read::<JsonItems>().map(|list| {
                let items = list.items.unwrap_or_default().into_iter();
                items.map(|item| (1, item)).collect()
            }),
        }
    }

    /// The paths of the fields that a `T` does not have, such as `spec.ports[0].nodeport`.
    pub(super) fn unknown_fields<T: DeserializeOwned>(self) -> Vec<String> {
        let mut found = Vec::new();
        let mut note = |path: Path<'_>| found.push(shorten(&dotted(&path)));
        // Whatever is no `T` ends the search: what of it matters here, `read` has judged.
        let _ = match self {
            Self::Item(value) => serde_ignored::deserialize::<_, _, T>(value, &mut note).map(drop),
            Self::Yaml(_) | Self::Json(_) => match self.read::<Value>() {
                Ok(value) => serde_ignored::deserialize::<_, _, T>(&value, &mut note).map(drop),
                Err(_) => Ok(()),
            },
        };
        found
    }
}

fn dotted(path: &Path<'_>) -> String {
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", dotted(parent)),
        Path::Map { parent: Path::Root, key } => key.clone(),
        Path::Map { parent, key } => format!("{}.{key}", dotted(parent)),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            dotted(parent)
        }
    }
}

fn read_yaml<'t, T: Deserialize<'t>>(text: &'t str) -> Result<T, Malformed> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        // As kubectl: `name: 8080` and `name: yes` are no strings.
        no_schema: true,
        strict_booleans: true,
        // The limits that guard against alias bombs stay; the size of a folder is the operator's own affair.
        budget: serde_saphyr::budget! { max_events: usize::MAX, max_nodes: usize::MAX },
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let (line, column) = error.location().map_or((0, 0), |at| (at.line(), at.column()));
        Malformed { line, column, message: without_position(&error.to_string()) }
    })
}

/// Cuts off the ` at line 3 column 5` that the libraries append: the place says it, in lines of the whole file.
fn without_position(message: &str) -> String {
    let end = message.rfind(" at line ").unwrap_or(message.len());
    message[..end].lines().next().unwrap_or_default().to_owned()
}

/// A list and its items, each with its line where that is known.
#[derive(Deserialize)]
struct YamlItems {
    items: Option<Vec<Spanned<Value>>>,
}

#[derive(Deserialize)]
struct JsonItems {
    items: Option<Vec<Value>>,
}

/// The documents of a YAML stream that hold anything, each with its first line's number.
///
/// A line that starts with `---` begins a document wherever it stands: YAML allows it inside no scalar.
pub(super) fn split(text: &str) -> impl Iterator<Item = (u64, &str)> {
    let mut starts = vec![(1_u64, 0_usize)];
    let mut offset = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let rest = line.strip_prefix("---");
        if index > 0 && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\n', '\r']))
        {
            starts.push((index as u64 + 1, offset));
        }
        offset += line.len();
    }
    let ends: Vec<usize> = starts.iter().skip(1).map(|(_, start)| *start).chain([text.len()]).collect();
    starts.into_iter().zip(ends).map(|((line, start), end)| (line, &text[start..end])).filter(
        |(_, document)| {
            document.lines().any(|line| {
                let line = line.strip_prefix("---").unwrap_or(line).trim();
                !(line.is_empty() || line.starts_with(['#', '%']) || line == "...")
            })
        },
    )
}
