//! The chains, maps and sets of ports with session affinity: what there is, and what they are called.
//!
//! Pure. Never decides which of them a port needs: [`super::affinity`] does.

use std::fmt;
use std::sync::Arc;

use super::schema::Field;
use crate::model::input::Family;

/// One of a port's two endpoint sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Scope {
    /// The Cluster set.
    Cluster,
    /// The Local set.
    Local,
}

/// What kind of object stands behind a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// The chain that leads a client to the backend in one of the set's maps.
    Consult(Scope),
    /// The chain that remembers where a new connection was led.
    Learn,
    /// The map client → backend, of the set's backends with this port.
    Map(Scope, u16),
    /// The set's members.
    Members(Scope),
}

/// A chain, map or set of one port. The order is one in which they can be removed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Object {
    /// What it is.
    pub(crate) kind: Kind,
    /// Of which table.
    pub(crate) family: Family,
    /// `namespace/name/protocol/port`.
    pub(super) port: Arc<str>,
}

impl Kind {
    /// Whether it is a chain; else it is a set or map.
    pub(crate) fn is_chain(self) -> bool {
        matches!(self, Self::Consult(_) | Self::Learn)
    }

    fn prefix(self) -> &'static str {
        match self {
            Self::Consult(Scope::Cluster) | Self::Map(Scope::Cluster, _) => "aff",
            Self::Consult(Scope::Local) | Self::Map(Scope::Local, _) => "aff-local",
            Self::Learn => "aff-learn",
            Self::Members(Scope::Cluster) => "aff-members",
            Self::Members(Scope::Local) => "aff-local-members",
        }
    }

    /// The components of a set's key; empty for a chain.
    pub(crate) fn key(self) -> &'static [Field] {
        match self {
            Self::Consult(_) | Self::Learn => &[],
            Self::Map(..) => &[Field::Address],
            Self::Members(_) => &[Field::Address, Field::Port],
        }
    }
}

impl Object {
    /// The object of this name, if it can be one of ours.
    pub(crate) fn named(name: &str, family: Family, is_chain: bool) -> Option<Self> {
        let (prefix, rest) = name.split_once('/')?;
        let map = |scope| {
            let (port, target) = rest.rsplit_once('/')?;
            Some((Kind::Map(scope, target.parse().ok()?), port))
        };
        let (kind, port) = match (prefix, is_chain) {
            ("aff", true) => (Kind::Consult(Scope::Cluster), rest),
            ("aff-local", true) => (Kind::Consult(Scope::Local), rest),
            ("aff-learn", true) => (Kind::Learn, rest),
            ("aff", false) => map(Scope::Cluster)?,
            ("aff-local", false) => map(Scope::Local)?,
            ("aff-members", false) => (Kind::Members(Scope::Cluster), rest),
            ("aff-local-members", false) => (Kind::Members(Scope::Local), rest),
            _ => return None,
        };
        Some(Self { kind, family, port: port.into() })
    }

    /// Its name in the kernel.
    pub(crate) fn name(&self) -> Arc<str> {
        self.to_string().into()
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.prefix(), self.port)?;
        if let Kind::Map(_, target) = self.kind { write!(f, "/{target}") } else { Ok(()) }
    }
}
