//! From the API's fields to the model's vocabulary.
//!
//! Owns what odd input means, as kube-proxy reads it: the good parts of an object are kept where that is safe, and
//! each bad part is a [`Problem`]. Never decides which endpoint serves whom.

use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::IpNetwork;
use k8s_openapi::jiff::Timestamp;

use super::intern::Interner;
use super::problem::{Problem, shorten};
use super::wire;
use crate::model::input::{
    Endpoint, EndpointSlice, Family, Node, ObjectKey, Origin, Protocol, Service, ServicePort, ServiceType,
    SlicePort, TrafficPolicy,
};

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

/// Converts objects of one origin and collects what is wrong with them.
pub(crate) struct Converter {
    origin: Origin,
    interner: Interner,
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
}

impl Converter {
    /// A converter for objects of `origin`. Static objects get the defaults that the API server would have filled in.
    pub(crate) fn new(origin: Origin) -> Self {
        Self { origin, interner: Interner::default(), problems: Vec::new() }
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

    /// A Service under the key that [`Self::key`] gave.
    pub(crate) fn service(&mut self, key: &ObjectKey, object: &wire::Service<'_>) -> Converted<Service> {
        let mut report = Report { kind: "Service", key: key.as_str(), problems: &mut self.problems };
        let metadata = object.metadata.as_ref();
        if metadata.and_then(|m| m.labels.as_ref()).is_some_and(|labels| labels.service_proxy_name.is_some())
        {
            return Converted::Ignored(Ignored::OtherProxy);
        }
        let Some(spec) = &object.spec else {
            report.add("spec", None, "missing: nothing to serve");
            return Converted::Bad;
        };
        if spec.kind.as_deref() == Some("ExternalName") {
            return Converted::Ignored(Ignored::ExternalName);
        }
        let cluster_ips = spec.cluster_ips.as_deref().unwrap_or_default();
        let first = match spec.cluster_ip.as_deref() {
            None | Some("") => cluster_ips.first().map_or("", |first| &**first),
            Some(cluster_ip) => cluster_ip,
        };
        match first {
            "" if self.origin == Origin::Api => return Converted::Ignored(Ignored::NoClusterIp),
            "" => {
                report.add("spec.clusterIP", None, "missing: no API server allocates one here, so name one");
                return Converted::Bad;
            }
            "None" => return Converted::Ignored(Ignored::Headless),
            _ => {}
        }

        let mut addresses: Vec<IpAddr> = Vec::with_capacity(cluster_ips.len().max(1));
        let mut add = |field: String, text: &str| match service_address(text) {
            Err(remedy) => report.add(field, Some(text), remedy),
            // The same address again is how clusterIP and clusterIPs[0] are written.
            Ok(address) if addresses.contains(&address) => {}
            Ok(address) if addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) => {
                report.add(
                    field,
                    Some(text),
                    "second address of one IP family: the first is used, remove this one",
                );
            }
            Ok(address) => addresses.push(address),
        };
        if spec.cluster_ip.as_deref().is_some_and(|text| !text.is_empty())
            && spec.cluster_ip.as_deref() != cluster_ips.first().map(|first| &**first)
        {
            add("spec.clusterIP".to_owned(), first);
        }
        for (index, text) in cluster_ips.iter().enumerate() {
            add(format!("spec.clusterIPs[{index}]"), text);
        }
        let ports = service_ports(spec, &mut self.interner, &mut report);
        if addresses.is_empty() || ports.is_empty() {
            return Converted::Bad;
        }
        Converted::Read(Service {
            key: key.clone(),
            created: created(metadata, &mut report),
            cluster_ips: addresses,
            ports,
            kind: ServiceType::ClusterIp,
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            affinity: None,
            external: None,
        })
    }

    /// A slice under the key that [`Self::key`] gave.
    pub(crate) fn slice(
        &mut self,
        key: &ObjectKey,
        object: &wire::EndpointSlice<'_>,
    ) -> Converted<EndpointSlice> {
        let mut report = Report { kind: "EndpointSlice", key: key.as_str(), problems: &mut self.problems };
        let labels = object.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref());
        if labels.is_some_and(|labels| labels.headless.is_some()) {
            return Converted::Ignored(Ignored::Headless);
        }
        let service = match labels.and_then(|labels| labels.service_name.as_deref()) {
            None | Some("") if self.origin == Origin::Api => {
                return Converted::Ignored(Ignored::NoServiceName);
            }
            None | Some("") => {
                let remedy = "missing: name the Service that the slice belongs to";
                report.add("metadata.labels[kubernetes.io/service-name]", None, remedy);
                return Converted::Bad;
            }
            Some(name) if !is_label(name) => {
                let remedy = "no Service can have this name; the slice is left out";
                report.add("metadata.labels[kubernetes.io/service-name]", Some(name), remedy);
                return Converted::Bad;
            }
            Some(name) => ObjectKey::new(key.namespace(), name),
        };
        let family = match object.address_type.as_deref() {
            Some("IPv4") => Family::V4,
            Some("IPv6") => Family::V6,
            Some("FQDN") => return Converted::Ignored(Ignored::AddressType),
            _ if self.origin == Origin::Api => return Converted::Ignored(Ignored::AddressType),
            other => {
                report.add(
                    "addressType",
                    other,
                    "not an address family: use IPv4 or IPv6; the slice is left out",
                );
                return Converted::Bad;
            }
        };

        let given = object.endpoints.as_deref().unwrap_or_default();
        let mut endpoints = Vec::with_capacity(given.len());
        for (index, endpoint) in given.iter().enumerate() {
            let field = || format!("endpoints[{index}].addresses[0]");
            let Some(text) = endpoint.addresses.as_deref().and_then(<[_]>::first) else {
                report.add(field(), None, "missing: the endpoint is left out");
                continue;
            };
            let address = match endpoint_address(text, family) {
                Ok(address) => address,
                Err(remedy) => {
                    report.add(field(), Some(text), remedy);
                    continue;
                }
            };
            let node = endpoint.node_name.as_deref().filter(|name| !name.is_empty()).and_then(|name| {
                if is_subdomain(name) {
                    return Some(self.interner.intern(name));
                }
                let remedy = "no node can have this name; the endpoint counts as one of another node";
                report.add(format!("endpoints[{index}].nodeName"), Some(name), remedy);
                None
            });
            let conditions = endpoint.conditions.as_ref();
            endpoints.push(Endpoint {
                address,
                ready: conditions.and_then(|c| c.ready).unwrap_or(true),
                serving: conditions.and_then(|c| c.serving).unwrap_or(true),
                terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
                node,
                hints: None,
            });
        }
        if endpoints.is_empty() && !given.is_empty() {
            return Converted::Bad;
        }
        endpoints.shrink_to_fit();
        let given_ports = object.ports.as_deref().unwrap_or_default();
        let ports = slice_ports(given_ports, self.origin, &mut self.interner, &mut report);
        if ports.is_empty() && !given_ports.is_empty() {
            return Converted::Bad;
        }
        Converted::Read(EndpointSlice { key: key.clone(), service, family, ports, endpoints })
    }

    /// A Node named `name`.
    pub(crate) fn node(&mut self, name: &str, object: &wire::Node<'_>) -> Node {
        let mut report = Report { kind: "Node", key: name, problems: &mut self.problems };
        let given = object.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
        let mut addresses = Vec::with_capacity(given.len());
        for wanted in ["InternalIP", "ExternalIP"] {
            for (index, address) in given.iter().enumerate() {
                if address.kind.as_deref() != Some(wanted) {
                    continue;
                }
                let text = address.address.as_deref().unwrap_or_default();
                match parse_ip(text) {
                    Some(address) if addresses.contains(&address) => {}
                    Some(address) => addresses.push(address),
                    None => report.add(
                        format!("status.addresses[{index}].address"),
                        Some(text),
                        "not an IP address; it is left out",
                    ),
                }
            }
        }
        Node { addresses, ..Node::default() }
    }

    /// The CIDRs of a ServiceCIDR named `name`.
    pub(crate) fn service_cidr(&mut self, name: &str, object: &wire::ServiceCidr<'_>) -> Vec<IpNetwork> {
        let mut report = Report { kind: "ServiceCIDR", key: name, problems: &mut self.problems };
        let given = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
        if given.is_empty() {
            report.add("spec.cidrs", None, "missing: name one CIDR for each IP family");
        }
        let mut cidrs = Vec::with_capacity(given.len());
        for (index, text) in given.iter().enumerate() {
            match parse_cidr(text) {
                Some(cidr) => cidrs.push(cidr),
                None => report.add(
                    format!("spec.cidrs[{index}]"),
                    Some(text),
                    "not a CIDR such as 10.96.0.0/12; it is left out",
                ),
            }
        }
        cidrs
    }
}

fn service_ports(
    spec: &wire::ServiceSpec<'_>,
    interner: &mut Interner,
    report: &mut Report<'_>,
) -> Vec<ServicePort> {
    let given = spec.ports.as_deref().unwrap_or_default();
    if given.is_empty() {
        report.add("spec.ports", None, "missing: a Service needs at least one port");
    }
    let mut ports: Vec<ServicePort> = Vec::with_capacity(given.len());
    for (index, entry) in given.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let name = entry.name.as_deref().unwrap_or_default();
        if !name.is_empty() && !is_label(name) {
            let remedy = "not a port name: use a DNS label of at most 63 characters; the port is left out";
            report.add(field("name"), Some(name), remedy);
            continue;
        }
        let Some(protocol) = protocol(entry.protocol.as_deref(), field("protocol"), report) else { continue };
        let Some(port) = port(entry.port, field("port"), report) else { continue };
        if ports.iter().any(|other| *other.name == *name) {
            let remedy = match name {
                "" => "missing, and only one port may go without: name each of them; the port is left out",
                _ => "another port has this name: the first is used, rename this one",
            };
            report.add(field("name"), Some(name).filter(|name| !name.is_empty()), remedy);
            continue;
        }
        if ports.iter().any(|other| (other.port, other.protocol) == (port, protocol)) {
            let value = format!("{port}/{protocol}");
            report.add(
                field("port"),
                Some(&value),
                "another port has this number: the first is used, remove this one",
            );
            continue;
        }
        let mut node_port = match entry.node_port {
            None | Some(0) => None,
            Some(number) => match u16::try_from(number) {
                Ok(number) => Some(number),
                Err(_) => {
                    let remedy = "not a port number: use 1 to 65535; the port has no NodePort";
                    report.add(field("nodePort"), Some(&number.to_string()), remedy);
                    None
                }
            },
        };
        if let Some(number) = node_port
            && ports.iter().any(|other| other.node_port == Some(number) && other.protocol == protocol)
        {
            let remedy = "another port has this NodePort: the first keeps it, choose another";
            report.add(field("nodePort"), Some(&number.to_string()), remedy);
            node_port = None;
        }
        ports.push(ServicePort { name: interner.intern(name), protocol, port, node_port });
    }
    ports
}

fn slice_ports(
    given: &[wire::SlicePort<'_>],
    origin: Origin,
    interner: &mut Interner,
    report: &mut Report<'_>,
) -> Vec<SlicePort> {
    let mut ports: Vec<SlicePort> = Vec::with_capacity(given.len());
    for (index, entry) in given.iter().enumerate() {
        let field = |name: &str| format!("ports[{index}].{name}");
        let name = match (entry.name.as_deref(), origin) {
            (Some(name), _) => name,
            // The API server writes "" for a missing name; one that is still missing has a meaning to no one.
            (None, Origin::Static) => "",
            (None, Origin::Api) => {
                report.add(field("name"), None, "missing: the port is left out");
                continue;
            }
        };
        if !name.is_empty() && !is_label(name) {
            let remedy = "not a port name: use a DNS label of at most 63 characters; the port is left out";
            report.add(field("name"), Some(name), remedy);
            continue;
        }
        let Some(protocol) = protocol(entry.protocol.as_deref(), field("protocol"), report) else { continue };
        let Some(port) = port(entry.port, field("port"), report) else { continue };
        if ports.iter().any(|other| *other.name == *name && other.protocol == protocol) {
            report.add(
                field("name"),
                Some(name),
                "another port has this name: the first is used, remove this one",
            );
            continue;
        }
        ports.push(SlicePort { name: interner.intern(name), protocol, port });
    }
    ports
}

fn protocol(text: Option<&str>, field: String, report: &mut Report<'_>) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(other) => {
            report.add(field, Some(other), "unknown protocol: use TCP, UDP or SCTP; the port is left out");
            None
        }
    }
}

fn port(number: Option<i64>, field: String, report: &mut Report<'_>) -> Option<u16> {
    let Some(number) = number else {
        report.add(field, None, "missing: use 1 to 65535; the port is left out");
        return None;
    };
    match u16::try_from(number) {
        Ok(port) if port != 0 => Some(port),
        _ => {
            let remedy = "not a port number: use 1 to 65535; the port is left out";
            report.add(field, Some(&number.to_string()), remedy);
            None
        }
    }
}

fn created(metadata: Option<&wire::Metadata<'_>>, report: &mut Report<'_>) -> i64 {
    let Some(text) = metadata.and_then(|metadata| metadata.creation_timestamp.as_deref()) else {
        return i64::MAX;
    };
    text.parse::<Timestamp>().map_or_else(
        |_| {
            let remedy = "not an RFC 3339 time; the Service counts as the youngest";
            report.add("metadata.creationTimestamp", Some(text), remedy);
            i64::MAX
        },
        Timestamp::as_second,
    )
}

fn service_address(text: &str) -> Result<IpAddr, &'static str> {
    let address = parse_ip(text).ok_or("not an IP address; it is left out")?;
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
        return Err("no Service can have this address: use one of the Service range; it is left out");
    }
    Ok(address)
}

fn endpoint_address(text: &str, family: Family) -> Result<IpAddr, &'static str> {
    let address = parse_ip(text).ok_or("not an IP address; the endpoint is left out")?;
    if Family::of(address) != family {
        return Err("not of the slice's addressType: put it in a slice of its own; the endpoint is left out");
    }
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() || link_local {
        return Err("no pod can have this address; the endpoint is left out");
    }
    Ok(address)
}

/// Reads an address as Go's `ParseIPSloppy` does: leading zeros of an octet are decimal, v4-mapped is IPv4.
fn parse_ip(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>().ok().map(|address| address.to_canonical()).or_else(|| {
        let mut octets = [0_u8; 4];
        let mut parts = text.split('.');
        for octet in &mut octets {
            let part = parts.next()?;
            if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
                return None;
            }
            *octet = part.parse().ok()?;
        }
        parts.next().is_none().then(|| Ipv4Addr::from(octets).into())
    })
}

/// Reads a CIDR and clears its host bits.
fn parse_cidr(text: &str) -> Option<IpNetwork> {
    let (address, length) = text.trim().split_once('/')?;
    if !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let network = IpNetwork::new(parse_ip(address)?, length.parse().ok()?).ok()?;
    IpNetwork::new(network.network(), network.prefix()).ok()
}

/// Whether this is a DNS label (RFC 1123): what names a Service, a namespace and a port.
fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let edge =
        |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-')
}

/// Whether this is a DNS subdomain (RFC 1123): what names a slice, a node and most other objects.
fn is_subdomain(text: &str) -> bool {
    // Unlike a label, a part of a subdomain has no length limit of its own in Kubernetes.
    let edge =
        |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    text.len() <= 253
        && text.split('.').all(|part| {
            let bytes = part.as_bytes();
            edge(bytes.first())
                && edge(bytes.last())
                && bytes
                    .iter()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-')
        })
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
