//! From the API's fields to the model's vocabulary.
//!
//! Owns what odd input means, as kube-proxy reads it: the good parts of an object are kept where that is safe, and
//! each bad part is a [`Problem`]. Never decides which endpoint serves whom.

mod names;
mod node;
mod ports;
mod service;
mod slice;
#[cfg(test)]
mod tests;

use self::names::{is_label, is_subdomain};
pub(crate) use self::service::SOURCE_RANGES;
pub(crate) use self::slice::triggered;
use super::intern::Interner;
use super::problem::{Problem, shorten};
use super::wire;
use crate::model::input::{ObjectKey, Origin, ServicePort, SlicePort};

/// What became of an object.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Converted<T> {
    /// The model reads it.
    Read(T),
    /// It is fine, and not for a Service proxy: the same as gone.
    Ignored(Ignored),
    /// Nothing usable is left of it; the problems say why.
    Bad,
}

impl<T> Converted<T> {
    /// The same of another type.
    pub(crate) fn map<U>(self, convert: impl FnOnce(T) -> U) -> Converted<U> {
        match self {
            Self::Read(content) => Converted::Read(convert(content)),
            Self::Ignored(why) => Converted::Ignored(why),
            Self::Bad => Converted::Bad,
        }
    }
}

/// Why an object is not for a Service proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Ignored {
    #[error("another proxy serves it (label service.kubernetes.io/service-proxy-name)")]
    OtherProxy,
    #[error("it is an ExternalName Service")]
    ExternalName,
    #[error("it is headless")]
    Headless,
    #[error("it has no clusterIP yet")]
    NoClusterIp,
    #[error("it belongs to no Service (no label kubernetes.io/service-name)")]
    NoServiceName,
    #[error("its addressType is neither IPv4 nor IPv6")]
    AddressType,
}

impl Ignored {
    /// What that means for the clients of a Service.
    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Self::OtherProxy => {
                "another proxy serves it: it has the label service.kubernetes.io/service-proxy-name"
            }
            Self::ExternalName => "ExternalName: DNS answers with another name, no address is served",
            Self::Headless => "headless: DNS answers with its endpoints, which clients dial themselves",
            Self::NoClusterIp => "it has no clusterIP yet",
            Self::NoServiceName | Self::AddressType => "it is not served",
        }
    }
}

/// Converts objects of one origin and collects what is wrong with them.
pub(crate) struct Converter {
    origin: Origin,
    names: Interner<str>,
    service_ports: Interner<[ServicePort]>,
    slice_ports: Interner<[SlicePort]>,
    /// What was wrong with the objects converted since the caller last took them.
    pub(crate) problems: Vec<Problem>,
}

/// Notes problems of one object.
struct Report<'c> {
    kind: &'static str,
    key: &'c str,
    problems: &'c mut Vec<Problem>,
}

impl Report<'_> {
    fn add(&mut self, field: impl Into<String>, value: Option<&str>, remedy: &str) {
        self.problems.push(Problem {
            place: None,
            object: Some(format!("{} {}", self.kind, shorten(self.key))),
            field: field.into(),
            value: value.map(shorten),
            remedy: remedy.to_owned(),
        });
    }

    /// One of an enumeration's values. What is absent or empty has the default; so has what is unknown, and that is
    /// a problem.
    fn choose<T: Copy + Default>(
        &mut self,
        field: &str,
        text: Option<&str>,
        values: &[(&str, T)],
        remedy: &str,
    ) -> T {
        let Some(text) = text.filter(|text| !text.is_empty()) else { return T::default() };
        match values.iter().find(|(name, _)| *name == text) {
            Some((_, value)) => *value,
            None => {
                self.add(field, Some(text), remedy);
                T::default()
            }
        }
    }

    /// Those of a list that can be read; each of the others is a problem with the same remedy.
    fn each<T>(
        &mut self,
        field: &str,
        given: Option<&[wire::Text<'_>]>,
        read: impl Fn(&str) -> Option<T>,
        remedy: &str,
    ) -> Vec<T> {
        let mut good = Vec::new();
        for (index, text) in given.unwrap_or_default().iter().enumerate() {
            match read(text) {
                Some(value) => good.push(value),
                None => self.add(format!("{field}[{index}]"), Some(text), remedy),
            }
        }
        good
    }
}

impl Converter {
    /// A converter for objects of `origin`. Static objects get the defaults that the API server would have filled in.
    pub(crate) fn new(origin: Origin) -> Self {
        Self {
            origin,
            names: Interner::default(),
            service_ports: Interner::default(),
            slice_ports: Interner::default(),
            problems: Vec::new(),
        }
    }

    /// The key of a namespaced object, or a problem where it has none that Kubernetes would accept.
    pub(crate) fn key(
        &mut self,
        kind: &'static str,
        metadata: Option<&wire::Metadata<'_>>,
    ) -> Option<ObjectKey> {
        let name = metadata.and_then(|metadata| metadata.name.as_deref()).unwrap_or_default();
        let namespace = match metadata.and_then(|metadata| metadata.namespace.as_deref()) {
            None | Some("") => "default",
            Some(namespace) => namespace,
        };
        // A slice's name is longer than a Service's: the Service's name and a suffix.
        let name_fits = if kind == "Service" { is_label(name) } else { is_subdomain(name) };
        let wrong = if name.is_empty() {
            ("metadata.name", None, "missing: give the object a name")
        } else if !name_fits {
            (
                "metadata.name",
                Some(name),
                "not a name: use lower-case letters, digits and '-', at most 63 of them",
            )
        } else if !is_label(namespace) {
            (
                "metadata.namespace",
                Some(namespace),
                "not a namespace: use a DNS label of at most 63 characters",
            )
        } else {
            return Some(ObjectKey::new(namespace, name));
        };
        let (field, value, remedy) = wrong;
        self.problems.push(Problem {
            place: None,
            object: Some(format!("{kind} {}", shorten(&format!("{namespace}/{name}")))),
            field: field.to_owned(),
            value: value.map(shorten),
            remedy: format!("{remedy}; the object is left out"),
        });
        None
    }
}
