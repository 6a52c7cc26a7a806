//! Which endpoints each policy gives, by tables: those of kube-proxy's own tests of endpoint selection, and more.

use std::net::Ipv4Addr;
use std::sync::Arc;

use kube_lane::model::input::{Change, Endpoint, Hints, Node, Protocol, Service, ServiceType, TrafficPolicy};
use kube_lane::model::plan::{FrontendKind, MAX_BACKENDS, PortPlan, Verdict};

use crate::build::{NODE, api, endpoint, key, service, slice, synced};

/// An endpoint by the last number of its address and what is unusual: it is Ready, remote and without hints, unless a
/// word says otherwise. `terminating` ones still serve, `gone` ones do not; `zone-…` and `node-…` are hints.
fn parse(text: &str) -> Endpoint {
    let mut words = text.split_whitespace();
    let number = words.next().unwrap().parse().unwrap();
    let mut parsed = endpoint(Ipv4Addr::new(10, 1, 0, number).into());
    for word in words {
        match word {
            "local" => parsed.node = Some(NODE.into()),
            "unready" => (parsed.ready, parsed.serving) = (false, false),
            "serving" => parsed.ready = false,
            "terminating" => (parsed.ready, parsed.terminating) = (false, true),
            "gone" => (parsed.ready, parsed.serving, parsed.terminating) = (false, false, true),
            "published" => (parsed.serving, parsed.terminating) = (false, true),
            zone if zone.starts_with("zone-") => {
                parsed.hints.get_or_insert_default().zones.push(zone.into());
            }
            node if node.starts_with("node-") => {
                parsed.hints.get_or_insert_default().nodes.push(node.into());
            }
            other => panic!("{other:?}"),
        }
    }
    parsed
}

/// A Service of the words `itp`, `etp` (a policy that is Local) and `nodeport`, `external-ip`.
fn described(words: &str) -> Service {
    let mut described = service("web", 0, &["10.96.0.1"], None);
    for word in words.split_whitespace() {
        match word {
            "itp" => described.internal_policy = TrafficPolicy::Local,
            "etp" => described.external_policy = TrafficPolicy::Local,
            "nodeport" => {
                described.kind = ServiceType::NodePort;
                Arc::make_mut(&mut described.ports)[0].node_port = Some(30080);
            }
            "external-ip" => {
                described.external.get_or_insert_default().ips.push("192.0.2.7".parse().unwrap());
            }
            "udp" => Arc::make_mut(&mut described.ports)[0].protocol = Protocol::Udp,
            other => panic!("{other:?}"),
        }
    }
    described
}

/// What each frontend does, then the numbers of the Cluster set and those of the Local set, then of the draining.
fn outcome(port: &PortPlan) -> String {
    let mut parts: Vec<String> = Vec::new();
    for frontend in &port.frontends {
        let kind = match frontend.kind {
            FrontendKind::ClusterIp => "in",
            FrontendKind::LoadBalancer | FrontendKind::ExternalIp | FrontendKind::NodePort => "out",
        };
        let verdict = match frontend.verdict {
            Verdict::Cluster => "cluster",
            Verdict::Local => "local",
            Verdict::Reject => "reject",
        };
        parts.push(format!("{kind} {verdict}"));
    }
    let numbers = |ips: &mut dyn Iterator<Item = std::net::IpAddr>| {
        let number = |ip: std::net::IpAddr| ip.to_string().rsplit('.').next().unwrap().to_owned();
        ips.map(number).collect::<Vec<_>>().join(" ")
    };
    let sets = [
        ("cluster", numbers(&mut port.backends.iter().map(|backend| backend.address.ip))),
        ("local", numbers(&mut port.local_backends.iter().map(|backend| backend.address.ip))),
        ("draining", numbers(&mut port.draining.iter().map(|address| address.ip))),
    ];
    let sets = sets.into_iter().filter(|(_, numbers)| !numbers.is_empty());
    parts.extend(sets.map(|(name, numbers)| format!("{name}: {numbers}")));
    parts.join(", ")
}

/// What becomes of a Service with these endpoints on a node in this zone.
fn on_node(zone: &str, words: &str, endpoints: &[&str]) -> String {
    let mut planner = synced();
    let zone = (!zone.is_empty()).then(|| zone.into());
    planner.apply(api(Change::Node(Some(Node { zone, ..Node::default() }))));
    let web = described(words);
    let mut pods = slice("web-1", "web", &[]);
    Arc::make_mut(&mut pods.ports)[0].protocol = web.ports[0].protocol;
    pods.endpoints = endpoints.iter().map(|text| parse(text)).collect();
    planner.apply(api(Change::Service(web)));
    planner.apply(api(Change::Slice(pods)));
    planner.replan();
    outcome(&planner.plan(&key("web")).unwrap().ports[0])
}

#[track_caller]
fn check(words: &str, endpoints: &[&str], expected: &str) {
    assert_eq!(on_node("", words, endpoints), expected, "{words:?} of {endpoints:?}");
}

#[test]
fn both_policies_cluster() {
    check("", &[], "in reject");
    check("", &["1 unready", "2 unready"], "in reject");
    check("", &["1", "2 local"], "in cluster, cluster: 1 2");
    check("", &["1", "2 unready", "3 serving", "4 terminating"], "in cluster, cluster: 1");
    check("", &["1 terminating local", "2 gone", "3 terminating"], "in cluster, cluster: 1 3");
    check("", &["1 gone", "2 serving"], "in reject");
    check("nodeport", &["1 terminating"], "in cluster, out cluster, cluster: 1");
    check("nodeport", &[], "in reject, out reject");
    // publishNotReadyAddresses makes all Ready, whatever they are.
    check("", &["1 published", "2"], "in cluster, cluster: 1 2");
}

#[test]
fn internal_policy_local() {
    check("itp", &[], "in reject");
    check("itp", &["1", "2"], "in local");
    check("itp", &["1 local", "2 local"], "in local, local: 1 2");
    check("itp", &["1 local", "2"], "in local, local: 1");
    check("itp", &["1 local unready", "2 unready"], "in reject");
    check("itp", &["1 terminating", "2 gone local"], "in local");
    check("itp", &["1", "2 terminating local"], "in local, local: 2");
    check("itp", &["1 local", "2 terminating local"], "in local, local: 1");
    check("itp nodeport", &["1 local", "2"], "in local, out cluster, cluster: 1 2, local: 1");
    check("itp nodeport", &["1", "2"], "in local, out cluster, cluster: 1 2");
}

#[test]
fn external_policy_local() {
    check("etp nodeport", &["1 local", "2"], "in cluster, out local, cluster: 1 2, local: 1");
    check("etp nodeport", &["1", "2"], "in cluster, out local, cluster: 1 2");
    check("etp nodeport", &[], "in reject, out reject");
    check("etp", &["1 local", "2"], "in cluster, cluster: 1 2");
    check("etp external-ip", &["1 local", "2"], "in cluster, out local, cluster: 1 2, local: 1");
    check(
        "etp nodeport",
        &["1", "2 local gone", "3 local terminating", "4 terminating"],
        "in cluster, out local, cluster: 1, local: 3",
    );
    check("etp nodeport", &["1 local terminating", "2"], "in cluster, out local, cluster: 2, local: 1");
}

#[test]
fn both_policies_local() {
    check("itp etp nodeport", &["1 local", "2"], "in local, out local, cluster: 1 2, local: 1");
    check("itp etp nodeport", &["1", "2"], "in local, out local, cluster: 1 2");
    check("itp etp nodeport", &["1 terminating", "2 terminating"], "in local, out local, cluster: 1 2");
    check("itp etp", &["1 local", "2"], "in local, local: 1");
}

/// The terminating endpoints of a node, with and without others that are ready.
#[test]
fn terminating_matrix() {
    let here = ["1 local terminating", "2 local terminating", "3 local gone", "4 local gone"];
    let (etp, itp) = ("etp nodeport", "itp nodeport");
    check(etp, &here, "in cluster, out local, cluster: 1 2, local: 1 2");
    check(itp, &here, "in local, out cluster, cluster: 1 2, local: 1 2");
    let with_ready = [&here[..], &["5 local"]].concat();
    check(etp, &with_ready, "in cluster, out local, cluster: 5, local: 5");
    check(itp, &with_ready, "in local, out cluster, cluster: 5, local: 5");
    let remote_ready = [&here[..], &["5"]].concat();
    check(etp, &remote_ready, "in cluster, out local, cluster: 5, local: 1 2");
    check(itp, &remote_ready, "in local, out cluster, cluster: 5, local: 1 2");
    let all_gone = ["1 local gone", "2 gone"];
    check(etp, &all_gone, "in reject, out reject");
    check(itp, &all_gone, "in reject, out reject");
    let remote = ["1 terminating", "2 gone", "3 local gone"];
    check(etp, &remote, "in cluster, out local, cluster: 1");
    check(itp, &remote, "in local, out cluster, cluster: 1");
}

#[test]
fn connections_to_what_still_serves_are_left_alone() {
    check("udp", &["1", "2 terminating", "3 serving", "4 gone"], "in cluster, cluster: 1, draining: 2 3");
    check("udp itp", &["1 local", "2", "3 unready"], "in local, local: 1, draining: 2");
    check("udp", &["1 serving"], "in reject, draining: 1");
    check("", &["1", "2 terminating", "3 serving"], "in cluster, cluster: 1");
    assert_eq!(
        on_node("zone-a", "udp", &["1 zone-a", "2 zone-b"]),
        "in cluster, cluster: 1, draining: 2",
        "the hints' leavings"
    );
}

#[test]
fn zone_hints() {
    let spread = ["1 zone-a", "2 zone-b", "3 zone-c", "4 zone-a"];
    let on = |zone, endpoints: &[&str]| on_node(zone, "", endpoints);
    assert_eq!(on("zone-a", &spread), "in cluster, cluster: 1 4");
    for zone in ["", "zone-d", "zone"] {
        assert_eq!(on(zone, &spread), "in cluster, cluster: 1 2 3 4", "{zone:?}");
    }
    // Unready ones neither count nor spoil.
    let unready = ["1 zone-a", "2 zone-b", "3 zone-c", "4 zone-a unready"];
    assert_eq!(on("zone-a", &unready), "in cluster, cluster: 1");
    let unready = ["1 zone-a unready", "2 zone-b", "3 zone-c", "4 zone-a unready"];
    assert_eq!(on("zone-a", &unready), "in cluster, cluster: 2 3");
    assert_eq!(on("zone-a", &["1 zone-a", "2 zone-b", "3 unready"]), "in cluster, cluster: 1");
    // All or nothing.
    assert_eq!(on("zone-a", &["1 zone-a", "2 zone-b", "3", "4 zone-a"]), "in cluster, cluster: 1 2 3 4");
    let several = ["1 zone-a zone-b zone-c", "2 zone-b zone-c", "3 zone-b zone-d", "4 zone-c zone-c"];
    assert_eq!(on("zone-c", &several), "in cluster, cluster: 1 2 4");
    // The last resort knows no zones.
    let terminating = ["1 zone-a terminating", "2 zone-b terminating"];
    assert_eq!(on("zone-a", &terminating), "in cluster, cluster: 1 2");
}

#[test]
fn zone_hints_do_not_touch_the_local_set() {
    let endpoints = ["1 zone-a local", "2 zone-b local", "3 zone-c", "4 zone-a"];
    let on = |words| on_node("zone-a", words, &endpoints);
    assert_eq!(on("etp nodeport"), "in cluster, out local, cluster: 1 4, local: 1 2");
    assert_eq!(on("itp nodeport"), "in local, out cluster, cluster: 1 4, local: 1 2");
}

#[test]
fn node_hints_come_before_zone_hints() {
    let on = |endpoints: &[&str]| on_node("zone-a", "", endpoints);
    let both = ["1 zone-a node-a", "2 zone-a node-b", "3 zone-b node-a"];
    assert_eq!(on(&both), "in cluster, cluster: 1 3");
    let other_nodes = ["1 zone-a node-b", "2 zone-a node-c", "3 zone-b node-b"];
    assert_eq!(on(&other_nodes), "in cluster, cluster: 1 2", "no node hint names this node");
    let not_all = ["1 zone-a node-a", "2 zone-a", "3 zone-b node-b"];
    assert_eq!(on(&not_all), "in cluster, cluster: 1 2", "not all have node hints");
    assert_eq!(on(&["1 node-b", "2 node-c"]), "in cluster, cluster: 1 2");
    assert_eq!(on(&["1 node-a unready", "2 node-b"]), "in cluster, cluster: 2");
}

#[test]
fn a_new_zone_plans_again_only_who_has_zone_hints() {
    let mut planner = synced();
    let mut near = slice("near", "near", &["10.1.0.1", "10.1.0.2"]);
    for (endpoint, zone) in near.endpoints.iter_mut().zip(["zone-a", "zone-b"]) {
        endpoint.hints = Some(Box::new(Hints { zones: vec![zone.into()], nodes: vec![] }));
    }
    planner.apply(api(Change::Service(service("near", 0, &["10.96.0.1"], None))));
    planner.apply(api(Change::Service(service("other", 0, &["10.96.0.2"], None))));
    planner.apply(api(Change::Slice(near)));
    planner.apply(api(Change::Slice(slice("other", "other", &["10.1.0.3"]))));
    planner.replan();
    let backends =
        |planner: &kube_lane::model::planner::Planner| outcome(&planner.plan(&key("near")).unwrap().ports[0]);
    assert_eq!(backends(&planner), "in cluster, cluster: 1 2");
    for (zone, expected) in [("zone-b", "cluster: 2"), ("zone-a", "cluster: 1"), ("zone-c", "cluster: 1 2")] {
        let before = planner.services_planned();
        planner.apply(api(Change::Node(Some(Node { zone: Some(zone.into()), ..Node::default() }))));
        planner.replan();
        assert_eq!(backends(&planner), format!("in cluster, {expected}"), "{zone}");
        assert_eq!(planner.services_planned(), before + 1);
    }
    let before = planner.services_planned();
    let heartbeat = Node { zone: Some("zone-c".into()), leaving: true, ..Node::default() };
    planner.apply(api(Change::Node(Some(heartbeat))));
    assert!(planner.replan().services.is_empty());
    assert_eq!(planner.services_planned(), before);
}

#[test]
fn more_endpoints_than_a_set_has_are_cut_and_both_numbers_told() {
    let mut planner = synced();
    let mut big = service("big", 0, &["10.96.0.1"], None);
    Arc::make_mut(&mut big.ports)[0].protocol = Protocol::Udp;
    planner.apply(api(Change::Service(big)));
    let numbered = |n: usize| endpoint(Ipv4Addr::from(0x0a01_0000 + n as u32).into());
    for (count, used) in
        [(MAX_BACKENDS, MAX_BACKENDS), (MAX_BACKENDS + 2, MAX_BACKENDS), (MAX_BACKENDS - 1, MAX_BACKENDS - 1)]
    {
        let mut all = slice("big-1", "big", &["10.1.0.0"]);
        Arc::make_mut(&mut all.ports)[0].protocol = Protocol::Udp;
        all.endpoints = (0..count).rev().map(numbered).collect();
        planner.apply(api(Change::Slice(all)));
        planner.replan();
        let plan = planner.plan(&key("big")).unwrap();
        let port = &plan.ports[0];
        assert_eq!((port.backends.len(), port.draining.len()), (used, count - used));
        let words = format!("has {count} endpoints: the first {MAX_BACKENDS} by address are used");
        assert_eq!(
            plan.warnings.iter().any(|warning| warning.contains(&words)),
            count > used,
            "{:?}",
            plan.warnings
        );
    }
}
