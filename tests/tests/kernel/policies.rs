//! Traffic policies, source ranges, detectors and changes in place, with real packets: who answers, and whom it sees.

use std::net::IpAddr;
use std::time::Duration;

use kube_lane_lab::{Dial, Echo, Host, Load, Outcome, Pod, Proto, topology};
use kube_lane_tests::objects::{Endpoint, Port};
use serde_json::{Value, json};

use super::world::{Leaks, World, answered, at, endpoints, serving, until, vips, web_ports};

const PROTOCOLS: [Proto; 2] = [Proto::Tcp, Proto::Udp];

/// The load balancer's VIPs of the Service with this number.
fn lb_ips(number: u8) -> [IpAddr; 2] {
    topology::vip_cidrs().map(|cidr| cidr.iter().nth(usize::from(number)).unwrap())
}

/// The external IPs of the Service with this number.
fn external_ips(number: u8) -> [IpAddr; 2] {
    lb_ips(number + 100)
}

/// A Service of type LoadBalancer with external IPs, and these fields.
fn everywhere(number: u8, fields: Value) -> Value {
    let ingress: Vec<_> = lb_ips(number).map(|ip| json!({"ip": ip})).to_vec();
    let mut spec = json!({
        "type": "LoadBalancer",
        "externalIPs": external_ips(number),
        "status": {"loadBalancer": {"ingress": ingress}},
    });
    for (field, value) in fields.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    spec
}

/// A world with two pods that serve, one on each node, and one on the first node that dials.
struct Cast {
    // Dropped in this order: what runs before where it runs.
    _servers: [[Echo; 2]; 2],
    near: Pod,
    far: Pod,
    pod: Pod,
    world: World,
}

impl Cast {
    fn new() -> Self {
        Self::of(World::new(&[]))
    }

    fn of(world: World) -> Self {
        let (near, near_server) = serving(&world.lab, 0, "near");
        let (far, far_server) = serving(&world.lab, 1, "far");
        let pod = world.lab.node(0).add_pod("client").unwrap();
        Self { _servers: [near_server, far_server], near, far, pod, world }
    }

    fn node(&self) -> &Host {
        self.world.lab.node(0)
    }

    fn outside(&self) -> &Host {
        self.world.lab.outside()
    }
}

/// What a client should meet: who may answer (all of them, over many connections), and whom they should see.
struct Expected<'a> {
    by: &'a [&'a Pod],
    seen: [IpAddr; 2],
}

/// A host's own addresses, IPv4 first.
fn own(host: &Host) -> [IpAddr; 2] {
    [host.v4(), host.v6()]
}

/// Dials an address of each family in both protocols until exactly the expected pods have answered, and checks whom
/// each of them saw; where nobody may answer, until it is dropped.
fn expect(client: &Host, to: [IpAddr; 2], port: u16, expected: &Expected<'_>) {
    for (family, proto) in [0, 1].into_iter().flat_map(|family| PROTOCOLS.map(|proto| (family, proto))) {
        let to = at(to[family], port);
        let about = format!("{proto} {} → {to}", client.name());
        if expected.by.is_empty() {
            let lost = until(client, proto, to, dropped);
            assert!(dropped(&lost), "{about}: {lost}");
            continue;
        }
        let may = |outcome: &Outcome| expected.by.iter().any(|pod| outcome.by() == Some(pod.name()));
        let right = |outcome: &Outcome| {
            may(outcome) && outcome.seen().is_some_and(|seen| seen.ip() == expected.seen[family])
        };
        let first = until(client, proto, to, right);
        assert!(right(&first), "{about}: {first}, not seen as {}", expected.seen[family]);
        let mut answered = std::collections::BTreeSet::new();
        for _ in 0..32 {
            let outcome = client.dial(proto, to).unwrap();
            assert!(right(&outcome), "{about}: {outcome}, not seen as {}", expected.seen[family]);
            answered.extend(outcome.by().map(str::to_owned));
        }
        assert_eq!(answered.len(), expected.by.len(), "{about}: only {answered:?}");
    }
}

fn dropped(outcome: &Outcome) -> bool {
    // The kernel tells a local sender of datagrams that its packet was dropped.
    matches!(outcome, Outcome::TimedOut)
        || matches!(outcome, Outcome::Failed(why) if why.contains("Operation not permitted"))
}

#[test]
fn external_traffic_policy_decides_who_answers_and_whom_they_see() {
    let cast = Cast::new();
    let (node, outside) = (cast.node(), cast.outside());
    let Cast { near, far, pod, world, .. } = &cast;
    let both = [near, far];
    // A Service for each case: a datagram from a port that was used before belongs to its old connection.
    let put = |number: u8, pods: &[&Pod], policy: &str| {
        let node_port = 30000 + u16::from(number);
        let ports = ["TCP", "UDP"].map(|protocol| Port::new(protocol, 80, 8080).node_port(node_port));
        let fields = json!({"externalTrafficPolicy": policy});
        let name = format!("web-{number}");
        world.put_spec(&name, &ports, number, &endpoints(pods), everywhere(number, fields));
        [(own(node), node_port), (lb_ips(number), 80), (external_ips(number), 80)]
    };
    for (to, port) in put(10, &both, "Cluster") {
        for client in [pod as &Host, node, outside] {
            expect(client, to, port, &Expected { by: &both, seen: own(node) });
        }
    }
    for (to, port) in put(11, &both, "Local") {
        expect(outside, to, port, &Expected { by: &[near], seen: own(outside) });
        expect(pod, to, port, &Expected { by: &both, seen: own(pod) });
        expect(node, to, port, &Expected { by: &both, seen: own(node) });
    }
    // It is not the cluster IP's business.
    expect(pod, vips(11), 80, &Expected { by: &both, seen: own(pod) });
    expect(outside, vips(11), 80, &Expected { by: &both, seen: own(node) });
    for (to, port) in put(12, &[far], "Local") {
        expect(outside, to, port, &Expected { by: &[], seen: own(outside) });
        expect(pod, to, port, &Expected { by: &[far], seen: own(pod) });
        expect(node, to, port, &Expected { by: &[far], seen: own(node) });
    }
}

#[test]
fn internal_traffic_policy_keeps_clients_on_the_node() {
    let cast = Cast::new();
    let (node, outside) = (cast.node(), cast.outside());
    let Cast { near, far, pod, world, .. } = &cast;
    let local = everywhere(10, json!({"internalTrafficPolicy": "Local"}));
    world.put_spec("web", &web_ports(), 10, &endpoints(&[near, far]), local.clone());
    expect(pod, vips(10), 80, &Expected { by: &[near], seen: own(pod) });
    expect(outside, vips(10), 80, &Expected { by: &[near], seen: own(node) });
    expect(node, vips(10), 80, &Expected { by: &[near], seen: own(node) });
    expect(outside, lb_ips(10), 80, &Expected { by: &[near, far], seen: own(node) });

    world.put_spec("web", &web_ports(), 10, &endpoints(&[far]), local);
    for client in [pod as &Host, node, outside] {
        expect(client, vips(10), 80, &Expected { by: &[], seen: own(node) });
    }
    expect(outside, own(node), 30080, &Expected { by: &[far], seen: own(node) });
}

#[test]
fn source_ranges_guard_the_load_balancer_alone() {
    let cast = Cast::new();
    let (node, outside) = (cast.node(), cast.outside());
    let Cast { far, pod, world, .. } = &cast;
    let put = |ranges: &[&str]| {
        let fields = json!({"loadBalancerSourceRanges": ranges});
        world.put_spec("web", &web_ports(), 10, &endpoints(&[far]), everywhere(10, fields));
    };
    let open = Expected { by: &[far], seen: own(node) };
    let shut = Expected { by: &[], seen: own(node) };
    let outsider = topology::outside_addresses().map(|ip| ip.to_string());
    put(&[&outsider[0], &outsider[1]]);
    // Addresses are no CIDRs: no range at all is left, and a manifest that says so opens nothing.
    for client in [pod as &Host, outside] {
        expect(client, lb_ips(10), 80, &shut);
        expect(client, external_ips(10), 80, &open);
        expect(client, own(node), 30080, &open);
    }
    let outsider = [format!("{}/32", outsider[0]), format!("{}/128", outsider[1])];
    put(&[&outsider[0], &outsider[1]]);
    expect(pod, lb_ips(10), 80, &shut);
    expect(outside, lb_ips(10), 80, &open);
    for client in [pod as &Host, outside] {
        expect(client, external_ips(10), 80, &open);
        expect(client, own(node), 30080, &open);
    }
    let pods = topology::cluster_cidrs().map(|cidr| cidr.to_string());
    put(&[&pods[0], &pods[1], "10.244.1.0/24", "10.244.0.0/17"]);
    expect(outside, lb_ips(10), 80, &shut);
    expect(pod, lb_ips(10), 80, &open);
    put(&[]);
    expect(outside, lb_ips(10), 80, &open);
}

/// What a cluster IP's client is seen as, and whom an eTP Local Service leads to, for one way to tell pods.
fn detector(bridge: bool, arguments: &[&str], detects: bool) {
    let cast = Cast::of(World::with(bridge, arguments, &[]));
    let (node, outside) = (cast.node(), cast.outside());
    let Cast { far, pod, world, .. } = &cast;
    let local = everywhere(10, json!({"externalTrafficPolicy": "Local"}));
    world.put_spec("web", &web_ports(), 10, &endpoints(&[far]), local);
    expect(pod, vips(10), 80, &Expected { by: &[far], seen: own(pod) });
    expect(node, vips(10), 80, &Expected { by: &[far], seen: own(node) });
    // Without masquerading the answers take another way than the questions: only who is seen can be told.
    if detects {
        expect(outside, vips(10), 80, &Expected { by: &[far], seen: own(node) });
    }
    let pods: &[&Pod] = if detects { &[far] } else { &[] };
    expect(pod, lb_ips(10), 80, &Expected { by: pods, seen: own(pod) });
    expect(pod, own(node), 30080, &Expected { by: pods, seen: own(pod) });
    expect(node, lb_ips(10), 80, &Expected { by: &[far], seen: own(node) });
    expect(outside, lb_ips(10), 80, &Expected { by: &[], seen: own(node) });
}

#[test]
fn without_a_detector_nobody_is_told_apart() {
    detector(false, &[], false);
}

#[test]
fn pods_are_told_by_their_bridge() {
    let bridge = ["--detect-local-mode", "BridgeInterface", "--pod-bridge-interface", topology::BRIDGE];
    detector(true, &bridge, true);
}

#[test]
fn pods_are_told_by_the_names_of_their_interfaces() {
    let prefix = ["--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", "veth"];
    detector(false, &prefix, true);
}

#[test]
fn a_cluster_cidr_of_one_family_says_nothing_of_the_other() {
    let [v4, _] = topology::cluster_cidrs().map(|cidr| cidr.to_string());
    let Cast { far, pod, world, .. } = &Cast::of(World::with(false, &["--cluster-cidr", &v4], &[]));
    world.put("web", &web_ports(), 10, &endpoints(&[far]));
    // IPv6 has no detector: nobody who dials a cluster IP is masqueraded, pods least of all.
    expect(pod, vips(10), 80, &Expected { by: &[far], seen: own(pod) });
}

/// A load that dials without pause.
fn load(client: &Host, proto: Proto, to: IpAddr, port: u16) -> Load {
    Load::start(client, Dial::new(proto, at(to, port)).timeout(Duration::from_secs(4)), 1, Duration::ZERO)
        .unwrap()
}

/// Puts the specs in turn, many times, while clients dial; no connection may fail, and no packet slip past.
fn under_load(world: &World, backends: &[Endpoint], specs: &[Value], loads: Vec<(String, Load)>) {
    let leaks = Leaks::watch(&world.lab);
    for spec in specs.iter().cycle().take(specs.len() * 60) {
        world.put_spec("web", &web_ports(), 10, backends, spec.clone());
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut dialled = 0;
    for (about, load) in loads {
        let report = load.stop();
        assert_eq!(report.tally.failures(), 0, "{about}: {:?}", report.tally);
        dialled += report.tally.answers();
    }
    assert_eq!(leaks.count(), 0, "of {dialled} connections");
    assert!(dialled > 1000, "only {dialled} connections: too few to prove anything");
    let changes = world.agents[0].metric("kubeproxy_sync_proxy_rules_duration_seconds_count").unwrap();
    assert!(changes > 50.0, "only {changes} commits");
}

#[test]
fn policies_change_under_load_and_nothing_is_lost() {
    let cast = Cast::new();
    let Cast { near, far, pod, world, .. } = &cast;
    let clients: [&Host; 3] = [pod, cast.node(), cast.outside()];
    let backends = endpoints(&[near, far]);
    let everybody = ["0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"];
    let finer = ["0.0.0.0/2", "64.0.0.0/2", "128.0.0.0/1", "::/1", "8000::/2", "c000::/2"];
    let specs = [
        everywhere(10, json!({"loadBalancerSourceRanges": everybody})),
        everywhere(10, json!({"externalTrafficPolicy": "Local", "loadBalancerSourceRanges": finer})),
        everywhere(10, json!({"internalTrafficPolicy": "Local", "loadBalancerSourceRanges": finer})),
    ];
    world.put_spec("web", &web_ports(), 10, &backends, specs[0].clone());
    let node = own(cast.node());
    let mut loads = Vec::new();
    for (i, client) in clients.into_iter().enumerate() {
        let destinations = [(node, 30080), (lb_ips(10), 80), (external_ips(10), 80), (vips(10), 80)];
        for (j, (to, port)) in destinations.into_iter().enumerate() {
            // Families and protocols alternate: all of them would be too much for a small machine.
            let (to, proto) = (to[(i + j) % 2], PROTOCOLS[(i + j / 2) % 2]);
            assert!(answered(&until(client, proto, at(to, port), answered)), "{} {to}", client.name());
            loads.push((format!("{proto} {} → {to}", client.name()), load(client, proto, to, port)));
        }
    }
    under_load(world, &backends, &specs, loads);
}

#[test]
fn a_service_changes_its_type_under_load_and_its_cluster_ip_does_not_notice() {
    let cast = Cast::new();
    let Cast { near, far, pod, world, .. } = &cast;
    let backends = endpoints(&[near, far]);
    let specs = [
        json!({"type": "ClusterIP"}),
        json!({"type": "NodePort", "externalTrafficPolicy": "Local"}),
        everywhere(10, json!({"loadBalancerSourceRanges": ["10.0.0.0/8"]})),
        json!({"type": "ClusterIP", "externalIPs": external_ips(10)}),
        json!({"type": "NodePort"}),
    ];
    world.put_spec("web", &web_ports(), 10, &backends, specs[0].clone());
    let mut loads = Vec::new();
    for (client, protocols) in [(pod as &Host, PROTOCOLS), (cast.outside(), [Proto::Udp, Proto::Tcp])] {
        for (to, proto) in vips(10).into_iter().zip(protocols) {
            assert!(answered(&until(client, proto, at(to, 80), answered)), "{} {to}", client.name());
            loads.push((format!("{proto} {} → {to}", client.name()), load(client, proto, to, 80)));
        }
    }
    under_load(world, &backends, &specs, loads);
}
