//! Kubernetes objects as they arrive, reduced to the fields that the model reads.
//!
//! Owns the field names of the API and nothing else: what is missing, null or odd is judged in [`super::convert`].
//! Strings are borrowed from the text where it has no escapes, so that decoding a list allocates next to nothing.

use std::borrow::Cow;
use std::fmt;
use std::ops::Deref;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, Visitor};

/// A string that borrows from the text where it can.
///
/// `Option<Cow<str>>` and `Vec<Cow<str>>` would always allocate: serde borrows only for a field that is a `Cow` itself.
#[derive(Debug)]
pub(crate) struct Text<'a>(pub(crate) Cow<'a, str>);

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text)))
            }
        }

        deserializer.deserialize_str(TextVisitor)
    }
}

/// `metadata`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Metadata<'a> {
    #[serde(borrow)]
    pub(crate) name: Option<Text<'a>>,
    pub(crate) namespace: Option<Text<'a>>,
    pub(crate) resource_version: Option<Text<'a>>,
    pub(crate) creation_timestamp: Option<Text<'a>>,
    pub(crate) deletion_timestamp: Option<IgnoredAny>,
    pub(crate) labels: Option<Labels<'a>>,
    pub(crate) annotations: Option<Annotations<'a>>,
}

/// The annotations that mean something here.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Annotations<'a> {
    #[serde(borrow, rename = "endpoints.kubernetes.io/last-change-trigger-time")]
    pub(crate) trigger_time: Option<Text<'a>>,
}

/// The labels that mean something to a Service proxy.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Labels<'a> {
    #[serde(borrow, rename = "kubernetes.io/service-name")]
    pub(crate) service_name: Option<Text<'a>>,
    #[serde(rename = "service.kubernetes.io/service-proxy-name")]
    pub(crate) service_proxy_name: Option<IgnoredAny>,
    #[serde(rename = "service.kubernetes.io/headless")]
    pub(crate) headless: Option<IgnoredAny>,
    #[serde(rename = "topology.kubernetes.io/zone")]
    pub(crate) zone: Option<Text<'a>>,
}

/// An object that has nothing that we read but `metadata`.
pub(crate) trait Object<'a> {
    /// `metadata`, `None` where the object has none.
    fn metadata(&self) -> Option<&Metadata<'a>>;
}

macro_rules! object {
    ($($kind:ident),*) => {
        $(impl<'a> Object<'a> for $kind<'a> {
            fn metadata(&self) -> Option<&Metadata<'a>> {
                self.metadata.as_ref()
            }
        })*
    };
}
object!(Service, EndpointSlice, Node, ServiceCidr);

/// `v1` Service.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Service<'a> {
    #[serde(borrow)]
    pub(crate) metadata: Option<Metadata<'a>>,
    pub(crate) spec: Option<ServiceSpec<'a>>,
    pub(crate) status: Option<ServiceStatus<'a>>,
}

/// `spec` of a Service.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct ServiceSpec<'a> {
    #[serde(borrow, rename = "type")]
    pub(crate) kind: Option<Text<'a>>,
    #[serde(rename = "clusterIP")]
    pub(crate) cluster_ip: Option<Text<'a>>,
    #[serde(rename = "clusterIPs")]
    pub(crate) cluster_ips: Option<Vec<Text<'a>>>,
    pub(crate) ports: Option<Vec<Port<'a>>>,
    pub(crate) internal_traffic_policy: Option<Text<'a>>,
    pub(crate) external_traffic_policy: Option<Text<'a>>,
    pub(crate) session_affinity: Option<Text<'a>>,
    pub(crate) session_affinity_config: Option<SessionAffinityConfig>,
    #[serde(rename = "externalIPs")]
    pub(crate) external_ips: Option<Vec<Text<'a>>>,
    pub(crate) load_balancer_source_ranges: Option<Vec<Text<'a>>>,
    pub(crate) health_check_node_port: Option<i64>,
}

/// `spec.sessionAffinityConfig` of a Service.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct SessionAffinityConfig {
    #[serde(rename = "clientIP")]
    pub(crate) client_ip: Option<ClientIpConfig>,
}

/// `spec.sessionAffinityConfig.clientIP` of a Service.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct ClientIpConfig {
    pub(crate) timeout_seconds: Option<i64>,
}

/// `status` of a Service.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct ServiceStatus<'a> {
    #[serde(borrow)]
    pub(crate) load_balancer: Option<LoadBalancerStatus<'a>>,
}

/// `status.loadBalancer` of a Service.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct LoadBalancerStatus<'a> {
    #[serde(borrow)]
    pub(crate) ingress: Option<Vec<LoadBalancerIngress<'a>>>,
}

/// One entry of a Service's `status.loadBalancer.ingress`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct LoadBalancerIngress<'a> {
    #[serde(borrow)]
    pub(crate) ip: Option<Text<'a>>,
    pub(crate) ip_mode: Option<Text<'a>>,
}

/// One entry of a Service's `spec.ports`, or of a slice's `ports`, which have no `nodePort`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Port<'a> {
    #[serde(borrow)]
    pub(crate) name: Option<Text<'a>>,
    pub(crate) protocol: Option<Text<'a>>,
    pub(crate) port: Option<i64>,
    pub(crate) node_port: Option<i64>,
}

/// `discovery.k8s.io/v1` EndpointSlice.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct EndpointSlice<'a> {
    #[serde(borrow)]
    pub(crate) metadata: Option<Metadata<'a>>,
    pub(crate) address_type: Option<Text<'a>>,
    pub(crate) endpoints: Option<Vec<Endpoint<'a>>>,
    pub(crate) ports: Option<Vec<Port<'a>>>,
}

/// One entry of a slice's `endpoints`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Endpoint<'a> {
    #[serde(borrow)]
    pub(crate) addresses: Option<Vec<Text<'a>>>,
    pub(crate) conditions: Option<Conditions>,
    pub(crate) node_name: Option<Text<'a>>,
    pub(crate) hints: Option<Hints<'a>>,
}

/// `conditions` of an endpoint.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Conditions {
    pub(crate) ready: Option<bool>,
    pub(crate) serving: Option<bool>,
    pub(crate) terminating: Option<bool>,
}

/// `hints` of an endpoint.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Hints<'a> {
    #[serde(borrow)]
    pub(crate) for_zones: Option<Vec<Hint<'a>>>,
    pub(crate) for_nodes: Option<Vec<Hint<'a>>>,
}

/// One entry of `hints.forZones` or `hints.forNodes`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Hint<'a> {
    #[serde(borrow)]
    pub(crate) name: Option<Text<'a>>,
}

/// `v1` Node.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Node<'a> {
    #[serde(borrow)]
    pub(crate) metadata: Option<Metadata<'a>>,
    pub(crate) spec: Option<NodeSpec<'a>>,
    pub(crate) status: Option<NodeStatus<'a>>,
}

/// `spec` of a Node.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct NodeSpec<'a> {
    #[serde(borrow, rename = "podCIDR")]
    pub(crate) pod_cidr: Option<Text<'a>>,
    #[serde(rename = "podCIDRs")]
    pub(crate) pod_cidrs: Option<Vec<Text<'a>>>,
    pub(crate) taints: Option<Vec<Taint<'a>>>,
}

/// One entry of a Node's `spec.taints`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Taint<'a> {
    #[serde(borrow)]
    pub(crate) key: Option<Text<'a>>,
}

/// `status` of a Node.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct NodeStatus<'a> {
    #[serde(borrow)]
    pub(crate) addresses: Option<Vec<NodeAddress<'a>>>,
}

/// One entry of a Node's `status.addresses`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct NodeAddress<'a> {
    #[serde(borrow, rename = "type")]
    pub(crate) kind: Option<Text<'a>>,
    pub(crate) address: Option<Text<'a>>,
}

/// `networking.k8s.io/v1` ServiceCIDR.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct ServiceCidr<'a> {
    #[serde(borrow)]
    pub(crate) metadata: Option<Metadata<'a>>,
    pub(crate) spec: Option<ServiceCidrSpec<'a>>,
}

/// `spec` of a ServiceCIDR.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct ServiceCidrSpec<'a> {
    #[serde(borrow)]
    pub(crate) cidrs: Option<Vec<Text<'a>>>,
}

/// The fields that say which object a document is.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Head<'a> {
    #[serde(borrow)]
    pub(crate) api_version: Option<Text<'a>>,
    pub(crate) kind: Option<Text<'a>>,
    pub(crate) metadata: Option<Metadata<'a>>,
}
