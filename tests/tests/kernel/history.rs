//! Random histories into the real kernel: what is read back in the end is what a fresh start from the final objects
//! programs, slots apart.

use std::collections::{BTreeMap, BTreeSet};

use kube_lane::dataplane::nftables::{Detector, Nftables, Settings, cleanup};
use kube_lane::dataplane::{Batch, Dataplane};
use kube_lane::model::input::{Change, Event, Origin};
use kube_lane::model::planner::{self, Planner, PodCidrs};

use crate::plans::{in_namespace, listing};

#[path = "../../../proxy/tests/planner/history.rs"]
mod random;

use random::{Random, World, each_seed, fresh, settings};

const CASES: u64 = 100;
const STEPS: u64 = 50;

#[test]
fn history_leaves_no_trace_in_the_kernel() {
    in_namespace(|| each_seed(CASES, case));
}

fn case(seed: u64) {
    let mut random = Random::new(seed);
    let settings = planner::Settings { pod_cidrs: PodCidrs::Node, ..settings() };
    let mut planner = Planner::new(settings.clone());
    let mut told = World::default();
    let mut dataplane = opened();
    let mut hear = |planner: &mut Planner, event: Event| {
        told.hear(&event);
        planner.apply(event);
    };
    for _ in 0..STEPS {
        hear(&mut planner, random.event());
        if random.one_in(4) {
            apply_changes(&mut dataplane, &mut planner);
        }
        if random.one_in(25) {
            // The agent starts again; meanwhile objects have changed.
            planner.replan();
            dataplane = opened();
            apply_all(&mut dataplane, &planner);
        }
    }
    for origin in [Origin::Static, Origin::Api] {
        hear(&mut planner, Event::Source { origin, change: Change::Complete(true) });
        hear(&mut planner, Event::Source { origin, change: Change::Synced });
    }
    apply_changes(&mut dataplane, &mut planner);
    let incremental = meaning(&listing());
    // It may add: the members of a port with affinity are not read back, but written anew.
    assert_eq!(apply_all(&mut opened(), &planner).1, 0, "a restart removes nothing that is right");
    assert_eq!(meaning(&listing()), incremental);
    cleanup().unwrap();

    let mut events = told.events();
    random.shuffle(&mut events);
    apply_all(&mut opened(), &fresh(settings, events));
    let fresh = meaning(&listing());
    cleanup().unwrap();
    let (only_old, only_new): (Vec<_>, Vec<_>) =
        incremental.symmetric_difference(&fresh).partition(|line| incremental.contains(*line));
    assert!(only_old.is_empty() && only_new.is_empty(), "left over: {only_old:#?}, missing: {only_new:#?}");
}

fn opened() -> Nftables {
    Nftables::open(Settings { detector: Detector::PodCidrs, masquerade_all: false, ..Settings::default() })
        .unwrap()
}

fn apply_changes(dataplane: &mut Nftables, planner: &mut Planner) {
    let changes = planner.replan();
    apply(dataplane, &Batch { node: changes.node, services: changes.services, sweep: planner.synced() });
}

/// Applies all that there is, as after a start.
fn apply_all(dataplane: &mut Nftables, planner: &Planner) -> (usize, usize) {
    let services = planner.plans().map(|plan| (plan.service.clone(), Some(plan.clone()))).collect();
    apply(dataplane, &Batch { node: planner.node().cloned(), services, sweep: planner.synced() })
}

/// How many elements it added and removed.
fn apply(dataplane: &mut Nftables, batch: &Batch) -> (usize, usize) {
    let outcome = dataplane.apply(batch).expect("commit");
    assert!(outcome.failed.is_empty(), "{outcome:?}");
    (outcome.added, outcome.removed)
}

/// What `nft list ruleset` says, line by line and element by element, each with where it stands; of slots only whether
/// they are of the Local set. A table that nothing needs is none: one that was needed once stays.
fn meaning(listing: &str) -> BTreeSet<String> {
    let (mut table, mut object, mut line) = (String::new(), String::new(), 0);
    let (mut said, mut needed) = (BTreeSet::new(), BTreeSet::new());
    for text in listing.replace(",\n", ", ").lines() {
        let text = text.trim();
        line += 1;
        match text.split_once(' ') {
            Some(("table", _)) => (table, object, line) = (text.to_owned(), String::new(), 0),
            Some(("chain" | "set" | "map", _)) => (object, line) = (text.to_owned(), 0),
            // Ends and blanks say which object comes last.
            None if matches!(text, "" | "}") => continue,
            _ => {}
        }
        let is_of_node = object.contains("nodeport-ips") || object.contains("pod-cidrs");
        if text.starts_with("elements = {") && !is_of_node {
            needed.insert(table.clone());
        }
        match text.strip_prefix("elements = {") {
            Some(elements) => said.extend(elements.trim_end_matches('}').split(", ").map(|element| {
                let element = element.trim();
                let element =
                    if object.contains("endpoints") { without_slot(element) } else { element.to_owned() };
                format!("{table} {object} {element}")
            })),
            None => drop(said.insert(format!("{table} {object} {line} {text}"))),
        }
    }
    said.retain(|line| needed.iter().any(|table| line.starts_with(table)));
    renumbered(&said)
}

/// The same with what the numbers of session affinity stand for in their place: the first frontend of a port, and a backend.
fn renumbered(said: &BTreeSet<String>) -> BTreeSet<String> {
    /// A number as nft prints it, such as `2a:3`.
    fn is_number(word: &str) -> bool {
        let hex = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_hexdigit());
        word.split_once(':').is_some_and(|(port, member)| hex(port) && hex(member))
    }
    let family = |line: &str| line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut names: BTreeMap<(String, String), String> = BTreeMap::new();
    let mut name = |line: &str, set: &str, name: fn(&str) -> String| {
        let element = line.split_once(&format!("map {set} {{ ")).map(|(_, element)| element);
        if let Some((key, number)) = element.and_then(|element| element.rsplit_once(" : ")) {
            names.entry((family(line), number.to_owned())).or_insert_with(|| name(key));
        }
    };
    let frontend = |key: &str| key.split(" comment ").next().unwrap_or_default().replace(' ', "");
    let backend = |key: &str| key.split(" . ").skip(1).collect::<Vec<_>>().join(".").replace(' ', "");
    for line in said {
        name(line, "affinity-ids", frontend);
        name(line, "np-affinity-ids", frontend);
        name(line, "affinity-backends", backend);
    }
    let word = |line: &str, word: &str| match names.get(&(family(line), word.to_owned())) {
        Some(name) if is_number(word) => name.clone(),
        _ => word.to_owned(),
    };
    said.iter()
        .map(|line| line.split(' ').map(|text| word(line, text)).collect::<Vec<_>>().join(" "))
        .collect()
}

/// `10.96.0.1 . tcp . 80 . 65537 comment "…" : 10.1.0.4 . 8080` without the slot's number.
fn without_slot(element: &str) -> String {
    let end = element.find(" comment ").expect("endpoints have comments");
    let (frontend, slot) = element[..end].rsplit_once(" . ").expect("a slot");
    let set = if slot.parse::<u32>().expect("a number") < 1 << 16 { "cluster" } else { "local" };
    format!("{frontend} . {set}{}", &element[end..])
}
