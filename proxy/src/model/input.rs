//! What the sources hand to the model: Kubernetes objects reduced to what the model reads.
//!
//! Owns these types only. Kubernetes' own types never come past `source::convert`, and text that does not parse as
//! an address or a number never comes this far either: the source reports it and leaves it out.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use arcstr::ArcStr;
use ipnetwork::IpNetwork;
use serde::{Serialize, Serializer};
use smallvec::SmallVec;

/// `namespace/name` of an object, shared by all who refer to it. There are many of each: eight bytes a reference.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey(ArcStr);

impl ObjectKey {
    /// Joins a namespace and a name; neither can contain `/` in Kubernetes.
    pub fn new(namespace: &str, name: &str) -> Self {
        let mut key = String::with_capacity(namespace.len() + 1 + name.len());
        key.push_str(namespace);
        key.push('/');
        key.push_str(name);
        Self(key.into())
    }

    /// The part before the slash.
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// The part after the slash.
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or(&self.0, |(_, name)| name)
    }

    /// The whole key, `namespace/name`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for ObjectKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// The key of a Service.
pub type ServiceKey = ObjectKey;
/// The key of an EndpointSlice.
pub type SliceKey = ObjectKey;

/// Where an object came from. A static object wins over an API object of the same kind and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// A file of the manifest folder.
    Static,
    /// The API server.
    Api,
}

/// An IP family. IPv4 and IPv6 are planned and programmed independently of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

impl Serialize for Family {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Family {
    /// Both families, IPv4 first.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// A transport protocol that a Service port can name; the discriminants are the IANA protocol numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP (6).
    Tcp = 6,
    /// UDP (17).
    Udp = 17,
    /// SCTP (132).
    Sctp = 132,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The IANA protocol number.
    pub fn number(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

impl Serialize for Protocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A Service that has a cluster IP: headless and ExternalName Services never come this far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `metadata.namespace/name`.
    pub key: ServiceKey,
    /// `metadata.creationTimestamp` in seconds since the epoch; `i64::MAX` where the object has none.
    pub created: i64,
    /// `spec.clusterIPs` (or `spec.clusterIP`), in the object's order.
    pub cluster_ips: SmallVec<[IpAddr; 1]>,
    /// `spec.ports`, in the object's order; shared by Services that have the same.
    pub ports: Arc<[ServicePort]>,
    /// `spec.type`.
    pub kind: ServiceType,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`, as written: it counts only where the Service can be reached from outside.
    pub external_policy: TrafficPolicy,
    /// `spec.sessionAffinityConfig.clientIP.timeoutSeconds` where `spec.sessionAffinity` is `ClientIP`, in seconds.
    pub affinity: Option<NonZeroU32>,
    /// Addresses beside the cluster IPs; `None` where there are none.
    pub external: Option<Box<External>>,
}

/// `spec.type` of a Service that has a cluster IP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceType {
    /// `ClusterIP`.
    #[default]
    ClusterIp,
    /// `NodePort`.
    NodePort,
    /// `LoadBalancer`.
    LoadBalancer,
}

/// Which endpoints a policy lets a client reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TrafficPolicy {
    /// `Cluster`: those of all nodes.
    #[default]
    Cluster,
    /// `Local`: those of this node.
    Local,
}

/// How a Service is reached from outside the cluster, NodePorts apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct External {
    /// `spec.externalIPs`, in the object's order.
    pub ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` where the load balancer leaves it to the nodes (`ipMode` is `VIP` or absent).
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`, as far as they parse, host bits cleared.
    pub source_ranges: Vec<IpNetwork>,
    /// Some of `spec.loadBalancerSourceRanges` do not parse, and must not open the Service: nobody is let through in a
    /// family that has no other. Of manifests alone: for objects of the API server, kube-proxy's rule holds.
    pub ranges_unread: bool,
    /// `spec.healthCheckNodePort`; `None` where the Service has none (0 or absent).
    pub health_check_node_port: Option<u16>,
}

/// One entry of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// `name`, empty where the object has none.
    pub name: Arc<str>,
    /// `protocol`.
    pub protocol: Protocol,
    /// `port`, never 0.
    pub port: u16,
    /// `nodePort`; `None` where the Service has none (0 or absent).
    pub node_port: Option<u16>,
}

/// An IPv4 or IPv6 EndpointSlice; FQDN slices never come this far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// `metadata.namespace/name` of the slice.
    pub key: SliceKey,
    /// The Service it belongs to, by its label `kubernetes.io/service-name`.
    pub service: ServiceKey,
    /// `addressType`.
    pub family: Family,
    /// The ports that have a name (possibly empty) and a number; shared by slices that have the same.
    pub ports: Arc<[SlicePort]>,
    /// The endpoints whose first address parses in the slice's family.
    pub endpoints: Vec<Endpoint>,
}

/// One port of a slice.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlicePort {
    /// `name`: joined with the Service port's name.
    pub name: Arc<str>,
    /// `protocol`.
    pub protocol: Protocol,
    /// `port`, never 0.
    pub port: u16,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `addresses[0]`.
    pub address: IpAddr,
    /// `conditions.ready`; absent means true.
    pub ready: bool,
    /// `conditions.serving`; absent means true.
    pub serving: bool,
    /// `conditions.terminating`; absent means false.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `hints`; `None` where there are none.
    pub hints: Option<Box<Hints>>,
}

/// For whom an endpoint is meant (`hints` of an endpoint).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// `forZones[].name`.
    pub zones: Vec<Arc<str>>,
    /// `forNodes[].name`.
    pub nodes: Vec<Arc<str>>,
}

/// What the model reads of the agent's own Node object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// `status.addresses`: the InternalIPs, then the ExternalIPs, in the object's order.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs` (or `spec.podCIDR`), in the object's order, host bits cleared.
    pub pod_cidrs: Vec<IpNetwork>,
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// It is about to go: deleted, or tainted by the cluster autoscaler to be.
    pub leaving: bool,
}

/// One thing that happened at a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A Service exists with this content.
    Service(Service),
    /// The Service does not exist (any more), or is one that no proxy serves.
    ServiceGone(ServiceKey),
    /// An EndpointSlice exists with this content.
    Slice(EndpointSlice),
    /// The EndpointSlice does not exist (any more), or is one that no proxy reads.
    SliceGone(SliceKey),
    /// The own Node, `None` where it does not exist.
    Node(Option<Node>),
    /// Every CIDR of every ServiceCIDR object, all together.
    ServiceCidrs(Vec<IpNetwork>),
    /// What triggered the change before this one at the API server (`endpoints.kubernetes.io/last-change-trigger-time`),
    /// in microseconds since the epoch; the family of its slice. For metrics alone.
    Triggered(Family, i64),
    /// Whether the source can read all that it has; true unless it says otherwise. While it cannot, what an earlier
    /// run left in the kernel may belong to what it cannot read, and is not stale.
    Complete(bool),
    /// The source has listed its Services and its slices once: what it has not named does not exist.
    Synced,
}

/// One thing that the planner is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something happened at a source.
    Source {
        /// The source.
        origin: Origin,
        /// What happened there.
        change: Change,
    },
    /// Every address of the host's interfaces, all together. NodePorts answer there while the own Node is unknown or
    /// has no addresses; the socket layer leaves Services' addresses alone that are among them. Belongs to no source;
    /// loopback and link-local addresses are ignored.
    HostAddresses(Vec<IpAddr>),
}
