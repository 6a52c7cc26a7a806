//! Counted connections and refusals: that the numbers are right, and stay so through changes and restarts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kube_lane::dataplane::nftables::{Nftables, Settings};
use kube_lane_lab::{Dial, Host, Load, Outcome, Pod, Proto};
use serde_json::{Value, json};

use crate::plans::{apply, in_namespace, listing, reached, service, settings, sorted, with_affinity};
use crate::world::{Leaks, Mode, SYNC, World, answered, at, endpoints, serving, vips, web_ports};

const PROTOCOLS: [Proto; 2] = [Proto::Tcp, Proto::Udp];

fn counting(mode: Mode) -> World {
    World::configured(mode, |_| json!({"kubeLane": {"countConnections": true}}))
}

/// What the first node's agent says of a port of a Service.
fn port(world: &World, service: &str, proto: Proto, family: &str) -> Value {
    let (_, text) = world.agents[0].status(&[&format!("default/{service}"), "-o=json"]).unwrap();
    let status: Value = serde_json::from_str(&text).unwrap();
    let ports = status["services"][0]["ports"].as_array().cloned().unwrap_or_default();
    let is_it = |port: &&Value| port["protocol"] == proto.to_string() && port["family"] == family;
    ports.iter().find(is_it).cloned().unwrap_or_default()
}

/// Connections by endpoint; `None` where they are not counted.
fn connections(port: &Value) -> BTreeMap<String, Option<u64>> {
    let sets = ["backends", "localBackends"].into_iter().filter_map(|set| port[set].as_array());
    let count =
        |backend: &Value| (backend["address"].as_str().unwrap().to_owned(), backend["connections"].as_u64());
    sets.flatten().map(count).collect()
}

fn sum(port: &Value) -> u64 {
    connections(port).into_values().flatten().sum()
}

/// Waits until the Service leads to these pods, with session affinity or without; nobody dials meanwhile.
fn until_led_to(world: &World, service: &str, pods: &[&Pod], affinity: bool) {
    let deadline = Instant::now() + SYNC;
    let mut wanted: Vec<_> = pods.iter().map(|pod| at(pod.v4(), 8080).to_string()).collect();
    wanted.sort();
    loop {
        let port = port(world, service, Proto::Udp, "IPv4");
        let backends: Vec<_> = connections(&port).into_keys().collect();
        if backends == wanted && port["affinity"].is_null() != affinity {
            return;
        }
        assert!(Instant::now() < deadline, "{port}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Dials so many times; who answered is added to what is expected.
fn dial(client: &Host, proto: Proto, to: std::net::SocketAddr, times: usize, expected: &mut Expected) {
    for _ in 0..times {
        let outcome = client.dial(proto, to).unwrap();
        let by = outcome.by().unwrap_or_else(|| panic!("{proto} {to}: {outcome}"));
        *expected.0.entry(by.to_owned()).or_default() += 1;
    }
}

#[derive(Default)]
struct Expected(BTreeMap<String, u64>);

impl Expected {
    /// As the agent should tell it of these pods.
    fn of(&self, pods: &[&Pod]) -> BTreeMap<String, Option<u64>> {
        let count = |pod: &&Pod| {
            let count = self.0.get(pod.name()).copied().unwrap_or_default();
            (at(pod.v4(), 8080).to_string(), Some(count))
        };
        pods.iter().map(count).collect()
    }
}

#[test]
fn connections_and_refusals_are_counted_through_changes() {
    let world = counting(Mode::Nftables);
    let pods = [serving(&world.lab, 0, "a"), serving(&world.lab, 1, "b"), serving(&world.lab, 1, "c")];
    let [a, b, c] = pods.each_ref().map(|(pod, _)| pod);
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[a, b]));
    until_led_to(&world, "web", &[a, b], false);

    let vip = at(vips(10)[0], 80);
    for proto in PROTOCOLS {
        let mut expected = Expected::default();
        dial(&client, proto, vip, 20, &mut expected);
        dial(world.lab.outside(), proto, at(world.lab.node(0).v4(), 30080), 10, &mut expected);
        let port = port(&world, "web", proto, "IPv4");
        assert_eq!(connections(&port), expected.of(&[a, b]), "{proto}");
        assert_eq!(port["refusedConnections"], 0);
    }
    dial(&client, Proto::Tcp, at(vips(10)[1], 80), 5, &mut Expected::default());
    assert_eq!(sum(&port(&world, "web", Proto::Tcp, "IPv6")), 5);
    let mut flow = client.flow(Dial::new(Proto::Tcp, vip)).unwrap();
    (0..3).for_each(|_| assert!(answered(&flow.ask())));
    assert_eq!(sum(&port(&world, "web", Proto::Tcp, "IPv4")), 31, "a connection counts once");

    world.put("web", &web_ports(), 10, &[]);
    until_led_to(&world, "web", &[], false);
    for (times, to) in [(4, vip), (3, at(world.lab.node(0).v4(), 30080))] {
        for _ in 0..times {
            assert_eq!(client.dial(Proto::Tcp, to).unwrap(), Outcome::Refused);
        }
    }
    assert_eq!(port(&world, "web", Proto::Tcp, "IPv4")["refusedConnections"], 7);

    // Whoever goes, another one moves into its slot, or none.
    world.put("web", &web_ports(), 10, &endpoints(&[a, b, c]));
    until_led_to(&world, "web", &[a, b, c], false);
    let mut expected = Expected::default();
    for gone in [a, b, c] {
        dial(&client, Proto::Tcp, vip, 20, &mut expected);
        let stay: Vec<_> = [a, b, c].into_iter().filter(|pod| pod.name() != gone.name()).collect();
        world.put("web", &web_ports(), 10, &endpoints(&stay));
        until_led_to(&world, "web", &stay, false);
        dial(&client, Proto::Tcp, vip, 10, &mut expected);
        assert_eq!(connections(&port(&world, "web", Proto::Tcp, "IPv4")), expected.of(&stay));
        world.put("web", &web_ports(), 10, &endpoints(&[a, b, c]));
        until_led_to(&world, "web", &[a, b, c], false);
        expected.0.remove(gone.name());
        assert_eq!(connections(&port(&world, "web", Proto::Tcp, "IPv4")), expected.of(&[a, b, c]));
    }
    assert_eq!(port(&world, "web", Proto::Tcp, "IPv4")["refusedConnections"], 7);
    let (_, text) = world.agents[0].status(&["default/web"]).unwrap();
    assert!(text.contains(" new]") && text.contains("7 refused\n") && !text.contains("socket"), "{text}");
}

#[test]
fn clients_that_are_led_back_are_counted_too() {
    let world = counting(Mode::Nftables);
    let pods = [serving(&world.lab, 0, "a"), serving(&world.lab, 1, "b")];
    let [a, b] = pods.each_ref().map(|(pod, _)| pod);
    let client = world.lab.node(0).add_pod("client").unwrap();
    let vip = at(vips(10)[0], 80);
    let (local, sticky) = ("externalTrafficPolicy", "sessionAffinity");
    let mut expected = Expected::default();
    for (i, spec) in [
        json!({sticky: "ClientIP"}),
        json!({}),
        json!({sticky: "ClientIP", local: "Local"}),
        json!({sticky: "ClientIP", local: "Local", "internalTrafficPolicy": "Local"}),
        json!({sticky: "ClientIP"}),
        json!({}),
    ]
    .into_iter()
    .enumerate()
    {
        let affinity = !spec[sticky].is_null();
        world.put_spec("web", &web_ports(), 10, &endpoints(&[a, b]), spec.clone());
        until_led_to(&world, "web", &[a, b], affinity);
        // Time for the policies, which the wait does not look at; the counts are right before and after.
        std::thread::sleep(Duration::from_millis(200));
        dial(&client, Proto::Tcp, vip, 10, &mut expected);
        dial(world.lab.outside(), Proto::Tcp, at(world.lab.node(0).v4(), 30080), 5, &mut expected);
        let port = port(&world, "web", Proto::Tcp, "IPv4");
        assert_eq!(connections(&port), expected.of(&[a, b]), "step {i}: {spec}");
    }
}

#[test]
fn a_restart_keeps_counts_and_a_switch_of_the_option_keeps_everything_else() {
    let mut world = counting(Mode::Nftables);
    let pods = [serving(&world.lab, 0, "a"), serving(&world.lab, 1, "b")];
    let [a, b] = pods.each_ref().map(|(pod, _)| pod);
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[a, b]));
    world.put_spec("sticky", &[], 12, &[], json!({}));
    let ports = web_ports().into_iter().map(|port| port.node_port(30081)).collect::<Vec<_>>();
    world.put_spec("sticky", &ports, 12, &endpoints(&[a, b]), json!({"sessionAffinity": "ClientIP"}));
    until_led_to(&world, "web", &[a, b], false);
    until_led_to(&world, "sticky", &[a, b], true);
    let [vip, sticky] = [10, 12].map(|number| at(vips(number)[0], 80));
    let (mut expected, mut expected_sticky) = (Expected::default(), Expected::default());
    dial(&client, Proto::Tcp, vip, 20, &mut expected);
    dial(&client, Proto::Tcp, sticky, 5, &mut expected_sticky);
    let mut flow = client.flow(Dial::new(Proto::Udp, vip)).unwrap();
    assert!(answered(&flow.ask()));
    let leaks = Leaks::watch(&world.lab);
    let load = Load::start(
        &client,
        Dial::new(Proto::Udp, vip).timeout(Duration::from_secs(2)),
        2,
        Duration::from_millis(1),
    )
    .unwrap();

    for round in ["with", "without", "with again"] {
        let counts = round != "without";
        world.agents.remove(0);
        let agent = world.start_agent(0, &[&format!("--count-connections={counts}")]);
        world.agents.insert(0, agent);
        world.agents[0].wait_synced(SYNC).unwrap();
        if round == "with" {
            let added = world.agents[0].metric("kubelane_nftables_elements_added_total").unwrap();
            assert!(added == 0.0, "{added} elements of what was there");
        } else {
            (expected, expected_sticky) = Default::default();
        }
        let (web, affine) =
            (port(&world, "web", Proto::Tcp, "IPv4"), port(&world, "sticky", Proto::Tcp, "IPv4"));
        if counts {
            dial(&client, Proto::Tcp, vip, 3, &mut expected);
            dial(&client, Proto::Tcp, sticky, 3, &mut expected_sticky);
            let (web, affine) =
                (port(&world, "web", Proto::Tcp, "IPv4"), port(&world, "sticky", Proto::Tcp, "IPv4"));
            assert_eq!(connections(&web), expected.of(&[a, b]), "{round}");
            assert_eq!(connections(&affine), expected_sticky.of(&[a, b]), "{round}");
        } else {
            let counted = [web, affine].iter().flat_map(connections).any(|(_, count)| count.is_some());
            assert!(!counted, "nothing is counted without it");
        }
        assert!(answered(&flow.ask()), "{round}");
    }
    // An endpoint that leaves while no agent is there, and another one that is to move into its slot.
    world.agents.remove(0);
    world.put("web", &web_ports(), 10, &endpoints(&[b]));
    let agent = world.start_agent(0, &[]);
    world.agents.insert(0, agent);
    world.agents[0].wait_synced(SYNC).unwrap();
    assert_eq!(connections(&port(&world, "web", Proto::Tcp, "IPv4")), expected.of(&[b]));
    let report = load.stop();
    assert_eq!(report.tally.failures(), 0, "{report}");
    assert_eq!(leaks.count(), 0, "{report}");
    assert!(report.tally.answers() > 100, "{report}");
}

#[test]
fn socket_and_nftables_are_counted_together() {
    let world = counting(Mode::Ebpf);
    let pods = [serving(&world.lab, 0, "a"), serving(&world.lab, 1, "b")];
    let [a, b] = pods.each_ref().map(|(pod, _)| pod);
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[a, b]));
    until_led_to(&world, "web", &[a, b], false);
    let (vip, node_port) = (at(vips(10)[0], 80), at(world.lab.node(0).v4(), 30080));
    let outside = world.lab.outside();
    let [mut tcp, mut udp] = [Expected::default(), Expected::default()];
    dial(&client, Proto::Tcp, vip, 13, &mut tcp);
    dial(outside, Proto::Tcp, node_port, 14, &mut tcp);
    dial(&client, Proto::Udp, vip, 12, &mut udp);
    let counted = port(&world, "web", Proto::Tcp, "IPv4");
    let layers: Vec<_> = counted["frontends"].as_array().unwrap().iter().map(|at| &at["layer"]).collect();
    assert_eq!(layers, ["socket", "nftables"], "{}", world.agents[0].log());
    assert_eq!(connections(&counted), tcp.of(&[a, b]));
    let part = |name: &str| {
        counted["backends"]
            .as_array()
            .unwrap()
            .iter()
            .map(|backend| backend[name].as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!(["connectionsAtSocket", "connectionsInNftables"].map(part), [13, 14]);
    assert_eq!(connections(&port(&world, "web", Proto::Udp, "IPv4")), udp.of(&[a, b]));

    world.put("web", &web_ports(), 10, &[]);
    until_led_to(&world, "web", &[], false);
    for (client, to, times) in [(&*client, vip, 2), (&**outside, node_port, 3)] {
        (0..times).for_each(|_| assert_eq!(client.dial(Proto::Tcp, to).unwrap(), Outcome::Refused));
    }
    assert_eq!(port(&world, "web", Proto::Tcp, "IPv4")["refusedConnections"], 5);
    let (_, text) = world.agents[0].status(&["default/web"]).unwrap();
    assert!(text.contains("5 refused: 2 at the socket, 3 in nftables"), "{text}");
}

#[test]
fn the_option_changes_definitions_alone() {
    in_namespace(|| {
        let opened =
            |count_connections| Nftables::open(Settings { count_connections, ..settings() }).unwrap();
        let services = || {
            let everything = reached(3, 4, crate::plans::EVERYTHING);
            vec![service(1, 5), service(2, 0), everything, with_affinity(service(4, 3))]
        };
        let bare = |listing: &str| {
            let counters = |line: &String| line != "counter";
            let lines = sorted(&listing.replace(" counter packets 0 bytes 0", ""));
            lines.into_iter().filter(counters).collect::<Vec<_>>()
        };
        apply(&mut opened(false), services());
        let without = listing();
        assert!(!without.contains("counter"));
        apply(&mut opened(true), services());
        let with = listing();
        let counted =
            "10.96.0.1 . tcp . 80 . 4 counter packets 0 bytes 0 comment \"default/svc-1:http\" : 10.1.0.5";
        assert!(with.contains(counted), "{with}");
        assert_eq!(bare(&with), sorted(&without));
        let again = apply(&mut opened(true), services());
        assert_eq!((again.added, again.removed), (0, 0));
        assert_eq!(sorted(&listing()), sorted(&with));
        apply(&mut opened(false), services());
        assert_eq!(sorted(&listing()), sorted(&without));
    });
}
