//! What a change makes of what is remembered: of endpoints, timeouts, policies, agents, the ruleset.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use kube_lane::dataplane::{Batch, Dataplane};
use kube_lane::model::input::{Family, Protocol, ServiceKey};
use kube_lane::model::plan::{Frontend, Plan, Verdict};
use kube_lane_lab::{Dial, Proto, topology};

use super::{HOUR, Wanted, World, at, elements, lb, nodeport, of, sole, vip, who};
use crate::plans::nft;

/// Such as `59m58s120ms`.
fn is_time(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_digit()) && word.ends_with('s') && !word.contains(['.', ':'])
}

/// A listing without the clients that are remembered: of what has gone, they stay until their time is over.
fn without_clients(listing: &str) -> Vec<String> {
    let mut lines = String::new();
    let mut is_clients = false;
    for line in listing.lines() {
        is_clients |= line.trim_start().starts_with("map affinity-clients");
        if !is_clients {
            lines.push_str(line);
            lines.push('\n');
        }
        is_clients &= line.trim() != "}";
    }
    without_time(&lines)
}

/// A listing without the order of elements and the times that pass.
fn without_time(listing: &str) -> Vec<String> {
    let words = listing.split_whitespace().map(|word| word.trim_end_matches(','));
    let mut words: Vec<_> = words.filter(|word| !is_time(word)).map(str::to_owned).collect();
    words.sort();
    words
}

#[test]
fn those_of_a_backend_that_leaves_move_and_the_others_stay() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    let sources: Vec<IpAddr> = (100..140).map(|n| IpAddr::from([192, 168, 77, n])).collect();
    sources.iter().for_each(|source| world.lab.outside().add_address(*source).unwrap());
    let ask = |world: &World| -> BTreeMap<IpAddr, String> {
        let by = |source: &IpAddr| {
            let dial = Dial::new(Proto::Tcp, vip(Family::V4)).from((*source, 0).into());
            let outcome = world.lab.outside().dial_with(dial).unwrap();
            (*source, outcome.by().unwrap_or_else(|| panic!("{outcome}")).to_owned())
        };
        sources.iter().map(by).collect()
    };
    let before = ask(&world);
    assert_eq!(before, ask(&world));
    let leaves = before.values().filter(|by| *by == "pod3").count();
    assert!(leaves > 0);
    world.apply(&Wanted::new(HOUR).among(&[0, 1, 2]));
    let held = world.remembered(Protocol::Tcp);
    assert_eq!(held.len(), sources.len() - leaves);
    let after = ask(&world);
    for (source, by) in &before {
        if by == "pod3" {
            assert_ne!(after[source], "pod3");
        } else {
            assert_eq!(&after[source], by, "{source}");
        }
    }
    // It comes back: nobody is led to it because of old times, and no client leaves another backend for it.
    world.apply(&Wanted::new(HOUR));
    assert_eq!(ask(&world), after);
}

#[test]
fn another_timeout_holds_from_the_next_connection_on() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    let client = world.lab.node(0).add_pod("client").unwrap();
    let first = who(&client, Proto::Tcp, vip(Family::V4));
    let lives = |world: &World| world.remembered(Protocol::Tcp)[&client.v4().to_string()].1;
    for timeout in [2 * HOUR, 60, 20] {
        let before = lives(&world);
        world.apply(&Wanted::new(timeout));
        assert!((before - 30.0..=before).contains(&lives(&world)), "{timeout}: {before} {}", lives(&world));
        assert_eq!(who(&client, Proto::Tcp, nodeport(Family::V4)), first);
        let (now, most) = (lives(&world), f64::from(timeout));
        assert!((most - 15.0..=most).contains(&now), "{timeout}: {now}");
        let chains = format!("chain remember-{timeout} ");
        assert!(world.listing().contains(&chains));
    }
    assert!(!world.listing().contains("remember-3600"), "no port has it any more");
}

#[test]
fn a_new_start_keeps_what_is_remembered() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    let client = world.lab.node(0).add_pod("client").unwrap();
    let first = who(&client, Proto::Tcp, vip(Family::V4));
    let before = world.listing();
    world.restart();
    let outcome = world.apply(&Wanted::new(HOUR));
    assert_eq!((outcome.added, outcome.removed), (0, 0));
    assert_eq!(without_time(&before), without_time(&world.listing()));
    assert_eq!(sole(&client, Proto::Tcp, nodeport(Family::V4)), Some(first.clone()));
    // A timeout and an endpoint that changed while nobody looked.
    world.restart();
    let gone: usize = first.trim_start_matches("pod").parse().unwrap();
    let others: Vec<_> = (0..4).filter(|i| *i != gone).collect();
    world.apply(&Wanted::new(60).among(&others));
    assert!(world.remembered(Protocol::Tcp).is_empty());
    let second = sole(&client, Proto::Tcp, vip(Family::V4)).expect("another");
    assert_ne!(second, first);
    assert!(world.remembered(Protocol::Tcp)[&client.v4().to_string()].1 <= 60.0);
    // And affinity that was switched off while nobody looked leaves nothing.
    world.restart();
    world.apply(&Wanted { timeout: None, ..Wanted::new(1) });
    assert!(has_no_affinity(&world), "{}", world.listing());
}

/// Whether no port has affinity, but for the clients whose time is not over yet.
fn has_no_affinity(world: &World) -> bool {
    let is_empty = |map| elements(map).is_empty();
    !world.listing().contains("chain remember-") && is_empty("affinity-members") && is_empty("affinity-ids")
}

#[test]
fn affinity_is_switched_on_and_off_in_place() {
    let mut world = World::new();
    let off = Wanted { timeout: None, ..Wanted::new(1) };
    world.apply(&off);
    let bare = world.listing();
    let client = world.lab.node(0).add_pod("client").unwrap();
    let load = |world: &World| {
        let dial = Dial::new(Proto::Tcp, vip(Family::V4));
        kube_lane_lab::Load::start(world.lab.node(0), dial, 4, Duration::from_millis(1)).unwrap()
    };
    let running = load(&world);
    for _ in 0..3 {
        assert_eq!(sole(&client, Proto::Tcp, vip(Family::V4)), None);
        world.apply(&Wanted::new(HOUR));
        assert!(sole(&client, Proto::Tcp, vip(Family::V4)).is_some());
        world.apply(&off);
        assert_eq!(without_clients(&bare), without_clients(&world.listing()));
    }
    for round in 0..30 {
        for pods in [[0, 1], [2, 3]] {
            world.apply(&Wanted::new(HOUR).among(&pods));
            let backends = pods.map(|i| world.pods[i].0.v4().to_string());
            let held = world.remembered(Protocol::Tcp);
            assert!(held.values().all(|(backend, _)| backends.contains(backend)), "{held:?}");
        }
        if round % 5 == 0 {
            world.apply(&off);
        }
    }
    let report = running.stop();
    assert_eq!(report.tally.failures(), 0, "{report:?}");
    let plan = world.plan(&off);
    let gone = Batch { services: vec![(plan.service.clone(), None)], ..Batch::default() };
    world.apply(&Wanted::new(HOUR));
    world.dataplane.apply(&gone).unwrap();
    assert!(has_no_affinity(&world), "{}", world.listing());
}

#[test]
fn a_policy_that_changes_takes_along_what_is_remembered() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR).among(&[0, 1]));
    let outside = |world: &World| sole(world.lab.outside(), Proto::Tcp, nodeport(Family::V4)).expect("one");
    let first = outside(&world);
    let local = Wanted { local: vec![0, 1], external: Verdict::Local, ..Wanted::new(HOUR).among(&[0, 1]) };
    for wanted in [local, Wanted::new(HOUR), Wanted::new(HOUR).among(&[0, 1])] {
        world.apply(&wanted);
        assert_eq!(outside(&world), first);
    }
}

#[test]
fn what_nft_lists_with_affinity_nft_takes_back() {
    let mut world = World::new();
    let mixed = Wanted { local: vec![0, 1], external: Verdict::Local, ..Wanted::new(HOUR) };
    world.apply(&mixed);
    let plan = world.plan(&Wanted::new(10800));
    let mut odd = Plan::clone(&plan);
    odd.service = ServiceKey::new(&"n".repeat(63), &"s".repeat(63));
    for port in &mut odd.ports {
        port.name = "Ä odd\"name".repeat(9).into();
        port.frontends = [Frontend::nodeport(30081, Verdict::Cluster)].into();
    }
    let odd = (odd.service.clone(), Some(Arc::new(odd)));
    let outcome = world.dataplane.apply(&Batch { services: vec![odd], ..Batch::default() }).unwrap();
    assert!(outcome.failed.is_empty(), "{outcome:?}");
    who(world.lab.outside(), Proto::Tcp, lb(Family::V4));
    who(world.lab.outside(), Proto::Udp, nodeport(Family::V6));
    let before = world.listing();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &before).unwrap();
    nft(&["flush", "ruleset"], None);
    nft(&["-f", &file.path().to_string_lossy()], None);
    assert_eq!(without_time(&before), without_time(&world.listing()));
    // Somebody else's flush is repaired; what was remembered went with it.
    world.dataplane.repair().unwrap();
    nft(&["flush", "ruleset"], None);
    assert!(world.dataplane.repair().unwrap().is_some_and(|outcome| outcome.failed.is_empty()));
    assert!(sole(world.lab.outside(), Proto::Tcp, lb(Family::V4)).is_some());
}

#[test]
fn a_change_costs_a_few_elements_whatever_is_remembered() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    let client = world.lab.node(0).add_pod("client").unwrap();
    let first = who(&client, Proto::Tcp, vip(Family::V4));
    let gone = (0..4).find(|i| format!("pod{i}") != first).unwrap();
    let others: Vec<_> = (0..4).filter(|i| *i != gone).collect();
    let outcome = world.apply(&Wanted::new(HOUR).among(&others));
    // For each of four ports a member, in three sets, and for each of three frontends: at most the last takes the gap and one
    // class goes.
    assert!(outcome.removed <= 4 * (3 + 3 * 3) && outcome.added <= 4 * 3, "{outcome:?}");
    assert_eq!(world.remembered(Protocol::Tcp).len(), 1);
}

#[test]
fn a_service_whose_objects_the_kernel_refuses_is_named_and_left_out() {
    let mut world = World::new();
    let mixed = Wanted { local: vec![0, 1], external: Verdict::Local, ..Wanted::new(HOUR) };
    let mut wrong = Plan::clone(&world.plan(&mixed));
    wrong.service = ServiceKey::new("default", "wrong");
    for port in &mut wrong.ports {
        // An address of the other family: an element of the wrong length.
        let stranger = if port.family == Family::V4 { Family::V6 } else { Family::V4 };
        port.local_backends[0].address = at(&world.pods[0].0, stranger, 8080);
        let address = of(port.family, topology::service_cidrs().map(|cidr| cidr.iter().nth(11).unwrap()));
        port.frontends = [Frontend::cluster_ip(SocketAddr::new(address, 80), Verdict::Local)].into();
    }
    let good = world.plan(&Wanted::new(HOUR));
    let services =
        vec![(wrong.service.clone(), Some(Arc::new(wrong))), (good.service.clone(), Some(good.clone()))];
    let moved = Wanted { timeout: None, ..Wanted::new(1) };
    world.apply(&moved);
    let outcome = world.dataplane.apply(&Batch { services, ..Batch::default() }).unwrap();
    let failed: Vec<_> = outcome.failed.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(failed, ["default/wrong"], "{outcome:?}");
    assert!(sole(world.lab.outside(), Proto::Tcp, vip(Family::V4)).is_some());
    let listing = world.listing();
    assert!(listing.contains("\"default/web:http\"") && !listing.contains("default/wrong"), "{listing}");
}

#[test]
fn what_is_sent_again_to_a_backend_that_left_does_not_lead_back_there() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    world.pods.iter().for_each(|(_, echoes)| echoes[1].pause());
    let client = world.lab.node(0).add_pod("client").unwrap();
    let dial = Dial::new(Proto::Udp, vip(Family::V4)).timeout(Duration::from_millis(200));
    let mut unanswered = client.flow(dial).unwrap();
    assert_eq!(unanswered.ask(), kube_lane_lab::Outcome::TimedOut);
    let (backend, _) = world.remembered(Protocol::Udp).into_values().next().expect("the first packet counts");
    let others: Vec<_> = (0..4).filter(|i| world.pods[*i].0.v4().to_string() != backend).collect();
    assert_eq!(others.len(), 3);
    world.apply(&Wanted::new(HOUR).among(&others));
    for _ in 0..3 {
        assert_eq!(unanswered.ask(), kube_lane_lab::Outcome::TimedOut);
        assert_eq!(world.remembered(Protocol::Udp).len(), 0);
    }
}
