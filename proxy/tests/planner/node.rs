//! What follows the own Node and the host: NodePort addresses, pod CIDRs, source ranges, eligibility.

use std::net::IpAddr;

use kube_lane::model::input::{Change, Event, External, Node, Origin, ServiceType};
use kube_lane::model::planner::{NodePortAddresses, Planner, PodCidrs, Settings};

use crate::build::{api, file, ip, key, reported, service, settings, synced, synced_with, text};

/// The own Node with these addresses.
fn of(addresses: &[&str]) -> Change {
    let addresses = addresses.iter().map(|text| ip(text)).collect();
    Change::Node(Some(Node { addresses, ..Node::default() }))
}

#[test]
fn node_ports_follow_the_node_and_fall_back_to_the_host() {
    let mut planner = synced();
    let mut addresses = |event: Event| -> Vec<IpAddr> {
        planner.apply(event);
        planner.replan();
        planner.node().map(|node| node.nodeport_addresses.clone()).unwrap_or_default()
    };

    let host = ["fe80::1", "::1", "127.0.0.1", "203.0.113.9", "192.0.2.9", "192.0.2.9"].map(ip);
    assert_eq!(addresses(Event::HostAddresses(host.into())), ["192.0.2.9", "203.0.113.9"].map(ip));
    let internal_then_external = of(&["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"]);
    assert_eq!(addresses(api(internal_then_external)), ["192.0.2.1", "2001:db8::1"].map(ip));
    assert_eq!(addresses(file(of(&["192.0.2.7"]))), ["192.0.2.7"].map(ip));
    assert_eq!(addresses(file(Change::Node(None))), ["192.0.2.1", "2001:db8::1"].map(ip));
    assert_eq!(addresses(api(of(&[]))), ["192.0.2.9", "203.0.113.9"].map(ip));
}

#[test]
fn service_cidrs_are_united() {
    let mut planner = synced();
    let cidrs =
        |texts: &[&str]| Change::ServiceCidrs(texts.iter().map(|text| text.parse().unwrap()).collect());
    planner.apply(api(cidrs(&["10.96.7.3/16", "fd00::5/112", "10.98.0.0/24", "10.98.1.0/24"])));
    planner.apply(file(cidrs(&["10.96.8.0/24", "10.96.0.0/16", "10.100.0.0/25"])));
    let united: Vec<_> =
        planner.replan().node.unwrap().service_cidrs.iter().map(ToString::to_string).collect();
    assert_eq!(united, ["10.96.0.0/16", "10.98.0.0/23", "10.100.0.0/25", "fd00::/112"]);
}

#[test]
fn a_bind_address_takes_the_place_of_the_nodes_own_of_its_family() {
    let mut planner = synced_with(Settings { node_address: Some(ip("198.51.100.4")), ..settings() });
    planner.apply(file(of(&["192.0.2.1", "2001:db8::1"])));
    let node = planner.replan().node.unwrap();
    assert_eq!(node.nodeport_addresses, ["198.51.100.4", "2001:db8::1"].map(ip));
}

#[test]
fn networks_choose_among_the_hosts_addresses_family_by_family() {
    let networks = ["192.0.2.0/24", "203.0.113.9/32"].map(|text| text.parse().unwrap()).into();
    let mut planner = synced_with(Settings {
        nodeport_addresses: NodePortAddresses { primary: false, within: networks },
        ..settings()
    });
    planner.apply(api(of(&["198.51.100.1"])));
    let mut addresses = |host: &[&str]| {
        planner.apply(Event::HostAddresses(host.iter().map(|text| ip(text)).collect()));
        planner.replan().node.map(|node| node.nodeport_addresses).unwrap_or_default()
    };
    let host = ["127.0.0.1", "::1", "fe80::1", "192.0.2.9", "203.0.113.8", "203.0.113.9", "2001:db8::9"];
    assert_eq!(addresses(&host), ["192.0.2.9", "203.0.113.9", "2001:db8::9"].map(ip));
    assert_eq!(addresses(&["192.0.2.10", "203.0.113.8"]), ["192.0.2.10"].map(ip));
}

#[test]
fn networks_come_beside_the_primary_addresses() {
    let host = ["127.0.0.1", "::1", "192.0.2.9", "198.51.100.1", "2001:db8::9"];
    let addresses = |networks: &[&str]| {
        let within = networks.iter().map(|text| text.parse().unwrap()).collect();
        let nodeport_addresses = NodePortAddresses { primary: true, within };
        let mut planner = synced_with(Settings { nodeport_addresses, ..settings() });
        planner.apply(api(of(&["198.51.100.1"])));
        planner.apply(Event::HostAddresses(host.map(ip).into()));
        planner.replan().node.map(|node| node.nodeport_addresses).unwrap_or_default()
    };
    assert_eq!(addresses(&["127.0.0.0/8", "::1/128"]), ["198.51.100.1"].map(ip), "`[primary, localhost]`");
    // The Node has no IPv6 address, and no network is one of IPv6.
    assert_eq!(addresses(&["192.0.2.0/24"]), ["192.0.2.9", "198.51.100.1", "2001:db8::9"].map(ip));
    assert_eq!(addresses(&["0.0.0.0/0", "::/0"]), ["192.0.2.9", "198.51.100.1", "2001:db8::9"].map(ip));
}

#[test]
fn the_nodes_pods_are_in_its_first_cidr_of_each_family() {
    let mut planner = synced_with(Settings { pod_cidrs: PodCidrs::Node, ..settings() });
    let mut pods_in = |node: Option<&[&str]>| -> Vec<String> {
        let parsed = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let node = node.map(|texts| Node { pod_cidrs: parsed(texts), ..Node::default() });
        planner.apply(api(Change::Node(node)));
        planner.replan();
        planner.node().unwrap().pod_cidrs.iter().map(ToString::to_string).collect()
    };
    assert_eq!(pods_in(None), [""; 0]);
    assert_eq!(pods_in(Some(&["10.244.1.0/24"])), ["10.244.1.0/24"]);
    let four = ["fd00:1::/64", "10.244.2.0/24", "10.244.3.0/24", "fd00:2::/64"];
    assert_eq!(pods_in(Some(&four)), ["10.244.2.0/24", "fd00:1::/64"]);
    assert_eq!(pods_in(Some(&[])), [""; 0]);
}

#[test]
fn the_clusters_pods_do_not_depend_on_the_node() {
    let networks = ["10.244.0.0/16", "fd00:1::/48"].map(|text| text.parse().unwrap());
    let pod_cidrs = PodCidrs::Cluster(networks.into());
    let mut planner = synced_with(Settings { pod_cidrs, ..settings() });
    assert_eq!(planner.node().unwrap().pod_cidrs, networks);
    let pod_cidrs = vec!["10.9.0.0/24".parse().unwrap()];
    planner.apply(api(Change::Node(Some(Node { pod_cidrs, ..Node::default() }))));
    assert_eq!(planner.replan().node, None);
}

#[test]
fn a_node_that_is_unknown_or_leaving_is_not_eligible() {
    let mut planner = synced();
    assert!(!planner.node_eligible());
    for (node, eligible) in [
        (Some(Node::default()), true),
        (Some(Node { leaving: true, ..Node::default() }), false),
        (Some(Node::default()), true),
        (None, false),
    ] {
        planner.apply(api(Change::Node(node)));
        assert_eq!(planner.node_eligible(), eligible);
    }
    let alone = Planner::new(Settings { origins: vec![Origin::Static], ..settings() });
    assert!(alone.node_eligible(), "without an API server nobody says that a Node exists");
}

#[test]
fn source_ranges_follow_the_nodes_addresses() {
    let mut planner = synced();
    let mut ranged = service("ranged", 0, &["10.96.0.1"], None);
    ranged.kind = ServiceType::LoadBalancer;
    ranged.external = Some(Box::new(External {
        load_balancer_ips: vec![ip("203.0.113.1")],
        source_ranges: vec!["192.0.2.0/24".parse().unwrap()],
        ..External::default()
    }));
    planner.apply(api(Change::Service(ranged)));
    planner.apply(api(Change::Service(service("other", 0, &["10.96.0.2"], None))));
    planner.replan();
    let planned = planner.services_planned();
    for (step, (addresses, allowed)) in [
        (["192.0.2.1"], &["192.0.2.0/24", "203.0.113.1/32"][..]),
        (["192.0.3.1"], &["192.0.2.0/24"]),
        (["2001:db8::1"], &["192.0.2.0/24"]),
        (["192.0.2.2"], &["192.0.2.0/24", "203.0.113.1/32"]),
    ]
    .into_iter()
    .enumerate()
    {
        planner.apply(api(of(&addresses)));
        planner.replan();
        let plan = planner.plan(&key("ranged")).unwrap();
        let ranges: Vec<_> =
            plan.ports[0].source_ranges.iter().flat_map(|all| all.iter()).map(ToString::to_string).collect();
        assert_eq!(ranges, allowed, "{addresses:?}");
        assert_eq!(planner.services_planned(), planned + step as u64 + 1);
    }
}

#[test]
fn ranges_that_cannot_be_read_let_nobody_in() {
    let mut planner = synced();
    let mut closed = service("closed", 0, &["10.96.0.1", "fd00::1"], None);
    closed.kind = ServiceType::LoadBalancer;
    closed.external = Some(Box::new(External {
        load_balancer_ips: vec![ip("203.0.113.1"), ip("2001:db8::1")],
        source_ranges: vec!["192.0.2.0/24".parse().unwrap()],
        ranges_unread: true,
        ..External::default()
    }));
    planner.apply(file(Change::Service(closed)));
    planner.replan();
    let plan = planner.plan(&key("closed")).unwrap();
    let ranges: Vec<_> = plan.ports.iter().map(|port| port.source_ranges.as_ref().unwrap().len()).collect();
    assert_eq!(ranges, [1, 0], "the IPv4 range alone could be read");
    let text = text(&planner, "closed");
    assert!(text.contains("LoadBalancer from nowhere"), "{text}");
    assert!(text.contains("no IPv6 range that can be read: no IPv6 client is let through"), "{text}");
}

#[test]
fn a_family_without_a_pod_network_is_warned_of_while_it_has_services() {
    let cluster = |list: &[&str]| PodCidrs::Cluster(list.iter().map(|cidr| cidr.parse().unwrap()).collect());
    let v4 = Node { pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()], ..Node::default() };
    for (pod_cidrs, node, words) in [
        (cluster(&["10.244.0.0/16"]), None, "clusterCIDR (--cluster-cidr) has no IPv6 network"),
        (PodCidrs::Node, Some(v4), "spec.podCIDRs of the Node have no IPv6 network"),
        (PodCidrs::Node, None, ""),
        (PodCidrs::Unknown, None, ""),
        (cluster(&["10.244.0.0/16", "fd01::/48"]), None, ""),
    ] {
        let mut planner = synced_with(Settings { pod_cidrs, ..settings() });
        planner.apply(api(Change::Node(node)));
        planner.apply(api(Change::Service(service("four", 0, &["10.96.0.1"], None))));
        planner.replan();
        let warnings = |planner: &Planner| planner.node().unwrap().warnings.clone();
        assert_eq!(warnings(&planner), [""; 0], "there is no IPv6 Service");
        planner.apply(api(Change::Service(service("six", 0, &["fd00::1"], None))));
        planner.apply(api(Change::Service(service("six-too", 0, &["fd00::2"], None))));
        planner.replan();
        let found = warnings(&planner);
        assert_eq!(found.len(), usize::from(!words.is_empty()), "{found:?}");
        assert!(found.iter().all(|warning| warning.starts_with(words)), "{found:?}");
        planner.apply(api(Change::ServiceGone(key("six"))));
        planner.replan();
        assert_eq!(warnings(&planner), found);
        planner.apply(api(Change::ServiceGone(key("six-too"))));
        planner.replan();
        assert_eq!(warnings(&planner), [""; 0]);
    }
}

#[test]
fn a_static_cluster_ip_that_the_node_has_is_warned_of() {
    let mut planner = synced();
    planner.apply(file(Change::Service(service("static", 0, &["192.0.2.9", "fd00::1"], None))));
    planner.apply(file(Change::Service(service("other", 0, &["10.96.0.1"], None))));
    planner.apply(api(Change::Service(service("dns", 0, &["192.0.2.8"], None))));
    planner.replan();
    let warned =
        |planner: &Planner| text(planner, "static").contains("clusterIP 192.0.2.9 is an address of this");
    assert!(!warned(&planner));
    let host = |addresses: &[&str]| Event::HostAddresses(addresses.iter().map(|text| ip(text)).collect());
    planner.apply(host(&["192.0.2.8", "192.0.2.9"]));
    assert_eq!(reported(&mut planner), ["static"], "a node-local cache has the API's address on purpose");
    assert!(warned(&planner));
    planner.apply(host(&["192.0.2.8"]));
    assert_eq!(reported(&mut planner), ["static"]);
    planner.apply(api(of(&["192.0.2.9"])));
    planner.replan();
    assert!(warned(&planner), "its Node says so");
}
