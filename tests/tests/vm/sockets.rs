//! The scenarios of the socket layer (`--proxy-mode ebpf`). That a client's `getpeername` says what it dialled, the lab
//! checks of every connection.

use std::fs;
use std::process::Command;
use std::time::Instant;

use kube_lane_lab::{Dial, Host, Met, Outcome, Proto};
use kube_lane_tests::agent;
use nix::sys::signal::Signal;

use crate::scenarios::{ANSWER, PATIENCE, by, dial_until, places};
use crate::world::{Mode, SYNC, World, at, endpoints, serving, vips, web_ports};

/// Dials the cluster IPs of Service 10 until what is met is as wanted.
#[track_caller]
fn meet_until(world: &World, client: &Host, wanted: impl Fn(&Met) -> bool) {
    for vip in vips(10) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let dial = Dial::new(Proto::Tcp, at(vip, 80)).timeout(ANSWER);
            let met = client.run(move || dial.meet()).unwrap();
            if wanted(&met) {
                break;
            }
            let who = client.name();
            assert!(Instant::now() < deadline, "{who} to {vip}: {met:?}\n{}", world.agents[0].log());
        }
    }
}

/// Led to this pod before a packet left.
fn led_to(pod: &str) -> impl Fn(&Met) -> bool {
    move |met| met.at_socket && met.outcome.by() == Some(pod)
}

pub(crate) fn the_kernel_takes_all_that_check_tries() {
    // As kubelet makes it.
    fs::create_dir_all("/sys/fs/cgroup/kubepods").unwrap();
    let mut check = Command::new(agent::binary().unwrap());
    let output = check.args(["check", "--proxy-mode", "ebpf"]).output().unwrap();
    let table = String::from_utf8_lossy(&output.stdout);
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !table.contains("  NO "), "{table}{words}");
    println!("{table}");
}

pub(crate) fn sockets_are_led_to_a_pod_and_the_rest_is_nftables() {
    let world = World::in_mode(Mode::Ebpf);
    let (pod, _echoes) = serving(&world.lab, 1, "far");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    for host in [&*client, world.lab.node(0)] {
        meet_until(&world, host, led_to(pod.name()));
    }
    for to in places() {
        dial_until(&world, &client, Proto::Udp, to, by(pod.name()));
        dial_until(&world, world.lab.outside(), Proto::Tcp, to, by(pod.name()));
    }
}

pub(crate) fn sockets_are_refused_without_endpoints() {
    let world = World::in_mode(Mode::Ebpf);
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &[]);
    for host in [&*client, world.lab.node(0)] {
        meet_until(&world, host, |met| met.at_socket && met.outcome == Outcome::Refused);
    }
}

pub(crate) fn sockets_follow_endpoints_and_outlive_the_agent() {
    let mut world = World::in_mode(Mode::Ebpf);
    let [(one, _e1), (two, _e2)] = ["one", "two"].map(|name| serving(&world.lab, 1, name));
    let client = world.lab.node(0).add_pod("client").unwrap();
    for pod in [&one, &two] {
        world.put("web", &web_ports(), 10, &endpoints(&[pod]));
        meet_until(&world, &client, led_to(pod.name()));
    }
    let dial = Dial::new(Proto::Tcp, at(vips(10)[0], 80)).timeout(ANSWER);
    let is_led_to_two = || led_to(two.name())(&client.run(move || dial.meet()).unwrap());
    world.agents[0].process().signal(Signal::SIGKILL).unwrap();
    drop(world.agents.remove(0));
    assert!(is_led_to_two(), "without an agent");
    let agent = world.start_agent(0, &[]);
    world.agents.insert(0, agent);
    world.agents[0].wait_synced(SYNC).unwrap();
    assert!(is_led_to_two(), "{}", world.agents[0].log());
    world.put("web", &web_ports(), 10, &endpoints(&[&one]));
    meet_until(&world, &client, led_to(one.name()));
}

pub(crate) fn cleanup_unloads_the_programs() {
    let mut world = World::in_mode(Mode::Ebpf);
    let (pod, _echoes) = serving(&world.lab, 1, "far");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    meet_until(&world, &client, led_to(pod.name()));
    drop(world.agents.remove(0));
    let node = world.lab.node(0);
    let (success, said) = agent::clean_up(node, "cleanup").unwrap();
    assert!(success, "{said}");
    let dial = Dial::new(Proto::Tcp, at(vips(10)[0], 80)).timeout(ANSWER);
    let met = client.run(move || dial.meet()).unwrap();
    assert!(!met.at_socket && met.outcome.by().is_none(), "{met:?}");
    let pins = fs::read_dir(node.bpf_root()).map_or(0, Iterator::count);
    assert_eq!(pins, 0, "below {}", node.bpf_root().display());
}
