//! The own Node, and ServiceCIDRs.

use ipnetwork::IpNetwork;

use super::{Converter, Report, wire};
use crate::address::{parse_cidr, parse_ip};
use crate::model::input::Node;

/// The taint of a Node that the cluster autoscaler is about to delete: load balancers should leave it.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

impl Converter {
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
        let metadata = object.metadata.as_ref();
        let zone = metadata.and_then(|metadata| metadata.labels.as_ref()?.zone.as_deref());
        Node {
            addresses,
            pod_cidrs: object.spec.as_ref().map(|spec| pod_cidrs(spec, &mut report)).unwrap_or_default(),
            zone: zone.filter(|zone| !zone.is_empty()).map(|zone| self.names.intern(zone)),
            leaving: is_leaving(object),
        }
    }

    /// The CIDRs of a ServiceCIDR named `name`.
    pub(crate) fn service_cidr(&mut self, name: &str, object: &wire::ServiceCidr<'_>) -> Vec<IpNetwork> {
        let mut report = Report { kind: "ServiceCIDR", key: name, problems: &mut self.problems };
        let given = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
        if given.is_empty() {
            report.add("spec.cidrs", None, "missing: name one CIDR for each IP family");
        }
        report.each("spec.cidrs", Some(given), parse_cidr, "not a CIDR such as 10.96.0.0/12; it is left out")
    }
}

fn pod_cidrs(spec: &wire::NodeSpec<'_>, report: &mut Report<'_>) -> Vec<IpNetwork> {
    let remedy = "not a CIDR such as 10.244.1.0/24; it is left out";
    match (spec.pod_cidrs.as_deref(), spec.pod_cidr.as_deref()) {
        (None | Some([]), None | Some("")) => Vec::new(),
        (None | Some([]), Some(text)) => {
            let cidr = parse_cidr(text);
            if cidr.is_none() {
                report.add("spec.podCIDR", Some(text), remedy);
            }
            cidr.into_iter().collect()
        }
        (some, _) => report.each("spec.podCIDRs", some, parse_cidr, remedy),
    }
}

fn is_leaving(object: &wire::Node<'_>) -> bool {
    let deleted = object.metadata.as_ref().is_some_and(|metadata| metadata.deletion_timestamp.is_some());
    let taints = object.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    deleted || taints.iter().any(|taint| taint.key.as_deref() == Some(TO_BE_DELETED))
}
