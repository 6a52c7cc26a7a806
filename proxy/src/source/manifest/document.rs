//! From the text of a manifest file to the objects in it.
//!
//! Owns which kinds are read, and `kind: List`. A file that is not YAML at all is one error; a document that is, and is not a
//! good object, leaves the others of the file alone. Never touches the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use k8s_openapi::api::{core, discovery, networking};
use serde::de::IgnoredAny;

use super::body::{Body, Format, Malformed, split};
use crate::model::input::{EndpointSlice, Node, Origin, Service, ServiceKey, SliceKey};
use crate::source::convert::{Converted, Converter, Ignored};
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
    /// Objects that cannot be read: what they had before stays in force.
    pub(super) malformed: BTreeSet<Id>,
    /// Objects that can, and of which no port, no address or no endpoint is left: the same as gone.
    pub(super) bad: BTreeSet<Id>,
    /// Objects that are fine, and not for a Service proxy.
    pub(super) ignored: BTreeMap<Id, Ignored>,
    /// There is a document that does not say which object it is: it may be any that the file had before.
    pub(super) unknown: bool,
}

impl Contents {
    /// Whether there is a document of this object.
    fn names(&self, id: &Id) -> bool {
        self.objects.contains_key(id)
            || self.malformed.contains(id)
            || self.bad.contains(id)
            || self.ignored.contains_key(id)
    }
}

/// A document of a file, or an item of a list in one.
#[derive(Clone, Copy)]
struct Document<'t> {
    file: &'t Arc<PathBuf>,
    /// Its first line in the file.
    line: u64,
    body: Body<'t>,
}

impl Document<'_> {
    fn place(self) -> Place {
        Place { file: Arc::clone(self.file), line: self.line, column: 0 }
    }

    fn at(self, malformed: &Malformed) -> Place {
        let line = self.line + malformed.line.saturating_sub(1);
        Place { file: Arc::clone(self.file), line, column: malformed.column }
    }
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
        let mut read = |line, body| self.document(&mut contents, Document { file, line, body });
        match format {
            Format::Json if text.trim().is_empty() => {}
            Format::Json => read(1, Body::Json(text))?,
            Format::Yaml => split(text).try_for_each(|(line, text)| read(line, Body::Yaml(text)))?,
        }
        Ok(contents)
    }

    fn document(&mut self, contents: &mut Contents, document: Document<'_>) -> Result<(), Problem> {
        let head: wire::Head<'_> = match document.body.read() {
            Ok(head) => head,
            Err(malformed) => {
                if let Err(syntax) = document.body.read::<IgnoredAny>() {
                    let remedy = format!("{}; what was in force before stays", syntax.message);
                    return Err(problem(document.at(&syntax), None, remedy));
                }
                contents.unknown = true;
                let remedy = format!("not a Kubernetes object: {}", malformed.message);
                self.problems.push(problem(document.at(&malformed), None, remedy));
                return Ok(());
            }
        };
        let metadata = head.metadata.as_ref();
        let kind = head.kind.as_deref().unwrap_or_default();
        let (version, id) = match kind {
            "List" => return self.list(contents, document),
            "Service" => ("v1", self.converter.key("Service", metadata).map(Id::Service)),
            "EndpointSlice" => {
                ("discovery.k8s.io/v1", self.converter.key("EndpointSlice", metadata).map(Id::Slice))
            }
            "ServiceCIDR" => {
                let name = self.name(document, kind, metadata);
                ("networking.k8s.io/v1", name.map(|name| Id::ServiceCidr(name.to_owned())))
            }
            "Node" => match self.name(document, kind, metadata) {
                Some(name) if self.node.as_deref() != Some(name) => return Ok(()),
                name => ("v1", name.map(|_| Id::Node)),
            },
            "" => {
                contents.unknown = true;
                let remedy = "missing: name the object's kind; the document is left out";
                self.complain(document, None, "kind", None, remedy);
                return Ok(());
            }
            other => {
                let remedy = "not read by a Service proxy, which knows Service, EndpointSlice, ServiceCIDR, Node and \
                    List; the document is left out";
                self.complain(document, None, "kind", Some(other), remedy);
                return Ok(());
            }
        };
        match id {
            Some(id) if head.api_version.as_deref() == Some(version) => self.object(contents, document, id),
            Some(id) => {
                let remedy = format!("use {version}; what was in force of it before stays");
                self.complain(document, Some(&id), "apiVersion", head.api_version.as_deref(), &remedy);
                contents.malformed.insert(id);
            }
            // No object can have its name: it is left out, whatever it was meant to be.
            None => self.take(document),
        }
        Ok(())
    }

    /// The name of an object that has no namespace.
    fn name<'m>(
        &mut self,
        document: Document<'_>,
        kind: &str,
        metadata: Option<&'m wire::Metadata<'_>>,
    ) -> Option<&'m str> {
        let name = metadata.and_then(|metadata| metadata.name.as_deref()).filter(|name| !name.is_empty());
        if name.is_none() {
            let problem = problem(document.place(), Some(kind.to_owned()), "missing: name it".to_owned());
            self.problems.push(Problem { field: "metadata.name".to_owned(), ..problem });
        }
        name
    }

    fn list(&mut self, contents: &mut Contents, document: Document<'_>) -> Result<(), Problem> {
        match document.body.items() {
            Ok(items) => {
                for (line, item) in &items {
                    let line = document.line + line - 1;
                    self.document(contents, Document { line, body: Body::Item(item), ..document })?;
                }
            }
            Err(malformed) => {
                contents.unknown = true;
                let place = document.at(&malformed);
                self.problems.push(problem(place, Some("List".to_owned()), malformed.message));
            }
        }
        Ok(())
    }

    /// Reads a document that says of itself which object it is.
    fn object(&mut self, contents: &mut Contents, document: Document<'_>, id: Id) {
        if contents.names(&id) {
            let remedy = "a second time in this file: the first is used, remove this one";
            self.problems.push(problem(document.place(), Some(id.to_string()), remedy.to_owned()));
            return;
        }
        let converted = match self.convert(&id, document.body) {
            Ok(converted) => {
                self.take(document);
                for field in unknown_fields(&id, document.body) {
                    self.complain(
                        document,
                        Some(&id),
                        &field,
                        None,
                        "Kubernetes has no such field: is it misspelt?",
                    );
                }
                converted
            }
            Err(malformed) => {
                let remedy = format!("{}; what was in force of it before stays", malformed.message);
                self.problems.push(problem(document.at(&malformed), Some(id.to_string()), remedy));
                contents.malformed.insert(id);
                return;
            }
        };
        match converted {
            Converted::Read(content) => {
                contents.objects.insert(id, content);
            }
            Converted::Ignored(why) => {
                tracing::debug!(place = %document.place(), object = %id, %why, "not for a Service proxy");
                contents.ignored.insert(id, why);
            }
            Converted::Bad => {
                contents.bad.insert(id);
            }
        }
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

    /// Takes over what the converter found in a document.
    fn take(&mut self, document: Document<'_>) {
        let place = document.place();
        let found = self.converter.problems.drain(..);
        self.problems.extend(found.map(|problem| Problem { place: Some(place.clone()), ..problem }));
    }

    /// Names a field of a document.
    fn complain(
        &mut self,
        document: Document<'_>,
        object: Option<&Id>,
        field: &str,
        value: Option<&str>,
        remedy: &str,
    ) {
        let problem = problem(document.place(), object.map(Id::to_string), remedy.to_owned());
        self.problems.push(Problem { field: field.to_owned(), value: value.map(shorten), ..problem });
    }
}

/// What is in an object's document and not in Kubernetes.
fn unknown_fields(id: &Id, body: Body<'_>) -> Vec<String> {
    match id {
        Id::Service(_) => body.unknown_fields::<core::v1::Service>(),
        Id::Slice(_) => body.unknown_fields::<discovery::v1::EndpointSlice>(),
        Id::ServiceCidr(_) => body.unknown_fields::<networking::v1::ServiceCIDR>(),
        Id::Node => body.unknown_fields::<core::v1::Node>(),
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
