//! The socket layer through changes: of endpoints, of agents, of what others attach, of room.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use kube_lane_lab::{Dial, Flow, Host, Load, Outcome, Pod, Proto};
use kube_lane_tests::agent;
use kube_lane_tests::objects::{Endpoint, Port};
use nix::sys::signal::Signal;
use serde_json::json;

use super::bare::attached;
use super::foreign::Foreign;
use super::world::{
    Mode, QUIET, SYNC, World, answered, answered_in, at, endpoints, meet, serving, until, until_met, vip,
    vips, web_ports,
};

/// The least pause that keeps the other processor for what is tested.
const PAUSE: Duration = Duration::from_micros(200);

#[test]
fn no_connect_fails_while_agents_come_and_go() {
    let mut world = World::in_mode(Mode::Ebpf);
    let pods = [serving(&world.lab, 0, "a"), serving(&world.lab, 1, "b")];
    let hosts = [&pods[0].0, &pods[1].0];
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&hosts));
    let sticky = json!({"type": "ClusterIP", "sessionAffinity": "ClientIP"});
    world.put_spec("sticky", &[Port::new("TCP", 80, 8080)], 11, &endpoints(&hosts), sticky);
    for number in [10, 11] {
        let met = until_met(&client, vip(number), answered_in(Mode::Ebpf));
        assert!(answered_in(Mode::Ebpf)(&met), "{met:?}\n{}", world.agents[0].log());
    }
    let remembered = meet(&client, vip(11)).outcome.by().unwrap().to_owned();

    let load = Load::start(&client, Dial::new(Proto::Tcp, vip(10)), 2, PAUSE).unwrap();
    for round in 0..6 {
        let mut agent = world.agents.remove(0);
        let signal = if round % 2 == 0 { Signal::SIGKILL } else { Signal::SIGTERM };
        agent.process().signal(signal).unwrap();
        assert!(agent.process().wait_timeout(SYNC).unwrap().is_some());
        drop(agent);
        let met = meet(&client, vip(10));
        assert!(answered_in(Mode::Ebpf)(&met), "without an agent: {met:?}");
        let agent = world.start_agent(0, &[]);
        world.agents.insert(0, agent);
        world.agents[0].wait_synced(SYNC).unwrap();
        let met = meet(&client, vip(11));
        assert!(met.at_socket, "{met:?}\n{}", world.agents[0].log());
        assert_eq!(met.outcome.by(), Some(&*remembered));
    }
    let report = load.stop();
    assert_eq!(report.tally.failures(), 0, "{report}");
    assert_eq!(report.tally.answered.len(), 2, "{report}");
}

#[test]
fn a_changing_service_is_always_answered_by_one_of_its_own() {
    let world = World::in_mode(Mode::Ebpf);
    let own: Vec<_> = ["a", "b", "c"].iter().map(|name| serving(&world.lab, 0, name)).collect();
    let other: Vec<_> = ["x", "y", "z"].iter().map(|name| serving(&world.lab, 1, name)).collect();
    let hosts = |pods: &'_ [(Pod, _)]| pods.iter().map(|(pod, _)| pod.name().to_owned()).collect::<Vec<_>>();
    let client = world.lab.node(0).add_pod("client").unwrap();
    let put = |number: u8, pods: &[&Pod]| {
        world.put(&format!("service-{number}"), &[Port::new("TCP", 80, 8080)], number, &endpoints(pods));
    };
    let subset = |pods: &'_ [(Pod, _)], turn: usize| {
        let kept: Vec<usize> = (0..3).filter(|index| (turn % 7 + 1) & (1 << index) != 0).collect();
        put(
            if pods[0].0.name().starts_with("node0") { 10 } else { 11 },
            &kept.iter().map(|index| &pods[*index].0).collect::<Vec<_>>(),
        );
    };
    subset(&own, 6);
    subset(&other, 6);
    for number in [10, 11] {
        assert!(until_met(&client, vip(number), answered_in(Mode::Ebpf)).at_socket);
    }
    let load = |number| Load::start(&client, Dial::new(Proto::Tcp, vip(number)), 1, Duration::ZERO).unwrap();
    let loads = [load(10), load(11)];
    let begun = Instant::now();
    let mut turn = 0;
    while begun.elapsed() < Duration::from_secs(4) {
        subset(&own, turn);
        subset(&other, turn + 3);
        // A third Service takes what the others gave back.
        if turn % 2 == 0 {
            put(12, &[&own[turn % 3].0, &other[turn % 3].0]);
        } else {
            world.folder.remove("service-12").unwrap();
        }
        turn += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    for (load, pods) in loads.into_iter().zip([hosts(&own), hosts(&other)]) {
        let report = load.stop();
        assert_eq!(report.tally.failures(), 0, "{turn} changes: {report}");
        assert!(report.tally.answered.keys().all(|by| pods.contains(by)), "{turn} changes: {report}");
        assert_eq!(report.tally.answered.len(), 3, "{turn} changes: {report}");
    }
}

#[test]
fn a_pool_keeps_its_connections_to_an_endpoint_that_terminates() {
    for mode in Mode::ALL {
        let world = World::in_mode(mode);
        let pods = [serving(&world.lab, 0, "leaves"), serving(&world.lab, 1, "stays")];
        let client = world.lab.node(0).add_pod("client").unwrap();
        world.put("web", &web_ports(), 10, &endpoints(&[&pods[0].0, &pods[1].0]));
        assert!(answered_in(mode)(&until_met(&client, vip(10), answered_in(mode))));
        let open = |_| {
            let mut flow = client.flow(Dial::new(Proto::Tcp, vip(10)).timeout(QUIET)).unwrap();
            let by = flow.ask().by().unwrap().to_owned();
            (flow, by)
        };
        let mut pool: Vec<(Flow, String)> = (0..24).map(open).collect();
        let still = |pool: &mut Vec<(Flow, String)>| {
            for (flow, by) in pool {
                assert_eq!(flow.ask().by(), Some(&**by), "{mode:?}");
            }
        };
        let conditions = json!({"ready": false, "serving": true, "terminating": true});
        let leaving = |endpoint: Endpoint| {
            let leaves = endpoint.node == "node0";
            if leaves { Endpoint { conditions: conditions.clone(), ..endpoint } } else { endpoint }
        };
        let terminating = endpoints(&[&pods[0].0, &pods[1].0]).into_iter().map(leaving).collect::<Vec<_>>();
        world.put("web", &web_ports(), 10, &terminating);
        let only = |client: &Host| {
            let deadline = Instant::now() + SYNC;
            while client.dial_many(Proto::Tcp, vip(10), 20).unwrap().answered.len() > 1 {
                assert!(Instant::now() < deadline, "{mode:?}: who leaves is still picked");
            }
        };
        only(&client);
        still(&mut pool);
        world.put("web", &web_ports(), 10, &endpoints(&[&pods[1].0]));
        only(&client);
        still(&mut pool);
    }
}

#[test]
fn a_connected_udp_client_recovers_when_its_backend_goes() {
    for (mode, udp) in [(Mode::Nftables, false), (Mode::Ebpf, false), (Mode::Ebpf, true)] {
        let world = World::configured(mode, |_| json!({"kubeLane": {"socketLB": {"udp": udp}}}));
        let (first, echoes) = serving(&world.lab, 0, "first");
        let (second, _second) = serving(&world.lab, 1, "second");
        let client = world.lab.node(0).add_pod("client").unwrap();
        world.put("dns", &web_ports(), 10, &endpoints(&[&first]));
        let mut flows: Vec<_> = vips(10)
            .map(|ip| {
                assert!(answered(&until(&client, Proto::Udp, at(ip, 80), answered)));
                client.flow(Dial::new(Proto::Udp, at(ip, 80)).timeout(QUIET)).unwrap()
            })
            .into();
        for flow in &mut flows {
            assert_eq!(flow.ask().by(), Some(first.name()));
        }
        world.put("dns", &web_ports(), 10, &endpoints(&[&second]));
        drop(echoes);
        drop(first);
        for flow in &mut flows {
            let deadline = Instant::now() + Duration::from_secs(5);
            let mut met = flow.ask();
            while met.by() != Some(second.name()) && Instant::now() < deadline {
                met = flow.ask();
            }
            assert_eq!(met.by(), Some(second.name()), "{mode:?} {udp}: {met}");
        }
    }
}

#[test]
fn what_others_attached_stays_and_works() {
    let mut world = World::in_mode(Mode::Ebpf);
    let (pod, _echoes) = serving(&world.lab, 1, "server");
    let _forbidden = pod.serve(Proto::Tcp, 81).unwrap();
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put(
        "web",
        &[Port::new("TCP", 80, 8080), Port { name: "other".into(), ..Port::new("TCP", 81, 81) }],
        10,
        &endpoints(&[&pod]),
    );
    let other = at(vips(10)[0], 81);
    let works = |world: &World, what: &str| {
        let met = until_met(&client, vip(10), answered_in(Mode::Ebpf));
        assert!(answered_in(Mode::Ebpf)(&met), "{what}: {met:?}\n{}", world.agents[0].log());
        assert!(matches!(meet(&client, other).outcome, Outcome::Failed(_)), "{what}");
    };
    assert!(answered(&until_met(&client, other, answered_in(Mode::Ebpf)).outcome));
    // Attached behind ours, and after a restart before what that attaches.
    let _foreign = Foreign::forbid(81, world.lab.node(0).cgroup());
    works(&world, "attached");
    drop(world.agents.remove(0));
    let agent = world.start_agent(0, &[]);
    world.agents.insert(0, agent);
    world.agents[0].wait_synced(SYNC).unwrap();
    works(&world, "after a restart");

    drop(world.agents.remove(0));
    let node = world.lab.node(0);
    assert!(attached(node.cgroup()).len() > 1, "{:?}", attached(node.cgroup()));
    let (success, said) = agent::clean_up(node, "cleanup").unwrap();
    assert!(success, "{said}");
    assert_eq!(attached(node.cgroup()).len(), 1, "only the foreign one stays: {:?}", attached(node.cgroup()));
    assert!(!node.bpf_root().exists() || node.bpf_root().read_dir().unwrap().next().is_none());
    assert!(matches!(meet(&client, other).outcome, Outcome::Failed(_)));
}

#[test]
fn cleanup_knows_the_configuration() {
    let mut world = World::in_mode(Mode::Ebpf);
    let (pod, _echoes) = serving(&world.lab, 0, "server");
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let met = until_met(&pod, vip(10), answered_in(Mode::Ebpf));
    assert!(answered_in(Mode::Ebpf)(&met), "{met:?}\n{}", world.agents[0].log());
    drop(world.agents.remove(0));

    let node = world.lab.node(0);
    let elsewhere = node.bpf_root().join("elsewhere");
    for (way, root, found) in [
        ("--cleanup", &elsewhere, false),
        ("cleanup", &elsewhere, false),
        ("cleanup", &node.bpf_root().to_owned(), true),
    ] {
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "kubeLane": {"bpfRoot": root},
        });
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), config.to_string()).unwrap();
        let mut command = Command::new(agent::binary().unwrap());
        command.arg(way).arg("--config").arg(file.path());
        let output = node.run(move || command.output()).unwrap().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        // The mark says that there is one.
        assert_eq!(output.status.success(), found, "{said}");
        assert_eq!(said.contains("removed the socket layer"), found, "{said}");
        assert_eq!(attached(node.cgroup()).is_empty(), found, "{said}");
    }
}

#[test]
fn node_ports_follow_the_addresses_of_the_node() {
    let world = World::configured(
        Mode::Ebpf,
        |_| json!({"kubeLane": {"socketLB": {"external": true}}, "nodePortAddresses": ["192.168.77.0/24"]}),
    );
    let (pod, _echoes) = serving(&world.lab, 1, "server");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let node = world.lab.node(0);
    let met = until_met(&client, at(node.v4(), 30080), answered_in(Mode::Ebpf));
    assert!(answered_in(Mode::Ebpf)(&met), "{met:?}\n{}", world.agents[0].log());
    let new = "192.168.77.50".parse().unwrap();
    node.add_address(new).unwrap();
    let met = until_met(&client, at(new, 30080), answered_in(Mode::Ebpf));
    assert!(answered_in(Mode::Ebpf)(&met), "{met:?}\n{}", world.agents[0].log());
}

#[test]
fn what_the_maps_have_no_room_for_is_named_and_left_to_nftables() {
    // Each has a port of either family.
    let world = World::configured(Mode::Ebpf, |_| json!({"kubeLane": {"socketLB": {"maxServicePorts": 4}}}));
    let (pod, _echoes) = serving(&world.lab, 1, "server");
    let client = world.lab.node(0).add_pod("client").unwrap();
    for number in 10..13 {
        let ports = [Port::new("TCP", 80, 8080)];
        world.put(&format!("service-{number}"), &ports, number, &endpoints(&[&pod]));
        assert!(answered(&until(&client, Proto::Tcp, vip(number), answered)));
    }
    let at_socket = |number| until_met(&client, vip(number), |met| met.at_socket).at_socket;
    assert!(at_socket(10) && at_socket(11));
    let met = meet(&client, vip(12));
    assert!(answered_in(Mode::Nftables)(&met), "{met:?}");
    assert!(world.agents[0].log().contains("default/service-12"), "{}", world.agents[0].log());
    // Room comes.
    world.folder.remove("service-10").unwrap();
    assert!(at_socket(12), "{}", world.agents[0].log());
}

#[test]
fn clients_that_cannot_be_remembered_are_said_and_left_to_nftables() {
    let world =
        World::configured(Mode::Ebpf, |_| json!({"kubeLane": {"socketLB": {"maxAffinityClients": 1}}}));
    let pods = [serving(&world.lab, 0, "a"), serving(&world.lab, 1, "b")];
    let [first, second] = ["first", "second"].map(|name| world.lab.node(0).add_pod(name).unwrap());
    let sticky = json!({"type": "ClusterIP", "sessionAffinity": "ClientIP"});
    let hosts = [&pods[0].0, &pods[1].0];
    world.put_spec("sticky", &[Port::new("TCP", 80, 8080)], 10, &endpoints(&hosts), sticky);
    assert!(until_met(&first, vip(10), answered_in(Mode::Ebpf)).at_socket);
    let met = meet(&second, vip(10));
    assert!(answered_in(Mode::Nftables)(&met), "{met:?}");
    // nftables remembers as well.
    (0..10).for_each(|_| assert_eq!(meet(&second, vip(10)).outcome.by(), met.outcome.by()));
    assert!(meet(&first, vip(10)).at_socket);
    let deadline = Instant::now() + SYNC;
    while !world.agents[0].status(&[]).unwrap().1.contains("maxAffinityClients are remembered") {
        assert!(Instant::now() < deadline, "{}", world.agents[0].status(&[]).unwrap().1);
    }
    let log = world.agents[0].log();
    assert_eq!(log.matches("maxAffinityClients are remembered").count(), 1, "{log}");
}
