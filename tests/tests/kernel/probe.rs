//! `kube-lane probe`: whom it asks, and what it says where there is nobody to ask.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;

use kube_lane_lab::Host;
use kube_lane_tests::agent::binary;
use kube_lane_tests::objects::Folder;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::world::{SYNC, World};

/// Whether a probe succeeds, and its words; `unshared`: asked from a PID namespace of its own, as a container has.
fn probe(host: &Host, what: &str, unshared: bool) -> (bool, String) {
    let mut command = Command::new(if unshared { "unshare".into() } else { binary().unwrap() });
    if unshared {
        command.args(["--pid", "--fork"]).arg(binary().unwrap());
    }
    command.args(["probe", what]);
    let output = host.run(move || command.output()).unwrap().unwrap();
    assert!(output.stdout.is_empty(), "{output:?}");
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

/// Fails unless a probe fails with these words.
#[track_caller]
fn fails(host: &Host, what: &str, unshared: bool, words: &str) {
    let (succeeds, said) = probe(host, what, unshared);
    assert!(!succeeds && said.contains(words), "{what}: {said}");
}

#[test]
fn probes_ask_the_agent_of_their_own_container_and_nobody_else() {
    let mut world = World::new(&[]);
    for what in ["startup", "live", "ready"] {
        assert_eq!(probe(world.lab.node(0), what, false), (true, String::new()));
        // An agent of another pod, or one that systemd runs, says nothing about this container's.
        fails(world.lab.node(0), what, true, "another PID namespace");
        fails(world.lab.outside(), what, false, "no kube-lane runs here");
    }
    world.agents[1].process().signal(Signal::SIGSTOP).unwrap();
    fails(world.lab.node(1), "live", false, "has not answered");

    // A folder that is not there yet: what it may hold is not programmed.
    world.agents.clear();
    let folder = Folder::new().unwrap();
    let late = folder.path().join("late");
    let mut agent = world.start_agent(0, &["--manifests", late.to_str().unwrap()]);
    let deadline = std::time::Instant::now() + SYNC;
    while !probe(world.lab.node(0), "live", false).0 {
        assert!(std::time::Instant::now() < deadline, "{}", agent.log());
    }
    fails(world.lab.node(0), "ready", false, "the first sync is not complete");
    std::fs::create_dir(late).unwrap();
    agent.wait_synced(SYNC).unwrap();
    assert_eq!(probe(world.lab.node(0), "ready", false), (true, String::new()));
}

#[test]
fn ports_that_another_program_has_decide_nothing_and_are_taken_over_when_they_come_free() {
    let mut world = World::new(&[]);
    world.agents.clear();
    let node = world.lab.node(0);
    let take = |port| node.run(move || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))).unwrap().unwrap();
    let taken = [10256, 10249].map(take);
    let agent = world.start_agent(0, &[]);
    let wait = |what: &str, is_so: &dyn Fn() -> bool| {
        let deadline = std::time::Instant::now() + SYNC;
        while !is_so() {
            assert!(std::time::Instant::now() < deadline, "{what}\n{}", agent.log());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    };
    wait("it is ready", &|| probe(node, "ready", false).0);
    let awaited = || {
        let status: Value = serde_json::from_str(&agent.status(&["-o=json"]).unwrap().1).unwrap();
        status["agent"]["awaitedPorts"].as_array().unwrap().len()
    };
    wait("both ports are awaited", &|| awaited() == 2);
    drop(taken);
    wait("health is served", &|| agent.healthz().is_ok_and(|(code, _)| code == 200));
    wait("metrics are served", &|| agent.metric("kubelane_awaited_ports").is_ok_and(|ports| ports == 0.0));
    assert_eq!(awaited(), 0);
    let log = agent.log();
    for server in ["health", "metrics"] {
        for words in [format!("cannot serve {server}"), format!("serving {server}: the address is free now")]
        {
            assert_eq!(log.lines().filter(|line| line.contains(&words)).count(), 1, "{words}: {log}");
        }
    }
}
