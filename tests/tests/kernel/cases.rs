//! Inputs from the field that went wrong elsewhere, with real packets: the right outcome of each.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use kube_lane_lab::{Dial, Filter, Host, Lab, Outcome, Proto, topology};
use serde_json::json;

use super::plans::nft;
use super::world::{
    Mode, QUIET, World, answered, answered_in, at, endpoints, serving, until, until_met, vip, vips, web_ports,
};

/// A load balancer's address.
fn lb(number: usize) -> SocketAddr {
    at(topology::vip_cidrs()[0].iter().nth(number).unwrap(), 80)
}

/// `nft` on a node.
fn nft_on(node: &Host, arguments: &[&str], input: Option<&str>) -> String {
    let arguments: Vec<_> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    let input = input.map(str::to_owned);
    node.run(move || {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        nft(&arguments, input.as_deref())
    })
    .unwrap()
}

fn dial_from(host: &Host, from: IpAddr, to: SocketAddr) -> Outcome {
    let dial = Dial::new(Proto::Tcp, to).from((from, 0).into()).timeout(QUIET);
    host.dial_with(dial).unwrap()
}

/// The elements of a set, each in a line, in order.
fn elements(listing: &str) -> Vec<String> {
    let inside = listing.split_once("elements = {").and_then(|(_, rest)| rest.split_once('}'));
    let mut elements: Vec<_> = inside
        .map(|(elements, _)| elements.split(',').map(|e| e.split_whitespace().collect::<Vec<_>>().join(" ")))
        .into_iter()
        .flatten()
        .collect();
    elements.sort();
    elements
}

#[test]
fn source_ranges_of_one_address_load_again_as_they_were() {
    let mut world = World::new(&[]);
    let node = &Host::clone(world.lab.node(0));
    let outside = &Host::clone(world.lab.outside());
    let (pod, _echoes) = serving(&world.lab, 0, "office");
    let [lb4, lb6] = topology::vip_cidrs().map(|cidr| cidr.iter().nth(21).unwrap());
    let inside: [IpAddr; 2] = ["198.51.100.7", "203.0.113.200"].map(|ip| ip.parse().unwrap());
    let between: IpAddr = "203.0.113.100".parse().unwrap();
    let inside6: [IpAddr; 2] = ["2001:db8:5::7", "2001:db8:5::ffff"].map(|ip| ip.parse().unwrap());
    let between6: IpAddr = "2001:db8:5::100".parse().unwrap();
    for ip in inside.into_iter().chain([between]).chain(inside6).chain([between6]) {
        outside.add_address(ip).unwrap();
        node.route(ip.into(), if ip.is_ipv4() { outside.v4() } else { outside.v6() }).unwrap();
    }
    let ranges: Vec<_> = inside.into_iter().chain(inside6).map(ipnetwork::IpNetwork::from).collect();
    let spec = json!({
        "type": "LoadBalancer", "loadBalancerSourceRanges": ranges,
        "status": {"loadBalancer": {"ingress": [{"ip": lb4}, {"ip": lb6}]}},
    });
    world.put_spec("office", &web_ports(), 21, &endpoints(&[&pod]), spec);
    for (from, to) in [(inside[0], lb4), (inside6[0], lb6)] {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !answered(&dial_from(outside, from, at(to, 80))) {
            assert!(Instant::now() < deadline, "{from} is let in");
        }
    }
    let check = |when: &str| {
        for (ranges, between, to) in [(inside, between, lb4), (inside6, between6, lb6)] {
            for from in ranges {
                assert!(answered(&dial_from(outside, from, at(to, 80))), "{when}: {from} is in a range");
            }
            let met = dial_from(outside, between, at(to, 80));
            assert_eq!(met, Outcome::TimedOut, "{when}: {between} is in none");
        }
    };
    check("as programmed");
    let families = ["ip", "ip6"];
    let listed = || {
        families.map(|family| elements(&nft_on(node, &["list", "set", family, "kube-lane", "ranges"], None)))
    };
    let before = listed();
    assert_eq!(before.each_ref().map(Vec::len), [4, 4], "two clients, two protocols: {before:?}");

    // Loaded again while the agent stands still: what was printed is what was there.
    let ruleset = nft_on(node, &["list", "ruleset"], None);
    world.agents[0].process().signal(nix::sys::signal::Signal::SIGSTOP).unwrap();
    nft_on(node, &["-f", "-"], Some(&format!("flush ruleset\n{ruleset}")));
    check("loaded again");
    assert_eq!(listed(), before);
    world.agents[0].process().signal(nix::sys::signal::Signal::SIGCONT).unwrap();

    // While it runs; and with what an element without an end made of it: one range of all between.
    let wrong = format!(
        "flush set ip kube-lane ranges\nadd element ip kube-lane ranges \
         {{ {lb4} . tcp . 80 . 198.51.100.7-203.0.113.200 }}\n"
    );
    for load in [format!("flush ruleset\n{ruleset}"), wrong] {
        nft_on(node, &["-f", "-"], Some(&load));
        let deadline = Instant::now() + Duration::from_secs(15);
        while listed() != before {
            assert!(Instant::now() < deadline, "{:?}", listed());
            std::thread::sleep(Duration::from_millis(50));
        }
        check("repaired");
    }
    // Other Services are programmed as ever.
    world.put("other", &web_ports(), 22, &endpoints(&[&pod]));
    assert!(answered(&until(outside, Proto::Tcp, vip(22), answered)));
}

/// Pods on a bridge as CNI's plugin `bridge` has them, and whom their Service shows as the client.
fn on_a_bridge(detector: &[&str]) {
    let lab = Lab::builder().nodes(2).switch(true).build().unwrap();
    let world = World::in_lab(lab, Mode::Nftables, detector);
    let (client, _clients) = serving(&world.lab, 0, "client");
    let (near, _near) = serving(&world.lab, 0, "near");
    let (far, _far) = serving(&world.lab, 1, "far");
    let gateway = topology::pod_cidrs(0).map(|cidr| cidr.iter().nth(1).unwrap());
    let seen = |host: &Host, to: SocketAddr| match until(host, Proto::Tcp, to, answered) {
        Outcome::Answered { seen, .. } => seen.ip(),
        outcome => panic!("{} to {to}: {outcome}", host.name()),
    };
    world.put("near", &web_ports(), 70, &endpoints(&[&near]));
    world.put("far", &web_ports(), 71, &endpoints(&[&far]));
    let spec = json!({"externalTrafficPolicy": "Local", "type": "LoadBalancer",
        "status": {"loadBalancer": {"ingress": [{"ip": lb(72).ip()}]}}});
    world.put_spec("local", &[web_ports()[0].clone().node_port(30132)], 72, &endpoints(&[&near]), spec);
    for (family, gateway) in gateway.into_iter().enumerate() {
        let own = |host: &Host| host.addresses()[family];
        let vip = |number| at(vips(number)[family], 80);
        assert_eq!(seen(&client, vip(70)), own(&client), "over the bridge");
        assert_eq!(seen(&near, vip(70)), gateway, "to itself");
        assert_eq!(seen(&client, vip(71)), own(&client), "through the node");
        assert_eq!(seen(world.lab.outside(), vip(70)), gateway, "who is no pod is masqueraded");
    }
    assert_eq!(seen(&client, lb(72)), client.v4(), "policy Local shows its clients");
    assert_eq!(seen(world.lab.outside(), at(world.lab.node(0).v4(), 30132)), world.lab.outside().v4());
}

#[test]
fn a_pod_is_seen_as_itself_over_its_bridge_told_by_the_bridge() {
    on_a_bridge(&["--detect-local-mode", "BridgeInterface", "--pod-bridge-interface", "cni0"]);
}

#[test]
fn a_pod_is_seen_as_itself_over_its_bridge_told_by_a_prefix() {
    on_a_bridge(&["--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", "cni"]);
}

#[test]
fn a_pod_is_seen_as_itself_over_its_bridge_told_by_its_address() {
    let cidrs = topology::cluster_cidrs().map(|cidr| cidr.to_string()).join(",");
    on_a_bridge(&["--cluster-cidr", &cidrs]);
}

#[test]
fn a_service_within_a_bridge_that_no_rule_sees_is_warned_of_and_answered_at_the_socket() {
    let detector = ["--detect-local-mode", "BridgeInterface", "--pod-bridge-interface", "cni0"];
    for mode in Mode::ALL {
        let lab = Lab::builder().nodes(2).switch(false).build().unwrap();
        let world = World::in_lab(lab, mode, &detector);
        let (client, _clients) = serving(&world.lab, 0, "client");
        let (near, _near) = serving(&world.lab, 0, "near");
        let (far, _far) = serving(&world.lab, 1, "far");
        world.put("far", &web_ports(), 71, &endpoints(&[&far]));
        world.put("near", &web_ports(), 70, &endpoints(&[&near]));
        let met = until_met(&client, vip(71), answered_in(mode));
        assert!(answered_in(mode)(&met), "{mode:?}: {met:?}");
        match mode {
            Mode::Nftables => {
                let outcome = client.dial_with(Dial::new(Proto::Tcp, vip(70)).timeout(QUIET)).unwrap();
                assert!(!answered(&outcome), "the answer passes the bridge as it is: {outcome}");
            }
            Mode::Ebpf => {
                let met = until_met(&client, vip(70), answered_in(mode));
                assert!(answered_in(mode)(&met), "{met:?}");
            }
        }
        let log = std::fs::read_to_string(world.log(0)).unwrap();
        let said = log.lines().filter(|line| line.contains("bridge-nf-call-iptables=1")).count();
        assert_eq!(said, 1, "{log}");
    }
}

/// Sends a segment that answers no connection: SYN and ACK, from a port that nobody dialled.
fn send_stray_segment(from: &Host, to: std::net::Ipv4Addr) {
    use std::os::fd::AsRawFd as _;

    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket};
    let IpAddr::V4(source) = from.v4() else { unreachable!("v4() is IPv4") };
    from.run(move || {
        let mut segment = [0_u8; 20];
        segment[..2].copy_from_slice(&8080_u16.to_be_bytes());
        segment[2..4].copy_from_slice(&40_000_u16.to_be_bytes());
        (segment[12], segment[13]) = (5 << 4, 0x12);
        let pseudo = [&source.octets()[..], &to.octets(), &[0, 6, 0, 20]].concat();
        let words = pseudo.chunks(2).chain(segment.chunks(2));
        let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        segment[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp);
        let raw = raw.unwrap();
        let address = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
        sendto(raw.as_raw_fd(), &segment, &address, nix::sys::socket::MsgFlags::empty()).unwrap();
    })
    .unwrap();
}

#[test]
fn what_belongs_to_no_connection_is_dropped_where_asked_for() {
    for (arguments, passes) in [(&[][..], true), (&["--drop-invalid"], false)] {
        let world = World::new(arguments);
        let (pod, _echoes) = serving(&world.lab, 0, "pod");
        world.put("web", &web_ports(), 70, &endpoints(&[&pod]));
        let outside = world.lab.outside();
        assert!(answered(&until(outside, Proto::Tcp, vip(70), answered)));
        let filter = Filter::new().from(pod.v4()).on(topology::UPLINK).leaving().port(40_000);
        let sniff = world.lab.node(0).sniff(filter).unwrap();
        let IpAddr::V4(to) = outside.v4() else { unreachable!("v4() is IPv4") };
        (0..5).for_each(|_| send_stray_segment(&pod, to));
        // What is sent after it has passed the same rules.
        assert!(answered(&pod.dial_with(Dial::new(Proto::Tcp, vip(70))).unwrap()));
        assert_eq!(sniff.count().unwrap(), if passes { 5 } else { 0 }, "{arguments:?}");
        assert!(answered(&until(outside, Proto::Udp, vip(70), answered)), "{arguments:?}");
    }
}
