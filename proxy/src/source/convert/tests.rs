//! Odd objects, one by one: what is kept of each and what is said about it.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;

use super::*;
use crate::model::input::{
    Change, EndpointSlice, External, Family, Hints, Node, Protocol, Service, ServiceType, TrafficPolicy,
};

fn convert_service(origin: Origin, json: &str) -> (Converted<Service>, Vec<String>) {
    let object: wire::Service<'_> = serde_json::from_str(json).unwrap();
    let mut converter = Converter::new(origin);
    let converted = converter.service(&ObjectKey::new("ns", "web"), &object);
    (converted, converter.problems.iter().map(ToString::to_string).collect())
}

fn convert_slice(origin: Origin, json: &str) -> (Converted<EndpointSlice>, Vec<String>) {
    let object: wire::EndpointSlice<'_> = serde_json::from_str(json).unwrap();
    let mut converter = Converter::new(origin);
    let converted = converter.slice(&ObjectKey::new("ns", "web-1"), &object);
    (converted, converter.problems.iter().map(ToString::to_string).collect())
}

fn read<T: std::fmt::Debug>(converted: Converted<T>) -> T {
    match converted {
        Converted::Read(content) => content,
        other => panic!("{other:?}"),
    }
}

#[test]
fn judges_names() {
    assert!(is_label("web-1") && is_label(&"a".repeat(63)));
    assert!(
        !is_label("")
            && !is_label("-web")
            && !is_label("Web")
            && !is_label("a.b")
            && !is_label(&"a".repeat(64))
    );
    assert!(is_subdomain("web.example-1") && is_subdomain(&"a".repeat(253)));
    assert!(!is_subdomain("web..x") && !is_subdomain("web/") && !is_subdomain(&"a".repeat(254)));
}

#[test]
fn services_that_no_proxy_serves() {
    let table = [
        (r#"{"spec": {"type": "ExternalName", "externalName": "x"}}"#, Ignored::ExternalName),
        (r#"{"spec": {"clusterIP": "None", "clusterIPs": ["None"]}}"#, Ignored::Headless),
        (r#"{"spec": {"clusterIPs": ["None"]}}"#, Ignored::Headless),
        (r#"{"spec": {"clusterIP": ""}}"#, Ignored::NoClusterIp),
        (
            r#"{"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": ""}}, "spec": {}}"#,
            Ignored::OtherProxy,
        ),
    ];
    for (json, why) in table {
        assert_eq!(convert_service(Origin::Api, json), (Converted::Ignored(why), vec![]), "{json}");
    }
}

#[test]
fn a_service_keeps_its_good_parts() {
    let (converted, problems) = convert_service(
        Origin::Api,
        r#"{"metadata": {"creationTimestamp": "1970-01-01T00:01:00Z", "labels": null}, "spec": {
            "clusterIP": "172.30.0.041", "clusterIPs": ["172.30.0.041", "fd00::1", "nonsense"],
            "ports": [{"name": "a", "port": 80, "protocol": "TCP", "nodePort": 30080},
                      {"name": "b", "port": 80, "protocol": "UDP", "nodePort": 0},
                      {"name": "c", "port": 80, "protocol": "TCP"},
                      {"name": "a", "port": 81},
                      {"name": "d", "port": 82, "protocol": "icmp"},
                      {"name": "e", "port": 83, "nodePort": 30080},
                      {"name": "f", "port": null}]}}"#,
    );
    let service = read(converted);
    assert_eq!(service.created, 60);
    assert_eq!(
        service.cluster_ips[..],
        ["172.30.0.41".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]
    );
    let ports: Vec<_> =
        service.ports.iter().map(|port| (&*port.name, port.protocol, port.port, port.node_port)).collect();
    assert_eq!(
        ports,
        [
            ("a", Protocol::Tcp, 80, Some(30080)),
            ("b", Protocol::Udp, 80, None),
            ("e", Protocol::Tcp, 83, None)
        ]
    );
    let expected = [
        "Service ns/web: spec.clusterIPs[2] is \"nonsense\": not an IP address",
        "spec.ports[2].port is \"80/TCP\": another port has this number",
        "spec.ports[3].name is \"a\": another port has this name",
        "spec.ports[4].protocol is \"icmp\": unknown protocol: use TCP, UDP or SCTP",
        "spec.ports[5].nodePort is \"30080\": another port has this NodePort",
        "spec.ports[6].port: missing",
    ];
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.contains(expected), "{problem}");
    }
}

#[test]
fn a_service_without_any_good_part_is_bad() {
    for json in [
        r#"{"spec": {"clusterIP": "nonsense", "ports": [{"port": 80}]}}"#,
        r#"{"spec": {"clusterIP": "10.0.0.1", "ports": []}}"#,
        r#"{"spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 0}]}}"#,
        r#"{"spec": null}"#,
    ] {
        let (converted, problems) = convert_service(Origin::Api, json);
        assert_eq!((converted, problems.len()), (Converted::Bad, 1), "{json}");
    }
}

#[test]
fn a_slice_keeps_its_good_parts() {
    let (converted, problems) = convert_slice(
        Origin::Api,
        r#"{"metadata": {"labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.1.0.01", "ignored"], "conditions": {}, "nodeName": "node-a"},
                          {"addresses": ["10.1.0.2"], "nodeName": "node-a",
                           "conditions": {"ready": false, "serving": true, "terminating": true}},
                          {"addresses": ["fd00::1"]}, {"addresses": []}, {"addresses": ["10.1.0.3"], "nodeName": null}],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "", "port": 8081},
                      {"name": null, "port": 8082}, {"name": "nil", "port": null}, {"name": "zero", "port": 0}]}"#,
    );
    let slice = read(converted);
    assert_eq!((slice.service.as_str(), slice.family), ("ns/web", Family::V4));
    let endpoints: Vec<_> = slice
        .endpoints
        .iter()
        .map(|e| (e.address.to_string(), e.ready, e.serving, e.terminating, e.node.as_deref()))
        .collect();
    assert_eq!(
        endpoints,
        [
            ("10.1.0.1".to_owned(), true, true, false, Some("node-a")),
            ("10.1.0.2".to_owned(), false, true, true, Some("node-a")),
            ("10.1.0.3".to_owned(), true, true, false, None),
        ]
    );
    let nodes: Vec<_> = slice.endpoints.iter().filter_map(|endpoint| endpoint.node.as_ref()).collect();
    assert!(Arc::ptr_eq(nodes[0], nodes[1]), "node names are shared");
    let ports: Vec<_> = slice.ports.iter().map(|port| (&*port.name, port.port)).collect();
    assert_eq!(ports, [("http", 8080), ("", 8081)]);
    assert_eq!(problems.len(), 5, "{problems:#?}");
    assert!(
        problems[0].contains("EndpointSlice ns/web-1: endpoints[2].addresses[0] is \"fd00::1\""),
        "{problems:#?}"
    );
}

#[test]
fn slices_that_no_proxy_reads() {
    let table = [
        (r#"{"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}"#, Ignored::Headless),
        (r#"{"addressType": "IPv4"}"#, Ignored::NoServiceName),
        (
            r#"{"metadata": {"labels": {"kubernetes.io/service-name": "web"}}, "addressType": "FQDN"}"#,
            Ignored::AddressType,
        ),
        (
            r#"{"metadata": {"labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPX"}"#,
            Ignored::AddressType,
        ),
    ];
    for (json, why) in table {
        assert_eq!(convert_slice(Origin::Api, json), (Converted::Ignored(why), vec![]), "{json}");
    }
}

#[test]
fn a_slice_tells_what_triggered_its_change() {
    let json = r#"{"metadata": {"annotations": {"a": "b",
        "endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:01.5Z"},
        "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv6", "endpoints": null, "ports": null}"#;
    let object: wire::EndpointSlice<'_> = serde_json::from_str(json).unwrap();
    let change = Change::Slice(read(convert_slice(Origin::Api, json).0));
    let since = |text: &str| triggered(&change, object.metadata.as_ref(), text.parse().unwrap());
    let at = Change::Triggered(Family::V6, 1_767_225_601_500_000);
    assert_eq!(since("2026-01-01T00:00:01Z"), Some(at));
    assert_eq!(since("2026-01-01T00:00:02Z"), None, "it is older than the watch");
    assert_eq!(triggered(&change, None, Timestamp::MIN), None);
}

#[test]
fn an_empty_slice_is_no_bad_one() {
    let json = r#"{"metadata": {"labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv6",
                   "endpoints": null, "ports": null}"#;
    let (converted, problems) = convert_slice(Origin::Api, json);
    assert_eq!((read(converted).endpoints.len(), problems.len()), (0, 0));
}

#[test]
fn static_objects_get_the_defaults_of_the_api_server() {
    let json = r#"{"metadata": {"labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
                   "ports": [{"port": 8080}]}"#;
    let slice = read(convert_slice(Origin::Static, json).0);
    assert_eq!((&*slice.ports[0].name, slice.ports[0].protocol), ("", Protocol::Tcp));
    let metadata: wire::Metadata<'_> = serde_json::from_str(r#"{"name": "web"}"#).unwrap();
    let key = Converter::new(Origin::Static).key("Service", Some(&metadata));
    assert_eq!(key, Some(ObjectKey::new("default", "web")));
}

fn node(json: &str) -> (Node, Vec<String>) {
    let object: wire::Node<'_> = serde_json::from_str(json).unwrap();
    let mut converter = Converter::new(Origin::Api);
    let node = converter.node("node-a", &object);
    (node, converter.problems.iter().map(ToString::to_string).collect())
}

#[test]
fn a_node_has_its_internal_addresses_first() {
    let (node, problems) = node(
        r#"{"status": {"addresses": [{"type": "ExternalIP", "address": "1.2.3.4"}, {"type": "Hostname", "address": "n"},
            {"type": "InternalIP", "address": "192.168.0.01"}, {"type": "InternalIP", "address": "bad"}]}}"#,
    );
    assert_eq!(node.addresses, ["192.168.0.1", "1.2.3.4"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    assert_eq!(problems.len(), 1);
}

#[test]
fn a_node_has_pod_cidrs_a_zone_and_may_leave() {
    let cidrs = |json: &str| {
        let (node, problems) = node(json);
        (node.pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>(), problems.len())
    };
    for (json, expected, problems) in [
        (
            r#"{"spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00:1::/64"]}}"#,
            &["10.1.0.0/24", "fd00:1::/64"][..],
            0,
        ),
        (r#"{"spec": {"podCIDR": "10.01.0.7/24"}}"#, &["10.1.0.0/24"], 0),
        (r#"{"spec": {"podCIDR": "", "podCIDRs": []}}"#, &[], 0),
        (r#"{"spec": {"podCIDRs": ["10.1.0.0", "10.2.0.0/24"]}}"#, &["10.2.0.0/24"], 1),
        (r#"{"spec": {"podCIDR": "all"}}"#, &[], 1),
        ("{}", &[], 0),
    ] {
        assert_eq!(cidrs(json), (expected.iter().map(ToString::to_string).collect(), problems), "{json}");
    }

    let zone = |json| node(json).0.zone;
    assert_eq!(
        zone(r#"{"metadata": {"labels": {"topology.kubernetes.io/zone": "a"}}}"#).as_deref(),
        Some("a")
    );
    assert_eq!(zone(r#"{"metadata": {"labels": {"topology.kubernetes.io/zone": ""}}}"#), None);
    assert_eq!(zone(r#"{"metadata": {"labels": null}}"#), None);

    for (json, leaving) in [
        (r#"{"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}"#, true),
        (r#"{"metadata": {"deletionTimestamp": null}, "spec": {"taints": null}}"#, false),
        (r#"{"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}}"#, false),
        (
            r#"{"spec": {"taints": [{"key": "a"}, {"key": "ToBeDeletedByClusterAutoscaler", "value": "1"}]}}"#,
            true,
        ),
    ] {
        assert_eq!(node(json).0.leaving, leaving, "{json}");
    }
}

/// A Service of one port with more in its `spec` and beside it.
fn with(spec: &str, beside: &str) -> (Service, Vec<String>) {
    let (converted, problems) = convert_service(
        Origin::Api,
        &format!(r#"{{"spec": {{"clusterIP": "10.0.0.1", "ports": [{{"port": 80}}] {spec}}} {beside}}}"#),
    );
    (read(converted), problems)
}

#[test]
fn types_and_policies() {
    let (service, problems) = with("", "");
    assert_eq!(service.kind, ServiceType::ClusterIp);
    assert_eq!((service.internal_policy, service.external_policy), Default::default());
    assert_eq!((service.affinity, service.external, problems.len()), (None, None, 0));

    let (service, problems) = with(
        r#", "type": "LoadBalancer", "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
           "sessionAffinity": "None""#,
        "",
    );
    assert_eq!(service.kind, ServiceType::LoadBalancer);
    assert_eq!(service.internal_policy, TrafficPolicy::Local);
    assert_eq!(service.external_policy, TrafficPolicy::Local);
    assert_eq!((service.affinity, problems.len()), (None, 0));

    let (service, problems) = with(
        r#", "type": "Nodeport", "internalTrafficPolicy": "local", "externalTrafficPolicy": "",
           "sessionAffinity": "Cookie""#,
        "",
    );
    assert_eq!(service.kind, ServiceType::ClusterIp);
    assert_eq!((service.internal_policy, service.external_policy), Default::default());
    assert_eq!(service.affinity, None);
    let expected = [
        "spec.type is \"Nodeport\": unknown type: use ClusterIP, NodePort, LoadBalancer or ExternalName; \
         it is served as a ClusterIP, without NodePorts and load balancer addresses",
        "spec.internalTrafficPolicy is \"local\": unknown policy: use Cluster or Local; Cluster applies",
        "spec.sessionAffinity is \"Cookie\": unknown affinity: use None or ClientIP; connections go to any endpoint",
    ];
    assert_eq!(problems, expected.map(|problem| format!("Service ns/web: {problem}")));
}

#[test]
fn session_affinity_has_a_timeout() {
    for (config, seconds, problems) in [
        ("", 10_800, 0),
        (r#", "sessionAffinityConfig": null"#, 10_800, 0),
        (r#", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": null}}"#, 10_800, 0),
        (r#", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}}"#, 1, 0),
        (r#", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86400}}"#, 86_400, 0),
        (r#", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}"#, 10_800, 1),
        (r#", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}"#, 10_800, 1),
        (r#", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": -5}}"#, 10_800, 1),
    ] {
        let (service, found) = with(&format!(r#", "sessionAffinity": "ClientIP" {config}"#), "");
        assert_eq!((service.affinity.unwrap().get(), found.len()), (seconds, problems), "{config}");
    }
    let timeout = r#", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}"#;
    assert_eq!(with(timeout, "").0.affinity, None, "without sessionAffinity");
}

#[test]
fn addresses_beside_the_cluster_ips() {
    let (service, problems) = with(
        r#", "externalIPs": ["192.0.2.041", "", "fd00::9", "192.0.2.41", "web", "0.0.0.0", "::1", "239.1.1.1",
                             "255.255.255.255", "169.254.1.1"],
           "loadBalancerSourceRanges": [" 10.1.2.3/8 ", "fd00::/8", "10.0.0.0"], "healthCheckNodePort": 31000"#,
        r#", "status": {"loadBalancer": {"ingress": [
            {"ip": "198.51.100.1", "ports": []}, {"ip": "198.51.100.2", "ipMode": "VIP"},
            {"ip": "198.51.100.3", "ipMode": "Proxy"}, {"hostname": "lb.example.com"}, {"ip": "", "ipMode": "VIP"},
            {"ip": "198.51.100.4", "ipMode": "Both"}, {"ip": "127.0.0.1"}, {"ip": "fd00::a"}]}}"#,
    );
    let addresses = |list: &[&str]| list.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
    let expected = External {
        ips: addresses(&["192.0.2.41", "fd00::9", "169.254.1.1"]),
        load_balancer_ips: addresses(&["198.51.100.1", "198.51.100.2", "fd00::a"]),
        source_ranges: ["10.0.0.0/8", "fd00::/8"].map(|range| range.parse().unwrap()).to_vec(),
        ranges_unread: false,
        health_check_node_port: Some(31_000),
    };
    assert_eq!(service.external.as_deref(), Some(&expected));
    let expected = [
        "spec.externalIPs[4] is \"web\": not an IP address",
        "spec.externalIPs[5] is \"0.0.0.0\": no Service can be dialled at this address",
        "spec.externalIPs[6] is \"::1\": no Service",
        "spec.externalIPs[7] is \"239.1.1.1\": no Service",
        "spec.externalIPs[8] is \"255.255.255.255\": no Service",
        "status.loadBalancer.ingress[5].ipMode is \"Both\": unknown mode",
        "status.loadBalancer.ingress[6].ip is \"127.0.0.1\": no Service",
        "spec.loadBalancerSourceRanges[2] is \"10.0.0.0\": not a CIDR",
    ];
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.contains(expected), "{problem}");
    }
}

#[test]
fn source_ranges_of_which_none_is_good_and_odd_health_ports_are_named() {
    let (service, problems) =
        with(r#", "loadBalancerSourceRanges": ["all"], "healthCheckNodePort": 65536"#, "");
    assert_eq!(service.external, None);
    assert_eq!(problems.len(), 3, "{problems:#?}");
    assert!(
        problems[1].ends_with("spec.loadBalancerSourceRanges: no range is left: everybody is let through")
    );
    assert!(problems[2].contains("spec.healthCheckNodePort is \"65536\""), "{problems:#?}");
    assert_eq!(
        with(r#", "healthCheckNodePort": 0, "externalIPs": null"#, r#", "status": {}"#).0.external,
        None
    );
}

#[test]
fn source_ranges_of_a_manifest_that_cannot_be_read_open_nothing() {
    for (ranges, unread, words) in [
        (r#"["all"]"#, true, "no range is left: nobody is let through"),
        (r#"["10.0.0.0/8", "fd00::/999"]"#, true, "not a CIDR"),
        (r#"["10.0.0.0/8"]"#, false, ""),
        ("[]", false, ""),
    ] {
        let spec = format!(r#", "loadBalancerSourceRanges": {ranges}, "externalIPs": ["192.0.2.1"]"#);
        let (converted, problems) = convert_service(
            Origin::Static,
            &format!(r#"{{"spec": {{"clusterIP": "10.0.0.1", "ports": [{{"port": 80}}]{spec}}}}}"#),
        );
        assert_eq!(read(converted).external.unwrap().ranges_unread, unread, "{ranges}");
        assert_eq!(problems.is_empty(), words.is_empty(), "{problems:#?}");
        assert!(problems.last().is_none_or(|last| last.contains(words)), "{problems:#?}");
    }
}

/// What the words say of a value that is none is what the model is told.
#[test]
fn values_in_the_wrong_case_are_what_the_words_say() {
    let (service, problems) = with(
        r#", "type": "nodeport", "externalTrafficPolicy": "local", "internalTrafficPolicy": "LOCAL",
            "sessionAffinity": "clientip", "healthCheckNodePort": 31000, "externalIPs": ["192.0.2.1"],
            "trafficDistribution": "preferclose", "ipFamilyPolicy": "singlestack""#,
        r#", "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}}"#,
    );
    assert_eq!(problems.len(), 4, "{problems:#?}");
    assert_eq!(service.kind, ServiceType::ClusterIp);
    let external = service.external.as_deref().unwrap();
    assert_eq!(
        (external.ips.len(), external.load_balancer_ips.len()),
        (1, 0),
        "a ClusterIP may have externalIPs"
    );
    assert_eq!((service.internal_policy, service.external_policy), Default::default());
    assert_eq!(service.affinity, None);

    let ports =
        r#"[{"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 81, "protocol": "udp"}]"#;
    for (kind, node_port) in [("nodeport", None), ("NODEPORT", None), ("NodePort", Some(30_080))] {
        let (converted, problems) = convert_service(
            Origin::Static,
            &format!(r#"{{"spec": {{"type": "{kind}", "clusterIP": "10.0.0.1", "ports": {ports}}}}}"#),
        );
        let service = read(converted);
        assert_eq!(
            (service.ports.len(), service.ports[0].node_port),
            (1, node_port),
            "{kind}: {problems:#?}"
        );
        assert!(
            problems.iter().any(|problem| problem.contains("\"udp\": unknown protocol")),
            "{problems:#?}"
        );
    }
    let (converted, problems) = with_ingress_mode("vip");
    assert!(converted.is_none() && problems[0].contains("the address is left to the load balancer"));
    let (converted, problems) = convert_slice(
        Origin::Static,
        r#"{"metadata": {"labels": {"kubernetes.io/service-name": "web"}}, "addressType": "ipv4",
            "endpoints": [{"addresses": ["10.1.0.1"]}]}"#,
    );
    assert_eq!(converted, Converted::Bad);
    assert!(problems[0].contains("use IPv4 or IPv6; the slice is left out"), "{problems:#?}");
}

/// The load balancer address of a Service with this `ipMode`, and what is wrong with it.
fn with_ingress_mode(mode: &str) -> (Option<IpAddr>, Vec<String>) {
    let ingress = format!(r#"{{"ip": "198.51.100.1", "ipMode": "{mode}"}}"#);
    let (service, problems) =
        with("", &format!(r#", "status": {{"loadBalancer": {{"ingress": [{ingress}]}}}}"#));
    let address = service.external.and_then(|external| external.load_balancer_ips.first().copied());
    (address, problems)
}

#[test]
fn endpoints_keep_their_hints() {
    let (converted, problems) = convert_slice(
        Origin::Api,
        r#"{"metadata": {"labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4", "endpoints": [
            {"addresses": ["10.1.0.1"], "hints": {"forZones": [{"name": "a"}, {"name": "b"}]}},
            {"addresses": ["10.1.0.2"], "hints": {"forNodes": [{"name": "node-a"}], "forZones": null}},
            {"addresses": ["10.1.0.3"], "hints": {"forZones": []}},
            {"addresses": ["10.1.0.4"], "hints": null}]}"#,
    );
    let hints: Vec<_> = read(converted).endpoints.into_iter().map(|endpoint| endpoint.hints).collect();
    let expected = [
        Some(Hints { zones: vec!["a".into(), "b".into()], nodes: vec![] }),
        Some(Hints { zones: vec![], nodes: vec!["node-a".into()] }),
        None,
        None,
    ];
    assert_eq!(hints, expected.map(|hints| hints.map(Box::new)));
    assert_eq!(problems.len(), 0);
}
