//! Short ways to write objects and events.

use std::net::IpAddr;

use kube_lane::model::input::{
    Change, Endpoint, EndpointSlice, Event, Family, ObjectKey, Origin, Protocol, Service, ServicePort,
    ServiceType, SlicePort, TrafficPolicy,
};
use kube_lane::model::planner::{Planner, Settings};

pub(crate) use crate::history::{NODE, settings};

pub(crate) fn key(name: &str) -> ObjectKey {
    ObjectKey::new("demo", name)
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A planner of both origins, neither synced.
pub(crate) fn planner() -> Planner {
    Planner::new(settings())
}

/// A planner whose two origins have synced.
pub(crate) fn synced() -> Planner {
    synced_with(settings())
}

pub(crate) fn synced_with(settings: Settings) -> Planner {
    let mut planner = Planner::new(settings);
    planner.apply(event(Origin::Static, Change::Synced));
    planner.apply(event(Origin::Api, Change::Synced));
    planner.replan();
    planner
}

pub(crate) fn event(origin: Origin, change: Change) -> Event {
    Event::Source { origin, change }
}

/// What happens at the API server.
pub(crate) fn api(change: Change) -> Event {
    event(Origin::Api, change)
}

/// What happens in the manifest folder.
pub(crate) fn file(change: Change) -> Event {
    event(Origin::Static, change)
}

/// A Service of one TCP port 80, named `http`.
pub(crate) fn service(name: &str, created: i64, cluster_ips: &[&str], node_port: Option<u16>) -> Service {
    Service {
        key: key(name),
        created,
        cluster_ips: cluster_ips.iter().map(|text| ip(text)).collect(),
        ports: [ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port }].into(),
        kind: ServiceType::default(),
        internal_policy: TrafficPolicy::default(),
        external_policy: TrafficPolicy::default(),
        affinity: None,
        external: None,
    }
}

/// A slice of a Service, of ready remote endpoints at port 8080 named `http`.
pub(crate) fn slice(name: &str, service: &str, addresses: &[&str]) -> EndpointSlice {
    let endpoints: Vec<_> = addresses.iter().map(|text| endpoint(ip(text))).collect();
    EndpointSlice {
        key: key(name),
        service: key(service),
        family: endpoints.first().map_or(Family::V4, |first| Family::of(first.address)),
        ports: [SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
        endpoints,
    }
}

pub(crate) fn endpoint(address: IpAddr) -> Endpoint {
    Endpoint {
        address,
        ready: true,
        serving: true,
        terminating: false,
        node: Some("node-b".into()),
        hints: None,
    }
}

/// The text of a Service's plan, `-` where it has none.
pub(crate) fn text(planner: &Planner, service: &str) -> String {
    planner.plan(&key(service)).map_or("-".to_owned(), |plan| plan.to_string())
}

/// The names of the Services that a replan reports.
pub(crate) fn reported(planner: &mut Planner) -> Vec<String> {
    planner.replan().services.iter().map(|(key, _)| key.name().to_owned()).collect()
}
