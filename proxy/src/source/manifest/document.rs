//! From the text of a manifest file to the objects in it.
//!
//! Owns YAML, JSON and `kind: List`. A file that is not YAML at all is one error; a document that is, and is not a
//! good object, leaves the others of the file alone. Never touches the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use serde_saphyr::Spanned;

use crate::model::input::{EndpointSlice, Node, Origin, Service, ServiceKey, SliceKey};
use crate::source::convert::{Converted, Converter};
use crate::source::problem::{Place, Problem, shorten};
use crate::source::wire;

/// Which object; ordered as events are sent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Id {
    Node,
    ServiceCidr(String),
    Service(ServiceKey),
    Slice(SliceKey),
}

/// What the model reads of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Node(Node),
    ServiceCidr(Vec<IpNetwork>),
    Service(Service),
    Slice(EndpointSlice),
}

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// The good objects.
    pub(super) objects: BTreeMap<Id, Content>,
    /// Objects of which nothing is usable: what they had before stays in force.
    pub(super) bad: BTreeSet<Id>,
    /// There is a document that does not say which object it is: it may be any that the file had before.
    pub(super) unknown: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Yaml,
    Json,
}

/// Why a text is not a `T`.
struct Malformed {
    /// From 1 within the text; 0 where unknown.
    line: u64,
    column: u64,
    message: String,
}

/// One document's text, or an item of a list.
#[derive(Clone, Copy)]
enum Body<'t> {
    Yaml(&'t str),
    Json(&'t str),
    Item(&'t Value),
}

impl<'t> Body<'t> {
    fn read<T: Deserialize<'t>>(self) -> Result<T, Malformed> {
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

/// Cuts off the ` at line 3 column 5` that the libraries append: the [`Place`] says it, in lines of the whole file.
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

/// Reads files and collects what is wrong in them.
pub(super) struct Reader {
    converter: Converter,
    /// The own node's name: other Nodes are not ours to read.
    node: Option<String>,
    pub(super) problems: Vec<Problem>,
}

impl Reader {
    pub(super) fn new(node: Option<String>) -> Self {
        Self { converter: Converter::new(Origin::Static), node, problems: Vec::new() }
    }

    /// Reads a whole file.
    ///
    /// # Errors
    /// When its text is no YAML (or JSON) at all: nothing is known of its objects then.
    pub(super) fn read(
        &mut self,
        file: &Arc<PathBuf>,
        text: &str,
        format: Format,
    ) -> Result<Contents, Problem> {
        let mut contents = Contents::default();
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        match format {
            Format::Json if text.trim().is_empty() => {}
            Format::Json => self.document(&mut contents, file, 1, Body::Json(text))?,
            Format::Yaml => {
                for (line, document) in split(text) {
                    self.document(&mut contents, file, line, Body::Yaml(document))?;
                }
            }
        }
        Ok(contents)
    }

    /// Reads a document that starts in `line` of its file.
    fn document(
        &mut self,
        contents: &mut Contents,
        file: &Arc<PathBuf>,
        line: u64,
        body: Body<'_>,
    ) -> Result<(), Problem> {
        let at = |malformed: &Malformed| Place {
            file: Arc::clone(file),
            line: line + malformed.line.saturating_sub(1),
            column: malformed.column,
        };
        let here = Place { file: Arc::clone(file), line, column: 0 };
        let head: wire::Head<'_> = match body.read() {
            Ok(head) => head,
            Err(malformed) => match body.read::<IgnoredAny>() {
                Err(syntax) => {
                    let remedy = format!("{}; what was in force before stays", syntax.message);
                    return Err(problem(at(&syntax), None, remedy));
                }
                Ok(_) => {
                    contents.unknown = true;
                    self.problems.push(problem(
                        at(&malformed),
                        None,
                        format!("not a Kubernetes object: {}", malformed.message),
                    ));
                    return Ok(());
                }
            },
        };
        let kind = head.kind.as_deref().unwrap_or_default();
        let expected = match kind {
            "Service" | "Node" | "List" => "v1",
            "EndpointSlice" => "discovery.k8s.io/v1",
            "ServiceCIDR" => "networking.k8s.io/v1",
            "" => {
                contents.unknown = true;
                let remedy = "kind: missing: name the object's kind; the document is left out";
                self.problems.push(problem(here, None, remedy.to_owned()));
                return Ok(());
            }
            _ => {
                tracing::debug!(place = %here, kind, "a document of a kind that no Service proxy reads");
                return Ok(());
            }
        };
        if kind == "List" {
            return self.list(contents, file, line, body);
        }

        let metadata = head.metadata.as_ref();
        let first = self.converter.problems.len();
        let id = match kind {
            "Service" => self.converter.key("Service", metadata).map(Id::Service),
            "EndpointSlice" => self.converter.key("EndpointSlice", metadata).map(Id::Slice),
            _ => match metadata.and_then(|metadata| metadata.name.as_deref()) {
                None | Some("") => {
                    let mut problem =
                        problem(here.clone(), Some(kind.to_owned()), "missing: name it".to_owned());
                    "metadata.name".clone_into(&mut problem.field);
                    self.problems.push(problem);
                    None
                }
                Some(name) if kind == "ServiceCIDR" => Some(Id::ServiceCidr(name.to_owned())),
                Some(name) if self.node.as_deref() == Some(name) => Some(Id::Node),
                Some(_) => return Ok(()),
            },
        };
        debug_assert_eq!(first, 0, "problems are taken after each document");
        let Some(id) = id else {
            contents.unknown = true;
            self.take(&here);
            return Ok(());
        };
        if head.api_version.as_deref() != Some(expected) {
            let mut problem =
                problem(here, Some(id.to_string()), format!("use {expected}; the object is left out"));
            "apiVersion".clone_into(&mut problem.field);
            problem.value = head.api_version.as_deref().map(shorten);
            self.problems.push(problem);
            contents.bad.insert(id);
            return Ok(());
        }
        if contents.objects.contains_key(&id) || contents.bad.contains(&id) {
            let remedy = "a second time in this file: the first is used, remove this one";
            self.problems.push(problem(here, Some(id.to_string()), remedy.to_owned()));
            return Ok(());
        }
        let converted = match self.convert(&id, body) {
            Ok(converted) => converted,
            Err(malformed) => {
                let remedy = format!("{}; the object is left out", malformed.message);
                self.problems.push(problem(at(&malformed), Some(id.to_string()), remedy));
                Converted::Bad
            }
        };
        self.take(&here);
        match converted {
            Converted::Read(content) => {
                contents.objects.insert(id, content);
            }
            Converted::Ignored(why) => {
                tracing::debug!(place = %here, object = %id, %why, "not for a Service proxy");
            }
            Converted::Bad => {
                contents.bad.insert(id);
            }
        }
        Ok(())
    }

    fn list(
        &mut self,
        contents: &mut Contents,
        file: &Arc<PathBuf>,
        line: u64,
        body: Body<'_>,
    ) -> Result<(), Problem> {
        let items = match body {
            Body::Yaml(_) => body.read::<YamlItems>().map(|list| {
                let items = list.items.unwrap_or_default();
                items
                    .into_iter()
                    .map(|item| (line + item.referenced.line().saturating_sub(1), item.value))
                    .collect()
            }),
            Body::Json(_) | Body::Item(_) => body.read::<JsonItems>().map(|list| {
                let items = list.items.unwrap_or_default();
                items.into_iter().map(|item| (line, item)).collect::<Vec<_>>()
            }),
        };
        match items {
            Ok(items) => {
                for (line, item) in &items {
                    self.document(contents, file, *line, Body::Item(item))?;
                }
            }
            Err(malformed) => {
                contents.unknown = true;
                let line = line + malformed.line.saturating_sub(1);
                let place = Place { file: Arc::clone(file), line, column: malformed.column };
                self.problems.push(problem(place, Some("List".to_owned()), malformed.message));
            }
        }
        Ok(())
    }

    fn convert(&mut self, id: &Id, body: Body<'_>) -> Result<Converted<Content>, Malformed> {
        Ok(match id {
            Id::Service(key) => self.converter.service(key, &body.read()?).map(Content::Service),
            Id::Slice(key) => self.converter.slice(key, &body.read()?).map(Content::Slice),
            Id::Node => {
                let name = self.node.clone().unwrap_or_default();
                Converted::Read(Content::Node(self.converter.node(&name, &body.read()?)))
            }
            Id::ServiceCidr(name) => match self.converter.service_cidr(name, &body.read()?) {
                cidrs if cidrs.is_empty() => Converted::Bad,
                cidrs => Converted::Read(Content::ServiceCidr(cidrs)),
            },
        })
    }

    /// Takes over what the converter found in the document at `place`.
    fn take(&mut self, place: &Place) {
        self.problems.extend(
            self.converter
                .problems
                .drain(..)
                .map(|problem| Problem { place: Some(place.clone()), ..problem }),
        );
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node => f.write_str("the own Node"),
            Self::ServiceCidr(name) => write!(f, "ServiceCIDR {}", shorten(name)),
            Self::Service(key) => write!(f, "Service {key}"),
            Self::Slice(key) => write!(f, "EndpointSlice {key}"),
        }
    }
}

fn problem(place: Place, object: Option<String>, remedy: String) -> Problem {
    Problem { place: Some(place), object, field: String::new(), value: None, remedy }
}

/// The documents of a YAML stream that hold anything, each with its first line's number.
///
/// A line that starts with `---` begins a document wherever it stands: YAML allows it inside no scalar.
fn split(text: &str) -> impl Iterator<Item = (u64, &str)> {
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
