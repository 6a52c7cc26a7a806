//! What one event costs, and what is reported for it.

use std::net::Ipv4Addr;

use kube_lane::model::input::{Change, Node};

use crate::build::{api, endpoint, ip, key, reported, service, slice, synced, text};

#[test]
fn one_slice_event_among_10_000_services_plans_one_service() {
    let mut planner = synced();
    for n in 0..10_000_u32 {
        let name = format!("web-{n}");
        let cluster_ip = Ipv4Addr::from(0x0a60_0000 + n).to_string();
        planner.apply(api(Change::Service(service(&name, 0, &[&cluster_ip], None))));
        planner.apply(api(Change::Slice(slice(&name, &name, &["10.244.0.1"]))));
    }
    assert_eq!(planner.replan().services.len(), 10_000);
    assert_eq!(planner.services_planned(), 10_000);

    planner.apply(api(Change::Slice(slice("web-77", "web-77", &["10.244.0.1", "10.244.0.2"]))));
    assert_eq!(reported(&mut planner), ["web-77"]);
    assert_eq!(planner.services_planned(), 10_001);
}

#[test]
fn one_of_50_slices_replaces_itself_only() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("big", 0, &["10.96.0.1"], None))));
    for n in 0..50_u32 {
        let mut big = slice(&format!("big-{n:02}"), "big", &[]);
        big.endpoints =
            (0..100).map(|i| endpoint(Ipv4Addr::from(0x0af4_0000 + n * 256 + i).into())).collect();
        planner.apply(api(Change::Slice(big)));
    }
    planner.replan();
    assert_eq!(planner.plan(&key("big")).unwrap().ports[0].backends.len(), 5_000);

    planner.apply(api(Change::Slice(slice("big-07", "big", &["10.244.99.1"]))));
    assert_eq!(reported(&mut planner), ["big"]);
    let backends = &planner.plan(&key("big")).unwrap().ports[0].backends;
    assert_eq!(backends.len(), 4_901);
    assert!(backends.iter().any(|backend| backend.address.ip == ip("10.244.99.1")));
    assert_eq!(planner.services_planned(), 2);
}

#[test]
fn equal_objects_mark_nothing() {
    let mut planner = synced();
    for _ in 0..3 {
        planner.apply(api(Change::Service(service("web", 0, &["10.96.0.1"], Some(30080)))));
        planner.apply(api(Change::Slice(slice("web-1", "web", &["10.244.0.1"]))));
        planner.apply(api(Change::Node(Some(Node { addresses: vec![ip("192.0.2.1")], ..Node::default() }))));
        planner.replan();
    }
    assert_eq!(planner.services_planned(), 1);
    assert!(planner.replan().is_empty());
}

#[test]
fn an_endpoint_that_moves_between_other_nodes_marks_nothing() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("web", 0, &["10.96.0.1"], None))));
    let mut web = slice("web-1", "web", &["10.244.0.1"]);
    planner.apply(api(Change::Slice(web.clone())));
    planner.replan();
    web.endpoints[0].node = Some("node-c".into());
    planner.apply(api(Change::Slice(web)));
    planner.replan();
    assert_eq!(planner.services_planned(), 1);
}

#[test]
fn a_change_without_consequence_is_planned_and_not_reported() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("web", 0, &["10.96.0.1"], None))));
    planner.apply(api(Change::Slice(slice("web-1", "web", &["10.244.0.1"]))));
    planner.replan();
    let mut unready = slice("web-2", "web", &["10.244.0.2"]);
    unready.endpoints[0].ready = false;
    planner.apply(api(Change::Slice(unready)));
    assert!(planner.replan().is_empty());
    assert_eq!(planner.services_planned(), 2);
}

#[test]
fn a_slice_that_changes_its_label_touches_both_services() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("blue", 0, &["10.96.0.1"], None))));
    planner.apply(api(Change::Service(service("green", 0, &["10.96.0.2"], None))));
    planner.apply(api(Change::Slice(slice("pods", "blue", &["10.244.0.1"]))));
    planner.replan();
    planner.apply(api(Change::Slice(slice("pods", "green", &["10.244.0.1"]))));
    assert_eq!(reported(&mut planner), ["blue", "green"]);
    assert!(text(&planner, "blue").contains("refused"));
    assert!(text(&planner, "green").contains("to 10.244.0.1:8080"));
}

#[test]
fn a_service_that_comes_and_goes_within_a_batch_is_not_reported() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("web", 0, &["10.96.0.1"], None))));
    planner.apply(api(Change::ServiceGone(key("web"))));
    assert!(planner.replan().is_empty());
}

#[test]
fn a_node_change_plans_no_service() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("web", 0, &["10.96.0.1"], Some(30080)))));
    planner.replan();
    planner.apply(api(Change::Node(Some(Node { addresses: vec![ip("192.0.2.1")], ..Node::default() }))));
    let changes = planner.replan();
    assert!(changes.services.is_empty());
    assert_eq!(changes.node.unwrap().nodeport_addresses, [ip("192.0.2.1")]);
    assert_eq!(planner.services_planned(), 1);
}
