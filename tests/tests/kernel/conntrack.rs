//! Stale UDP flows: a client that keeps its socket comes to the right endpoint at once when a Service changes.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use kube_lane_lab::{Dial, Flow, Host, Outcome, Pod, Proto, topology};
use kube_lane_tests::objects::{Port, service, slices};

use super::world::{QUIET, SYNC, World, answered, at, endpoints, serving, until, vips, web_ports};

const DELETED: &str = "kubeproxy_conntrack_reconciler_deleted_entries_total";
const READ: &str = "kubelane_conntrack_read_total";
const LOOKS: &str = "kubeproxy_conntrack_reconciler_sync_duration_seconds_count";

/// A metric of the first node's agent, both families together; 0 before the first look.
fn metric(world: &World, name: &str) -> u64 {
    let of = |family| world.agents[0].metric(&format!("{name}{{ip_family=\"{family}\"}}")).unwrap_or(0.0);
    (of("IPv4") + of("IPv6")) as u64
}

/// A UDP socket connected to this address, which it keeps.
fn udp(client: &Host, to: SocketAddr) -> Flow {
    client.flow(Dial::new(Proto::Udp, to).timeout(QUIET)).unwrap()
}

/// Asks on one socket until the outcome is as wanted, at most a few seconds; the last outcome where it never is.
fn ask_until(flow: &mut Flow, wanted: impl Fn(&Outcome) -> bool) -> Outcome {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let outcome = flow.ask();
        if wanted(&outcome) || Instant::now() > deadline {
            return outcome;
        }
    }
}

fn by(name: &str) -> impl Fn(&Outcome) -> bool {
    move |outcome| outcome.by() == Some(name)
}

/// The cluster IPs of Service 10 and the first node's NodePort addresses, each with its port.
fn places() -> Vec<SocketAddr> {
    let node = topology::node_addresses(0);
    vips(10).into_iter().map(|vip| at(vip, 80)).chain(node.map(|ip| at(ip, 30080))).collect()
}

/// A socket of each client to each place; all answer.
fn flows(clients: &[&Host]) -> Vec<(String, Flow)> {
    let mut flows = Vec::new();
    for client in clients {
        for place in places() {
            let who = format!("{} to {place}", client.name());
            assert!(answered(&until(client, Proto::Udp, place, answered)), "{who}");
            let mut flow = udp(client, place);
            assert!(answered(&ask_until(&mut flow, answered)), "{who}");
            flows.push((who, flow));
        }
    }
    flows
}

#[test]
fn a_client_follows_the_server_pod_as_it_cycles() {
    let world = World::new(&[]);
    let lab = &world.lab;
    let pods = [serving(lab, 0, "a"), serving(lab, 1, "b"), serving(lab, 0, "c")];
    let client = lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pods[0].0]));
    let mut flows = flows(&[&client, lab.node(0), lab.outside()]);
    for (pod, _) in [&pods[1], &pods[2], &pods[0]] {
        world.put("web", &web_ports(), 10, &endpoints(&[pod]));
        for (who, flow) in &mut flows {
            let outcome = ask_until(flow, by(pod.name()));
            assert_eq!(outcome.by(), Some(pod.name()), "{who}: {outcome}\n{}", world.agents[0].log());
        }
    }
}

#[test]
fn a_client_of_a_local_policy_follows_the_pods_of_its_node() {
    let world = World::new(&[]);
    let lab = &world.lab;
    let pods = [serving(lab, 0, "a"), serving(lab, 1, "far"), serving(lab, 0, "c")];
    let [a, far, c] = pods.each_ref().map(|(pod, _)| pod);
    let client = lab.node(0).add_pod("client").unwrap();
    let put = |backends: &[&Pod]| {
        let mut local = service("web", &vips(10), &web_ports());
        local["spec"]["internalTrafficPolicy"] = "Local".into();
        let mut objects = vec![local];
        objects.extend(slices("web", &web_ports(), &endpoints(backends)));
        world.folder.put("web", &objects).unwrap();
    };
    put(&[a, far]);
    let mut flows: Vec<_> = vips(10).into_iter().map(|vip| udp(&client, at(vip, 80))).collect();
    for (backends, pod) in [([a, far], a), ([c, far], c), ([far, a], a)] {
        put(&backends);
        for flow in &mut flows {
            let outcome = ask_until(flow, by(pod.name()));
            assert_eq!(outcome.by(), Some(pod.name()), "{outcome}\n{}", world.agents[0].log());
        }
    }
}

#[test]
fn sctp_follows_where_it_is_asked_to() {
    let world = World::new(&["--conntrack-clean-sctp"]);
    let lab = &world.lab;
    let pods = ["node0-a", "node0-b"].map(|name| lab.node(0).add_pod(name).unwrap());
    let _echoes = pods.each_ref().map(|pod| pod.serve(Proto::Sctp, 9999).unwrap());
    let client = lab.node(0).add_pod("client").unwrap();
    let ports = [Port::new("SCTP", 99, 9999)];
    world.put("sctp", &ports, 12, &endpoints(&[&pods[0]]));
    let flow = |vip| {
        assert!(answered(&until(&client, Proto::Sctp, at(vip, 99), answered)));
        client.flow(Dial::new(Proto::Sctp, at(vip, 99)).timeout(QUIET)).unwrap()
    };
    let mut flows = vips(12).map(flow);
    for pod in [&pods[0], &pods[1], &pods[0]] {
        world.put("sctp", &ports, 12, &endpoints(&[pod]));
        for flow in &mut flows {
            let outcome = ask_until(flow, by(pod.name()));
            assert_eq!(outcome.by(), Some(pod.name()), "{outcome}\n{}", world.agents[0].log());
        }
    }
}

#[test]
fn a_client_that_was_there_before_the_service_is_served() {
    let world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 1, "late");
    let mut flows: Vec<_> =
        topology::node_addresses(0).into_iter().map(|ip| udp(world.lab.outside(), at(ip, 30080))).collect();
    for flow in &mut flows {
        assert!(!answered(&flow.ask()));
    }
    world.put("web", &web_ports(), 10, &[]);
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    for flow in &mut flows {
        let outcome = ask_until(flow, answered);
        assert!(answered(&outcome), "{outcome}\n{}", world.agents[0].log());
    }
}

#[test]
fn without_endpoints_and_without_the_service_flows_end() {
    let world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 1, "only");
    let client = world.lab.node(0).add_pod("client").unwrap();
    for deleted in [false, true] {
        world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
        let mut flows = flows(&[&client, world.lab.outside()]);
        if deleted {
            world.folder.remove("web").unwrap();
        } else {
            world.put("web", &web_ports(), 10, &[]);
        }
        for (who, flow) in &mut flows {
            let outcome = ask_until(flow, |outcome| !answered(outcome));
            assert!(!answered(&outcome), "{who}: {outcome}\n{}", world.agents[0].log());
        }
    }
}

#[test]
fn another_target_port_takes_the_flows_along() {
    let world = World::new(&[]);
    let (pod, _old) = serving(&world.lab, 1, "pod");
    let new = pod.serve(Proto::Udp, 8081).unwrap();
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let mut flows = flows(&[&client, world.lab.outside()]);
    let ports = [Port::new("UDP", 80, 8081).node_port(30080)];
    world.put("web", &ports, 10, &endpoints(&[&pod]));
    for (who, flow) in &mut flows {
        let before = new.count();
        ask_until(flow, |_| new.count() > before);
        assert!(new.count() > before, "{who}\n{}", world.agents[0].log());
    }
}

#[test]
fn a_flow_that_is_still_right_is_left_alone() {
    let world = World::new(&[]);
    let lab = &world.lab;
    let pods = [serving(lab, 0, "a"), serving(lab, 1, "b"), serving(lab, 1, "c")];
    let [a, b, c] = pods.each_ref().map(|(pod, _)| pod);
    let client = lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[a]));
    let mut flows = flows(&[&client, lab.node(0), lab.outside()]);
    let before = (metric(&world, DELETED), metric(&world, LOOKS));
    for backends in [&[a, b][..], &[a, b, c], &[a, c], &[a]] {
        world.put("web", &web_ports(), 10, &endpoints(backends));
        for _ in 0..20 {
            for (who, flow) in &mut flows {
                assert_eq!(flow.ask().by(), Some(a.name()), "{who}");
            }
        }
    }
    let deadline = Instant::now() + SYNC;
    while metric(&world, LOOKS) < before.1 + 4 {
        assert!(Instant::now() < deadline, "nobody looked\n{}", world.agents[0].log());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(metric(&world, DELETED), before.0);
}

/// Sends one datagram from each of two ports to each port of a host, where nobody listens: that many tracked flows.
fn flood(from: &Host, to: IpAddr) {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    from.run(move || {
        for _ in 0..2 {
            let socket = UdpSocket::bind((any, 0)).unwrap();
            for port in 1..=60_000 {
                // The error that an earlier datagram met is no news.
                while socket.send_to(b"x", (to, port)).is_err() {}
            }
        }
    })
    .unwrap();
}

#[test]
fn among_a_hundred_thousand_flows_only_the_matching_ones_are_copied() {
    let world = World::new(&[]);
    let lab = &world.lab;
    let pods = [serving(lab, 0, "a"), serving(lab, 1, "b")];
    let client = lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pods[0].0]));
    let mut flows = flows(&[&client]);
    flood(lab.outside(), topology::node_addresses(0)[0]);
    let count = || fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
    let tracked: u64 = lab.node(0).run(count).unwrap().unwrap().trim().parse().unwrap();
    assert!(tracked >= 100_000, "only {tracked} flows");
    let before = (metric(&world, READ), metric(&world, DELETED));
    world.put("web", &web_ports(), 10, &endpoints(&[&pods[1].0]));
    for (who, flow) in &mut flows {
        let outcome = ask_until(flow, by(pods[1].0.name()));
        assert_eq!(outcome.by(), Some(pods[1].0.name()), "{who}: {outcome}\n{}", world.agents[0].log());
    }
    let (read, deleted) = (metric(&world, READ) - before.0, metric(&world, DELETED) - before.1);
    assert!(deleted >= 4, "{deleted} deleted");
    assert!(read < 100, "{read} flows were copied to the agent, of {tracked}");
}

#[test]
fn a_service_that_went_while_no_agent_ran_takes_its_flows_along() {
    let mut world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 1, "only");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let mut flows = flows(&[&client, world.lab.outside()]);
    drop(world.agents.remove(0));
    world.folder.remove("web").unwrap();
    assert!(flows.iter_mut().all(|(_, flow)| answered(&flow.ask())));
    let mut agent = world.start_agent(0, &[]);
    agent.wait_synced(SYNC).unwrap();
    for (who, flow) in &mut flows {
        let outcome = ask_until(flow, |outcome| !answered(outcome));
        assert!(!answered(&outcome), "{who}: {outcome}\n{}", agent.log());
    }
}
