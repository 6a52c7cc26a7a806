//! Each rule of what the socket layer answers.

use std::net::IpAddr;
use std::num::NonZeroU32;

use kube_lane_common::{Answered, Client, PodCgroups};

use super::answers::*;
use crate::model::input::{Family, Protocol};
use crate::model::plan::{
    AddressPort, Backend, Frontend, FrontendAddress, FrontendKind, NodePlan, PortPlan, Verdict,
};

fn address(text: &str) -> AddressPort {
    text.parse::<std::net::SocketAddr>().unwrap().into()
}

fn vip(at: &str, kind: FrontendKind, verdict: Verdict) -> Frontend {
    Frontend { at: FrontendAddress::Vip(address(at)), kind, verdict }
}

fn cluster_ip(verdict: Verdict) -> Frontend {
    vip("10.96.0.1:80", FrontendKind::ClusterIp, verdict)
}

fn load_balancer(verdict: Verdict) -> Frontend {
    vip("198.51.100.1:80", FrontendKind::LoadBalancer, verdict)
}

fn external_ip(verdict: Verdict) -> Frontend {
    vip("198.51.100.2:80", FrontendKind::ExternalIp, verdict)
}

fn nodeport(verdict: Verdict) -> Frontend {
    Frontend::nodeport(30_080, verdict)
}

/// A TCP port with one local endpoint.
fn port(frontends: impl Into<Box<[Frontend]>>) -> PortPlan {
    let backends = [Backend { address: address("10.244.1.2:8080"), local: true }];
    PortPlan {
        backends: backends.into(),
        local_backends: backends.into(),
        frontends: frontends.into(),
        ..PortPlan::new(Family::V4, Protocol::Tcp, "http")
    }
}

/// Pods are told by their address.
fn node() -> NodePlan {
    NodePlan { pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()], ..NodePlan::default() }
}

const DETECTED: Policy = Policy {
    external: false,
    udp: false,
    loopback_nodeports: false,
    host_namespace_only: false,
    leave_alone: false,
    detector: Clients::PodCidrs,
    masquerade_all: false,
};
const EXTERNAL: Policy = Policy { external: true, ..DETECTED };
const UNDETECTED: Policy = Policy { detector: Clients::None, ..EXTERNAL };

const ALL: Answering = Answering { pods: true, hosts: true, others: false, awaits_pods: false };
const PODS: Answering = Answering { pods: true, hosts: false, others: true, awaits_pods: false };
const HOSTS: Answering = Answering { pods: false, hosts: true, others: false, awaits_pods: false };

fn all(port: &PortPlan, policy: &Policy) -> Vec<Answer> {
    answers(port, policy, &node(), Clashes::default()).into()
}

/// The same on a node of which an interface has this address.
fn all_beside(own: &str, port: &PortPlan, policy: &Policy) -> Vec<Answer> {
    let interface_addresses = vec!["192.0.2.11".parse().unwrap(), own.parse().unwrap()];
    answers(port, policy, &NodePlan { interface_addresses, ..node() }, Clashes::default()).into()
}

/// The answer at the only frontend.
fn one(frontend: Frontend, policy: &Policy) -> Answer {
    all(&port([frontend]), policy)[0]
}

fn socket(clients: Answering, set: EndpointSet) -> Answer {
    Answer::Socket { clients, set }
}

use EndpointSet::{Cluster, Local};

#[test]
fn a_cluster_ip_is_answered_for_pods_and_with_a_detector_for_the_host() {
    assert_eq!(one(cluster_ip(Verdict::Cluster), &DETECTED), socket(ALL, Cluster));
    assert_eq!(one(cluster_ip(Verdict::Cluster), &UNDETECTED), socket(PODS, Cluster));
    let interface = Policy { detector: Clients::Interface, ..DETECTED };
    assert_eq!(one(cluster_ip(Verdict::Cluster), &interface), socket(ALL, Cluster));
    let ipv6 = PortPlan { family: Family::V6, ..port([cluster_ip(Verdict::Cluster)]) };
    assert_eq!(all(&ipv6, &DETECTED), [socket(PODS, Cluster)], "pods' IPv6 network is not known");
}

#[test]
fn masquerade_all_leaves_cluster_ips_to_nftables() {
    let policy = Policy { masquerade_all: true, ..EXTERNAL };
    assert_eq!(one(cluster_ip(Verdict::Cluster), &policy), Answer::Nftables(Why::MasqueradeAll));
    assert_eq!(one(nodeport(Verdict::Cluster), &policy), socket(ALL, Cluster));
}

#[test]
fn external_addresses_are_answered_by_option() {
    for at in [load_balancer, external_ip, nodeport] {
        assert_eq!(one(at(Verdict::Cluster), &DETECTED), Answer::Nftables(Why::External));
        assert_eq!(one(at(Verdict::Cluster), &EXTERNAL), socket(ALL, Cluster));
        assert_eq!(one(at(Verdict::Cluster), &UNDETECTED), socket(ALL, Cluster));
        // The short-circuit: who is on this node gets the Cluster set.
        assert_eq!(one(at(Verdict::Local), &EXTERNAL), socket(ALL, Cluster));
        assert_eq!(one(at(Verdict::Local), &UNDETECTED), Answer::Nftables(Why::LocalUndetected));
    }
}

#[test]
fn an_internal_policy_of_local_gets_the_local_set() {
    assert_eq!(one(cluster_ip(Verdict::Local), &DETECTED), socket(ALL, Local));
    let none = PortPlan { local_backends: [].into(), ..port([cluster_ip(Verdict::Local)]) };
    let [answer] = all(&none, &DETECTED)[..] else { panic!("one frontend") };
    assert_eq!((answer, answer.set()), (Answer::Nftables(Why::NoLocalEndpoint), Some(Local)));
}

#[test]
fn what_has_no_endpoint_is_refused_at_the_socket() {
    let none = PortPlan {
        backends: [].into(),
        local_backends: [].into(),
        ..port([cluster_ip(Verdict::Reject), nodeport(Verdict::Reject)])
    };
    assert_eq!(all(&none, &UNDETECTED), [socket(PODS, Cluster), socket(ALL, Cluster)]);
}

#[test]
fn source_ranges_are_about_load_balancer_addresses() {
    let ranged = PortPlan {
        source_ranges: Some(["192.0.2.0/24".parse().unwrap()].into()),
        ..port([cluster_ip(Verdict::Cluster), load_balancer(Verdict::Cluster), nodeport(Verdict::Cluster)])
    };
    let expected = [socket(ALL, Cluster), Answer::Nftables(Why::SourceRanges), socket(ALL, Cluster)];
    assert_eq!(all(&ranged, &EXTERNAL), expected);
}

#[test]
fn udp_is_answered_by_option_and_sctp_never() {
    let udp = PortPlan { protocol: Protocol::Udp, ..port([cluster_ip(Verdict::Cluster)]) };
    assert_eq!(all(&udp, &DETECTED), [Answer::Nftables(Why::Udp)]);
    let option = Policy { udp: true, ..EXTERNAL };
    assert_eq!(all(&udp, &option), [socket(ALL, Cluster)]);
    // It stays where it is in the maps, so that endpoints come by one store.
    let refused = PortPlan { frontends: [cluster_ip(Verdict::Reject)].into(), ..udp.clone() };
    assert_eq!(all(&refused, &option), [Answer::Nftables(Why::UdpRefused)]);
    assert_eq!(Answer::Nftables(Why::UdpRefused).set(), Some(Cluster));
    let remembered = PortPlan { affinity: NonZeroU32::new(10), ..udp };
    assert_eq!(all(&remembered, &option), [Answer::Nftables(Why::UdpAffinity)]);
    let sctp = PortPlan { protocol: Protocol::Sctp, ..port([cluster_ip(Verdict::Cluster)]) };
    assert_eq!(all(&sctp, &option), [Answer::Nftables(Why::Sctp)]);
}

#[test]
fn with_affinity_all_frontends_are_answered_by_one_layer() {
    let frontends = [cluster_ip(Verdict::Cluster), nodeport(Verdict::Cluster)];
    let remembered = PortPlan { affinity: NonZeroU32::new(10), ..port(frontends) };
    assert_eq!(all(&remembered, &EXTERNAL), [socket(ALL, Cluster); 2]);
    let expected = [Answer::Nftables(Why::Affinity), Answer::Nftables(Why::External)];
    assert_eq!(all(&remembered, &DETECTED), expected);
    // The host's processes would be remembered by nftables at the first and by the socket layer at the second.
    assert_eq!(all(&remembered, &UNDETECTED), [Answer::Nftables(Why::Affinity); 2]);
    // What is dropped is remembered by nobody.
    let frontends = [cluster_ip(Verdict::Local), nodeport(Verdict::Cluster)];
    let dropped = PortPlan { local_backends: [].into(), frontends: frontends.into(), ..remembered };
    assert_eq!(all(&dropped, &EXTERNAL), [Answer::Nftables(Why::NoLocalEndpoint), socket(ALL, Cluster)]);
}

#[test]
fn in_the_host_s_namespace_only() {
    let only = Policy { host_namespace_only: true, ..EXTERNAL };
    assert_eq!(one(cluster_ip(Verdict::Cluster), &only), socket(HOSTS, Cluster));
    let undetected = Policy { detector: Clients::None, ..only };
    assert_eq!(one(cluster_ip(Verdict::Cluster), &undetected), Answer::Nftables(Why::HostsUndetected));
    assert_eq!(one(nodeport(Verdict::Cluster), &undetected), socket(HOSTS, Cluster));
}

#[test]
fn clashes_leave_to_nftables_what_they_touch() {
    let plan = port([cluster_ip(Verdict::Cluster), nodeport(Verdict::Cluster)]);
    let twice = Why::TranslatedTwice(address("10.244.1.2:8080"));
    let of = |clashes| answers(&plan, &EXTERNAL, &node(), clashes).to_vec();
    assert_eq!(of(Clashes { backend: Some(twice), vip_on_node: false }), [Answer::Nftables(twice); 2]);
    let expected = [socket(ALL, Cluster), Answer::Nftables(Why::VipOnNode)];
    assert_eq!(of(Clashes { backend: None, vip_on_node: true }), expected);
}

#[test]
fn addresses_that_are_each_namespace_s_own_are_left_to_nftables() {
    for at in ["0.0.0.0:80", "127.0.0.1:80", "224.0.0.1:80", "[::]:80", "[::1]:80", "[fe80::1]:80"] {
        let own = vip(at, FrontendKind::ExternalIp, Verdict::Cluster);
        assert_eq!(one(own, &EXTERNAL), Answer::Nftables(Why::Address), "{at}");
    }
    let mapped = vip("[::ffff:10.96.0.1]:80", FrontendKind::ExternalIp, Verdict::Cluster);
    assert_eq!(one(mapped, &EXTERNAL), Answer::Nftables(Why::Address));
}

#[test]
fn the_settings_say_who_is_answered_where() {
    let bit = |client, external, is_ipv6| Answered::bit(client, external, is_ipv6);
    let settings = DETECTED.settings(&node(), 7, PodCgroups { level: 1, ids: [2, 0, 0, 0] });
    let expected = bit(Client::Pod, false, false)
        | bit(Client::Host, false, false)
        | bit(Client::Pod, false, true)
        | bit(Client::Other, false, true)
        | Answered::SOURCE;
    assert_eq!((settings.answered.0, settings.host), (expected, 7));
    assert!(settings.pods.has(2) && !settings.pods.has(1));
    assert_eq!(settings.pods4.network.to_ne_bytes(), [10, 244, 1, 0]);
    assert_eq!(settings.pods4.mask.to_ne_bytes(), [255, 255, 255, 0]);

    let dual = NodePlan { pod_cidrs: vec!["fd01::/64".parse().unwrap()], ..NodePlan::default() };
    let policy =
        Policy { host_namespace_only: true, loopback_nodeports: true, leave_alone: true, ..EXTERNAL };
    let settings = policy.settings(&dual, 7, PodCgroups::NONE);
    let expected = bit(Client::Host, true, false)
        | bit(Client::Host, true, true)
        | bit(Client::Host, false, true)
        | Answered::SOURCE << 8
        | Answered::NODEPORTS
        | Answered::LOOPBACK_NODEPORTS
        | Answered::LEFT_ALONE;
    assert_eq!(settings.answered.0, expected);
    let [network, mask] =
        [settings.pods6.network, settings.pods6.mask].map(kube_lane_common::Address::from_user_ip6);
    assert_eq!(IpAddr::from(network), "fd01::".parse::<IpAddr>().unwrap());
    assert_eq!(IpAddr::from(mask), "ffff:ffff:ffff:ffff::".parse::<IpAddr>().unwrap());
}

#[test]
fn a_person_can_read_who_answers() {
    assert_eq!(
        one(cluster_ip(Verdict::Cluster), &DETECTED).to_string(),
        "socket for pods and host processes"
    );
    let twice = Answer::Nftables(Why::TranslatedTwice(address("10.96.0.9:80")));
    let expected =
        "nftables (endpoint 10.96.0.9:80 is an address of a Service itself: it would be translated twice)";
    assert_eq!(twice.to_string(), expected);
    let full = Answer::Nftables(Why::Full(Limit::Slots));
    assert_eq!(full.to_string(), "nftables (no room: the map of endpoint sets is full)");
}

#[test]
fn an_address_that_the_node_has_is_left_to_nftables() {
    let frontends = [cluster_ip, load_balancer, external_ip, nodeport].map(|at| at(Verdict::Cluster));
    let (port, socket) = (port(frontends), socket(ALL, Cluster));
    let own = Answer::Nftables(Why::OwnAddress);
    assert_eq!(all_beside("192.0.2.12", &port, &EXTERNAL), [socket; 4]);
    assert_eq!(all_beside("10.96.0.1", &port, &EXTERNAL), [own, socket, socket, socket]);
    assert_eq!(all_beside("198.51.100.1", &port, &EXTERNAL), [socket, own, socket, socket]);
    assert_eq!(all_beside("198.51.100.2", &port, &EXTERNAL), [socket, socket, own, socket]);
    assert_eq!(Why::OwnAddress.to_string(), "an interface of this node has the address");
    // Clients of the others would be remembered in another layer.
    let remembered = PortPlan { affinity: NonZeroU32::new(60), ..port };
    let affinity = Answer::Nftables(Why::Affinity);
    assert_eq!(all_beside("10.96.0.1", &remembered, &EXTERNAL), [own, affinity, affinity, affinity]);
}
