//! Who has an address that several Services ask for.

use std::sync::Arc;

use kube_lane::model::input::{
    Change, External, Origin, Protocol, Service, ServicePort, ServiceType, TrafficPolicy,
};
use kube_lane::model::planner::{OwnPort, Planner, Settings};

use crate::build::{api, event, file, key, reported, service, settings, synced, synced_with, text};

#[test]
fn the_oldest_has_the_address_until_it_goes() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("young", 20, &["10.96.0.1"], None))));
    planner.replan();
    planner.apply(api(Change::Service(service("old", 10, &["10.96.0.1"], None))));
    planner.apply(api(Change::Service(service("middle", 15, &["10.96.0.1"], None))));
    assert_eq!(reported(&mut planner), ["middle", "old", "young"]);
    assert_eq!(
        text(&planner, "middle"),
        "service demo/middle\n  warning: Service demo/old comes first at 10.96.0.1:80/TCP\n"
    );
    assert!(text(&planner, "young").contains("Service demo/old comes first"), "who has it is named");

    planner.apply(api(Change::ServiceGone(key("old"))));
    assert_eq!(reported(&mut planner), ["middle", "old", "young"]);
    assert!(text(&planner, "middle").contains("ClusterIP 10.96.0.1:80"));
    assert!(text(&planner, "young").contains("Service demo/middle comes first"));

    planner.apply(api(Change::Service(service("middle", 15, &["10.96.0.2"], None))));
    assert_eq!(reported(&mut planner), ["middle", "young"]);
    assert!(text(&planner, "young").contains("ClusterIP 10.96.0.1:80"));
}

#[test]
fn a_newcomer_moves_nobody_who_hears_nothing_new() {
    let mut planner = synced();
    for n in 0..2_000 {
        let contested = service(&format!("web-{n:04}"), n, &["10.96.0.1"], None);
        planner.apply(api(Change::Service(contested)));
        assert_eq!(planner.replan().services.len(), 1);
    }
    assert_eq!(planner.services_planned(), 2_000, "each newcomer comes last");
    planner.apply(api(Change::ServiceGone(key("web-1000"))));
    planner.apply(api(Change::Service(service("between", 1_000, &["10.96.0.1"], None))));
    assert_eq!(reported(&mut planner), ["between", "web-1000"]);
    planner.apply(api(Change::ServiceGone(key("web-0000"))));
    assert_eq!(planner.replan().services.len(), 2_000, "all others hear of another owner");
    assert!(text(&planner, "web-0001").contains("ClusterIP 10.96.0.1:80"));
    assert!(text(&planner, "between").contains("Service demo/web-0001 comes first"));
}

#[test]
fn rank_is_origin_then_age_then_name() {
    for (winner, loser) in [
        ((Origin::Static, 20, "z"), (Origin::Api, 10, "a")),
        ((Origin::Api, 10, "z"), (Origin::Api, 20, "a")),
        ((Origin::Api, 10, "a"), (Origin::Api, 10, "z")),
    ] {
        for order in [[winner, loser], [loser, winner]] {
            let mut planner = synced();
            for (origin, created, name) in order {
                let contested = service(name, created, &["10.96.0.1"], Some(30080));
                planner.apply(event(origin, Change::Service(contested)));
                planner.replan();
            }
            assert!(text(&planner, winner.2).contains("NodePort *:30080 refused"), "{winner:?}");
            assert_eq!(planner.plan(&key(loser.2)).unwrap().warnings.len(), 2, "{loser:?}");
            assert!(planner.plan(&key(loser.2)).unwrap().ports.is_empty(), "{loser:?}");
        }
    }
}

#[test]
fn a_swap_within_one_batch_comes_out_right() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("a", 1, &["10.96.0.1"], Some(30001)))));
    planner.apply(api(Change::Service(service("b", 2, &["10.96.0.2"], Some(30002)))));
    planner.replan();
    planner.apply(api(Change::Service(service("b", 2, &["10.96.0.1"], Some(30001)))));
    planner.apply(api(Change::Service(service("a", 1, &["10.96.0.2"], Some(30002)))));
    let changes = planner.replan();
    assert!(changes.services.iter().all(|(_, plan)| plan.as_ref().unwrap().warnings.is_empty()));
    assert!(text(&planner, "a").contains("10.96.0.2:80") && text(&planner, "a").contains("*:30002"));
    assert!(text(&planner, "b").contains("10.96.0.1:80") && text(&planner, "b").contains("*:30001"));
}

#[test]
fn a_lost_node_port_leaves_the_cluster_ip() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("a", 1, &["10.96.0.1", "fd00::1"], Some(30080)))));
    planner.apply(api(Change::Service(service("b", 2, &["10.96.0.2", "fd00::2"], Some(30080)))));
    planner.replan();
    assert_eq!(
        text(&planner, "b"),
        "service demo/b
  port http TCP IPv4
    ClusterIP 10.96.0.2:80 refused: no endpoint
  port http TCP IPv6
    ClusterIP [fd00::2]:80 refused: no endpoint
  warning: Service demo/a comes first at NodePort 30080/TCP (IPv4)
  warning: Service demo/a comes first at NodePort 30080/TCP (IPv6)
"
    );
}

#[test]
fn other_families_and_protocols_are_no_contest() {
    let mut planner = synced();
    let mut udp = service("udp", 2, &["10.96.0.1"], Some(30080));
    Arc::make_mut(&mut udp.ports)[0].protocol = Protocol::Udp;
    planner.apply(api(Change::Service(service("tcp", 1, &["10.96.0.1"], Some(30080)))));
    planner.apply(api(Change::Service(udp)));
    planner.apply(api(Change::Service(service("six", 3, &["fd00::1"], Some(30080)))));
    planner.replan();
    assert!(planner.plans().all(|plan| plan.warnings.is_empty()));
}

#[test]
fn within_a_service_the_first_port_counts() {
    let mut planner = synced();
    let port = |name: &str, port, node_port| ServicePort {
        name: name.into(),
        protocol: Protocol::Tcp,
        port,
        node_port: Some(node_port),
    };
    let mut odd = service("odd", 1, &["10.96.0.1", "10.96.0.1"], None);
    odd.ports =
        [port("b", 80, 30001), port("a", 80, 30002), port("b", 81, 30003), port("c", 82, 30001)].into();
    planner.apply(file(Change::Service(odd)));
    planner.replan();
    assert_eq!(
        text(&planner, "odd"),
        "service demo/odd
  port a TCP IPv4
    NodePort *:30002 refused: no endpoint
  port b TCP IPv4
    ClusterIP 10.96.0.1:80 refused: no endpoint
    NodePort *:30001 refused: no endpoint
  port c TCP IPv4
    ClusterIP 10.96.0.1:82 refused: no endpoint
  warning: port \"a\" is not at 10.96.0.1:80/TCP: port \"b\" is
  warning: a second TCP port named \"b\" is ignored
  warning: port \"c\" is not at NodePort 30001/TCP (IPv4): port \"b\" is
"
    );
}

/// A Service whose load balancer asks for its health at this port.
fn checked(name: &str, created: i64, cluster_ip: &str, port: u16) -> Service {
    let external = External { health_check_node_port: Some(port), ..External::default() };
    Service {
        kind: ServiceType::LoadBalancer,
        external_policy: TrafficPolicy::Local,
        external: Some(Box::new(external)),
        ..service(name, created, &[cluster_ip], None)
    }
}

fn health_check_port(planner: &Planner, name: &str) -> Option<u16> {
    planner.plan(&key(name))?.health_check.as_ref().map(|check| check.port)
}

#[test]
fn node_ports_and_health_check_ports_are_one_space() {
    for (first, second) in [("a", "b"), ("b", "a")] {
        let age = |name: &str| if name == first { 1 } else { 2 };
        let mut planner = synced();
        planner.apply(api(Change::Service(service("a", age("a"), &["10.96.0.1"], Some(30119)))));
        planner.replan();
        planner.apply(api(Change::Service(checked("b", age("b"), "10.96.0.2", 30119))));
        planner.replan();
        assert_eq!(text(&planner, "a").contains("NodePort *:30119"), first == "a");
        assert_eq!(health_check_port(&planner, "b").is_some(), first == "b");
        let loser = text(&planner, second);
        assert!(
            loser.contains(&format!("Service demo/{first} comes first at NodePort 30119/TCP (IPv4)")),
            "{loser}"
        );
        assert!(!text(&planner, first).contains("warning"));

        planner.apply(api(Change::ServiceGone(key(first))));
        assert_eq!(reported(&mut planner), ["a", "b"]);
        assert!(!text(&planner, second).contains("warning"), "it has the port once the first has gone");
    }
}

#[test]
fn a_health_check_claims_only_what_load_balancers_ask() {
    let mut planner = synced();
    for (name, kind, policy) in [
        ("cluster", ServiceType::LoadBalancer, TrafficPolicy::Cluster),
        ("node-port", ServiceType::NodePort, TrafficPolicy::Local),
    ] {
        let unasked = Service { kind, external_policy: policy, ..checked(name, 1, "10.96.0.1", 30119) };
        planner.apply(api(Change::Service(unasked)));
        let mut udp = service("udp", 1, &["10.96.0.3"], Some(30119));
        Arc::make_mut(&mut udp.ports)[0].protocol = Protocol::Udp;
        planner.apply(api(Change::Service(udp)));
        planner.apply(api(Change::Service(checked("asked", 2, "10.96.0.2", 30119))));
        planner.replan();
        assert_eq!(health_check_port(&planner, "asked"), Some(30119), "{name}");
        planner.apply(api(Change::ServiceGone(key(name))));
    }
}

#[test]
fn the_agents_own_ports_come_before_all() {
    let own = |address: &str| OwnPort { server: "health", address: address.parse().unwrap() };
    for (address, v4, v6) in [
        ("0.0.0.0:30119", true, false),
        ("[::]:30119", true, true),
        ("192.0.2.1:30119", true, false),
        ("[2001:db8::1]:30119", false, true),
        ("127.0.0.1:30119", false, false),
        ("[::1]:30119", false, false),
        ("0.0.0.0:30118", false, false),
    ] {
        let mut planner = synced_with(Settings { own_ports: vec![own(address)], ..settings() });
        planner.apply(file(Change::Service(service("a", 1, &["10.96.0.1", "fd00::1"], Some(30119)))));
        planner.replan();
        let text = text(&planner, "a");
        for (family, taken) in [("IPv4", v4), ("IPv6", v6)] {
            let words = format!("the agent's own health server comes first at NodePort 30119/TCP ({family})");
            assert_eq!(text.contains(&words), taken, "{address}: {text}");
        }
        let left = 2 - usize::from(v4) - usize::from(v6);
        assert_eq!(text.matches("NodePort *:30119").count(), left, "{address}: {text}");
    }
    let mut planner = synced_with(Settings { own_ports: vec![own("0.0.0.0:30119")], ..settings() });
    planner.apply(api(Change::Service(checked("checked", 1, "10.96.0.1", 30119))));
    planner.replan();
    assert_eq!(health_check_port(&planner, "checked"), None);
    assert!(
        text(&planner, "checked").contains("for the health of this Service: the agent's own health server")
    );
}

#[test]
fn a_node_port_of_the_same_service_comes_before_its_health_check() {
    let mut planner = synced();
    let mut both = checked("both", 1, "10.96.0.1", 30119);
    Arc::make_mut(&mut both.ports)[0].node_port = Some(30119);
    planner.apply(file(Change::Service(both)));
    planner.replan();
    assert_eq!(health_check_port(&planner, "both"), None);
    let text = text(&planner, "both");
    assert!(text.contains("NodePort *:30119"), "{text}");
    assert!(text.contains("a port of the Service is at NodePort 30119/TCP (IPv4)"), "{text}");
}
