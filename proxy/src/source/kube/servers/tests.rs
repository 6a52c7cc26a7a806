//! Which address comes first, which are Services, and what is remembered: all without a connection.

use std::sync::Arc;

use smallvec::SmallVec;

use super::*;
use crate::model::input::{Endpoint, External, Family, ServiceType, SlicePort, TrafficPolicy};

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn endpoint(text: &str) -> Candidate {
    Candidate::Endpoint(at(text))
}

/// A state with this address configured, where these endpoints are remembered.
fn state(source: Source, url: &str, endpoints: &[&str]) -> State {
    let target = Some(Target {
        url: url.parse().unwrap(),
        source,
        may_fall_back: true,
        proxy: None,
        ignored_proxy: None,
        unusable_base: None,
    });
    State { target, endpoints: endpoints.iter().map(|text| at(text)).collect(), ..State::default() }
}

fn slice(name: &str, service: &str, addresses: &[&str]) -> Change {
    let endpoint = |address: &&str| Endpoint {
        address: address.parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        node: None,
        hints: None,
    };
    let ports = [("metrics", Protocol::Tcp, 9), ("https", Protocol::Udp, 1), ("https", Protocol::Tcp, 6443)];
    let port =
        |(name, protocol, port): (&str, Protocol, u16)| SlicePort { name: name.into(), protocol, port };
    Change::Slice(EndpointSlice {
        key: SliceKey::new("default", name),
        service: ServiceKey::new("default", service),
        family: Family::V4,
        ports: Arc::from(ports.map(port)),
        endpoints: addresses.iter().map(endpoint).collect(),
    })
}

fn service(name: &str, cluster_ip: &str, external: &str) -> Change {
    let external = External { ips: vec![external.parse().unwrap()], ..External::default() };
    Change::Service(Service {
        key: ServiceKey::new("default", name),
        created: 0,
        cluster_ips: SmallVec::from_elem(cluster_ip.parse().unwrap(), 1),
        ports: Arc::from([]),
        kind: ServiceType::ClusterIp,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        external: Some(Box::new(external)),
    })
}

#[test]
fn a_real_address_comes_before_the_services_and_a_written_one_before_what_is_remembered() {
    let (a, b) = ("192.0.2.1:6443", "192.0.2.2:6443");
    let mut by_service = state(Source::Service, "https://10.96.0.1", &[a, b]);
    assert_eq!(by_service.candidates(), [endpoint(a), endpoint(b), Candidate::Configured]);
    by_service.first = 5;
    assert_eq!(by_service.candidates(), [endpoint(b), endpoint(a), Candidate::Configured]);
    by_service.failed.insert(endpoint(b));
    assert_eq!(by_service.candidates(), [endpoint(a), Candidate::Configured, endpoint(b)]);

    let mut written = state(Source::Kubeconfig("/k".into()), "https://192.0.2.2:6443", &[a, b]);
    assert_eq!(written.candidates(), [Candidate::Configured, endpoint(a)], "one address is dialed once");
    written.failed.insert(Candidate::Configured);
    assert_eq!(written.candidates(), [endpoint(a), Candidate::Configured]);
    // A proxy dials for us, or TLS does not say who answers.
    written.target.as_mut().unwrap().may_fall_back = false;
    assert_eq!(written.candidates(), [Candidate::Configured]);
}

#[test]
fn an_address_that_is_a_services_is_known_as_one() {
    for (address, source, expected) in [
        ("10.96.0.1:443", Source::Service, true),
        ("10.96.0.7:443", Source::Master, true),
        ("10.100.0.1:443", Source::Master, true),
        ("192.0.2.9:6443", Source::Master, true),
        ("192.0.2.1:6443", Source::Master, false),
    ] {
        let servers = open(state(source, "https://example.com:6443", &[]));
        servers.connected(Candidate::Configured, at(address), "");
        let cidrs = Change::ServiceCidrs(vec!["10.100.0.0/16".parse().unwrap()]);
        servers.observe(&[service("kubernetes", "10.96.0.7", "192.0.2.9"), cidrs], false);
        assert_eq!(servers.status().borrow().through_service, expected, "{address}");
    }
    let servers = open(state(Source::Master, "https://example.com", &[]));
    servers.connected(Candidate::Configured, at("192.0.2.9:443"), "");
    servers.observe(&[service("web", "10.96.0.8", "192.0.2.9")], false);
    assert!(servers.status().borrow().through_service);
    servers.observe(&[Change::ServiceGone(ServiceKey::new("default", "web"))], false);
    assert!(!servers.status().borrow().through_service);
}

fn open(state: State) -> ApiServers {
    let status = watch::Sender::new(state.status());
    ApiServers(Arc::new(Shared {
        state: Mutex::new(state),
        status,
        moves: watch::Sender::new(()),
        file: None,
    }))
}

#[test]
fn endpoints_are_remembered_once_all_slices_are_listed_and_never_forgotten_for_none() {
    let servers = open(state(Source::Service, "https://10.96.0.1", &["192.0.2.9:6443"]));
    let known = |servers: &ApiServers| servers.status().borrow().endpoints.clone();
    servers.connected(Candidate::Configured, at("10.96.0.1:443"), "");
    let mut moves = servers.moves();
    servers.observe(&[slice("kubernetes", "kubernetes", &["192.0.2.1"])], false);
    assert_eq!(known(&servers), [at("192.0.2.9:6443")], "another slice may follow");
    servers
        .observe(&[slice("more", "kubernetes", &["192.0.2.2"]), slice("web", "web", &["192.0.2.3"])], true);
    assert_eq!(known(&servers), [at("192.0.2.1:6443"), at("192.0.2.2:6443")]);
    assert!(moves.has_changed().unwrap(), "watches leave the Service's address");
    moves.mark_unchanged();

    servers.observe(&[Change::SliceGone(SliceKey::new("default", "more"))], true);
    assert_eq!(known(&servers), [at("192.0.2.1:6443")]);
    servers.observe(&[slice("kubernetes", "kubernetes", &[])], true);
    assert_eq!(known(&servers), [at("192.0.2.1:6443")]);
    servers.connected(endpoint("192.0.2.1:6443"), at("192.0.2.1:6443"), "");
    moves.mark_unchanged();
    servers.observe(&[slice("kubernetes", "kubernetes", &["192.0.2.1", "192.0.2.4"])], true);
    assert!(!moves.has_changed().unwrap(), "an endpoint is in use already");
}

#[test]
fn a_fallback_ends_when_the_preferred_address_answers_again() {
    let other = "192.0.2.1:6443";
    let servers = open(state(Source::Master, "https://192.0.2.7:6443", &[other]));
    let mut moves = servers.moves();
    servers.failed(Candidate::Configured);
    servers.connected(endpoint(other), at(other), "192.0.2.7:6443: refused");
    assert!(servers.status().borrow().fallback);
    assert_eq!(servers.candidates(), [endpoint(other), Candidate::Configured], "no connection waits for it");
    assert_eq!(servers.silent(), [Candidate::Configured]);
    servers.answers_again(Candidate::Configured);
    assert!(moves.has_changed().unwrap());
    moves.mark_unchanged();
    servers.connected(Candidate::Configured, at("192.0.2.7:6443"), "");
    assert!(!servers.status().borrow().fallback);

    servers.failed(Candidate::Configured);
    servers.failed(endpoint(other));
    servers.all_failed("nobody".to_owned());
    assert_eq!(servers.candidates(), [Candidate::Configured, endpoint(other)], "the order is as it was");
    assert_eq!(servers.status().borrow().failure.as_deref(), Some("nobody"));
}

#[test]
fn only_another_address_than_the_services_counts_as_named() {
    let environment = |host: &str, service: &str| Environment {
        host: Some(host.to_owned()).filter(|host| !host.is_empty()),
        service: Some(service.to_owned()).filter(|service| !service.is_empty()),
    };
    for (host, service, expected) in [
        ("10.96.0.1", "10.96.0.1", false),
        ("192.0.2.1", "10.96.0.1", true),
        ("api.example.com", "", true),
        ("", "", false),
    ] {
        assert_eq!(environment(host, service).names_a_server(), expected, "{host} {service}");
    }
}
