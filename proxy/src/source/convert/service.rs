//! Services.

use std::net::IpAddr;
use std::num::NonZeroU32;

use k8s_openapi::jiff::Timestamp;
use smallvec::SmallVec;

use super::{Converted, Converter, Ignored, Report, ports, wire};
use crate::address::{parse_cidr, parse_ip};
use crate::model::input::{External, ObjectKey, Origin, Service, ServicePort, ServiceType, TrafficPolicy};
use crate::source::intern::Interner;

/// The API server's default of `spec.sessionAffinityConfig.clientIP.timeoutSeconds`: three hours.
const AFFINITY: NonZeroU32 = NonZeroU32::new(10_800).unwrap();
/// The field of the ranges that load balancers' clients have to be in.
pub(crate) const SOURCE_RANGES: &str = "spec.loadBalancerSourceRanges";
/// The most that it accepts: a day.
const LONGEST_AFFINITY: u32 = 86_400;

impl Converter {
    /// A Service under the key that [`Self::key`] gave.
    pub(crate) fn service(&mut self, key: &ObjectKey, object: &wire::Service<'_>) -> Converted<Service> {
        let Self { origin, names, service_ports, problems, .. } = self;
        let mut report = Report { kind: "Service", key: key.as_str(), problems };
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
        let cluster_ips = match cluster_ips(spec, *origin, &mut report) {
            Converted::Read(addresses) => addresses,
            Converted::Ignored(why) => return Converted::Ignored(why),
            Converted::Bad => return Converted::Bad,
        };
        let (kind, is_known) = service_type(spec, &mut report);
        let mut ports = ports_of(spec, names, &mut report);
        if !is_known {
            ports.iter_mut().for_each(|port| port.node_port = None);
        }
        if cluster_ips.is_empty() || ports.is_empty() {
            return Converted::Bad;
        }
        let mut policy = |field: &str, text: &Option<wire::Text<'_>>| {
            let values = &[("Cluster", TrafficPolicy::Cluster), ("Local", TrafficPolicy::Local)];
            report.choose(
                field,
                text.as_deref(),
                values,
                "unknown policy: use Cluster or Local; Cluster applies",
            )
        };
        let internal_policy = policy("spec.internalTrafficPolicy", &spec.internal_traffic_policy);
        let external_policy = policy("spec.externalTrafficPolicy", &spec.external_traffic_policy);
        Converted::Read(Service {
            key: key.clone(),
            created: created(metadata, &mut report),
            cluster_ips,
            ports: service_ports.intern(&ports),
            kind,
            internal_policy,
            external_policy,
            affinity: affinity(spec, &mut report),
            external: external(spec, object.status.as_ref().filter(|_| is_known), *origin, &mut report),
        })
    }
}

/// The good ones of `spec.clusterIPs`, and `spec.clusterIP` where it is not the first of them.
fn cluster_ips(
    spec: &wire::ServiceSpec<'_>,
    origin: Origin,
    report: &mut Report<'_>,
) -> Converted<SmallVec<[IpAddr; 1]>> {
    let given = spec.cluster_ips.as_deref().unwrap_or_default();
    let first_given = given.first().map(|first| &**first);
    let single = spec.cluster_ip.as_deref().filter(|text| !text.is_empty());
    match single.or(first_given).unwrap_or_default() {
        "" if origin == Origin::Api => return Converted::Ignored(Ignored::NoClusterIp),
        "" => {
            report.add("spec.clusterIP", None, "missing: no API server allocates one here, so name one");
            return Converted::Bad;
        }
        "None" => return Converted::Ignored(Ignored::Headless),
        _ => {}
    }

    let mut addresses: SmallVec<[IpAddr; 1]> = SmallVec::new();
    let mut add = |field: String, text: &str| match service_address(text) {
        Err(remedy) => report.add(field, Some(text), remedy),
        // The same address again is how clusterIP and clusterIPs[0] are written.
        Ok(address) if addresses.contains(&address) => {}
        Ok(address) if addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) => {
            let remedy = "second address of one IP family: the first is used, remove this one";
            report.add(field, Some(text), remedy);
        }
        Ok(address) => addresses.push(address),
    };
    if let Some(single) = single.filter(|single| Some(*single) != first_given) {
        add("spec.clusterIP".to_owned(), single);
    }
    for (index, text) in given.iter().enumerate() {
        add(format!("spec.clusterIPs[{index}]"), text);
    }
    Converted::Read(addresses)
}

/// Cluster, external and load balancer IPs. Link-local ones work where they are routed.
fn service_address(text: &str) -> Result<IpAddr, &'static str> {
    let address = parse_ip(text).ok_or("not an IP address; it is left out")?;
    let broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() || broadcast {
        return Err("no Service can be dialled at this address: use a unicast one; it is left out");
    }
    Ok(address)
}

fn ports_of(
    spec: &wire::ServiceSpec<'_>,
    names: &mut Interner<str>,
    report: &mut Report<'_>,
) -> Vec<ServicePort> {
    let given = spec.ports.as_deref().unwrap_or_default();
    if given.is_empty() {
        report.add("spec.ports", None, "missing: a Service needs at least one port");
    }
    let mut ports: Vec<ServicePort> = Vec::with_capacity(given.len());
    for (index, entry) in given.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let Some(ports::Port { name, protocol, number }) = ports::read(entry, field, report) else {
            continue;
        };
        if ports.iter().any(|other| *other.name == *name) {
            let remedy = match name {
                "" => "missing, and only one port may go without: name each of them; the port is left out",
                _ => "another port has this name: the first is used, rename this one",
            };
            report.add(field("name"), Some(name).filter(|name| !name.is_empty()), remedy);
            continue;
        }
        if ports.iter().any(|other| (other.port, other.protocol) == (number, protocol)) {
            let value = format!("{number}/{protocol}");
            let remedy = "another port has this number: the first is used, remove this one";
            report.add(field("port"), Some(&value), remedy);
            continue;
        }
        let remedy = "not a port number: use 1 to 65535; the port has no NodePort";
        let mut node_port = ports::optional(entry.node_port, || field("nodePort"), remedy, report);
        if let Some(number) = node_port
            && ports.iter().any(|other| other.node_port == Some(number) && other.protocol == protocol)
        {
            let remedy = "another port has this NodePort: the first keeps it, choose another";
            report.add(field("nodePort"), Some(&number.to_string()), remedy);
            node_port = None;
        }
        ports.push(ServicePort { name: names.intern(name), protocol, port: number, node_port });
    }
    ports
}

/// The type, and whether it is one: of an unknown type, nothing but what any Service has is served.
fn service_type(spec: &wire::ServiceSpec<'_>, report: &mut Report<'_>) -> (ServiceType, bool) {
    let values = &[
        ("ClusterIP", (ServiceType::ClusterIp, true)),
        ("NodePort", (ServiceType::NodePort, true)),
        ("LoadBalancer", (ServiceType::LoadBalancer, true)),
    ];
    let remedy = "unknown type: use ClusterIP, NodePort, LoadBalancer or ExternalName; it is served as a ClusterIP, \
                  without NodePorts and load balancer addresses";
    match spec.kind.as_deref().filter(|text| !text.is_empty()) {
        None => (ServiceType::default(), true),
        text => report.choose("spec.type", text, values, remedy),
    }
}

fn affinity(spec: &wire::ServiceSpec<'_>, report: &mut Report<'_>) -> Option<NonZeroU32> {
    let values = &[("None", false), ("ClientIP", true)];
    let remedy = "unknown affinity: use None or ClientIP; connections go to any endpoint";
    if !report.choose("spec.sessionAffinity", spec.session_affinity.as_deref(), values, remedy) {
        return None;
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(written) = config.and_then(|client_ip| client_ip.timeout_seconds) else {
        return Some(AFFINITY);
    };
    let seconds = u32::try_from(written).ok().filter(|seconds| *seconds <= LONGEST_AFFINITY);
    Some(seconds.and_then(NonZeroU32::new).unwrap_or_else(|| {
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        report.add(field, Some(&written.to_string()), "use 1 to 86400 seconds; 10800 apply");
        AFFINITY
    }))
}

fn external(
    spec: &wire::ServiceSpec<'_>,
    status: Option<&wire::ServiceStatus<'_>>,
    origin: Origin,
    report: &mut Report<'_>,
) -> Option<Box<External>> {
    let mut ips = Vec::new();
    for (index, text) in spec.external_ips.as_deref().unwrap_or_default().iter().enumerate() {
        // The API server does not always refuse an empty one.
        if !text.trim().is_empty() {
            add_address(&mut ips, || format!("spec.externalIPs[{index}]"), text, report);
        }
    }

    let mut load_balancer_ips = Vec::new();
    let ingress = status.and_then(|status| status.load_balancer.as_ref()?.ingress.as_deref());
    for (index, ingress) in ingress.unwrap_or_default().iter().enumerate() {
        let field = |name: &str| format!("status.loadBalancer.ingress[{index}].{name}");
        let Some(text) = ingress.ip.as_deref().filter(|text| !text.is_empty()) else { continue };
        match ingress.ip_mode.as_deref() {
            None | Some("VIP") => add_address(&mut load_balancer_ips, || field("ip"), text, report),
            Some("Proxy") => {}
            Some(other) => {
                let remedy = "unknown mode: use VIP or Proxy; the address is left to the load balancer";
                report.add(field("ipMode"), Some(other), remedy);
            }
        }
    }

    let field = SOURCE_RANGES;
    let given = spec.load_balancer_source_ranges.as_deref();
    let remedy = "not a CIDR such as 192.0.2.0/24; it is left out";
    let source_ranges = report.each(field, given, parse_cidr, remedy);
    let is_unread = source_ranges.len() < given.map_or(0, <[_]>::len);
    if source_ranges.is_empty() && is_unread {
        let meaning = match origin {
            Origin::Static => "no range is left: nobody is let through",
            // As in kube-proxy.
            Origin::Api => "no range is left: everybody is let through",
        };
        report.add(field, None, meaning);
    }

    let health_check_node_port = ports::optional(
        spec.health_check_node_port,
        || "spec.healthCheckNodePort".to_owned(),
        "not a port number: use 1 to 65535; load balancers cannot ask for its health",
        report,
    );
    let ranges_unread = is_unread && origin == Origin::Static;
    let external = External { ips, load_balancer_ips, source_ranges, ranges_unread, health_check_node_port };
    (external != External::default()).then(|| Box::new(external))
}

/// Adds an address that a Service can have, once.
fn add_address(addresses: &mut Vec<IpAddr>, field: impl Fn() -> String, text: &str, report: &mut Report<'_>) {
    match service_address(text) {
        Ok(address) if addresses.contains(&address) => {}
        Ok(address) => addresses.push(address),
        Err(remedy) => report.add(field(), Some(text), remedy),
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
