//! The JSON form that programs read.

use kube_lane::model::input::{Change, Node};
use serde_json::json;

use crate::build::{NODE, api, ip, key, service, slice, synced};

#[test]
fn plans_as_json() {
    let mut planner = synced();
    let mut pods = slice("web-1", "web", &["10.244.0.1"]);
    pods.endpoints[0].node = Some(NODE.into());
    planner.apply(api(Change::Service(service("web", 0, &["10.96.0.1"], Some(30080)))));
    planner.apply(api(Change::Slice(pods)));
    planner.apply(api(Change::Node(Some(Node { addresses: vec![ip("192.0.2.1")], ..Node::default() }))));
    planner.apply(api(Change::ServiceCidrs(vec!["10.96.0.0/16".parse().unwrap()])));
    planner.replan();
    assert_eq!(
        serde_json::to_value(planner.plan(&key("web")).unwrap()).unwrap(),
        json!({
            "service": "demo/web",
            "ports": [{
                "family": "IPv4",
                "protocol": "TCP",
                "name": "http",
                "backends": [{"address": "10.244.0.1:8080", "local": true}],
                "frontends": [
                    {"at": {"vip": "10.96.0.1:80"}, "kind": "ClusterIP", "verdict": "cluster"},
                    {"at": {"nodePort": 30080}, "kind": "NodePort", "verdict": "cluster"},
                ],
            }],
            "warnings": [],
        })
    );
    assert_eq!(
        serde_json::to_value(planner.node().unwrap()).unwrap(),
        json!({"nodePortAddresses": ["192.0.2.1"], "podCIDRs": [], "serviceCIDRs": ["10.96.0.0/16"]})
    );
}
