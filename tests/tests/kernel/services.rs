//! Services with real packets: the agent on a node, its objects in a manifest folder, clients in pods, on hosts and
//! outside.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use kube_lane_lab::{Dial, Host, Lab, Load, Outcome, Pod, Proto, topology};
use kube_lane_tests::agent::{self, Agent};
use kube_lane_tests::objects::Port;
use nix::sys::signal::Signal;
use serde_json::json;

use super::world::{Leaks, QUIET, SYNC, World, answered, at, endpoints, serving, until, vips, web_ports};

#[test]
fn everybody_reaches_a_service_and_is_seen_as_kube_proxy_would_have_it() {
    let world = World::new(&[]);
    let lab = &world.lab;
    let (near, _e1) = serving(lab, 0, "near");
    let (far, _e2) = serving(lab, 1, "far");
    let client = lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&near, &far]));
    let clients: [&Host; 3] = [&client, lab.node(0), lab.outside()];
    for proto in [Proto::Tcp, Proto::Udp] {
        for (family, vip) in vips(10).into_iter().enumerate() {
            let node_ip = topology::node_addresses(0)[family];
            for host in clients {
                assert!(
                    answered(&until(host, proto, at(vip, 80), answered)),
                    "{proto} {} {vip}",
                    host.name()
                );
                let tally = host.dial_many(proto, at(vip, 80), 40).unwrap();
                assert_eq!(
                    (tally.failures(), tally.answered.len()),
                    (0, 2),
                    "{proto} {}: {tally:?}",
                    host.name()
                );
                let tally = host.dial_many(proto, at(node_ip, 30080), 40).unwrap();
                assert_eq!(
                    (tally.failures(), tally.answered.len()),
                    (0, 2),
                    "{proto} {}: {tally:?}",
                    host.name()
                );
            }
            // Through a cluster IP a pod is seen as itself, everybody else as the node that translated.
            let seen = |host: &Host, to| host.dial(proto, to).unwrap().seen().unwrap().ip();
            let pod_ip = [client.v4(), client.v6()][family];
            assert_eq!(seen(&client, at(vip, 80)), pod_ip);
            for _ in 0..8 {
                assert_eq!(seen(lab.outside(), at(vip, 80)), node_ip);
                assert_eq!(seen(lab.outside(), at(node_ip, 30080)), node_ip);
                assert_eq!(seen(&client, at(node_ip, 30080)), node_ip);
            }
        }
    }
}

#[test]
fn masquerade_all_hides_pods_too() {
    let world = World::new(&["--masquerade-all"]);
    let lab = &world.lab;
    let (near, _e) = serving(lab, 0, "near");
    let client = lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&near]));
    for (family, vip) in vips(10).into_iter().enumerate() {
        let outcome = until(&client, Proto::Tcp, at(vip, 80), answered);
        assert_eq!(
            outcome.seen().map(|seen| seen.ip()),
            Some(topology::node_addresses(0)[family]),
            "{outcome}"
        );
    }
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    let world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 0, "self");
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    for proto in [Proto::Tcp, Proto::Udp] {
        for (family, vip) in vips(10).into_iter().enumerate() {
            let node_ip = topology::node_addresses(0)[family];
            for to in [at(vip, 80), at(node_ip, 30080)] {
                let outcome = until(&pod, proto, to, answered);
                assert_eq!(outcome.by(), Some(pod.name()), "{proto} {to}: {outcome}");
                assert_eq!(outcome.seen().map(|seen| seen.ip()), Some(node_ip), "{proto} {to}");
            }
        }
    }
}

#[test]
fn without_endpoints_clients_are_refused_at_once() {
    let world = World::new(&[]);
    let lab = &world.lab;
    let client = lab.node(0).add_pod("client").unwrap();
    world.put("empty", &web_ports(), 11, &[]);
    for proto in [Proto::Tcp, Proto::Udp] {
        for (family, vip) in vips(11).into_iter().enumerate() {
            let node_ip = topology::node_addresses(0)[family];
            for host in [&*client as &Host, lab.node(0), lab.outside()] {
                let refused = |outcome: &Outcome| *outcome == Outcome::Refused;
                assert_eq!(
                    until(host, proto, at(vip, 80), refused),
                    Outcome::Refused,
                    "{proto} {}",
                    host.name()
                );
                for to in [at(vip, 80), at(node_ip, 30080)] {
                    let begun = Instant::now();
                    let tally = host.dial_many(proto, to, 20).unwrap();
                    assert_eq!(tally.refused, 20, "{proto} {} {to}: {tally:?}", host.name());
                    assert!(begun.elapsed() < Duration::from_secs(5), "refused, but late");
                }
                // Another port of a cluster IP is refused, an address that no Service has is dropped.
                assert_eq!(
                    host.dial(proto, at(vip, 81)).unwrap(),
                    Outcome::Refused,
                    "{proto} {}",
                    host.name()
                );
                let unused = Dial::new(proto, at(vips(200)[family], 80)).timeout(QUIET);
                let outcome = host.dial_with(unused).unwrap();
                // The kernel tells a local sender of datagrams that its packet was dropped.
                let told = Outcome::Failed("Operation not permitted (os error 1)".into());
                assert!(
                    outcome == Outcome::TimedOut || outcome == told,
                    "{proto} {}: {outcome}",
                    host.name()
                );
            }
        }
    }
}

#[test]
fn sctp_is_translated_like_the_others() {
    let world = World::new(&[]);
    let pod = world.lab.node(1).add_pod("node1-sctp").unwrap();
    let _echo = pod.serve(Proto::Sctp, 9999).unwrap();
    let client = world.lab.node(0).add_pod("client").unwrap();
    let ports = [Port::new("SCTP", 99, 9999).node_port(30099)];
    world.put("sctp", &ports, 12, &endpoints(&[&pod]));
    for (family, vip) in vips(12).into_iter().enumerate() {
        for to in [at(vip, 99), at(topology::node_addresses(0)[family], 30099)] {
            let outcome = until(&client, Proto::Sctp, to, answered);
            assert_eq!(outcome.by(), Some(pod.name()), "{to}: {outcome}");
        }
    }
}

#[test]
fn nothing_slips_past_while_the_endpoints_swing() {
    let world = World::new(&[]);
    let lab = &world.lab;
    let pods: Vec<_> = (0..9).map(|i| serving(lab, i % 2, &format!("p{i}"))).collect();
    let client = lab.node(0).add_pod("client").unwrap();
    let pods: Vec<_> = pods.iter().map(|(pod, _)| pod).collect();
    world.put("web", &web_ports(), 10, &endpoints(&pods));
    for vip in vips(10) {
        assert!(answered(&until(&client, Proto::Tcp, at(vip, 80), answered)));
    }
    let leaks = Leaks::watch(lab);
    // Forwarded (a pod) and local (the node itself), both families, TCP and UDP.
    let mut loads = Vec::new();
    for host in [&*client as &Host, lab.node(0)] {
        for (vip, proto) in vips(10).into_iter().zip([Proto::Udp, Proto::Tcp]) {
            let dial = Dial::new(proto, at(vip, 80)).timeout(Duration::from_secs(2));
            let load = Load::start(host, dial, 1, Duration::ZERO).unwrap();
            loads.push((format!("{proto} {}", host.name()), load));
        }
    }
    // Those that leave still serve: the flows of one that does not are stale, and end with a question unanswered.
    let first_ready = |n: usize| {
        let mut leaving = endpoints(&pods[n..]);
        for endpoint in &mut leaving {
            endpoint.conditions = json!({"ready": false, "serving": true, "terminating": true});
        }
        [endpoints(&pods[..n]), leaving].concat()
    };
    for (more, fewer) in [(3, 2), (5, 4), (2, 1), (9, 8)] {
        for _ in 0..60 {
            for n in [more, fewer] {
                world.put("web", &web_ports(), 10, &first_ready(n));
                std::thread::sleep(Duration::from_millis(3));
            }
        }
    }
    let mut dialled = 0;
    for (host, load) in loads {
        let report = load.stop();
        assert_eq!(report.tally.failures(), 0, "{host}: {:?}", report.tally);
        dialled += report.tally.answers();
    }
    assert!(dialled > 2000, "only {dialled} connections: too few to prove anything");
    assert_eq!(leaks.count(), 0, "of {dialled} connections");
    let changes = world.agents[0].metric("kubeproxy_sync_proxy_rules_duration_seconds_count").unwrap();
    assert!(changes > 100.0, "only {changes} commits");
}

#[test]
fn a_killed_agent_is_not_missed_and_its_successor_rewrites_nothing() {
    let mut world = World::new(&[]);
    let (near, _e1) = serving(&world.lab, 0, "near");
    let (far, _e2) = serving(&world.lab, 1, "far");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&near, &far]));
    let vip = at(vips(10)[0], 80);
    assert!(answered(&until(&client, Proto::Tcp, vip, answered)));
    let load = Load::start(&client, Dial::new(Proto::Tcp, vip), 2, Duration::ZERO).unwrap();
    for _ in 0..3 {
        let mut old = world.agents.remove(0);
        old.process().signal(Signal::SIGKILL).unwrap();
        old.process().wait_timeout(SYNC).unwrap().unwrap();
        let mut next = world.start_agent(0, &[]);
        next.wait_synced(SYNC).unwrap();
        assert_eq!(next.metric("kubelane_nftables_elements_added_total").unwrap(), 0.0);
        assert_eq!(next.metric("kubelane_nftables_elements_removed_total").unwrap(), 0.0);
        world.agents.insert(0, next);
    }
    let report = load.stop();
    assert_eq!(report.tally.failures(), 0, "{:?}", report.tally);
    assert!(report.tally.answers() > 500, "{:?}", report.tally);
}

#[test]
fn sigterm_leaves_the_rules_in_place() {
    let mut world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 1, "far");
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let vip = at(vips(10)[0], 80);
    assert!(answered(&until(world.lab.node(0), Proto::Tcp, vip, answered)));
    let mut agent = world.agents.remove(0);
    agent.process().signal(Signal::SIGTERM).unwrap();
    let status = agent.process().wait_timeout(SYNC).unwrap().expect("it ends");
    assert!(status.success(), "{status}\n{}", agent.log());
    let tally = world.lab.node(0).dial_many(Proto::Tcp, vip, 20).unwrap();
    assert_eq!(tally.failures(), 0, "{tally:?}");
}

#[test]
fn a_flushed_ruleset_comes_back() {
    let world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 1, "far");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let vip = at(vips(10)[1], 80);
    assert!(answered(&until(&client, Proto::Tcp, vip, answered)));
    let flush = || std::process::Command::new("nft").args(["flush", "ruleset"]).status();
    for _ in 0..2 {
        assert!(world.lab.node(0).run(flush).unwrap().unwrap().success());
        let outcome = until(&client, Proto::Tcp, vip, answered);
        assert!(answered(&outcome), "{outcome}\n{}", world.agents[0].log());
    }
}

#[test]
fn thirty_malformed_objects_are_named_and_the_good_ones_served() {
    let world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 1, "far");
    world.put("web", &web_ports()[..1], 150, &endpoints(&[&pod]));
    let vip = at(vips(150)[0], 80);
    assert!(answered(&until(world.lab.node(0), Proto::Tcp, vip, answered)));
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/malformed");
    for file in std::fs::read_dir(fixtures).unwrap() {
        let file = file.unwrap().path();
        std::fs::copy(&file, world.folder.path().join(file.file_name().unwrap())).unwrap();
    }
    let deadline = Instant::now() + SYNC;
    let named = || {
        world.agents[0].log().lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).count()
    };
    while named() < 30 {
        assert!(Instant::now() < deadline, "only {} named:\n{}", named(), world.agents[0].log());
        std::thread::sleep(Duration::from_millis(20));
    }
    world.put("after", &[Port::new("TCP", 80, 8080)], 151, &endpoints(&[&pod]));
    for number in [150, 151] {
        let outcome = until(world.lab.node(0), Proto::Tcp, at(vips(number)[0], 80), answered);
        assert!(answered(&outcome), "{number}: {outcome}\n{}", world.agents[0].log());
    }
}

#[test]
fn a_restart_with_a_broken_file_takes_nothing_away() {
    let mut world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 1, "far");
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let vip = at(vips(10)[0], 80);
    assert!(answered(&until(world.lab.node(0), Proto::Tcp, vip, answered)));
    drop(world.agents.remove(0));
    std::fs::write(world.folder.path().join("web.json"), "{").unwrap();
    let mut agent = world.start_agent(0, &[]);
    let serves = |agent: &Agent| agent.healthz().is_ok_and(|(code, _)| code == 503);
    let deadline = Instant::now() + SYNC;
    while !(agent.log().contains("what was in force before stays") && serves(&agent)) {
        assert!(Instant::now() < deadline, "{}", agent.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    let tally = world.lab.node(0).dial_many(Proto::Tcp, vip, 20).unwrap();
    assert_eq!(tally.failures(), 0, "{tally:?}");
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    agent.wait_synced(SYNC).unwrap();
    assert!(answered(&until(world.lab.node(0), Proto::Tcp, vip, answered)));
    assert_eq!(agent.metric("kubelane_nftables_elements_removed_total").unwrap(), 0.0);
}

#[test]
fn beside_an_agent_no_other_starts_and_nothing_is_cleaned_up() {
    let mut world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 1, "far");
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let vip = at(vips(10)[0], 80);
    assert!(answered(&until(world.lab.node(0), Proto::Tcp, vip, answered)));
    let named = format!("another kube-lane runs on this node (pid {})", world.agents[0].process().id());
    let mut second = world.start_agent(0, &["--healthz-port=0", "--metrics-port=0"]);
    let status = second.process().wait_timeout(SYNC).unwrap().expect("it ends");
    assert!(!status.success() && second.log().contains(&named), "{}", second.log());

    for way in ["cleanup", "--cleanup"] {
        let (success, said) = agent::clean_up(world.lab.node(0), way).unwrap();
        assert!(!success && said.contains(&named), "{said}");
    }
    assert!(answered(&world.lab.node(0).dial(Proto::Tcp, vip).unwrap()));
    drop(world.agents.remove(0));
    let (success, said) = agent::clean_up(world.lab.node(0), "cleanup").unwrap();
    assert!(success, "{said}");
    assert!(!answered(&world.lab.node(0).dial_with(Dial::new(Proto::Tcp, vip).timeout(QUIET)).unwrap()));
}

#[test]
fn a_node_is_prepared_without_an_agent() {
    let lab = Lab::builder().build().unwrap();
    let binary = agent::binary().unwrap();
    let prepare = move || {
        let arguments = ["--init-only", "--manifests=/tmp", "--conntrack-tcp-timeout-close-wait=90s"];
        let output = std::process::Command::new(binary).args(arguments).output()?;
        let close_wait =
            std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait")?;
        std::io::Result::Ok((output, close_wait))
    };
    let (output, close_wait) = lab.node(0).run(prepare).unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(close_wait.trim(), "90");
}

#[test]
fn affinity_outlives_a_killed_agent() {
    let mut world = World::new(&[]);
    let pods: Vec<_> = (0..4).map(|i| serving(&world.lab, i / 2, &format!("pod{i}"))).collect();
    let hosts: Vec<&Pod> = pods.iter().map(|(pod, _)| pod).collect();
    let put = |world: &World, seconds: u32, pods: &[&Pod]| {
        let spec = json!({
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}},
        });
        world.put_spec("web", &web_ports(), 10, &endpoints(pods), spec);
    };
    put(&world, 600, &hosts);
    let client = world.lab.node(0).add_pod("client").unwrap();
    let vip = at(vips(10)[0], 80);
    assert!(answered(&until(&client, Proto::Tcp, vip, answered)));
    let first = until(&client, Proto::Tcp, vip, answered).by().unwrap().to_owned();
    let stays = |by: &str| {
        let tally = client.dial_many(Proto::Tcp, vip, 20).unwrap();
        assert_eq!((tally.failures(), tally.answered.get(by)), (0, Some(&20)), "{tally:?}");
    };
    stays(&first);
    world.agents[0].process().signal(Signal::SIGKILL).unwrap();
    drop(world.agents.remove(0));
    stays(&first);
    put(&world, 700, &hosts);
    let mut agent = world.start_agent(0, &[]);
    agent.wait_synced(SYNC).unwrap();
    stays(&first);
    let others: Vec<&Pod> = hosts.iter().copied().filter(|pod| pod.name() != first).collect();
    put(&world, 700, &others);
    let moved = |outcome: &Outcome| outcome.by().is_some_and(|by| by != first);
    let second = until(&client, Proto::Tcp, vip, moved);
    assert!(moved(&second), "{second}\n{}", agent.log());
    stays(second.by().unwrap());
}
