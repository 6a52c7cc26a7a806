//! What load balancers ask: an HTTP server on the `healthCheckNodePort` of a Service, while it should be there.

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use kube_lane_lab::{Pod, Proto};
use kube_lane_tests::objects::{Endpoint, Port, service, slices};
use serde_json::{Value, json};

use super::world::{SYNC, World, answered, endpoints, serving, until, vips};

const PORT: u16 = 32100;

/// A Service of type LoadBalancer with this `externalTrafficPolicy`, asked for at this port.
fn put(world: &World, policy: &str, port: u16, endpoints: &[Endpoint]) {
    let ports = [Port::new("TCP", 80, 8080).node_port(30080)];
    let mut balanced = service("web", &vips(10), &ports);
    balanced["spec"]["type"] = "LoadBalancer".into();
    balanced["spec"]["externalTrafficPolicy"] = policy.into();
    if policy == "Local" {
        balanced["spec"]["healthCheckNodePort"] = port.into();
    }
    let mut objects = vec![balanced];
    objects.extend(slices("web", &ports, endpoints));
    world.folder.put("web", &objects).unwrap();
}

/// Asks a node's agent until it says so: a status code, or nothing at all.
fn says(world: &World, node: usize, port: u16, wanted: Option<u16>) -> Value {
    let deadline = Instant::now() + SYNC;
    loop {
        let at = SocketAddr::from((world.lab.node(node).v4(), port));
        let answer = world.agents[node].get_at(at, "/").ok();
        if answer.as_ref().map(|(code, _)| *code) == wanted {
            return answer.map(|(_, body)| serde_json::from_str(&body).unwrap()).unwrap_or_default();
        }
        let log = world.agents[node].log();
        assert!(Instant::now() < deadline, "node {node} says {answer:?}, not {wanted:?}\n{log}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_health_check_port_follows_the_service() {
    let world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 1, "far");
    put(&world, "Local", PORT, &endpoints(&[&pod]));
    let body = says(&world, 1, PORT, Some(200));
    let service = json!({"namespace": "default", "name": "web"});
    assert_eq!(body, json!({"service": service, "localEndpoints": 1, "serviceProxyHealthy": true}));
    assert_eq!(says(&world, 0, PORT, Some(503))["localEndpoints"], 0);
    assert!(world.agents[1].get(PORT, "/").is_err(), "it listens where NodePorts answer alone");

    // Terminating endpoints take no new load, though they may still serve.
    let terminating = |pod: &Pod| {
        let mut endpoints = endpoints(&[pod]);
        for endpoint in &mut endpoints {
            endpoint.conditions = json!({"ready": false, "serving": true, "terminating": true});
        }
        endpoints
    };
    put(&world, "Local", PORT, &terminating(&pod));
    says(&world, 1, PORT, Some(503));
    put(&world, "Local", PORT + 1, &endpoints(&[&pod]));
    says(&world, 1, PORT + 1, Some(200));
    says(&world, 1, PORT, None);
    put(&world, "Cluster", 0, &endpoints(&[&pod]));
    says(&world, 1, PORT + 1, None);
}

#[test]
fn a_health_check_port_that_is_taken_is_named_and_tried_again() {
    let world = World::new(&[]);
    let (pod, _e) = serving(&world.lab, 0, "near");
    // On both families, as IPv6 sockets are by default.
    let taken = world.lab.node(0).run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))).unwrap().unwrap();
    put(&world, "Local", PORT, &endpoints(&[&pod]));
    let deadline = Instant::now() + SYNC;
    while !world.agents[0].log().contains("cannot serve the health check") {
        assert!(Instant::now() < deadline, "{}", world.agents[0].log());
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(taken);
    says(&world, 0, PORT, Some(200));
}

/// A Service whose load balancer asks for its health at this port.
fn checked(name: &str, created: &str, number: u8, port: u16) -> Value {
    let mut checked = service(name, &vips(number), &[Port::new("TCP", 80, 8080)]);
    checked["metadata"]["creationTimestamp"] = created.into();
    checked["spec"]["type"] = "LoadBalancer".into();
    checked["spec"]["externalTrafficPolicy"] = "Local".into();
    checked["spec"]["healthCheckNodePort"] = port.into();
    checked
}

#[test]
fn the_oldest_has_a_port_that_health_checks_and_node_ports_ask_for() {
    let mut world = World::new(&[]);
    let [(near, _n), (other, _o)] = ["near", "other"].map(|name| serving(&world.lab, 0, name));
    let ports = [Port::new("TCP", 80, 8080)];
    let put = |name: &str, object: Value, pod: &Pod| {
        let mut objects = vec![object];
        objects.extend(slices(name, &ports, &endpoints(&[pod])));
        world.folder.put(name, &objects).unwrap();
    };
    let mut taker = service("taker", &vips(11), &[Port::new("TCP", 80, 8080).node_port(PORT)]);
    taker["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    put("checked-too", checked("checked-too", "2026-03-01T00:00:00Z", 12, PORT), &other);
    put("taker", taker, &other);
    put("checked", checked("checked", "2026-01-01T00:00:00Z", 10, PORT), &near);
    says(&world, 0, PORT, Some(200));
    for _ in 0..4 {
        world.agents.remove(0);
        let agent = world.start_agent(0, &[]);
        world.agents.insert(0, agent);
        world.agents[0].wait_synced(SYNC).unwrap();
        assert_eq!(says(&world, 0, PORT, Some(200))["service"]["name"], "checked");
        // A load balancer asks from outside, where the NodePort would lead it to a pod.
        let at = SocketAddr::from((world.lab.node(0).v4(), PORT));
        let client = world.lab.outside();
        let dial = move || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&at, SYNC)?;
            stream.set_read_timeout(Some(SYNC))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = client.run(dial).unwrap().unwrap();
        assert!(answer.contains(r#""name":"checked""#), "{answer}");
        let (_, status) = world.agents[0].status(&[]).unwrap();
        for loser in ["taker", "checked-too"] {
            let line = status.lines().find(|line| line.contains(&format!("default/{loser}: ")));
            let words = "Service default/checked comes first at NodePort 32100/TCP (IPv4)";
            assert!(line.is_some_and(|line| line.contains(words)), "{status}");
        }
        // Two Services lose the port in two families each.
        assert_eq!(world.agents[0].metric("kubelane_warnings").unwrap(), 4.0);
        assert!(
            !world.agents[0].log().contains("cannot serve the health check"),
            "{}",
            world.agents[0].log()
        );
    }
    world.folder.remove("checked").unwrap();
    let at = SocketAddr::from((world.lab.node(0).v4(), PORT));
    let outcome = until(world.lab.outside(), Proto::Tcp, at, answered);
    assert!(answered(&outcome), "the NodePort has it now: {outcome:?}");
}
