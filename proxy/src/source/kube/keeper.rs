//! What is known of each kind of object, so that a relist can tell what vanished meanwhile.
//!
//! Owns keys only, never content. Never talks to the server.

use std::collections::{BTreeMap, HashMap};

use ipnetwork::IpNetwork;
use serde::Deserialize;
use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::super::convert::{Converted, Converter};
use super::super::problem::Problem;
use super::super::wire;
use super::{Complaint, protobuf};
use crate::model::input::{Change, Node, ObjectKey, Origin};

/// Turns the objects of one resource into changes.
pub(super) trait Keeper: Send + 'static {
    /// The object as it arrives.
    type Object<'a>: Deserialize<'a> + wire::Object<'a>;
    /// The object as it comes in a list in protobuf.
    type Message: prost::Message + Default;
    /// The resource's name in the API.
    const RESOURCE: &'static str;
    /// The path of its collection.
    const PATH: &'static str;
    /// Whether the source can do without it: a server that does not serve it, or forbids it, has none.
    const OPTIONAL: bool = false;
    /// Whether it passes over objects that the field selector leaves out: servers before 1.31 refuse that of Services.
    const FILTERS: bool = false;
    /// Whether its objects say where the API server is.
    const LISTS_ENDPOINTS: bool = false;

    /// The field and label selectors.
    fn selectors(&self) -> (Option<String>, Option<&'static str>);
    /// The same object in the form that it arrives in elsewhere.
    fn object(message: &Self::Message) -> Self::Object<'_>;
    /// A list begins: what it does not name is gone.
    fn list_begins(&mut self);
    /// An object exists.
    fn put(&mut self, object: &Self::Object<'_>, changes: &mut Vec<Change>);
    /// An object was deleted, or its labels no longer match.
    fn remove(&mut self, object: &Self::Object<'_>, changes: &mut Vec<Change>);
    /// The list is whole.
    fn list_ends(&mut self, changes: &mut Vec<Change>);
}

/// Says what is wrong with an object once, not with each of its versions.
#[derive(Default)]
struct Complaints {
    said: HashMap<ObjectKey, Vec<Problem>>,
    /// Who hears of them beside the log.
    told: Option<mpsc::UnboundedSender<Complaint>>,
}

impl Complaints {
    fn about(&mut self, key: &ObjectKey, converter: &mut Converter) {
        let problems = std::mem::take(&mut converter.problems);
        if problems.is_empty() {
            self.said.remove(key);
        } else if self.said.get(key) != Some(&problems) {
            for problem in &problems {
                warn!("{problem}");
                if let Some(told) = &self.told {
                    // Nobody may listen any more.
                    let _ = told.send(Complaint { service: key.clone(), problem: problem.clone() });
                }
            }
            self.said.insert(key.clone(), problems);
        }
    }
}

/// The objects of a kind that are in force.
#[derive(Default)]
struct Known {
    /// Each with the number of the last list or watch that named it.
    keys: HashMap<ObjectKey, u32>,
    list: u32,
}

impl Known {
    fn begin(&mut self) {
        self.list = self.list.wrapping_add(1);
    }

    fn put(&mut self, key: ObjectKey) {
        self.keys.insert(key, self.list);
    }

    fn remove(&mut self, key: &ObjectKey) -> bool {
        self.keys.remove(key).is_some()
    }

    /// Drops what the last list did not name, and hands it over.
    fn vanished(&mut self) -> Vec<ObjectKey> {
        let list = self.list;
        let mut gone: Vec<ObjectKey> =
            self.keys.extract_if(|_, seen| *seen != list).map(|(key, _)| key).collect();
        gone.sort_unstable();
        gone
    }
}

macro_rules! namespaced {
    ($keeper:ident, $wire:ident, $convert:ident, $kind:literal, $resource:literal, $path:literal, $endpoints:literal,
     $fields:expr, $labels:expr, $here:path, $gone:path) => {
        #[doc = concat!("Keeps track of every ", $kind, ".")]
        pub(super) struct $keeper {
            converter: Converter,
            complaints: Complaints,
            known: Known,
        }

        impl $keeper {
            pub(super) fn new(told: Option<mpsc::UnboundedSender<Complaint>>) -> Self {
                let converter = Converter::new(Origin::Api);
                let complaints = Complaints { told, ..Complaints::default() };
                Self { converter, complaints, known: Known::default() }
            }

            fn key(&mut self, object: &wire::$wire<'_>) -> Option<ObjectKey> {
                let key = self.converter.key($kind, object.metadata.as_ref());
                for problem in self.converter.problems.drain(..) {
                    warn!("{problem}");
                }
                key
            }

            fn forget(&mut self, key: ObjectKey, changes: &mut Vec<Change>) {
                if self.known.remove(&key) {
                    changes.push($gone(key));
                }
            }
        }

        impl Keeper for $keeper {
            type Object<'a> = wire::$wire<'a>;
            type Message = protobuf::$wire;
            const RESOURCE: &'static str = $resource;
            const PATH: &'static str = $path;
            const FILTERS: bool = true;
            const LISTS_ENDPOINTS: bool = $endpoints;

            fn selectors(&self) -> (Option<String>, Option<&'static str>) {
                ($fields, $labels)
            }

            fn object(message: &protobuf::$wire) -> wire::$wire<'_> {
                message.into()
            }

            fn list_begins(&mut self) {
                self.known.begin();
            }

            fn put(&mut self, object: &wire::$wire<'_>, changes: &mut Vec<Change>) {
                let Some(key) = self.key(object) else { return };
                let converted = self.converter.$convert(&key, object);
                self.complaints.about(&key, &mut self.converter);
                match converted {
                    Converted::Read(content) => {
                        self.known.put(key);
                        changes.push($here(content));
                    }
                    Converted::Ignored(why) => {
                        debug!(object = %key, %why, concat!("this ", $kind, " is not for a Service proxy"));
                        self.forget(key, changes);
                    }
                    Converted::Bad => self.forget(key, changes),
                }
            }

            fn remove(&mut self, object: &wire::$wire<'_>, changes: &mut Vec<Change>) {
                let Some(key) = self.key(object) else { return };
                self.complaints.said.remove(&key);
                self.forget(key, changes);
            }

            fn list_ends(&mut self, changes: &mut Vec<Change>) {
                for key in self.known.vanished() {
                    self.complaints.said.remove(&key);
                    changes.push($gone(key));
                }
            }
        }
    };
}

namespaced!(
    Services,
    Service,
    service,
    "Service",
    "services",
    "/api/v1/services",
    false,
    Some("spec.clusterIP!=None".to_owned()),
    Some("!service.kubernetes.io/service-proxy-name"),
    Change::Service,
    Change::ServiceGone
);
namespaced!(
    Slices,
    EndpointSlice,
    slice,
    "EndpointSlice",
    "endpointslices",
    "/apis/discovery.k8s.io/v1/endpointslices",
    true,
    None,
    Some("!service.kubernetes.io/headless"),
    Change::Slice,
    Change::SliceGone
);

/// Keeps track of the own Node.
pub(super) struct OwnNode {
    name: String,
    converter: Converter,
    complaints: Complaints,
    /// What was last said; `None` where nothing was.
    said: Option<Option<Node>>,
    /// A list that is under way has named it.
    seen: bool,
}

impl OwnNode {
    pub(super) fn new(name: String) -> Self {
        let converter = Converter::new(Origin::Api);
        Self { name, converter, complaints: Complaints::default(), said: None, seen: false }
    }

    fn say(&mut self, node: Option<Node>, changes: &mut Vec<Change>) {
        // A kubelet updates its Node's status every few minutes, and hardly ever what we read of it.
        if self.said.as_ref() != Some(&node) {
            changes.push(Change::Node(node.clone()));
            self.said = Some(node);
        }
    }
}

impl Keeper for OwnNode {
    type Object<'a> = wire::Node<'a>;
    type Message = protobuf::Node;
    const RESOURCE: &'static str = "nodes";
    const PATH: &'static str = "/api/v1/nodes";
    const OPTIONAL: bool = true;

    fn selectors(&self) -> (Option<String>, Option<&'static str>) {
        (Some(format!("metadata.name={}", self.name)), None)
    }

    fn object(message: &protobuf::Node) -> wire::Node<'_> {
        message.into()
    }

    fn list_begins(&mut self) {
        self.seen = false;
    }

    fn put(&mut self, object: &wire::Node<'_>, changes: &mut Vec<Change>) {
        self.seen = true;
        let node = self.converter.node(&self.name, object);
        self.complaints.about(&ObjectKey::new("", &self.name), &mut self.converter);
        self.say(Some(node), changes);
    }

    fn remove(&mut self, _object: &wire::Node<'_>, changes: &mut Vec<Change>) {
        self.say(None, changes);
    }

    fn list_ends(&mut self, changes: &mut Vec<Change>) {
        if !self.seen {
            self.say(None, changes);
        }
    }
}

/// Keeps track of every ServiceCIDR.
pub(super) struct ServiceCidrs {
    converter: Converter,
    complaints: Complaints,
    known: BTreeMap<String, Vec<IpNetwork>>,
    /// What the list that is under way has named so far.
    listing: Option<BTreeMap<String, Vec<IpNetwork>>>,
    said: Option<Vec<IpNetwork>>,
}

impl ServiceCidrs {
    pub(super) fn new() -> Self {
        let converter = Converter::new(Origin::Api);
        Self {
            converter,
            complaints: Complaints::default(),
            known: BTreeMap::new(),
            listing: None,
            said: None,
        }
    }

    fn say(&mut self, changes: &mut Vec<Change>) {
        let cidrs: Vec<IpNetwork> = self.known.values().flatten().copied().collect();
        if self.said.as_ref() != Some(&cidrs) {
            changes.push(Change::ServiceCidrs(cidrs.clone()));
            self.said = Some(cidrs);
        }
    }
}

fn name<'o>(metadata: Option<&'o wire::Metadata<'_>>) -> &'o str {
    metadata.and_then(|metadata| metadata.name.as_deref()).unwrap_or_default()
}

impl Keeper for ServiceCidrs {
    type Object<'a> = wire::ServiceCidr<'a>;
    type Message = protobuf::ServiceCidr;
    const RESOURCE: &'static str = "servicecidrs";
    const PATH: &'static str = "/apis/networking.k8s.io/v1/servicecidrs";
    const OPTIONAL: bool = true;

    fn selectors(&self) -> (Option<String>, Option<&'static str>) {
        (None, None)
    }

    fn object(message: &protobuf::ServiceCidr) -> wire::ServiceCidr<'_> {
        message.into()
    }

    fn list_begins(&mut self) {
        self.listing = Some(BTreeMap::new());
    }

    fn put(&mut self, object: &wire::ServiceCidr<'_>, changes: &mut Vec<Change>) {
        let name = name(object.metadata.as_ref()).to_owned();
        let cidrs = self.converter.service_cidr(&name, object);
        self.complaints.about(&ObjectKey::new("", &name), &mut self.converter);
        match &mut self.listing {
            Some(listing) => {
                listing.insert(name, cidrs);
            }
            None => {
                self.known.insert(name, cidrs);
                self.say(changes);
            }
        }
    }

    fn remove(&mut self, object: &wire::ServiceCidr<'_>, changes: &mut Vec<Change>) {
        self.known.remove(name(object.metadata.as_ref()));
        self.say(changes);
    }

    fn list_ends(&mut self, changes: &mut Vec<Change>) {
        self.known = self.listing.take().unwrap_or_default();
        self.say(changes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_node_is_news_when_what_we_read_of_it_changes() {
        let mut keeper = OwnNode::new("node-a".to_owned());
        for (json, news) in [
            (r#"{"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}"#, true),
            (
                r#"{"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}], "phase": "Running"}}"#,
                false,
            ),
            (r#"{"spec": {"podCIDR": "10.1.0.0/24"}}"#, true),
            (r#"{"spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"]}}"#, false),
            (r#"{"metadata": {"labels": {"topology.kubernetes.io/zone": "a"}}}"#, true),
            (r#"{"metadata": {"labels": {"topology.kubernetes.io/zone": "b"}}}"#, true),
            (r#"{"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}}"#, true),
            (r#"{"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}"#, false),
            ("{}", true),
        ] {
            let mut changes = Vec::new();
            keeper.put(&serde_json::from_str(json).unwrap(), &mut changes);
            assert_eq!(changes.len(), usize::from(news), "{json}");
        }
    }
}
