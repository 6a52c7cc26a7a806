//! What the agent tells the cluster of itself and of its node: Events, and whether load balancers should come here.

use std::net::{Ipv6Addr, TcpListener};

use kube_lane_lab::Lab;
use kube_lane_tests::agent::Agent;
use kube_lane_tests::cluster::Cluster;
use kube_lane_tests::objects::{Port, node, service};
use serde_json::{Value, json};

use crate::wait::{LIMIT, until};

/// The Events about the object of this kind and name.
fn events(cluster: &Cluster, kind: &str, name: &str) -> Vec<Value> {
    let list = cluster.kubectl(&["get", "events.v1.events.k8s.io", "-A", "-o", "json"]).unwrap();
    let list: Value = serde_json::from_str(&list).unwrap();
    let about = |event: &&Value| event["regarding"]["kind"] == kind && event["regarding"]["name"] == name;
    list["items"].as_array().unwrap().iter().filter(about).cloned().collect()
}

/// Waits for the Event with this reason.
fn event(cluster: &Cluster, kind: &str, name: &str, reason: &str) -> Value {
    let mut found = None;
    until(|| {
        let events = events(cluster, kind, name);
        found = events.iter().find(|event| event["reason"] == reason).cloned();
        found.as_ref().map(drop).ok_or_else(|| format!("no {reason} in {events:#?}"))
    });
    found.unwrap()
}

#[test]
fn the_node_and_services_hear_of_what_matters_to_them() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    let node0 = cluster.lab().node(0);
    let taken = node0.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 32100))).unwrap().unwrap();
    let mut balanced = service("web", &["10.96.1.1".parse().unwrap()], &[Port::new("TCP", 80, 8080)]);
    balanced["spec"]["type"] = "LoadBalancer".into();
    balanced["spec"]["externalTrafficPolicy"] = "Local".into();
    balanced["spec"]["healthCheckNodePort"] = 32100.into();
    cluster.apply(&balanced).unwrap();
    let mut agent = cluster.start_agent(node0, &[]).unwrap();
    agent.wait_synced(LIMIT).unwrap();

    let starting = event(&cluster, "Node", "node0", "Starting");
    assert_eq!(
        (
            &starting["type"],
            &starting["action"],
            &starting["reportingInstance"],
            &starting["metadata"]["namespace"]
        ),
        (&json!("Normal"), &json!("StartKubeProxy"), &json!("node0"), &json!("default"))
    );
    let failed = event(&cluster, "Service", "web", "FailedToStartServiceHealthcheck");
    assert_eq!((&failed["type"], &failed["action"]), (&json!("Warning"), &json!("Listen")));
    let note = failed["note"].as_str().unwrap();
    assert!(note.contains("node0") && note.contains("default/web") && note.contains("32100"), "{note}");
    assert_eq!(failed["metadata"]["namespace"], "default");
    drop(taken);
}

#[test]
fn only_a_node_that_is_there_to_stay_is_eligible() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    let node0 = cluster.lab().node(0);
    let mut agent = cluster.start_agent(node0, &[]).unwrap();
    agent.wait_synced(LIMIT).unwrap();
    let says = |agent: &Agent, code: u16| {
        until(|| {
            let (found, body) = agent.healthz().map_err(|error| error.to_string())?;
            let answer: Value = serde_json::from_str(&body).unwrap();
            assert_eq!(answer["healthy"], true, "{body}");
            assert_eq!(answer["nodeEligible"], found == 200, "{body}");
            (found == code).then_some(()).ok_or(body)
        });
        assert_eq!(agent.get(10256, "/livez").unwrap().0, 200);
    };
    says(&agent, 503);
    let plain = node("node0", &[node0.v4(), node0.v6()]);
    cluster.apply(&plain).unwrap();
    says(&agent, 200);
    let mut tainted = plain.clone();
    tainted["spec"]["taints"] = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    cluster.apply(&tainted).unwrap();
    says(&agent, 503);
    cluster.apply(&plain).unwrap();
    says(&agent, 200);
    cluster.delete(&plain).unwrap();
    says(&agent, 503);
}
