//! The nftables dataplane against the real kernel, without packets: what it writes, finds, repairs and refuses.

use std::net::SocketAddr;
use std::sync::Arc;

use kube_lane::dataplane::nftables::{Nftables, Settings, cleanup};
use kube_lane::dataplane::{Batch, Dataplane};
use kube_lane::model::input::ServiceKey;
use kube_lane::model::plan::{FrontendAddress, NodePlan, Plan, Verdict};

use crate::plans::{
    EVERYTHING, Outside, RANGES, apply, in_namespace, listing, named, nft, node, opened, reached, rules,
    service, settings, slotless, sorted, with_affinity,
};

#[test]
fn what_nft_lists_nft_takes_back() {
    takes_back(false);
}

#[test]
fn with_counters_too() {
    takes_back(true);
}

fn takes_back(count_connections: bool) {
    in_namespace(move || {
        let mut dataplane = Nftables::open(Settings { count_connections, ..settings() }).unwrap();
        let long = |c: &str| c.repeat(63);
        let mut longest = Plan::clone(service(4, 2).1.as_deref().unwrap());
        longest.service = ServiceKey::new(&long("n"), &long("s"));
        longest.ports.iter_mut().for_each(|port| port.name = long("p").into());
        let longest = (longest.service.clone(), Some(Arc::new(longest)));
        let local = Outside { external: Verdict::Local, internal: Verdict::Local, ..EVERYTHING };
        let ranged = Outside { ranges: Some(RANGES), ..EVERYTHING };
        let services = vec![
            service(1, 5),
            service(2, 1),
            service(3, 0),
            longest,
            reached(5, 4, local),
            reached(6, 4, ranged),
            with_affinity(service(7, 3)),
        ];
        let outcome = apply(&mut dataplane, services.clone());
        assert!(outcome.failed.is_empty(), "{outcome:?}");
        let before = listing();
        let counted = if count_connections { " counter packets 0 bytes 0" } else { "" };
        assert!(
            before.contains(&format!(
                "10.96.0.1 . tcp . 80 . 4{counted} comment \"default/svc-1:http\" : 10.1.0.5 . 8080"
            )),
            "{before}"
        );
        for there in [
            "203.0.0.6 . tcp . 80 . 10.0.0.0/9 comment \"default/svc-6:http\"",
            "203.0.0.6 . tcp . 80 . 198.51.100.7 comment",
            "fd00:203::6 . tcp . 80 . fd00::/32 comment",
            &format!("203.0.0.5 . tcp . 80 . 1{counted} comment \"default/svc-5:http\" : 10.1.0.4 . 8080"),
        ] {
            assert!(before.contains(there), "{there}\n{before}");
        }
        nft(&["flush", "ruleset"], None);
        nft(&["-f", "-"], Some(&before));
        assert_eq!(sorted(&before), sorted(&listing()));
        let again =
            apply(&mut Nftables::open(Settings { count_connections, ..settings() }).unwrap(), services);
        assert_eq!((again.added, again.removed), (0, 0), "it is ours");
    });
}

/// The rules of a chain of the table of a family.
fn chain(family: &str, name: &str) -> String {
    nft(&["list", "chain", family, "kube-lane", name], None)
}

#[test]
fn a_family_without_pod_cidrs_has_no_detector_and_gets_one_when_they_are_known() {
    in_namespace(|| {
        let mut dataplane = opened();
        let with = |cidrs: &[&str]| NodePlan {
            pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            ..node()
        };
        let detects = |family: &str| {
            let chains = ["masq-cluster-ip", "masq-etp-local", "vip-etp-local", "np-etp-local"];
            let found = chains.map(|name| chain(family, name).contains("@pod-cidrs"));
            assert!(found.iter().all(|each| *each == found[0]), "{family}: {found:?}");
            found[0]
        };
        for (cidrs, expected) in [
            (&[][..], [false, false]),
            (&["10.244.1.0/24"], [true, false]),
            (&["10.244.1.0/24", "fd00:244::/64"], [true, true]),
            (&["10.244.2.0/24", "fd00:244::/64"], [true, true]),
            (&["fd00:244::/64"], [false, true]),
        ] {
            let batch = Batch { node: Some(with(cidrs)), sweep: true, ..Batch::default() };
            dataplane.apply(&batch).unwrap();
            assert_eq!(["ip", "ip6"].map(detects), expected, "{cidrs:?}");
            assert!(cidrs.iter().all(|cidr| listing().contains(cidr)));
        }
        // The next run keeps what it finds until it knows better.
        let mut second = opened();
        second.apply(&Batch::default()).unwrap();
        assert_eq!(["ip", "ip6"].map(detects), [false, true]);
        second.apply(&Batch { node: Some(with(&["10.244.1.0/24"])), ..Batch::default() }).unwrap();
        assert_eq!(["ip", "ip6"].map(detects), [true, true]);
        second
            .apply(&Batch { node: Some(with(&["10.244.1.0/24"])), sweep: true, ..Batch::default() })
            .unwrap();
        assert_eq!(["ip", "ip6"].map(detects), [true, false]);
    });
}

#[test]
fn a_second_start_settles_what_changed_meanwhile() {
    let first = [
        Outside { external: Verdict::Local, ranges: Some(RANGES), ..EVERYTHING },
        Outside { external: Verdict::Reject, ..EVERYTHING },
        Outside { internal: Verdict::Local, ranges: Some(&["10.0.0.0/8", "fd00::/16"]), ..EVERYTHING },
    ];
    // Ranges that overlap those that the kernel holds; endpoints that are fewer.
    let second = [
        Outside { ranges: Some(&["10.0.0.0/10", "10.64.0.0/10", "192.168.77.7/32"]), ..EVERYTHING },
        Outside { external: Verdict::Local, ..EVERYTHING },
        Outside { ranges: None, ..EVERYTHING },
    ];
    let services = |kinds: [Outside; 3], endpoints| -> Vec<_> {
        (1..).zip(kinds).map(|(number, kind)| reached(number, endpoints, kind)).collect()
    };
    let expected = in_namespace(move || {
        apply(&mut opened(), services(second, 5));
        listing()
    });
    in_namespace(move || {
        apply(&mut opened(), services(first, 9));
        let mut next = opened();
        // Before the sweep already: what belongs to a frontend is known as soon as the frontend is.
        next.apply(&Batch { services: services(second, 5), ..Batch::default() }).unwrap();
        assert_eq!(slotless(&listing(), "svc-"), slotless(&expected, "svc-"));
        apply(&mut next, services(second, 5));
        assert_eq!(slotless(&listing(), ""), slotless(&expected, ""));
        let outcome = apply(&mut opened(), services(second, 5));
        assert_eq!((outcome.added, outcome.removed), (0, 0));
    });
}

/// A Service with names as long as they get, so many ports, and so many endpoints behind each.
fn big(ports: u16, endpoints: std::ops::Range<u16>) -> (ServiceKey, Option<Arc<Plan>>) {
    let long = |c: &str| c.repeat(63);
    let service = ServiceKey::new(&long("n"), &long("s"));
    let endpoints: Vec<_> = endpoints.collect();
    let (_, template) = named("template", 7, &endpoints);
    let template = Plan::clone(template.as_deref().unwrap());
    let ports = template.ports.iter().flat_map(|template| {
        (0..ports).map(|i| {
            let mut port = template.clone();
            port.name = format!("{}{i:04}", "p".repeat(59)).into();
            for frontend in &mut port.frontends {
                match &mut frontend.at {
                    FrontendAddress::Vip(at) => at.port += i,
                    FrontendAddress::NodePort(at) => *at = 30000 + i,
                }
            }
            port
        })
    });
    let plan = Plan { service: service.clone(), ports: ports.collect(), ..template.clone() };
    (service, Some(Arc::new(plan)))
}

#[test]
fn a_change_of_a_big_service_costs_a_handful_of_elements() {
    in_namespace(|| {
        let mut dataplane = opened();
        let one = |services| Batch { services, ..Batch::default() };
        let outcome = apply(&mut dataplane, vec![big(1, 1..5001)]);
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
        // A slot of the VIP and one of the NodePort in each family; no other Service is a local one's neighbour.
        let outcome = dataplane.apply(&one(vec![big(1, 2..5002)])).unwrap();
        assert_eq!((outcome.added, outcome.removed), (4, 4));
        // The cost of one more includes its own hairpin element.
        let outcome = dataplane.apply(&one(vec![big(1, 2..5003)])).unwrap();
        assert_eq!((outcome.added, outcome.removed), (6, 0));
        let listed = nft(&["list", "map", "ip", "kube-lane", "endpoints"], None);
        assert_eq!(listed.matches(" . 8080").count(), 5001);

        let outcome = apply(&mut dataplane, vec![(big(1, 1..2).0, None), service(1, 1)]);
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
        let outcome = apply(&mut dataplane, vec![big(1000, 2..4)]);
        assert!(outcome.failed.is_empty() && outcome.added >= 16_000, "{outcome:?}");
        // One endpoint of a thousand ports: a slot each, and nothing else.
        let outcome = dataplane.apply(&one(vec![big(1000, 3..5)])).unwrap();
        assert_eq!((outcome.added, outcome.removed), (4002, 4002), "one hairpin a family besides");
        let before = listing();
        nft(&["flush", "ruleset"], None);
        nft(&["-f", "-"], Some(&before));
        assert_eq!(sorted(&before), sorted(&listing()));
    });
}

#[test]
fn the_number_of_rules_does_not_depend_on_the_services() {
    let count = |services: u16| {
        in_namespace(move || {
            let kinds = [service, |n, endpoints| with_affinity(service(n, endpoints))];
            let services: Vec<_> = (1..=services).map(|n| kinds[usize::from(n % 2)](n, 5)).collect();
            let last = services.last().unwrap().0.clone();
            apply(&mut opened(), services);
            let listing = listing();
            assert!(listing.contains(&format!("{last}:http")));
            rules(&listing)
        })
    };
    let few = count(10);
    assert!(few > 100, "{few}");
    assert_eq!(few, count(10_000));
}

#[test]
fn a_change_costs_the_same_whatever_there_is() {
    let cost = |services: u16, affinity: bool| {
        in_namespace(move || {
            let kind = |service| if affinity { with_affinity(service) } else { service };
            let mut dataplane = opened();
            apply(&mut dataplane, (1..=services).map(|n| kind(service(n, 5))).collect());
            let replaced = kind(named("svc-50", 50, &[1, 2, 3, 4, 9]));
            let outcome = dataplane.apply(&Batch { services: vec![replaced], ..Batch::default() }).unwrap();
            (outcome.messages, outcome.bytes, outcome.added, outcome.removed)
        })
    };
    let few = cost(100, false);
    // One slot of the VIP and one of the NodePort, in each family.
    assert_eq!((few.2, few.3), (4, 4));
    assert_eq!(few, cost(50_000, false));
    let few = cost(100, true);
    // Besides, a member in three sets.
    assert_eq!((few.2, few.3), (10, 10));
    assert_eq!(few, cost(10_000, true));
}

#[test]
fn a_second_start_changes_nothing_that_is_right() {
    in_namespace(|| {
        let services: Vec<_> = (1..=20).map(|n| service(n, n % 7)).collect();
        let mut first = opened();
        apply(&mut first, services.clone());
        // A history that leaves slots in another order than a fresh start would choose.
        apply(&mut first, vec![named("svc-20", 20, &[2, 3, 9, 11]), named("svc-19", 19, &[5])]);
        let before = sorted(&listing());
        drop(first);
        let mut second = opened();
        let mut services = services;
        services.truncate(18);
        services.extend([named("svc-20", 20, &[2, 3, 9, 11]), named("svc-19", 19, &[5])]);
        let outcome = apply(&mut second, services);
        assert_eq!((outcome.added, outcome.removed), (0, 0));
        assert_eq!(before, sorted(&listing()));
        // And the ledger is right: the next change is a small one.
        let outcome = second.apply(&Batch { services: vec![named("svc-19", 19, &[6])], ..Batch::default() });
        let outcome = outcome.unwrap();
        assert_eq!((outcome.added, outcome.removed), (4, 4), "a slot of each frontend, in each family");
    });
}

#[test]
fn what_is_stale_stays_until_the_sources_have_synced() {
    in_namespace(|| {
        apply(&mut opened(), vec![service(1, 3), service(2, 3)]);
        let mut second = opened();
        let early = Batch { node: None, services: vec![service(1, 3)], sweep: false };
        let outcome = second.apply(&early).unwrap();
        assert_eq!((outcome.added, outcome.removed), (0, 0));
        assert!(listing().contains("default/svc-2:http"));
        assert!(listing().contains("192.168.77.1"), "the node's own elements stay as well");
        let outcome = apply(&mut second, vec![]);
        assert!(outcome.removed > 0 && outcome.added == 0, "{outcome:?}");
        assert!(!listing().contains("default/svc-2:http"));
        let expected = in_namespace(|| {
            apply(&mut opened(), vec![service(1, 3)]);
            sorted(&listing())
        });
        assert_eq!(sorted(&listing()), expected);
    });
}

#[test]
fn a_service_that_the_kernel_refuses_is_named_and_left_out() {
    in_namespace(|| {
        let mut dataplane = opened();
        apply(&mut dataplane, vec![service(2, 3)]);
        // An IPv6 backend in an IPv4 map: data of the wrong length.
        let wrong = |number: u16| {
            let (key, plan) = service(number, 3);
            let mut plan = Plan::clone(plan.as_deref().unwrap());
            plan.ports[0].backends[1].address = "[fd00::1]:80".parse::<SocketAddr>().unwrap().into();
            (key, Some(Arc::new(plan)))
        };
        let outcome = apply(&mut dataplane, vec![service(1, 3), wrong(2), wrong(3), service(4, 3)]);
        let failed: Vec<_> = outcome.failed.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(failed, ["default/svc-2", "default/svc-3"]);
        assert!(outcome.failed[0].1.contains("EINVAL"), "{:?}", outcome.failed);
        let listing = listing();
        for (service, there) in [(1, true), (2, true), (3, false), (4, true)] {
            assert_eq!(listing.contains(&format!("default/svc-{service}:http")), there, "svc-{service}");
        }
        assert!(apply(&mut dataplane, vec![service(2, 5), service(3, 1)]).failed.is_empty());
    });
}

#[test]
fn foreign_changes_are_noticed_and_repaired() {
    in_namespace(|| {
        let mut dataplane = opened();
        apply(&mut dataplane, vec![service(1, 5), service(2, 0)]);
        let right = sorted(&listing());
        assert!(dataplane.repair().unwrap().is_none(), "our own commits are not foreign");
        nft(&["add", "table", "ip", "somebody-else"], None);
        assert!(dataplane.repair().unwrap().is_none(), "other tables do not concern us");
        nft(&["delete", "table", "ip", "somebody-else"], None);
        let key = "{ 10.96.0.1 . tcp . 80 . 0 }";
        let other = "{ 10.96.0.1 . tcp . 80 . 0 : 10.9.9.9 . 99 }";
        let damages: &[&[&[&str]]] = &[
            &[&["delete", "element", "ip", "kube-lane", "endpoints", key]],
            &[
                &["delete", "element", "ip", "kube-lane", "endpoints", key],
                &["add", "element", "ip", "kube-lane", "endpoints", other],
            ],
            &[&["add", "element", "ip", "kube-lane", "vips", "{ 10.96.0.77 . tcp . 80 }"]],
            &[&["flush", "set", "ip6", "kube-lane", "cluster-ips"]],
            &[&["flush", "set", "ip", "kube-lane", "service-cidrs"]],
            &[&["flush", "chain", "ip", "kube-lane", "services"]],
            &[&["add", "rule", "ip", "kube-lane", "services", "counter"]],
            &[&["add", "chain", "ip", "kube-lane", "theirs"]],
            &[&["add", "set", "ip6", "kube-lane", "theirs", "{ type ipv6_addr; }"]],
            &[&["delete", "table", "ip6", "kube-lane"]],
            &[&["flush", "ruleset"]],
        ];
        for damage in damages {
            damage.iter().for_each(|command| drop(nft(command, None)));
            assert_ne!(sorted(&listing()), right, "{damage:?}");
            let outcome = dataplane.repair().unwrap().expect("noticed");
            assert!(outcome.failed.is_empty());
            assert_eq!(sorted(&listing()), right, "{damage:?}");
            assert!(dataplane.repair().unwrap().is_none(), "the repair itself is not foreign");
        }
    });
}

#[test]
fn a_disagreement_is_settled_by_reading_back() {
    in_namespace(|| {
        let mut dataplane = opened();
        apply(&mut dataplane, vec![service(1, 5), service(2, 5)]);
        nft(&["delete", "element", "ip", "kube-lane", "endpoints", "{ 10.96.0.1 . tcp . 80 . 4 }"], None);
        // Needs to remove the element that is gone already.
        let outcome = apply(&mut dataplane, vec![service(1, 4)]);
        assert!(outcome.failed.is_empty(), "{outcome:?}");
        let after = sorted(&listing());
        let expected = in_namespace(|| {
            apply(&mut opened(), vec![service(1, 4), service(2, 5)]);
            sorted(&listing())
        });
        assert_eq!(after, expected);
    });
}

#[test]
fn two_services_swap_their_addresses_in_one_batch() {
    in_namespace(|| {
        let mut dataplane = opened();
        apply(&mut dataplane, vec![named("a", 1, &[1]), named("b", 2, &[2])]);
        let outcome = apply(&mut dataplane, vec![named("a", 2, &[1]), named("b", 1, &[2])]);
        assert!(outcome.failed.is_empty(), "{outcome:?}");
        let expected = in_namespace(|| {
            apply(&mut opened(), vec![named("a", 2, &[1]), named("b", 1, &[2])]);
            sorted(&listing())
        });
        assert_eq!(sorted(&listing()), expected);
    });
}

#[test]
fn the_nodes_own_elements_follow() {
    in_namespace(|| {
        let mut dataplane = opened();
        apply(&mut dataplane, vec![]);
        let mut node = node();
        node.nodeport_addresses = vec!["192.168.77.9".parse().unwrap()];
        node.service_cidrs.push("10.112.0.0/16".parse().unwrap());
        dataplane.apply(&Batch { node: Some(node), ..Batch::default() }).unwrap();
        let listing = listing();
        assert!(listing.contains("{ 192.168.77.9 }") && !listing.contains("192.168.77.1"), "{listing}");
        assert!(listing.contains("10.96.0.0-10.112.255.255"), "{listing}");
        assert!(!listing.contains("fd00:77::1"));
        // One of two ranges without a gap goes.
        dataplane.apply(&Batch { node: Some(self::node()), ..Batch::default() }).unwrap();
        let expected = in_namespace(|| {
            apply(&mut opened(), vec![]);
            sorted(&self::listing())
        });
        assert_eq!(sorted(&self::listing()), expected);
    });
}

#[test]
fn cleanup_leaves_nothing_of_ours_and_everything_else() {
    in_namespace(|| {
        nft(&["-f", "-"], Some("table ip kube-proxy {\nchain x {\naccept\n}\n}\n"));
        let before = listing();
        cleanup().expect("cleanup of nothing");
        apply(&mut opened(), vec![service(1, 5)]);
        assert_ne!(listing(), before);
        cleanup().unwrap();
        assert_eq!(listing(), before);
    });
}

#[test]
fn a_load_of_many_services_goes_in_and_out() {
    in_namespace(|| {
        let mut dataplane = opened();
        let all: Vec<_> = (1..=2768).map(|n| service(n, 9)).collect();
        let outcome = apply(&mut dataplane, all.clone());
        assert!(outcome.failed.is_empty() && outcome.added > 100_000, "{}", outcome.added);
        assert!(outcome.messages < outcome.added / 50, "{} messages", outcome.messages);
        let gone = all.into_iter().map(|(key, _)| (key, None)).collect();
        let outcome = apply(&mut dataplane, gone);
        assert!(outcome.failed.is_empty() && outcome.added == 0);
        let expected = in_namespace(|| {
            apply(&mut opened(), vec![]);
            sorted(&listing())
        });
        assert_eq!(sorted(&listing()), expected);
    });
}
