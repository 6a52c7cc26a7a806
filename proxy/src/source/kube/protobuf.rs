//! The protobuf form of the objects, reduced to the fields that the model reads.
//!
//! Owns field numbers (`generated.proto` of `k8s.io/api` and `k8s.io/apimachinery`) and nothing else: what a field
//! means is judged in [`super::super::convert`], which sees the same borrowed types as for JSON.

use std::borrow::Cow;
use std::collections::HashMap;

use k8s_openapi::jiff::Timestamp;
use prost::Message;
use serde::de::IgnoredAny;

use super::super::wire::{self, Text};

/// `meta/v1` ListMeta.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ListMetadata {
    #[prost(string, tag = "2")]
    pub(super) resource_version: String,
}

/// `meta/v1` ObjectMeta.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Metadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(message, optional, tag = "8")]
    creation_timestamp: Option<Time>,
    #[prost(message, optional, tag = "9")]
    deletion_timestamp: Option<Time>,
    #[prost(map = "string, string", tag = "11")]
    labels: HashMap<String, String>,
}

/// `meta/v1` Time.
#[derive(Clone, Copy, PartialEq, Message)]
struct Time {
    #[prost(int64, tag = "1")]
    seconds: i64,
}

/// `v1` Service.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Service {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(message, optional, tag = "2")]
    spec: Option<ServiceSpec>,
    #[prost(message, optional, tag = "3")]
    status: Option<ServiceStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct ServiceSpec {
    #[prost(message, repeated, tag = "1")]
    ports: Vec<ServicePort>,
    #[prost(string, tag = "3")]
    cluster_ip: String,
    #[prost(string, tag = "4")]
    kind: String,
    #[prost(string, repeated, tag = "5")]
    external_ips: Vec<String>,
    #[prost(string, tag = "7")]
    session_affinity: String,
    #[prost(string, repeated, tag = "9")]
    load_balancer_source_ranges: Vec<String>,
    #[prost(string, tag = "11")]
    external_traffic_policy: String,
    #[prost(int32, tag = "12")]
    health_check_node_port: i32,
    #[prost(message, optional, tag = "14")]
    session_affinity_config: Option<SessionAffinityConfig>,
    #[prost(string, repeated, tag = "18")]
    cluster_ips: Vec<String>,
    #[prost(string, optional, tag = "22")]
    internal_traffic_policy: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct ServicePort {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    protocol: String,
    #[prost(int32, tag = "3")]
    port: i32,
    #[prost(int32, tag = "5")]
    node_port: i32,
}

#[derive(Clone, PartialEq, Message)]
struct SessionAffinityConfig {
    #[prost(message, optional, tag = "1")]
    client_ip: Option<ClientIpConfig>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct ClientIpConfig {
    #[prost(int32, optional, tag = "1")]
    timeout_seconds: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct ServiceStatus {
    #[prost(message, optional, tag = "1")]
    load_balancer: Option<LoadBalancerStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct LoadBalancerStatus {
    #[prost(message, repeated, tag = "1")]
    ingress: Vec<LoadBalancerIngress>,
}

#[derive(Clone, PartialEq, Message)]
struct LoadBalancerIngress {
    #[prost(string, tag = "1")]
    ip: String,
    #[prost(string, optional, tag = "3")]
    ip_mode: Option<String>,
}

/// `discovery.k8s.io/v1` EndpointSlice.
#[derive(Clone, PartialEq, Message)]
pub(super) struct EndpointSlice {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(message, repeated, tag = "2")]
    endpoints: Vec<Endpoint>,
    #[prost(message, repeated, tag = "3")]
    ports: Vec<EndpointPort>,
    #[prost(string, tag = "4")]
    address_type: String,
}

#[derive(Clone, PartialEq, Message)]
struct Endpoint {
    #[prost(string, repeated, tag = "1")]
    addresses: Vec<String>,
    #[prost(message, optional, tag = "2")]
    conditions: Option<Conditions>,
    #[prost(string, optional, tag = "6")]
    node_name: Option<String>,
    #[prost(message, optional, tag = "8")]
    hints: Option<Hints>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Conditions {
    #[prost(bool, optional, tag = "1")]
    ready: Option<bool>,
    #[prost(bool, optional, tag = "2")]
    serving: Option<bool>,
    #[prost(bool, optional, tag = "3")]
    terminating: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct Hints {
    #[prost(message, repeated, tag = "1")]
    for_zones: Vec<Named>,
    #[prost(message, repeated, tag = "2")]
    for_nodes: Vec<Named>,
}

#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct EndpointPort {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(string, optional, tag = "2")]
    protocol: Option<String>,
    #[prost(int32, optional, tag = "3")]
    port: Option<i32>,
}

/// `v1` Node.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Node {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(message, optional, tag = "2")]
    spec: Option<NodeSpec>,
    #[prost(message, optional, tag = "3")]
    status: Option<NodeStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct NodeSpec {
    #[prost(string, tag = "1")]
    pod_cidr: String,
    #[prost(message, repeated, tag = "5")]
    taints: Vec<Taint>,
    #[prost(string, repeated, tag = "7")]
    pod_cidrs: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Taint {
    #[prost(string, tag = "1")]
    key: String,
}

#[derive(Clone, PartialEq, Message)]
struct NodeStatus {
    #[prost(message, repeated, tag = "5")]
    addresses: Vec<NodeAddress>,
}

#[derive(Clone, PartialEq, Message)]
struct NodeAddress {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(string, tag = "2")]
    address: String,
}

/// `networking.k8s.io/v1` ServiceCIDR.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ServiceCidr {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(message, optional, tag = "2")]
    spec: Option<ServiceCidrSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct ServiceCidrSpec {
    #[prost(string, repeated, tag = "1")]
    cidrs: Vec<String>,
}

/// Absent fields of protobuf are empty ones: the same to [`super::super::convert`].
fn text(text: &str) -> Option<Text<'_>> {
    (!text.is_empty()).then_some(Text(Cow::Borrowed(text)))
}

fn optional(text: Option<&String>) -> Option<Text<'_>> {
    text.map(|text| Text(Cow::Borrowed(text)))
}

fn texts(texts: &[String]) -> Option<Vec<Text<'_>>> {
    (!texts.is_empty()).then(|| texts.iter().map(|text| Text(Cow::Borrowed(text))).collect())
}

impl<'a> From<&'a Metadata> for wire::Metadata<'a> {
    fn from(metadata: &'a Metadata) -> Self {
        let time = |time: Time| {
            Timestamp::from_second(time.seconds).ok().map(|time| Text(Cow::Owned(time.to_string())))
        };
        let label = |name: &str| metadata.labels.get(name);
        Self {
            name: text(&metadata.name),
            namespace: text(&metadata.namespace),
            // A list has one of its own.
            resource_version: None,
            creation_timestamp: metadata.creation_timestamp.and_then(time),
            deletion_timestamp: metadata.deletion_timestamp.map(|_| IgnoredAny),
            labels: Some(wire::Labels {
                service_name: optional(label("kubernetes.io/service-name")),
                service_proxy_name: label("service.kubernetes.io/service-proxy-name").map(|_| IgnoredAny),
                headless: label("service.kubernetes.io/headless").map(|_| IgnoredAny),
                zone: optional(label("topology.kubernetes.io/zone")),
            }),
            // What a list names may have changed at any time.
            annotations: None,
        }
    }
}

impl<'a> From<&'a Service> for wire::Service<'a> {
    fn from(service: &'a Service) -> Self {
        Self {
            metadata: service.metadata.as_ref().map(Into::into),
            spec: service.spec.as_ref().map(Into::into),
            status: service.status.as_ref().map(|status| wire::ServiceStatus {
                load_balancer: status.load_balancer.as_ref().map(Into::into),
            }),
        }
    }
}

impl<'a> From<&'a ServiceSpec> for wire::ServiceSpec<'a> {
    fn from(spec: &'a ServiceSpec) -> Self {
        let ports = spec.ports.iter().map(|port| wire::Port {
            name: text(&port.name),
            protocol: text(&port.protocol),
            port: Some(port.port.into()),
            node_port: Some(port.node_port.into()),
        });
        Self {
            kind: text(&spec.kind),
            cluster_ip: text(&spec.cluster_ip),
            cluster_ips: texts(&spec.cluster_ips),
            ports: Some(ports.collect()),
            internal_traffic_policy: optional(spec.internal_traffic_policy.as_ref()),
            external_traffic_policy: text(&spec.external_traffic_policy),
            session_affinity: text(&spec.session_affinity),
            session_affinity_config: spec.session_affinity_config.as_ref().map(|config| {
                let timeout = |config: ClientIpConfig| wire::ClientIpConfig {
                    timeout_seconds: config.timeout_seconds.map(i64::from),
                };
                wire::SessionAffinityConfig { client_ip: config.client_ip.map(timeout) }
            }),
            external_ips: texts(&spec.external_ips),
            load_balancer_source_ranges: texts(&spec.load_balancer_source_ranges),
            health_check_node_port: Some(spec.health_check_node_port.into()),
        }
    }
}

impl<'a> From<&'a LoadBalancerStatus> for wire::LoadBalancerStatus<'a> {
    fn from(status: &'a LoadBalancerStatus) -> Self {
        let ingress = status.ingress.iter().map(|ingress| wire::LoadBalancerIngress {
            ip: text(&ingress.ip),
            ip_mode: optional(ingress.ip_mode.as_ref()),
        });
        Self { ingress: Some(ingress.collect()) }
    }
}

impl<'a> From<&'a EndpointSlice> for wire::EndpointSlice<'a> {
    fn from(slice: &'a EndpointSlice) -> Self {
        let ports = slice.ports.iter().map(|port| wire::Port {
            name: optional(port.name.as_ref()),
            protocol: optional(port.protocol.as_ref()),
            port: port.port.map(i64::from),
            node_port: None,
        });
        Self {
            metadata: slice.metadata.as_ref().map(Into::into),
            address_type: text(&slice.address_type),
            endpoints: Some(slice.endpoints.iter().map(Into::into).collect()),
            ports: Some(ports.collect()),
        }
    }
}

impl<'a> From<&'a Endpoint> for wire::Endpoint<'a> {
    fn from(endpoint: &'a Endpoint) -> Self {
        let hints = |hints: &'a [Named]| {
            Some(hints.iter().map(|hint| wire::Hint { name: text(&hint.name) }).collect())
        };
        Self {
            addresses: texts(&endpoint.addresses),
            conditions: endpoint.conditions.map(|conditions| wire::Conditions {
                ready: conditions.ready,
                serving: conditions.serving,
                terminating: conditions.terminating,
            }),
            node_name: optional(endpoint.node_name.as_ref()),
            hints: endpoint.hints.as_ref().map(|given| wire::Hints {
                for_zones: hints(&given.for_zones),
                for_nodes: hints(&given.for_nodes),
            }),
        }
    }
}

impl<'a> From<&'a Node> for wire::Node<'a> {
    fn from(node: &'a Node) -> Self {
        let taint = |taint: &'a Taint| wire::Taint { key: text(&taint.key) };
        let address = |address: &'a NodeAddress| wire::NodeAddress {
            kind: text(&address.kind),
            address: text(&address.address),
        };
        Self {
            metadata: node.metadata.as_ref().map(Into::into),
            spec: node.spec.as_ref().map(|spec| wire::NodeSpec {
                pod_cidr: text(&spec.pod_cidr),
                pod_cidrs: texts(&spec.pod_cidrs),
                taints: Some(spec.taints.iter().map(taint).collect()),
            }),
            status: node.status.as_ref().map(|status| wire::NodeStatus {
                addresses: Some(status.addresses.iter().map(address).collect()),
            }),
        }
    }
}

impl<'a> From<&'a ServiceCidr> for wire::ServiceCidr<'a> {
    fn from(cidr: &'a ServiceCidr) -> Self {
        Self {
            metadata: cidr.metadata.as_ref().map(Into::into),
            spec: cidr.spec.as_ref().map(|spec| wire::ServiceCidrSpec { cidrs: texts(&spec.cidrs) }),
        }
    }
}
