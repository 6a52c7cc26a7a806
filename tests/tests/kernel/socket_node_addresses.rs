//! Addresses of Services that an interface of the node has: NodeLocal DNSCache, and load balancer addresses that move from
//! node to node. In both modes they fare as in nftables.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use kube_lane_lab::{Dial, Host, Lab, Node, Outcome, Proto, topology};
use kube_lane_tests::objects::Port;
use serde_json::json;

use super::socket_clients::output;
use super::world::{
    Mode, QUIET, World, answered, answered_in, at, endpoints, meet, serving, until, until_met, vips,
};

/// Why nftables answers such an address.
const WHY: &str = "an interface of this node has the address";

fn world(mode: Mode) -> World {
    World::configured(mode, |_| json!({"kubeLane": {"socketLB": {"external": true, "udp": true}}}))
}

/// An interface of node 0 with addresses that packets reach untranslated, as NodeLocal DNSCache sets it up.
struct CacheInterface<'l> {
    node: &'l Node,
    name: &'static str,
}

impl<'l> CacheInterface<'l> {
    fn add(lab: &'l Lab, name: &'static str, addresses: &[IpAddr]) -> Self {
        let node = lab.node(0);
        for (family, is_v4) in [("ip", true), ("ip6", false)] {
            let addresses: Vec<_> = addresses.iter().filter(|ip| ip.is_ipv4() == is_v4).collect();
            let rules = |direction, port| {
                let rule = |ip| {
                    ["tcp", "udp"]
                        .map(|proto| format!("{family} {direction} {ip} {proto} {port} 53 notrack; "))
                };
                addresses.iter().flat_map(rule).collect::<String>()
            };
            let (to, from) = (rules("daddr", "dport"), rules("saddr", "sport"));
            let table = format!(
                "table {family} {name} {{
                    chain prerouting {{ type filter hook prerouting priority raw; {to} }}
                    chain output {{ type filter hook output priority raw; {to} {from} }}
                }}"
            );
            output(node, "nft", &[&table]);
        }
        output(node, "ip", &["link", "add", name, "type", "bridge"]);
        output(node, "ip", &["link", "set", name, "up"]);
        for ip in addresses {
            output(node, "ip", &["address", "add", &ip.to_string(), "dev", name, "nodad"]);
        }
        Self { node, name }
    }

    fn remove(self) {
        output(self.node, "ip", &["link", "delete", self.name]);
        for family in ["ip", "ip6"] {
            output(self.node, "nft", &["delete", "table", family, self.name]);
        }
    }
}

/// Who answers a datagram of an unconnected socket, and from where.
fn ask_unconnected(client: &Host, to: SocketAddr) -> Option<(String, SocketAddr)> {
    let ask = move || {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0)).unwrap();
        socket.set_read_timeout(Some(QUIET)).unwrap();
        socket.send_to(b"1 0\n", to).unwrap();
        let mut answer = [0; 256];
        let (length, from) = socket.recv_from(&mut answer).ok()?;
        let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
        Some((answer.split(' ').nth(1)?.to_owned(), from))
    };
    client.run(ask).unwrap()
}

/// All ways to ask are answered by this one.
fn assert_answered(mode: Mode, client: &Host, to: SocketAddr, by: &str) {
    let tcp = until(client, Proto::Tcp, to, |outcome| outcome.by() == Some(by));
    assert_eq!(tcp.by(), Some(by), "{mode:?} {} → {to}: {tcp:?}", client.name());
    for _ in 0..3 {
        for proto in [Proto::Tcp, Proto::Udp] {
            let outcome = client.dial_with(Dial::new(proto, to).timeout(QUIET)).unwrap();
            assert_eq!(outcome.by(), Some(by), "{mode:?} {} → {to} {proto}: {outcome:?}", client.name());
        }
        let datagram = ask_unconnected(client, to);
        assert_eq!(datagram, Some((by.to_owned(), to)), "{mode:?} {} → {to}", client.name());
    }
}

/// Both modes of NodeLocal DNSCache: the cache has the cluster IP of kube-dns as well, or an address of its own alone.
#[test]
fn node_local_dns_cache_answers_while_it_has_the_address() {
    for mode in Mode::ALL {
        let world = world(mode);
        let (dns, _echoes) = serving(&world.lab, 1, "coredns");
        let client = world.lab.node(0).add_pod("client").unwrap();
        let ports = ["UDP", "TCP"].map(|protocol| Port::new(protocol, 53, 8080));
        world.put("kube-dns", &ports, 10, &endpoints(&[&dns]));
        world.put("kube-dns-upstream", &ports, 11, &endpoints(&[&dns]));
        let node = world.lab.node(0);
        let clients = [&*client as &Host, node];
        let (kube_dns, upstream) = (vips(10), vips(11));
        let local = IpAddr::from([169, 254, 20, 10]);
        let through_service = |vips: [IpAddr; 2]| {
            for vip in vips.map(|vip| at(vip, 53)) {
                for client in clients {
                    let met = until_met(client, vip, answered_in(mode));
                    assert!(answered_in(mode)(&met), "{mode:?} {} → {vip}: {met:?}", client.name());
                    assert_answered(mode, client, vip, dns.name());
                }
            }
        };
        through_service(kube_dns);
        for addresses in [vec![kube_dns[0], kube_dns[1], local], vec![local], kube_dns.to_vec()] {
            let interface = CacheInterface::add(&world.lab, "nodelocaldns", &addresses);
            let at: Vec<_> = addresses.iter().map(|ip| at(*ip, 53)).collect();
            let cache = [Proto::Tcp, Proto::Udp].map(|proto| node.serve_at(proto, &at).unwrap());
            for to in at {
                for client in clients {
                    assert_answered(mode, client, to, node.name());
                }
            }
            through_service(upstream);
            let has_vip = addresses.contains(&kube_dns[0]);
            if !has_vip {
                through_service(kube_dns);
            }
            let (_, status) = world.agents[0].status(&["default/kube-dns"]).unwrap();
            assert_eq!(status.contains(WHY), has_vip && mode == Mode::Ebpf, "{status}");
            // Elsewhere there is no such interface.
            let (_, status) = world.agents[1].status(&["default/kube-dns"]).unwrap();
            assert!(!status.contains(WHY), "{status}");
            drop(cache);
            interface.remove();
            through_service(kube_dns);
        }
    }
}

/// As with kube-vip, keepalived and others that bind a load balancer's address on the node that has it at the moment.
#[test]
fn a_load_balancer_address_on_the_node_is_translated_by_nftables_while_it_is_there() {
    for mode in Mode::ALL {
        let world = world(mode);
        let (server, _echoes) = serving(&world.lab, 1, "server");
        let pods = [0, 1].map(|index| world.lab.node(index).add_pod(&format!("client-{index}")).unwrap());
        let addresses = topology::vip_cidrs().map(|cidr| topology::nth(cidr, 7));
        let external = topology::vip_cidrs().map(|cidr| topology::nth(cidr, 8));
        let ports = ["UDP", "TCP"].map(|protocol| Port::new(protocol, 80, 8080).node_port(30080));
        let ingress: Vec<_> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let spec = json!({
            "type": "LoadBalancer", "externalIPs": external,
            "status": {"loadBalancer": {"ingress": ingress}},
        });
        world.put_spec("web", &ports, 10, &endpoints(&[&server]), spec);
        let node = world.lab.node(0);
        let by_socket = |client: &Host, to| {
            let met = until_met(client, to, answered_in(mode));
            assert!(answered_in(mode)(&met), "{mode:?} {} → {to}: {met:?}", client.name());
        };
        let elsewhere = [&*pods[1] as &Host, world.lab.node(1)];
        let to: Vec<_> = addresses.iter().chain(&external).map(|ip| at(*ip, 80)).collect();
        for interface in [topology::UPLINK, "lo", topology::UPLINK] {
            for to in &to {
                [&*pods[0] as &Host, node]
                    .into_iter()
                    .chain(elsewhere)
                    .for_each(|client| by_socket(client, *to));
            }
            let change = |verb: &str| {
                for to in &to {
                    let prefix = if to.is_ipv4() { 32 } else { 128 };
                    let address = format!("{}/{prefix}", to.ip());
                    let mut words = vec!["address", verb, &address, "dev", interface];
                    words.extend((verb == "add").then_some("nodad"));
                    output(node, "ip", &words);
                }
            };
            change("add");
            for to in &to {
                for client in [&*pods[0] as &Host, node] {
                    let met = until_met(client, *to, answered_in(Mode::Nftables));
                    assert!(answered_in(Mode::Nftables)(&met), "{mode:?} {} → {to}: {met:?}", client.name());
                    assert_answered(mode, client, *to, server.name());
                }
                elsewhere.iter().for_each(|client| by_socket(client, *to));
                let outside = until(world.lab.outside(), Proto::Tcp, *to, answered);
                assert_eq!(outside.by(), Some(server.name()), "{mode:?} {to}: {outside:?}");
                // A port that the Service has not is the node's.
                let other = meet(node, at(to.ip(), 81));
                assert_eq!(other.outcome, Outcome::Refused, "{mode:?} {to}");
            }
            let (_, status) = world.agents[0].status(&["default/web"]).unwrap();
            assert_eq!(status.contains(WHY), mode == Mode::Ebpf, "{status}");
            // The cluster IP of the same Service stays where it was.
            vips(10).iter().for_each(|vip| by_socket(&pods[0], at(*vip, 80)));
            change("delete");
        }
    }
}
