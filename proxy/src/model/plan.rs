//! What a Service becomes on this node: frontends that clients dial and the endpoint sets behind them.
//!
//! Owns the vocabulary between policy and dataplanes. A plan holds *sets*: slots, element order and ids belong to
//! the lowering of each dataplane. Two plans that mean the same are equal.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use serde::{Serialize, Serializer};

use super::input::{Family, Protocol, ServiceKey};

/// The most endpoints that a set has: the dataplanes find one of so many. Of more, the first by address are used, and a
/// warning tells both numbers.
pub const MAX_BACKENDS: usize = 1 << 14;

/// One Service on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// The Service.
    pub service: ServiceKey,
    /// One entry for each port and family that has a frontend, sorted by family, protocol and name; no two
    /// are equal in all three.
    pub ports: Box<[PortPlan]>,
    /// What load balancers ask whether this node has endpoints of the Service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_check: Option<Box<HealthCheck>>,
    /// What a user should know of this Service, in words: lost claims, ignored fields.
    pub warnings: Box<[String]>,
}

/// One port of a Service in one family. Its frontends share one endpoint set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortPlan {
    /// IPv4 or IPv6.
    pub family: Family,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The Service port's name, empty where it has none.
    pub name: Arc<str>,
    /// How long a client comes back to the backend it had, in seconds; all frontends share what is remembered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<NonZeroU32>,
    /// Who may dial the frontends of kind LoadBalancer: sorted, disjoint, of the port's family. `None`: everybody; none of
    /// them: nobody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_ranges: Option<Arc<[IpNetwork]>>,
    /// The Cluster set: sorted, no address:port twice. Empty where no frontend uses it.
    pub backends: Box<[Backend]>,
    /// The Local set, likewise.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub local_backends: Box<[Backend]>,
    /// Endpoints in neither set that still serve: connections they have are left alone. Sorted, no address:port twice.
    /// Empty for TCP, whose connections end by themselves.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub draining: Box<[AddressPort]>,
    /// What clients dial: sorted, and claimed by no other Service.
    pub frontends: Box<[Frontend]>,
}

/// An IP address and a port: what `SocketAddr` says, in 20 bytes instead of 32. There may be 250,000 of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressPort {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    pub port: u16,
}

impl AddressPort {
    /// As the standard library has it.
    pub fn socket(self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

impl From<SocketAddr> for AddressPort {
    /// Flow information and scope of an IPv6 address have no meaning in a plan.
    fn from(address: SocketAddr) -> Self {
        Self { ip: address.ip(), port: address.port() }
    }
}

impl Serialize for AddressPort {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.socket())
    }
}

/// An endpoint that was selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    /// Address and port, of the plan's family.
    pub address: AddressPort,
    /// It runs on this node: a connection from it can come back to it (hairpin).
    pub local: bool,
}

/// An address that clients dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Frontend {
    /// The address and port.
    pub at: FrontendAddress,
    /// Which field of the Service it comes from.
    pub kind: FrontendKind,
    /// What a new connection meets.
    pub verdict: Verdict,
}

/// The address and port of a frontend; protocol and family are the port plan's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum FrontendAddress {
    /// One address of the Service.
    Vip(AddressPort),
    /// A NodePort: this port on each of the node's NodePort addresses.
    NodePort(u16),
}

/// Which field of the Service a frontend comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum FrontendKind {
    /// `spec.clusterIPs`: masqueraded only for clients that the detector calls non-local (or by masqueradeAll).
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    /// `status.loadBalancer.ingress[].ip`: as a NodePort, and [`PortPlan::source_ranges`] are let through alone.
    #[serde(rename = "LoadBalancer")]
    LoadBalancer,
    /// `spec.externalIPs`: as a NodePort.
    #[serde(rename = "externalIP")]
    ExternalIp,
    /// `spec.ports[].nodePort`: masqueraded where the verdict is `Cluster`; where it is `Local`, for host processes
    /// alone.
    NodePort,
}

/// What a new connection to a frontend meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Verdict {
    /// One of the Cluster set, at random.
    Cluster,
    /// One of the Local set, at random; dropped where that is empty. At external frontends, the pods and host
    /// processes of this node get the Cluster set instead (the short-circuit of `externalTrafficPolicy: Local`).
    Local,
    /// ICMP port unreachable: no usable endpoint anywhere.
    Reject,
}

/// What a `healthCheckNodePort` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheck {
    /// The port, on the node's NodePort addresses.
    pub port: u16,
    /// Ready endpoints of this node by family, each address once; `None`: the Service has no frontend of the family.
    pub v4_endpoints: Option<u32>,
    /// The same for IPv6.
    pub v6_endpoints: Option<u32>,
}

/// What belongs to the node rather than to a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodePlan {
    /// The addresses that NodePorts answer on: sorted, unique.
    #[serde(rename = "nodePortAddresses")]
    pub nodeport_addresses: Vec<IpAddr>,
    /// The addresses of its interfaces, but loopback and link-local ones: sorted, unique. What has one of them is the
    /// node itself, or a Service whose address is bound there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interface_addresses: Vec<IpAddr>,
    /// Where local pods have their addresses, for the detectors that go by address: at most one network a family.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<IpNetwork>,
    /// The ServiceCIDRs: an address inside one that no Service has is dropped. Sorted, disjoint.
    #[serde(rename = "serviceCIDRs")]
    pub service_cidrs: Vec<IpNetwork>,
    /// What a user should know of the node, in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl Plan {
    /// Of these ports, with no health check and nothing to warn of.
    pub fn new(service: ServiceKey, ports: impl Into<Box<[PortPlan]>>) -> Self {
        Self { service, ports: ports.into(), health_check: None, warnings: [].into() }
    }

    /// `namespace/name:port` of one of its ports, as kube-proxy writes it in comments and logs.
    pub fn port_name(&self, port: &PortPlan) -> String {
        if port.name.is_empty() {
            self.service.to_string()
        } else {
            format!("{}:{}", self.service, port.name)
        }
    }
}

impl PortPlan {
    /// A port that nobody dials and nobody serves, to be filled in.
    pub fn new(family: Family, protocol: Protocol, name: impl Into<Arc<str>>) -> Self {
        Self {
            family,
            protocol,
            name: name.into(),
            affinity: None,
            source_ranges: None,
            backends: [].into(),
            local_backends: [].into(),
            draining: [].into(),
            frontends: [].into(),
        }
    }
}

impl Frontend {
    /// A cluster IP.
    pub fn cluster_ip(at: impl Into<AddressPort>, verdict: Verdict) -> Self {
        Self { at: FrontendAddress::Vip(at.into()), kind: FrontendKind::ClusterIp, verdict }
    }

    /// A NodePort.
    pub fn nodeport(port: u16, verdict: Verdict) -> Self {
        Self { at: FrontendAddress::NodePort(port), kind: FrontendKind::NodePort, verdict }
    }
}
