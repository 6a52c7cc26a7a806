//! The whole chain: objects in a real API server, the agent as users run it, clients and pods that meet.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::Duration;

use kube_lane_lab::{Dial, Echo, Host, Lab, Load, Outcome, Pod, Proto};
use kube_lane_tests::agent::Agent;
use kube_lane_tests::cluster::Cluster;
use kube_lane_tests::objects::{Endpoint, Folder, Port, node, service, slice, slices};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::wait::{LIMIT, answered, logged, until};

const TARGET: u16 = 8080;

/// A pod that answers on [`TARGET`], TCP and UDP.
struct Server {
    pod: Pod,
    _echoes: [Echo; 2],
}

impl Server {
    fn on(node: &kube_lane_lab::Node, name: &str) -> Self {
        let pod = node.add_pod(name).unwrap();
        let echoes = [Proto::Tcp, Proto::Udp].map(|proto| pod.serve(proto, TARGET).unwrap());
        Self { pod, _echoes: echoes }
    }

    fn endpoints(&self, node: &str) -> [Endpoint; 2] {
        [self.pod.v4(), self.pod.v6()].map(|address| Endpoint::ready(address, node))
    }
}

fn http() -> Vec<Port> {
    vec![Port::new("TCP", 80, TARGET)]
}

/// The IPv4 Service `name` at `vip`, port 80, and the slice that leads it to `server`.
fn lead(name: &str, vip: &str, server: &Server) -> [Value; 2] {
    let [v4, _] = server.endpoints("node0");
    [service(name, &[ip(vip)], &http()), slice(name, "v4", false, &http(), &[v4])]
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(address: &str, port: u16) -> SocketAddr {
    (ip(address), port).into()
}

fn apply(cluster: &Cluster, objects: impl IntoIterator<Item = Value>) {
    objects.into_iter().for_each(|object| cluster.apply(&object).unwrap());
}

/// Starts the agent on the first node and waits until it is in step.
fn synced(cluster: &Cluster) -> Agent {
    let mut agent = cluster.start_agent(cluster.lab().node(0), &[]).unwrap();
    agent.wait_synced(LIMIT).unwrap();
    agent
}

fn lines_with(agent: &Agent, words: &str) -> usize {
    agent.log().lines().filter(|line| line.contains(words)).count()
}

#[test]
fn what_the_api_says_is_what_clients_meet() {
    let cluster = Cluster::start(Lab::builder().nodes(2).build().unwrap()).unwrap();
    let lab = cluster.lab();
    let (near, far) = (Server::on(lab.node(0), "near"), Server::on(lab.node(1), "far"));
    let pod = lab.node(0).add_pod("client").unwrap();
    cluster.apply(&node("node0", &[lab.node(0).v4(), lab.node(0).v6()])).unwrap();
    let _agent = synced(&cluster);

    let ports =
        [Port::new("TCP", 80, TARGET).node_port(30080), Port::new("UDP", 53, TARGET).node_port(30053)];
    let vips = [ip("10.96.1.1"), ip("fd00:10:96::101")];
    let echo = service("echo", &vips, &ports);
    let lead_to = |servers: &[&Server]| {
        let endpoints: Vec<_> = servers.iter().flat_map(|server| server.endpoints("node0")).collect();
        for (v6, suffix) in [(false, "v4"), (true, "v6")] {
            let of_family: Vec<_> = endpoints.iter().filter(|e| e.address.is_ipv6() == v6).cloned().collect();
            cluster.apply(&slice("echo", suffix, v6, &ports, &of_family)).unwrap();
        }
    };
    cluster.apply(&echo).unwrap();
    lead_to(&[&near]);

    // Every client, every way in.
    let clients: [&Host; 3] = [&pod, lab.node(0), lab.outside()];
    let ways = |proto, port, node_port| {
        let vips = vips.map(|vip| SocketAddr::new(vip, port));
        let nodes = [lab.node(0).v4(), lab.node(0).v6()].map(|node| SocketAddr::new(node, node_port));
        vips.into_iter().chain(nodes).map(move |to| (proto, to))
    };
    let ways: Vec<_> = ways(Proto::Tcp, 80, 30080).chain(ways(Proto::Udp, 53, 30053)).collect();
    let all_answered = |by| {
        for (proto, to) in &ways {
            clients.iter().for_each(|client| answered(client, *proto, *to, by));
        }
    };
    all_answered(Some("near"));

    lead_to(&[&far]);
    all_answered(Some("far"));
    lead_to(&[&near, &far]);
    let (proto, to) = ways[0];
    until(|| {
        let tally = pod.dial_many(proto, to, 20).unwrap();
        (tally.answered.len() == 2).then_some(()).ok_or_else(|| format!("{tally:?}"))
    });
    lead_to(&[]);
    until(|| match pod.dial(proto, to).unwrap() {
        Outcome::Refused => Ok(()),
        other => Err(other.to_string()),
    });
    lead_to(&[&near]);
    all_answered(Some("near"));
    cluster.delete(&echo).unwrap();
    all_answered(None);
}

#[test]
fn node_ports_are_where_the_node_says_it_is() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    let (node0, outside) = (cluster.lab().node(0), cluster.lab().outside());
    let server = Server::on(node0, "server");
    let second = ip("192.168.77.51");
    node0.add_address(second).unwrap();
    let mut agent = cluster.start_agent(node0, &[]).unwrap();
    agent.wait_synced(LIMIT).unwrap();

    let ports = [Port::new("TCP", 80, TARGET).node_port(30080)];
    apply(&cluster, [service("echo", &[ip("10.96.1.1")], &ports)]);
    apply(&cluster, slices("echo", &ports, &server.endpoints("node0")[..1]));
    let node_port = |address| SocketAddr::new(address, 30080);
    // No Node yet: wherever this host is.
    answered(outside, Proto::Tcp, node_port(node0.v4()), Some("server"));
    answered(outside, Proto::Tcp, node_port(second), Some("server"));

    for (here, not_here) in [(node0.v4(), second), (second, node0.v4())] {
        cluster.apply(&node("node0", &[here])).unwrap();
        answered(outside, Proto::Tcp, node_port(not_here), None);
        answered(outside, Proto::Tcp, node_port(here), Some("server"));
    }
    cluster.delete(&node("node0", &[])).unwrap();
    answered(outside, Proto::Tcp, node_port(node0.v4()), Some("server"));
}

#[test]
fn an_outage_of_the_api_server_breaks_no_connection() {
    let mut cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    let node0 = cluster.lab().node(0);
    let (one, other) = (Server::on(node0, "one"), Server::on(node0, "other"));
    let client = node0.add_pod("client").unwrap();
    apply(&cluster, lead("echo", "10.96.1.1", &one));
    let agent = synced(&cluster);
    let echo = at("10.96.1.1", 80);
    answered(&client, Proto::Tcp, echo, Some("one"));

    let load = Load::start(&client, Dial::new(Proto::Tcp, echo), 2, Duration::from_millis(2)).unwrap();
    cluster.stop_apiserver();
    logged(&agent, &["the API server cannot be watched"]);
    cluster.restart_apiserver().unwrap();
    apply(&cluster, lead("echo", "10.96.1.1", &other));
    answered(&client, Proto::Tcp, echo, Some("other"));
    logged(&agent, &["the API server is watched again"]);
    let report = load.stop();
    assert_eq!(report.tally.failures(), 0, "{report}");
    assert_eq!(lines_with(&agent, "the API server cannot be watched"), 1, "{}", agent.log());
    assert_eq!(lines_with(&agent, "the API server is watched again"), 1, "{}", agent.log());
}

#[test]
fn static_manifests_neither_wait_for_the_api_server_nor_give_way_to_it() {
    let mut cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    let node0 = cluster.lab().node(0);
    let (api, file) = (Server::on(node0, "api"), Server::on(node0, "file"));
    let client = node0.add_pod("client").unwrap();
    let by = |vip, by| answered(&client, Proto::Tcp, at(vip, 80), by);
    apply(&cluster, lead("of-api", "10.96.1.1", &api));
    apply(&cluster, lead("of-both", "10.96.1.2", &api));
    let manifests = Folder::new().unwrap();
    manifests.put("of-file", &lead("of-file", "10.96.1.3", &file)).unwrap();
    manifests.put("of-both", &lead("of-both", "10.96.1.2", &file)).unwrap();

    cluster.stop_apiserver();
    let mut agent = cluster.start_agent(cluster.lab().node(0), &["--manifests", &manifests.arg()]).unwrap();
    by("10.96.1.3", Some("file"));
    by("10.96.1.2", Some("file"));
    by("10.96.1.1", None);
    assert_eq!(agent.healthz().unwrap().0, 503, "half of it is still to come");

    cluster.restart_apiserver().unwrap();
    agent.wait_synced(LIMIT).unwrap();
    by("10.96.1.1", Some("api"));
    by("10.96.1.2", Some("file"));
    manifests.remove("of-both").unwrap();
    by("10.96.1.2", Some("api"));
    manifests.put("of-both", &lead("of-both", "10.96.1.2", &file)).unwrap();
    by("10.96.1.2", Some("file"));
    by("10.96.1.3", Some("file"));
}

#[test]
fn an_agent_may_leave_and_come_back_unnoticed() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    let node0 = cluster.lab().node(0);
    let server = Server::on(node0, "server");
    let client = node0.add_pod("client").unwrap();
    cluster.apply(&node("node0", &[node0.v4(), node0.v6()])).unwrap();
    let ports = [Port::new("TCP", 80, TARGET).node_port(30080)];
    for number in 1..=20 {
        // Kubernetes 1.33 and earlier give only the first 65,536 addresses of a range.
        let vips = [ip(&format!("10.96.1.{number}")), ip(&format!("fd00:10:96::1{number:02}"))];
        let name = format!("echo-{number}");
        // One with a NodePort, one without endpoints.
        let ports = if number == 1 { &ports[..] } else { &http()[..] };
        apply(&cluster, [service(&name, &vips, ports)]);
        let endpoints = if number == 2 { vec![] } else { server.endpoints("node0").to_vec() };
        apply(&cluster, slices(&name, ports, &endpoints));
    }
    let mut agent = synced(&cluster);
    let echo = at("10.96.1.1", 80);
    answered(&client, Proto::Tcp, echo, Some("server"));

    let load = Load::start(&client, Dial::new(Proto::Tcp, echo), 2, Duration::from_millis(2)).unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
        agent.process().signal(signal).unwrap();
        let status = agent.process().wait_timeout(LIMIT).unwrap().unwrap();
        if signal != Signal::SIGKILL {
            assert_eq!(status.code(), Some(0), "{}", agent.log());
        }
        sleep(Duration::from_millis(100));
        agent = synced(&cluster);
        for metric in ["added", "removed"] {
            let name = format!("kubelane_nftables_elements_{metric}_total");
            assert_eq!(agent.metric(&name).unwrap(), 0.0, "after {signal}: {}", agent.log());
        }
    }
    let report = load.stop();
    assert_eq!(report.tally.failures(), 0, "{report}");
    let answered_by: BTreeSet<_> = report.tally.answered.keys().collect();
    assert_eq!(answered_by.len(), 1, "{report}");
}

#[test]
fn credentials_come_from_a_token_file_and_may_be_put_right_later() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    let node0 = cluster.lab().node(0);
    let server = Server::on(node0, "server");
    apply(&cluster, lead("echo", "10.96.1.1", &server));

    let dir = tempfile::tempdir().unwrap();
    let (kubeconfig, token) = (dir.path().join("kubeconfig.conf"), dir.path().join("token"));
    let admin = fs::read(cluster.control_plane().admin_kubeconfig()).unwrap();
    let mut content: Value = serde_json::from_slice(&admin).unwrap();
    let good = content["users"][0]["user"]["token"].as_str().unwrap().to_owned();
    content["users"][0]["user"] = json!({"tokenFile": token});
    fs::write(&kubeconfig, content.to_string()).unwrap();
    fs::write(&token, "stale").unwrap();

    let arguments = ["--kubeconfig", kubeconfig.to_str().unwrap()];
    let mut agent = cluster.start_agent(node0, &arguments).unwrap();
    logged(&agent, &["the API server cannot be watched", "Unauthorized", "credentials"]);
    assert_eq!(agent.healthz().unwrap().0, 503);
    fs::write(&token, good).unwrap();
    agent.wait_synced(LIMIT).unwrap();
    answered(node0, Proto::Tcp, at("10.96.1.1", 80), Some("server"));
}
