//! `kube-lane status`: what it says of a running agent, and that what it says of the layers is true.

use std::process::Command;
use std::time::{Duration, Instant};

use kube_lane_lab::{Host, Outcome, Proto};
use kube_lane_tests::agent::binary;
use serde_json::Value;

use super::world::{SYNC, World, answered, at, endpoints, serving, until, vips, web_ports};

/// The one frontend of a kind over TCP and IPv4.
fn frontend(status: &Value, kind: &str) -> Value {
    let port = port(status);
    port["frontends"].as_array().unwrap().iter().find(|frontend| frontend["kind"] == kind).unwrap().clone()
}

/// The Service's port over TCP and IPv4.
fn port(status: &Value) -> Value {
    let ports = status["services"][0]["ports"].as_array().unwrap();
    ports.iter().find(|port| port["protocol"] == "TCP" && port["family"] == "IPv4").unwrap().clone()
}

fn json(world: &World, arguments: &[&str]) -> Value {
    let (known, text) = world.agents[0].status(&[arguments, &["-o=json"]].concat()).unwrap();
    assert!(known, "{text}");
    serde_json::from_str(&text).unwrap()
}

#[test]
fn the_agent_tells_what_it_has_programmed() {
    let world = World::new(&[]);
    let (pod, _echoes) = serving(&world.lab, 0, "a");
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let client = world.lab.node(0).add_pod("client").unwrap();
    assert!(answered(&until(&client, Proto::Tcp, at(vips(10)[0], 80), answered)));

    let agent = &world.agents[0];
    let (known, text) = agent.status(&["default/web"]).unwrap();
    let expected = [
        format!("    ClusterIP {}", at(vips(10)[0], 80)),
        format!("    to {} on this node", at(pod.v4(), 8080)),
    ];
    assert!(known && expected.iter().all(|line| text.lines().any(|printed| printed == line)), "{text}");
    let (known, text) = agent.status(&["default/web", "default/none"]).unwrap();
    assert!(!known && text.contains("service default/web"), "{text}");
    assert!(!agent.status(&["web"]).unwrap().0, "no namespace");

    let metric = |name: &str| agent.metric(&format!("kubeproxy_sync_{name}")).unwrap();
    for kind in ["endpoint", "service"] {
        assert!(metric(&format!("proxy_rules_{kind}_changes_total")) > 0.0);
        assert_eq!(metric(&format!("proxy_rules_{kind}_changes_pending")), 0.0);
    }
    let [queued, synced] =
        ["last_queued", "last"].map(|of| metric(&format!("proxy_rules_{of}_timestamp_seconds")));
    assert!(0.0 < queued && queued <= synced, "{queued} {synced}");
    let [all, full, partial] =
        ["", "full_", "partial_"].map(|of| metric(&format!("{of}proxy_rules_duration_seconds_count")));
    assert!(full > 0.0 && partial > 0.0 && full + partial == all, "{all} {full} {partial}");

    let status = json(&world, &["--all"]);
    assert_eq!((&status["agent"]["mode"], &status["agent"]["synced"]), (&"nftables".into(), &true.into()));
    assert_eq!(
        (&status["agent"]["services"], &status["services"][0]["service"]),
        (&1.into(), &"default/web".into())
    );
    assert_eq!(json(&world, &[])["services"], Value::Array(Vec::new()));

    let words = nobody(world.lab.outside());
    assert!(words.contains("no kube-lane runs here, and nothing of it is in the kernel"), "{words}");
    let mut world = world;
    world.agents.clear();
    let words = nobody(world.lab.node(0));
    for part in ["no kube-lane runs here", "its nftables tables", "kube-lane cleanup"] {
        assert!(words.contains(part), "{words}");
    }
}

#[test]
fn it_names_manifests_that_are_not_read() {
    let mut world = World::new(&[]);
    let file = world.folder.path().join("web.json");
    let metric = |world: &World, name: &str| world.agents[0].metric(name).unwrap();
    let is_bad = |world: &World| metric(world, "kubelane_manifests_unread") > 0.0;
    let wait = |what: &str, is_so: &dyn Fn() -> bool| {
        let deadline = Instant::now() + SYNC;
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    world.put("web", &web_ports(), 10, &[]);
    wait("it is read", &|| json(&world, &[])["agent"]["services"] == 1);
    std::fs::write(&file, "\n{]\n").unwrap();
    wait("it is counted", &|| is_bad(&world));
    let words = format!("  {}:2:", file.display());
    let told = |world: &World| world.agents[0].status(&[]).unwrap().1;
    assert!(told(&world).contains(&words) && !told(&world).contains("says 503"), "{}", told(&world));

    // Another run never saw it good.
    world.agents.clear();
    let agent = world.start_agent(0, &[]);
    world.agents.push(agent);
    wait("the metrics are served", &|| world.agents[0].metric("kubelane_manifests_unread").is_ok());
    wait("it is counted again", &|| is_bad(&world));
    assert!(told(&world).contains(&words) && told(&world).contains("/healthz says 503"), "{}", told(&world));
    assert_eq!(world.agents[0].healthz().unwrap().0, 503);
    world.put("web", &web_ports(), 10, &[]);
    world.agents[0].wait_synced(SYNC).unwrap();
    let status = json(&world, &[]);
    let manifests = serde_json::json!({"complete": true, "problems": []});
    assert_eq!((&status["agent"]["manifests"], is_bad(&world)), (&manifests, false));
}

/// What `status` says where no agent runs.
fn nobody(host: &Host) -> String {
    let mut command = Command::new(binary().unwrap());
    command.arg("status");
    let output = host.run(move || command.output()).unwrap().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn it_names_the_layer_that_answers_and_what_that_counted() {
    let mut world = World::new(&[]);
    world.agents.clear();
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let node = world.lab.node(0);
    let [cgroup, pins] = [node.cgroup(), node.bpf_root()].map(text);
    let roots = ["--cgroup-root", cgroup.as_str(), "--bpf-root", pins.as_str()];
    let agent = world.start_agent(0, &[&roots[..], &["--proxy-mode=ebpf"]].concat());
    world.agents.push(agent);
    world.agents[0].wait_synced(SYNC).unwrap();
    let (pod, _echoes) = serving(&world.lab, 0, "a");
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let client = world.lab.node(0).add_pod("client").unwrap();
    let vip = at(vips(10)[0], 80);
    assert!(answered(&until(&client, Proto::Tcp, vip, answered)));

    let status = json(&world, &["default/web"]);
    assert_eq!(status["agent"]["mode"], "ebpf", "{}", world.agents[0].log());
    let [cluster_ip, node_port] = ["ClusterIP", "NodePort"].map(|kind| frontend(&status, kind));
    assert_eq!([&cluster_ip["layer"], &node_port["layer"]], ["socket", "nftables"]);
    assert_eq!(node_port["answeredBy"], "nftables (socketLB.external is off)");
    let connections = |status: &Value| port(status)["backends"][0]["connections"].as_u64().unwrap();
    let before = connections(&status);
    (0..3).for_each(|_| assert!(answered(&client.dial(Proto::Tcp, vip).unwrap())));
    assert_eq!(connections(&json(&world, &["default/web"])), before + 3);

    world.put("web", &web_ports(), 10, &[]);
    let refused = |outcome: &Outcome| matches!(outcome, Outcome::Refused);
    assert!(refused(&until(&client, Proto::Tcp, vip, refused)));
    assert!(port(&json(&world, &["default/web"]))["refusedConnections"].as_u64().unwrap() > 0);

    // An agent that does not want it takes it away: nobody would follow changes there.
    world.agents.clear();
    let agent = world.start_agent(0, &roots);
    world.agents.push(agent);
    world.agents[0].wait_synced(SYNC).unwrap();
    assert_eq!(json(&world, &[])["agent"]["mode"], "nftables");
    assert!(!std::path::Path::new(&pins).join("v1").exists());
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    assert!(answered(&until(&client, Proto::Tcp, vip, answered)));
}
