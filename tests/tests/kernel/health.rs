//! What load balancers ask: an HTTP server on the `healthCheckNodePort` of a Service, while it should be there.

use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use kube_lane_lab::Pod;
use kube_lane_tests::objects::{Endpoint, Port, service, slices};
use serde_json::{Value, json};

use super::world::{SYNC, World, endpoints, serving, vips};

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
