//! EndpointSlices.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;

use super::names::{is_label, is_subdomain};
use super::{Converted, Converter, Ignored, Report, ports, wire};
use crate::address::parse_ip;
use crate::model::input::{
    Change, Endpoint, EndpointSlice, Family, Hints, ObjectKey, Origin, ServiceKey, SlicePort,
};
use crate::source::intern::Interner;

impl Converter {
    /// A slice under the key that [`Self::key`] gave.
    pub(crate) fn slice(
        &mut self,
        key: &ObjectKey,
        object: &wire::EndpointSlice<'_>,
    ) -> Converted<EndpointSlice> {
        let Self { origin, names, slice_ports, problems, .. } = self;
        let mut report = Report { kind: "EndpointSlice", key: key.as_str(), problems };
        let (service, family) = match identify(key, object, *origin, &mut report) {
            Converted::Read(identity) => identity,
            Converted::Ignored(why) => return Converted::Ignored(why),
            Converted::Bad => return Converted::Bad,
        };
        let given = object.endpoints.as_deref().unwrap_or_default();
        let mut endpoints = Vec::with_capacity(given.len());
        endpoints.extend(
            given
                .iter()
                .enumerate()
                .filter_map(|(index, given)| endpoint(index, given, family, names, &mut report)),
        );
        if endpoints.is_empty() && !given.is_empty() {
            return Converted::Bad;
        }
        endpoints.shrink_to_fit();
        let given = object.ports.as_deref().unwrap_or_default();
        let ports = ports_of(given, *origin, names, &mut report);
        if ports.is_empty() && !given.is_empty() {
            return Converted::Bad;
        }
        let ports = slice_ports.intern(&ports);
        Converted::Read(EndpointSlice { key: key.clone(), service, family, ports, endpoints })
    }
}

/// What the change of a slice came from, where that was after `since`: what was known before, too, comes with the time that
/// it had then.
pub(crate) fn triggered(
    change: &Change,
    metadata: Option<&wire::Metadata<'_>>,
    since: Timestamp,
) -> Option<Change> {
    let Change::Slice(slice) = change else { return None };
    let time = metadata?.annotations.as_ref()?.trigger_time.as_deref()?;
    let time: Timestamp = time.parse().ok().filter(|time| *time > since)?;
    Some(Change::Triggered(slice.family, time.as_microsecond()))
}

/// The Service that the slice belongs to, and its family.
fn identify(
    key: &ObjectKey,
    object: &wire::EndpointSlice<'_>,
    origin: Origin,
    report: &mut Report<'_>,
) -> Converted<(ServiceKey, Family)> {
    let labels = object.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref());
    if labels.is_some_and(|labels| labels.headless.is_some()) {
        return Converted::Ignored(Ignored::Headless);
    }
    let label = "metadata.labels[kubernetes.io/service-name]";
    let service = match labels.and_then(|labels| labels.service_name.as_deref()) {
        None | Some("") if origin == Origin::Api => return Converted::Ignored(Ignored::NoServiceName),
        None | Some("") => {
            report.add(label, None, "missing: name the Service that the slice belongs to");
            return Converted::Bad;
        }
        Some(name) if !is_label(name) => {
            report.add(label, Some(name), "no Service can have this name; the slice is left out");
            return Converted::Bad;
        }
        Some(name) => ObjectKey::new(key.namespace(), name),
    };
    match object.address_type.as_deref() {
        Some("IPv4") => Converted::Read((service, Family::V4)),
        Some("IPv6") => Converted::Read((service, Family::V6)),
        Some("FQDN") => Converted::Ignored(Ignored::AddressType),
        _ if origin == Origin::Api => Converted::Ignored(Ignored::AddressType),
        other => {
            report.add(
                "addressType",
                other,
                "not an address family: use IPv4 or IPv6; the slice is left out",
            );
            Converted::Bad
        }
    }
}

fn endpoint(
    index: usize,
    given: &wire::Endpoint<'_>,
    family: Family,
    names: &mut Interner<str>,
    report: &mut Report<'_>,
) -> Option<Endpoint> {
    let field = || format!("endpoints[{index}].addresses[0]");
    let Some(text) = given.addresses.as_deref().and_then(<[_]>::first) else {
        report.add(field(), None, "missing: the endpoint is left out");
        return None;
    };
    let address = match endpoint_address(text, family) {
        Ok(address) => address,
        Err(remedy) => {
            report.add(field(), Some(text), remedy);
            return None;
        }
    };
    let node = given.node_name.as_deref().filter(|name| !name.is_empty()).and_then(|name| {
        if is_subdomain(name) {
            return Some(names.intern(name));
        }
        let remedy = "no node can have this name; the endpoint counts as one of another node";
        report.add(format!("endpoints[{index}].nodeName"), Some(name), remedy);
        None
    });
    let conditions = given.conditions.as_ref();
    Some(Endpoint {
        address,
        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        node,
        hints: given.hints.as_ref().and_then(|given| hints(given, names)),
    })
}

fn hints(given: &wire::Hints<'_>, names: &mut Interner<str>) -> Option<Box<Hints>> {
    let mut named = |list: &Option<Vec<wire::Hint<'_>>>| -> Vec<Arc<str>> {
        let hints = list.as_deref().unwrap_or_default().iter();
        hints.map(|hint| names.intern(hint.name.as_deref().unwrap_or_default())).collect()
    };
    // A hint without a name stays: it names nobody, and is a hint all the same.
    let hints = Hints { zones: named(&given.for_zones), nodes: named(&given.for_nodes) };
    (hints != Hints::default()).then(|| Box::new(hints))
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

fn ports_of(
    given: &[wire::Port<'_>],
    origin: Origin,
    names: &mut Interner<str>,
    report: &mut Report<'_>,
) -> Vec<SlicePort> {
    let mut ports: Vec<SlicePort> = Vec::with_capacity(given.len());
    for (index, entry) in given.iter().enumerate() {
        let field = |name: &str| format!("ports[{index}].{name}");
        // The API server writes "" for a missing name; one that is still missing has a meaning to no one.
        if entry.name.is_none() && origin == Origin::Api {
            report.add(field("name"), None, "missing: the port is left out");
            continue;
        }
        let Some(port) = ports::read(entry, field, report) else { continue };
        if ports.iter().any(|other| *other.name == *port.name && other.protocol == port.protocol) {
            report.add(
                field("name"),
                Some(port.name),
                "another port has this name: the first is used, remove this one",
            );
            continue;
        }
        ports.push(SlicePort { name: names.intern(port.name), protocol: port.protocol, port: port.number });
    }
    ports
}
