//! Who has an address that several Services ask for.

use std::sync::Arc;

use kube_lane::model::input::{Change, Origin, Protocol, ServicePort};

use crate::build::{api, event, file, key, reported, service, synced, text};

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
    assert!(text(&planner, "young").contains("Service demo/middle comes first"));

    planner.apply(api(Change::ServiceGone(key("old"))));
    assert_eq!(reported(&mut planner), ["middle", "old"]);
    assert!(text(&planner, "middle").contains("ClusterIP 10.96.0.1:80"));

    planner.apply(api(Change::Service(service("middle", 15, &["10.96.0.2"], None))));
    assert_eq!(reported(&mut planner), ["middle", "young"]);
    assert!(text(&planner, "young").contains("ClusterIP 10.96.0.1:80"));
}

#[test]
fn a_newcomer_moves_one_other_however_many_ask() {
    let mut planner = synced();
    for n in (0..2_000).rev() {
        let contested = service(&format!("web-{n:04}"), n, &["10.96.0.1"], None);
        planner.apply(api(Change::Service(contested)));
        assert!(planner.replan().services.len() <= 2);
    }
    assert_eq!(planner.services_planned(), 2_000 + 1_999, "each newcomer outranks all before it");
    planner.apply(api(Change::ServiceGone(key("web-0000"))));
    assert_eq!(reported(&mut planner), ["web-0000", "web-0001"]);
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
