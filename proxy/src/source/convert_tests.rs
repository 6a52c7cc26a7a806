//! Odd objects, one by one: what is kept of each and what is said about it.

use std::sync::Arc;

use super::*;

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
fn reads_addresses_as_go_does() {
    let table = [
        ("10.0.0.1", Some("10.0.0.1")),
        ("172.30.0.041", Some("172.30.0.41")),
        ("010.000.00.0000009", Some("10.0.0.9")),
        ("fd00::1", Some("fd00::1")),
        ("::ffff:10.0.0.1", Some("10.0.0.1")),
        ("10.0.0.256", None),
        ("10.0.0", None),
        ("10.0.0.1.", None),
        ("10.0.0.+1", None),
        (" 10.0.0.1", None),
        ("fe80::1%eth0", None),
        ("", None),
    ];
    for (text, expected) in table {
        assert_eq!(parse_ip(text).map(|address| address.to_string()).as_deref(), expected, "{text:?}");
    }
}

#[test]
fn reads_cidrs_and_clears_host_bits() {
    let table = [
        ("10.96.0.0/12", Some("10.96.0.0/12")),
        (" 10.96.0.010/12 ", Some("10.96.0.0/12")),
        ("fd00::1/112", Some("fd00::/112")),
        ("10.96.0.0", None),
        ("10.96.0.0/33", None),
        ("10.96.0.0/+8", None),
        ("10.96.0.0/", None),
    ];
    for (text, expected) in table {
        assert_eq!(parse_cidr(text).map(|cidr| cidr.to_string()).as_deref(), expected, "{text:?}");
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
    assert_eq!(service.cluster_ips, ["172.30.0.41".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
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

#[test]
fn a_node_has_its_internal_addresses_first() {
    let node: wire::Node<'_> = serde_json::from_str(
        r#"{"status": {"addresses": [{"type": "ExternalIP", "address": "1.2.3.4"}, {"type": "Hostname", "address": "n"},
            {"type": "InternalIP", "address": "192.168.0.1"}, {"type": "InternalIP", "address": "bad"}]}}"#,
    )
    .unwrap();
    let mut converter = Converter::new(Origin::Api);
    let addresses = converter.node("node-a", &node).addresses;
    assert_eq!(addresses, ["192.168.0.1".parse::<IpAddr>().unwrap(), "1.2.3.4".parse().unwrap()]);
    assert_eq!(converter.problems.len(), 1);
}
