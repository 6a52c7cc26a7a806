//! The scenarios: what has to work on every kernel, each in a lab of its own. A scenario that fails panics.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use kube_lane_lab::{Dial, Echo, Flow, Host, Outcome, Pod, Proto, topology};
use kube_lane_tests::agent;
use kube_lane_tests::objects::Port;
use kube_lane_tests::vm::Scenario;
use serde_json::{Value, json};

use crate::sockets;
use crate::world::{World, answered, at, endpoints, serving, vips, web_ports};

/// In the order in which they run.
pub(crate) const ALL: &[Scenario] = &[
    ("services_answer_from_a_pod", services_answer_from_a_pod),
    ("a_service_without_endpoints_refuses", a_service_without_endpoints_refuses),
    ("a_change_of_endpoints_is_followed", a_change_of_endpoints_is_followed),
    ("a_udp_flow_follows_its_service", a_udp_flow_follows_its_service),
    ("affinity_keeps_a_client_at_its_pod", affinity_keeps_a_client_at_its_pod),
    ("policies_and_source_ranges_hold", policies_and_source_ranges_hold),
    ("nft_takes_its_listing_back", nft_takes_its_listing_back),
    ("a_restart_changes_nothing", a_restart_changes_nothing),
    ("connections_are_counted", connections_are_counted),
    ("cleanup_leaves_nothing", cleanup_leaves_nothing),
    ("the_kernel_takes_all_that_check_tries", sockets::the_kernel_takes_all_that_check_tries),
    (
        "sockets_are_led_to_a_pod_and_the_rest_is_nftables",
        sockets::sockets_are_led_to_a_pod_and_the_rest_is_nftables,
    ),
    ("sockets_are_refused_without_endpoints", sockets::sockets_are_refused_without_endpoints),
    (
        "sockets_follow_endpoints_and_outlive_the_agent",
        sockets::sockets_follow_endpoints_and_outlive_the_agent,
    ),
    ("cleanup_unloads_the_programs", sockets::cleanup_unloads_the_programs),
];

/// How long anything may take that has to happen: many times what it does under emulation.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How long a client waits for an answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(3);

/// Asks until the outcome is as wanted.
#[track_caller]
fn until(world: &World, who: &str, mut ask: impl FnMut() -> Outcome, wanted: impl Fn(&Outcome) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let outcome = ask();
        if wanted(&outcome) {
            return;
        }
        assert!(Instant::now() < deadline, "{who}: {outcome}\n{}", world.agents[0].log());
    }
}

/// Dials until the outcome is as wanted.
#[track_caller]
pub(crate) fn dial_until(
    world: &World,
    client: &Host,
    proto: Proto,
    to: SocketAddr,
    wanted: impl Fn(&Outcome) -> bool,
) {
    let ask = || client.dial_with(Dial::new(proto, to).timeout(ANSWER)).unwrap();
    until(world, &format!("{} to {to} by {proto}", client.name()), ask, wanted);
}

pub(crate) fn by(name: &str) -> impl Fn(&Outcome) -> bool {
    move |outcome| outcome.by() == Some(name)
}

fn refused(outcome: &Outcome) -> bool {
    *outcome == Outcome::Refused
}

/// Where Service 10 answers clients of each kind.
pub(crate) fn places() -> [SocketAddr; 4] {
    let [vip4, vip6] = vips(10);
    let [node4, node6] = topology::node_addresses(0);
    [at(vip4, 80), at(vip6, 80), at(node4, 30080), at(node6, 30080)]
}

fn services_answer_from_a_pod() {
    let world = World::new(&[]);
    let (pod, _echoes) = serving(&world.lab, 1, "far");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    for host in [&*client, world.lab.node(0), world.lab.outside()] {
        for to in places() {
            for proto in [Proto::Tcp, Proto::Udp] {
                dial_until(&world, host, proto, to, by(pod.name()));
            }
        }
    }
}

fn a_service_without_endpoints_refuses() {
    let world = World::new(&[]);
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &[]);
    for host in [&*client, world.lab.node(0), world.lab.outside()] {
        for to in places() {
            for proto in [Proto::Tcp, Proto::Udp] {
                dial_until(&world, host, proto, to, refused);
            }
        }
    }
}

fn a_change_of_endpoints_is_followed() {
    let world = World::new(&[]);
    let [(one, _e1), (two, _e2)] = ["one", "two"].map(|name| serving(&world.lab, 1, name));
    let client = world.lab.node(0).add_pod("client").unwrap();
    for pod in [&one, &two, &one] {
        world.put("web", &web_ports(), 10, &endpoints(&[pod]));
        for to in places() {
            dial_until(&world, &client, Proto::Tcp, to, by(pod.name()));
        }
    }
    world.put("web", &web_ports(), 10, &endpoints(&[&one, &two]));
    for pod in [&one, &two] {
        dial_until(&world, &client, Proto::Tcp, places()[0], by(pod.name()));
    }
    world.folder.remove("web").unwrap();
    for to in places() {
        dial_until(&world, &client, Proto::Tcp, to, |outcome| !answered(outcome));
    }
}

fn a_udp_flow_follows_its_service() {
    let world = World::new(&[]);
    let [(one, _e1), (two, _e2)] = ["one", "two"].map(|name| serving(&world.lab, 1, name));
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&one]));
    let mut flows: Vec<(SocketAddr, Flow)> = Vec::new();
    for to in places() {
        dial_until(&world, &client, Proto::Udp, to, by(one.name()));
        flows.push((to, client.flow(Dial::new(Proto::Udp, to).timeout(ANSWER)).unwrap()));
    }
    for pod in [&one, &two, &one] {
        world.put("web", &web_ports(), 10, &endpoints(&[pod]));
        for (to, flow) in &mut flows {
            until(&world, &to.to_string(), || flow.ask(), by(pod.name()));
        }
    }
}

fn affinity_keeps_a_client_at_its_pod() {
    let world = World::new(&[]);
    let pods = ["a", "b", "c", "d"].map(|name| serving(&world.lab, 1, name));
    let all = pods.each_ref().map(|(pod, _)| pod);
    let client = world.lab.node(0).add_pod("client").unwrap();
    let put = |backends: &[_]| {
        let spec = json!({"sessionAffinity": "ClientIP"});
        world.put_spec("web", &web_ports(), 10, &endpoints(backends), spec);
    };
    put(&all);
    for to in places() {
        dial_until(&world, &client, Proto::Tcp, to, answered);
    }
    let first = client.dial(Proto::Tcp, places()[0]).unwrap();
    let first = first.by().unwrap();
    let stays = |pod: &str| {
        // Of IPv4: the client's other address is another client.
        for to in [places()[0], places()[2]] {
            let tally = client.dial_many(Proto::Tcp, to, 10).unwrap();
            assert_eq!(tally.answered.get(pod), Some(&10), "{to}: {tally:?}\n{}", world.agents[0].log());
        }
    };
    stays(first);
    let others: Vec<_> = all.into_iter().filter(|pod| pod.name() != first).collect();
    put(&others);
    dial_until(&world, &client, Proto::Tcp, places()[0], |outcome| {
        outcome.by().is_some_and(|pod| pod != first)
    });
    let second = client.dial(Proto::Tcp, places()[0]).unwrap();
    stays(second.by().unwrap());
}

fn policies_and_source_ranges_hold() {
    let world = World::new(&[]);
    let [near, far] = [(0, "near"), (1, "far")].map(|(node, name)| serving(&world.lab, node, name));
    let [near, far] = [&near.0, &far.0];
    let [vip, _] = topology::vip_cidrs().map(|cidr| cidr.iter().nth(7).unwrap());
    let outside = world.lab.outside();
    let balancer = |policy: &str, ranges: &[&str]| {
        json!({
            "type": "LoadBalancer", "externalTrafficPolicy": policy, "loadBalancerSourceRanges": ranges,
            "status": {"loadBalancer": {"ingress": [{"ip": vip}]}},
        })
    };
    let put = |spec| world.put_spec("web", &web_ports(), 10, &endpoints(&[near, far]), spec);

    put(balancer("Local", &[]));
    dial_until(&world, outside, Proto::Tcp, at(vip, 80), by(near.name()));
    let tally = outside.dial_many(Proto::Tcp, at(vip, 80), 10).unwrap();
    assert_eq!(tally.answered.get(near.name()), Some(&10), "{tally:?}");
    let seen = outside.dial(Proto::Tcp, at(vip, 80)).unwrap().seen();
    assert_eq!(seen.map(|seen| seen.ip()), Some(outside.v4()));

    put(balancer("Cluster", &[]));
    dial_until(&world, outside, Proto::Tcp, at(vip, 80), by(far.name()));
    put(balancer("Cluster", &["198.51.100.0/24"]));
    dial_until(&world, outside, Proto::Tcp, at(vip, 80), |outcome| *outcome == Outcome::TimedOut);
    put(balancer("Cluster", &["192.168.0.0/16"]));
    dial_until(&world, outside, Proto::Tcp, at(vip, 80), answered);
}

/// Runs nft on the first node with this standard input.
fn nft(world: &World, arguments: &'static [&str], input: Option<String>) -> String {
    let file = world.folder.path().join(".ruleset");
    let run = {
        let mut command = Command::new("nft");
        command.args(arguments);
        if let Some(input) = input {
            fs::write(&file, input).unwrap();
            command.arg("-f").arg(file);
        }
        move || command.output()
    };
    let output = world.lab.node(0).run(run).unwrap().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "nft {arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn ruleset(world: &World) -> String {
    nft(world, &["-s", "list", "ruleset"], None)
}

/// Services of several kinds, in force: the pod behind them and an address where it answers.
fn fill(world: &World) -> ((Pod, [Echo; 2]), SocketAddr) {
    let (pod, echoes) = serving(&world.lab, 1, "far");
    world.put("refused", &[Port::new("TCP", 81, 8080)], 11, &[]);
    let spec = json!({"sessionAffinity": "ClientIP", "externalTrafficPolicy": "Local"});
    let ports = web_ports().into_iter().map(|port| port.node_port(30081)).collect::<Vec<_>>();
    world.put_spec("sticky", &ports, 12, &endpoints(&[&pod]), spec);
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let to = at(vips(10)[0], 80);
    dial_until(world, world.lab.node(0), Proto::Tcp, at(vips(11)[0], 81), refused);
    dial_until(world, world.lab.node(0), Proto::Tcp, at(vips(12)[0], 80), answered);
    dial_until(world, world.lab.node(0), Proto::Tcp, to, answered);
    ((pod, echoes), to)
}

fn nft_takes_its_listing_back() {
    let world = World::new(&[]);
    let _serving = fill(&world);
    let listed = ruleset(&world);
    for name in ["default/web", "default/sticky"] {
        assert!(listed.contains(name), "no {name} in\n{listed}");
    }
    nft(&world, &["-c"], Some(format!("flush ruleset\n{listed}")));
}

fn a_restart_changes_nothing() {
    let mut world = World::new(&[]);
    let (_serving, to) = fill(&world);
    let before = ruleset(&world);
    drop(world.agents.remove(0));
    let tally = world.lab.node(0).dial_many(Proto::Tcp, to, 10).unwrap();
    assert_eq!(tally.failures(), 0, "{tally:?}");
    let mut agent = world.start_agent(0, &[]);
    agent.wait_synced(PATIENCE).unwrap();
    for metric in ["kubelane_nftables_elements_added_total", "kubelane_nftables_elements_removed_total"] {
        assert_eq!(agent.metric(metric).unwrap(), 0.0, "{metric}\n{}", agent.log());
    }
    assert_eq!(ruleset(&world), before);
}

/// How many connections by TCP and IPv4 each endpoint of Service 10 had; `None` where they are not counted.
fn counted(world: &World) -> BTreeMap<String, Option<u64>> {
    let (_, text) = world.agents[0].status(&["default/web", "-o=json"]).unwrap();
    let status: Value = serde_json::from_str(&text).unwrap();
    let ports = status["services"][0]["ports"].as_array().unwrap();
    let port = ports.iter().find(|port| port["protocol"] == "TCP" && port["family"] == "IPv4").unwrap();
    let count =
        |backend: &Value| (backend["address"].as_str().unwrap().to_owned(), backend["connections"].as_u64());
    port["backends"].as_array().unwrap().iter().map(count).collect()
}

fn connections_are_counted() {
    let mut world = World::new(&["--count-connections"]);
    let pods = ["a", "b", "c"].map(|name| serving(&world.lab, 1, name));
    let all = pods.each_ref().map(|(pod, _)| pod);
    let client = world.lab.node(0).add_pod("client").unwrap();
    let to = places()[0];
    world.put("web", &web_ports(), 10, &endpoints(&all));
    dial_until(&world, &client, Proto::Tcp, to, answered);
    let mut expected = counted(&world);
    let dial = |expected: &mut BTreeMap<String, Option<u64>>| {
        let tally = client.dial_many(Proto::Tcp, to, 12).unwrap();
        assert_eq!(tally.failures(), 0, "{tally:?}");
        for pod in all {
            let count = tally.answered.get(pod.name()).map_or(0, |count| *count as u64);
            let had = expected.get_mut(&at(pod.v4(), 8080).to_string()).and_then(Option::as_mut);
            had.map_or_else(|| assert_eq!(count, 0), |had| *had += count);
        }
    };
    dial(&mut expected);
    assert_eq!(counted(&world), expected);

    drop(world.agents.remove(0));
    let agent = world.start_agent(0, &["--count-connections"]);
    world.agents.insert(0, agent);
    world.agents[0].wait_synced(PATIENCE).unwrap();
    assert_eq!(counted(&world), expected, "a restart keeps them");
    // One of them moves into its slot.
    world.put("web", &web_ports(), 10, &endpoints(&all[1..]));
    expected.remove(&at(all[0].v4(), 8080).to_string());
    let deadline = Instant::now() + PATIENCE;
    while counted(&world).len() != expected.len() {
        assert!(Instant::now() < deadline, "{}", world.agents[0].log());
    }
    dial(&mut expected);
    assert_eq!(counted(&world), expected);

    let counting = ruleset(&world);
    drop(world.agents.remove(0));
    let mut agent = world.start_agent(0, &[]);
    agent.wait_synced(PATIENCE).unwrap();
    assert!(counting.contains("counter") && !ruleset(&world).contains("counter"), "{counting}");
    let tally = client.dial_many(Proto::Tcp, to, 12).unwrap();
    assert_eq!(tally.failures(), 0, "{tally:?}");
}

fn cleanup_leaves_nothing() {
    let mut world = World::new(&[]);
    let _serving = fill(&world);
    drop(world.agents.remove(0));
    let (success, said) = agent::clean_up(world.lab.node(0), "cleanup").unwrap();
    assert!(success, "{said}");
    assert_eq!(ruleset(&world), "");
}
