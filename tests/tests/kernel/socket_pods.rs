//! Who is a pod at the socket: containers of another runtime are none, and nftables masquerades them.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use kube_lane_lab::{Dial, Host, Met, Outcome, Proto};
use serde_json::json;

use super::world::{
    Mode, QUIET, SYNC, World, answered_in, at, endpoints, serving, until_met, vip, vips, web_ports,
};

/// The address that the server saw.
fn seen(met: &Met) -> Option<IpAddr> {
    match &met.outcome {
        Outcome::Answered { seen, .. } => Some(seen.ip()),
        _ => None,
    }
}

/// What a client meets that dials from a cgroup.
fn meet_in(cgroup: &Path, client: &Host, to: SocketAddr) -> Met {
    let threads = cgroup.join("cgroup.threads");
    let dial = Dial::new(Proto::Tcp, to).timeout(QUIET);
    let body = move || {
        fs::write(threads, "0").unwrap();
        dial.meet()
    };
    client.run(body).unwrap()
}

#[test]
fn a_container_that_is_no_pod_is_masqueraded() {
    for external in [false, true] {
        let world =
            World::configured(Mode::Ebpf, |_| json!({"kubeLane": {"socketLB": {"external": external}}}));
        let node = world.lab.node(0);
        let (pod, _echoes) = serving(&world.lab, 1, "server");
        let client = node.add_pod("client").unwrap();
        let container = node.add_container("container").unwrap();
        world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
        for (family, vip) in vips(10).into_iter().enumerate() {
            let met = until_met(&client, at(vip, 80), answered_in(Mode::Ebpf));
            assert!(answered_in(Mode::Ebpf)(&met), "{met:?}\n{}", world.agents[0].log());
            let own = node.addresses()[family];
            for to in [at(vip, 80), at(own, 30080)] {
                let met = until_met(&container, to, answered_in(Mode::Nftables));
                assert_eq!((seen(&met), met.at_socket), (Some(own), false), "{to}: {met:?}");
            }
        }
    }
}

#[test]
fn where_nobody_is_masqueraded_all_containers_are_answered() {
    let world = World::configured(
        Mode::Ebpf,
        |_| json!({"clusterCIDR": "", "kubeLane": {"socketLB": {"podCgroups": ["none"]}}}),
    );
    let (pod, _echoes) = serving(&world.lab, 0, "server");
    let container = world.lab.node(0).add_container("container").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let met = until_met(&container, vip(10), answered_in(Mode::Ebpf));
    assert_eq!((seen(&met), met.at_socket), (Some(container.v4()), true), "{}", world.agents[0].log());
    assert!(!world.agents[0].log().contains("podCgroups"), "{}", world.agents[0].log());
}

#[test]
fn where_there_is_no_cgroup_of_pods_it_is_said_until_there_is() {
    let world = World::configured(
        Mode::Ebpf,
        |_| json!({"kubeLane": {"socketLB": {"podCgroups": ["/nowhere", "kubepods/later"]}}}),
    );
    let node = world.lab.node(0);
    let (pod, _echoes) = serving(&world.lab, 1, "server");
    let client = node.add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let log = || world.agents[0].log();
    let told = || world.agents[0].status(&[]).unwrap().1;
    let wait = |what: &str, is_so: &dyn Fn() -> bool| {
        let deadline = Instant::now() + SYNC;
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}: {}\n{}", told(), log());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let met = until_met(&client, vip(10), answered_in(Mode::Nftables));
    assert!(answered_in(Mode::Nftables)(&met), "{met:?}");
    // The host's own processes are known without.
    assert!(until_met(node, vip(10), answered_in(Mode::Ebpf)).at_socket);
    for words in ["nowhere, kubepods/later", "nftables alone answers pods", "--socket-lb-pod-cgroups"] {
        wait(words, &|| told().contains(words) && log().contains(words));
    }
    let answered = || world.agents[0].status(&["--all"]).unwrap().1;
    assert!(answered().contains("[socket for host processes; nftables for pods (none of"), "{}", answered());

    let later = client.cgroup().join("later");
    for turn in 0..2 {
        fs::create_dir(&later).unwrap();
        fs::write(later.join("cgroup.type"), "threaded").unwrap();
        wait("it is there", &|| !told().contains("nftables alone answers pods"));
        assert!(answered().contains("[socket for pods and host processes]"), "{}", answered());
        wait("answered", &|| meet_in(&later, &client, vip(10)).at_socket);
        assert!(!meet_in(client.cgroup(), &client, vip(10)).at_socket);
        let again = log().matches("pods are answered at the socket").count();
        assert_eq!(again, turn + 1, "{}", log());
        fs::remove_dir(&later).unwrap();
        wait("it has gone", &|| told().contains("nftables alone answers pods"));
    }
}
