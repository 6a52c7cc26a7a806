//! What is stale, without a kernel.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::tracker::{Filter, Flow, Tracker};
use crate::dataplane::{Batch, Outcome};
use crate::model::input::{Family, Protocol, ServiceKey};
use crate::model::plan::{
    AddressPort, Backend, Frontend, FrontendAddress, NodePlan, Plan, PortPlan, Verdict,
};

const VIP: &str = "10.96.0.1:53";
const NODE: &str = "192.0.2.1";
const NODE_PORT: u16 = 30053;

fn at(text: &str) -> AddressPort {
    text.parse::<std::net::SocketAddr>().unwrap().into()
}

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("ns", name)
}

/// A Service with these UDP endpoints behind [`VIP`] and [`NODE_PORT`].
fn service(name: &str, endpoints: &[&str], draining: &[&str]) -> Plan {
    let verdict = if endpoints.is_empty() { Verdict::Reject } else { Verdict::Cluster };
    let mut backends: Box<[_]> =
        endpoints.iter().map(|text| Backend { address: at(text), local: false }).collect();
    backends.sort();
    let frontends = [Frontend::cluster_ip(at(VIP), verdict), Frontend::nodeport(NODE_PORT, verdict)];
    let port = PortPlan {
        backends,
        draining: draining.iter().map(|text| at(text)).collect(),
        frontends: frontends.into(),
        ..PortPlan::new(Family::V4, Protocol::Udp, "dns")
    };
    Plan::new(key(name), [port])
}

fn batch(services: impl IntoIterator<Item = (&'static str, Option<Plan>)>) -> Batch {
    let services = services.into_iter().map(|(name, plan)| (key(name), plan.map(Arc::new)));
    Batch { services: services.collect(), ..Batch::default() }
}

fn flow(to: &str, from: &str) -> Flow {
    Flow { protocol: Protocol::Udp, to: at(to), from: at(from), translated: to != from }
}

struct World(Tracker);

impl World {
    /// A node with [`NODE`], and what these plans are.
    fn new(services: impl IntoIterator<Item = (&'static str, Option<Plan>)>) -> Self {
        let mut world = Self(Tracker::new(false));
        let nodeport_addresses = vec![NODE.parse::<IpAddr>().unwrap()];
        let node = Some(NodePlan { nodeport_addresses, ..NodePlan::default() });
        world.commit(&Batch { node, ..batch(services) });
        world.0.take();
        world
    }

    fn commit(&mut self, batch: &Batch) {
        self.0.committing(batch);
        self.0.committed(batch, &Outcome::default());
    }

    fn put(&mut self, name: &'static str, plan: Plan) {
        self.commit(&batch([(name, Some(plan))]));
    }

    /// Of these flows, those that the pending look brings and calls stale.
    fn stale(&mut self, flows: &[Flow]) -> Vec<Flow> {
        let look = self.0.take();
        let filters = self.0.filters(&look);
        let matches = |flow: &Flow| {
            filters.iter().any(|filter| {
                filter.protocol == flow.protocol
                    && filter.family == Family::of(flow.to.ip)
                    && filter.address.is_none_or(|address| address == flow.to.ip)
                    && filter.port.is_none_or(|port| port == flow.to.port)
            })
        };
        flows.iter().filter(|flow| matches(flow) && self.0.is_stale(flow, &look)).copied().collect()
    }
}

fn node_port(on: &str) -> String {
    format!("{on}:{NODE_PORT}")
}

#[test]
fn flows_to_an_endpoint_that_left_are_stale_and_no_others() {
    let mut world = World::new([("a", Some(service("a", &["10.0.0.1:53", "10.0.0.2:53"], &[])))]);
    world.put("a", service("a", &["10.0.0.2:53", "10.0.0.3:53"], &[]));
    let gone = [VIP, &node_port(NODE)].map(|to| flow(to, "10.0.0.1:53"));
    let mut flows = gone.to_vec();
    flows.extend([
        flow(VIP, "10.0.0.2:53"),
        // The same endpoint by its own address; the NodePort on what is no address of the node; another protocol.
        flow("10.0.0.1:53", "10.0.0.1:53"),
        flow(&node_port("192.0.2.9"), "10.0.0.1:53"),
        Flow { protocol: Protocol::Tcp, ..flow(VIP, "10.0.0.1:53") },
    ]);
    assert_eq!(world.stale(&flows), gone);
}

#[test]
fn another_target_port_is_another_endpoint() {
    let mut world = World::new([("a", Some(service("a", &["10.0.0.1:53"], &[])))]);
    world.put("a", service("a", &["10.0.0.1:5353"], &[]));
    let gone = flow(VIP, "10.0.0.1:53");
    assert_eq!(world.stale(&[gone, flow(VIP, "10.0.0.1:5353")]), [gone]);
}

#[test]
fn what_drains_is_left_alone_until_it_is_gone() {
    let mut world = World::new([("a", Some(service("a", &["10.0.0.1:53"], &[])))]);
    let old = flow(VIP, "10.0.0.1:53");
    world.put("a", service("a", &["10.0.0.2:53"], &["10.0.0.1:53"]));
    assert!(!world.0.has_pending());
    world.put("a", service("a", &["10.0.0.2:53"], &[]));
    assert_eq!(world.stale(&[old]), [old]);
}

#[test]
fn what_was_never_translated_goes_once_there_are_endpoints() {
    let mut world = World::new([]);
    let past = [VIP, &node_port(NODE)].map(|to| flow(to, to));
    world.put("a", service("a", &[], &[]));
    assert!(world.stale(&past).is_empty(), "new connections are refused, too");
    world.put("a", service("a", &["10.0.0.1:53"], &[]));
    assert_eq!(world.stale(&past), past);
}

#[test]
fn the_last_endpoint_and_the_service_take_their_flows_with_them() {
    let start = || World::new([("a", Some(service("a", &["10.0.0.1:53"], &[])))]);
    let ours = [VIP, &node_port(NODE)].map(|to| flow(to, "10.0.0.1:53"));
    let others = [VIP, &node_port(NODE)].map(|to| flow(to, to));
    let flows = [ours, others].concat();
    let mut world = start();
    world.put("a", service("a", &[], &[]));
    assert_eq!(world.stale(&flows), ours);
    let mut world = start();
    world.commit(&batch([("a", None)]));
    assert_eq!(world.stale(&flows), ours);
    assert!(!world.0.has_pending());
}

#[test]
fn what_an_earlier_run_left_goes_with_its_flows() {
    let mut world = World::new([("a", Some(service("a", &["10.0.0.1:53"], &[])))]);
    let swept = ["10.96.0.9:53", VIP].map(|vip| (Family::V4, Protocol::Udp, FrontendAddress::Vip(at(vip))));
    let outcome = Outcome { swept: swept.to_vec(), ..Outcome::default() };
    world.0.committed(&Batch { sweep: true, ..Batch::default() }, &outcome);
    let old = flow("10.96.0.9:53", "10.0.0.9:53");
    let others = [flow("10.96.0.9:53", "10.96.0.9:53"), flow(VIP, "10.0.0.1:53")];
    assert_eq!(world.stale(&[[old].as_slice(), &others].concat()), [old]);
}

#[test]
fn an_address_that_moves_to_another_service_keeps_its_right_flows() {
    for (from, to) in [("a", "b"), ("b", "a")] {
        let mut world = World::new([(from, Some(service(from, &["10.0.0.1:53", "10.0.0.2:53"], &[])))]);
        let mut services = vec![(from, None), (to, Some(service(to, &["10.0.0.2:53"], &[])))];
        services.sort_by_key(|(name, _)| *name);
        world.commit(&batch(services));
        let gone = flow(VIP, "10.0.0.1:53");
        assert_eq!(world.stale(&[gone, flow(VIP, "10.0.0.2:53")]), [gone]);
    }
}

#[test]
fn an_endpoint_that_comes_back_saves_its_flows_before_it_is_committed() {
    let mut world = World::new([("a", Some(service("a", &["10.0.0.1:53"], &[])))]);
    world.put("a", service("a", &["10.0.0.2:53"], &[]));
    let look = world.0.take();
    let flow = flow(VIP, "10.0.0.1:53");
    assert!(world.0.is_stale(&flow, &look));
    let back = batch([("a", Some(service("a", &["10.0.0.1:53"], &[])))]);
    world.0.committing(&back);
    assert!(!world.0.is_stale(&flow, &look));
    world.0.committed(&back, &Outcome::default());
    assert!(!world.0.is_stale(&flow, &look));
}

#[test]
fn a_refused_service_keeps_the_flows_of_what_it_had() {
    let mut world = World::new([("a", Some(service("a", &["10.0.0.1:53"], &[])))]);
    let next = batch([("a", Some(service("a", &["10.0.0.2:53"], &[])))]);
    let outcome = Outcome { failed: vec![(key("a"), "no".into())], ..Outcome::default() };
    world.0.committing(&next);
    world.0.committed(&next, &outcome);
    assert!(!world.0.has_pending());
    world.0.look_at_everything();
    assert!(world.stale(&[flow(VIP, "10.0.0.1:53")]).is_empty());
}

#[test]
fn only_what_loses_endpoints_causes_a_look() {
    let mut world = World::new([("a", Some(service("a", &["10.0.0.1:53"], &[])))]);
    world.put("a", service("a", &["10.0.0.1:53", "10.0.0.2:53"], &[]));
    assert!(!world.0.has_pending(), "one more endpoint");
    let mut tcp = service("b", &["10.0.0.1:53"], &[]);
    tcp.ports[0].protocol = Protocol::Tcp;
    tcp.service = key("b");
    world.put("b", tcp);
    world.commit(&batch([("b", None)]));
    assert!(!world.0.has_pending(), "TCP");
}

#[test]
fn a_new_address_of_the_node_takes_its_node_ports_over() {
    let mut world = World::new([("a", Some(service("a", &["10.0.0.1:53"], &[])))]);
    let past = flow(&node_port("192.0.2.9"), &node_port("192.0.2.9"));
    let nodeport_addresses = [NODE, "192.0.2.9"].map(|text| text.parse().unwrap()).to_vec();
    let node = Some(NodePlan { nodeport_addresses, ..NodePlan::default() });
    world.commit(&Batch { node, ..Batch::default() });
    assert_eq!(world.stale(&[past]), [past]);
}

#[test]
fn the_kernel_is_asked_for_the_places_that_changed() {
    let mut world = World::new([("a", Some(service("a", &["10.0.0.1:53"], &[])))]);
    let udp = |address, port| Filter { family: Family::V4, protocol: Protocol::Udp, address, port };
    world.put("a", service("a", &["10.0.0.2:53"], &[]));
    let look = world.0.take();
    let vip = at(VIP);
    let few = BTreeSet::from([udp(Some(vip.ip), Some(vip.port)), udp(None, Some(NODE_PORT))]);
    assert_eq!(world.0.filters(&look), few);
    world.0.put_back(look.clone());
    assert_eq!(world.0.take(), look);
    world.0.look_at_everything();
    let look = world.0.take();
    assert_eq!(world.0.filters(&look), BTreeSet::from([udp(None, None)]));
}

#[test]
fn sctp_is_looked_after_where_it_is_asked_for() {
    let mut plan = service("a", &["10.0.0.1:53"], &[]);
    plan.ports[0].protocol = Protocol::Sctp;
    let plan = Arc::new(plan);
    for sctp in [false, true] {
        let mut tracker = Tracker::new(sctp);
        let put = Batch { services: vec![(key("a"), Some(Arc::clone(&plan)))], ..Batch::default() };
        tracker.committed(&put, &Outcome::default());
        tracker.take();
        tracker.committed(&batch([("a", None)]), &Outcome::default());
        assert_eq!(tracker.has_pending(), sctp);
    }
}
