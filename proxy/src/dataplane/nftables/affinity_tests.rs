//! Tests of session affinity's objects: what a change makes of them, and which maps it has looked through.

use std::net::SocketAddr;

use super::super::kernel::Empty;
use super::super::observe::Found;
use super::*;
use crate::model::input::ServiceKey;

fn backend(n: u8) -> Backend {
    Backend { address: SocketAddr::from(([10, 1, 0, n], 8080)).into(), local: false }
}

/// A port with cluster IP and NodePort; `verdicts` are theirs.
fn port(timeout: u32, verdicts: [Verdict; 2], cluster: &[u8], local: &[u8]) -> PortPlan {
    let vip = SocketAddr::from(([10, 96, 0, 1], 80));
    PortPlan {
        affinity: NonZeroU32::new(timeout),
        backends: cluster.iter().copied().map(backend).collect(),
        local_backends: local.iter().copied().map(backend).collect(),
        frontends: [Frontend::cluster_ip(vip, verdicts[0]), Frontend::nodeport(30080, verdicts[1])].into(),
        ..PortPlan::new(Family::V4, Protocol::Tcp, "http")
    }
}

fn plan(port: PortPlan) -> Arc<Plan> {
    let service = ServiceKey::new("default", "web");
    Arc::new(Plan::new(service, [port]))
}

fn single(timeout: u32, backends: &[u8]) -> Arc<Plan> {
    plan(port(timeout, [Verdict::Cluster; 2], backends, &[]))
}

fn mixed(timeout: u32, cluster: &[u8], local: &[u8]) -> Arc<Plan> {
    plan(port(timeout, [Verdict::Cluster, Verdict::Local], cluster, local))
}

fn change(previous: Option<&Arc<Plan>>, next: Option<&Arc<Plan>>) -> Change {
    Change::between(previous, next, &Empty::default())
}

fn names(objects: &[Object]) -> Vec<String> {
    objects.iter().map(Object::to_string).collect()
}

fn sources(change: &Change) -> Vec<String> {
    change.reviews.iter().flat_map(|review| names(&review.sources)).collect()
}

#[test]
fn a_port_with_one_set_has_two_chains_and_a_map() {
    let change = change(None, Some(&single(10, &[1, 2])));
    let names = names(&change.created);
    let expected = [
        "aff/default/web/tcp/http",
        "aff-learn/default/web/tcp/http",
        "aff/default/web/tcp/http/8080",
        "aff-members/default/web/tcp/http",
    ];
    assert_eq!(names, expected);
    assert_eq!(change.rules.iter().map(|(_, chain)| chain.rules.len()).sum::<usize>(), 2);
    let elements: Vec<_> =
        change.added.iter().map(|e| format!("{} {:?}", e.place, e.data.as_ref().unwrap())).collect();
    assert_eq!(
        elements,
        [
            "aff { 10.96.0.1 . 6 . 80 } jump aff/default/web/tcp/http",
            "aff-learn { 10.96.0.1 . 6 . 80 } goto aff-learn/default/web/tcp/http",
            "np-aff { 6 . 30080 } jump aff/default/web/tcp/http",
            "np-aff-learn { 6 . 30080 } goto aff-learn/default/web/tcp/http",
        ]
    );
    assert_eq!(change.members[0].2, [1, 2].map(|n| backend(n).address));
    assert!(change.reviews.is_empty());
}

#[test]
fn rules_do_not_depend_on_endpoints() {
    let backends: Vec<_> = (0..250).collect();
    let (before, after) = (single(10, &backends), single(10, &backends[1..]));
    let change = change(Some(&before), Some(&after));
    assert_eq!(sources(&change), ["aff/default/web/tcp/http/8080"]);
    assert_eq!(change.members[0].1.as_deref(), Some(&[backend(0).address][..]));
    assert_eq!(Change { reviews: vec![], members: vec![], ..change }, Change::default());
    let more = super::Change::between(Some(&after), Some(&before), &Empty::default());
    assert_eq!(more.members[0].2, [backend(0).address]);
    assert_eq!(
        Change { members: vec![], ..more },
        Change::default(),
        "nobody is remembered wrongly because of a new endpoint"
    );
}

#[test]
fn a_port_with_both_sets_learns_by_membership() {
    let first = mixed(10, &[1, 2], &[1]);
    let made = change(None, Some(&first));
    assert_eq!(made.created.len(), 2 + 2 + 2 + 1);
    assert_eq!(made.members.len(), 2);
    let places: Vec<_> = made.added.iter().map(|e| e.place.to_string()).collect();
    assert!(places.contains(&"np-aff-local { 6 . 30080 }".to_owned()), "{places:?}");
    let joined = change(Some(&first), Some(&mixed(10, &[1, 2, 3], &[1])));
    assert_eq!(joined.members.len(), 1);
    assert_eq!(joined.members[0].1.as_deref(), Some(&[][..]));
    assert_eq!(joined.members[0].2, [backend(3).address]);
    assert!(joined.rules.is_empty() && joined.created.is_empty());
    assert_eq!(sources(&joined).len(), 2, "what the other map knows may count here from now on");
}

#[test]
fn another_timeout_rewrites_what_learns_and_nothing_else() {
    let change = change(Some(&single(10, &[1])), Some(&single(20, &[1])));
    assert_eq!(change.rules.len(), 1);
    assert_eq!(change.rules[0].1.name, "aff-learn/default/web/tcp/http");
    assert_eq!(sources(&change), ["aff/default/web/tcp/http/8080"]);
    assert_eq!(Change { rules: vec![], reviews: vec![], ..change }, Change::default());
}

#[test]
fn off_takes_everything_away_and_without_affinity_there_is_nothing() {
    let (on, off) = (single(10, &[1]), single(0, &[1]));
    let made = change(Some(&off), Some(&on));
    let gone = change(Some(&on), Some(&off));
    assert_eq!(gone, change(Some(&on), None));
    assert_eq!(gone.dropped.iter().collect::<BTreeSet<_>>(), made.created.iter().collect());
    assert_eq!(gone.removed.len(), made.added.len());
    assert!(gone.dropped.is_sorted_by_key(|object| !object.kind.is_chain()), "maps after the chains");
    assert_eq!(change(None, Some(&off)), Change::default());
    let none_left = plan(port(10, [Verdict::Reject; 2], &[], &[]));
    assert_eq!(change(Some(&on), Some(&none_left)), gone);
}

#[test]
fn a_policy_that_changes_keeps_the_map_of_the_set_that_stays() {
    let (one, both) = (single(10, &[1, 2]), mixed(10, &[1, 2], &[1]));
    let to_both = change(Some(&one), Some(&both));
    assert!(to_both.dropped.is_empty() && to_both.removed.is_empty());
    assert_eq!(sources(&to_both), ["aff/default/web/tcp/http/8080"]);
    assert_eq!(to_both.members.len(), 1, "of the set that is new");
    let back = change(Some(&both), Some(&one));
    assert!(!names(&back.dropped).contains(&"aff/default/web/tcp/http/8080".to_owned()));
    assert_eq!(back.dropped.len(), to_both.created.len());
}

#[test]
fn names_are_such_as_nft_takes_and_keep_their_identity() {
    let name = |port: &str| {
        let mut plan = Plan::clone(&single(10, &[1]));
        plan.service = ServiceKey::new(&"n".repeat(63), &"s".repeat(63));
        plan.ports[0].name = port.into();
        let change = change(None, Some(&Arc::new(plan)));
        change.created.iter().map(|object| object.name().len()).max().unwrap();
        (change.created[0].to_string(), change.created.iter().map(|o| o.name().len()).max().unwrap())
    };
    let (long, len) = name(&"p".repeat(63));
    assert!(len <= 255 && long.ends_with(&"p".repeat(63)), "{long}");
    let (odd, other) = (name("a\"b"), name("a\u{e4}b"));
    assert_ne!(odd.0, other.0);
    assert!(odd.0.chars().all(|c| c.is_ascii_alphanumeric() || "/-_.".contains(c)), "{odd:?}");
    let object = Object::named(&long, Family::V4, true).unwrap();
    assert_eq!((object.kind, object.to_string()), (Kind::Consult(Scope::Cluster), long));
    let map = "aff-local/default/web/tcp/http/8080";
    let object = Object::named(map, Family::V4, false).unwrap();
    assert_eq!((object.kind, &*object.to_string()), (Kind::Map(Scope::Local, 8080), map));
    assert_eq!(Object::named("vip-pick", Family::V4, true), None);
}

#[test]
fn each_port_that_backends_listen_on_has_its_map() {
    let mut several = Plan::clone(&single(10, &[1, 2, 3]));
    several.ports[0].backends[1].address.port = 9090;
    let several = Arc::new(several);
    let made = change(Some(&single(10, &[1, 2, 3])), Some(&several));
    assert_eq!(names(&made.created), ["aff/default/web/tcp/http/9090"]);
    assert_eq!(made.rules.iter().map(|(_, chain)| chain.rules.len()).collect::<Vec<_>>(), [2, 2]);
    assert!(made.added.is_empty());
    let back = change(Some(&several), Some(&single(10, &[1, 2, 3])));
    assert_eq!(names(&back.dropped), ["aff/default/web/tcp/http/9090"]);
}

#[test]
fn a_map_of_an_earlier_run_is_looked_through_when_it_is_taken_over() {
    let old = single(10, &[1]);
    let map = change(None, Some(&mixed(10, &[1], &[1])));
    let map = map.created.iter().find(|object| object.kind == Kind::Map(Scope::Local, 8080)).unwrap();
    let found = Found::holding([].iter(), [map].into_iter());
    for (previous, next) in [(None, mixed(10, &[1], &[1])), (Some(&old), mixed(10, &[1], &[1]))] {
        let change = Change::between(previous, Some(&next), &found);
        assert!(sources(&change).contains(&map.to_string()), "{change:?}");
    }
    assert!(Change::between(None, Some(&old), &found).reviews[0].sources == [map.clone()], "for its clients");
}
