//! The model by example: every `tests/model/*.txtar` holds manifests and the plan that they give on `node-a`.
//!
//! A scenario begins with what it shows, then has the sections `-- static.yaml --` (the manifest folder) and
//! `-- api.yaml --` (the API server), of which either can be missing, and `-- plan --`. The plan must come out in
//! every order of arrival. `UPDATE_SCENARIOS=1 cargo test --test model` writes the plans anew; read the difference.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use kube_lane::model::input::{Change, Event, Origin};
use kube_lane::model::plan::NodePlan;
use kube_lane::model::planner::{NodePortAddresses, OwnPort, Planner, PodCidrs, Settings};
use kube_lane::source::manifest;

const NODE: &str = "node-a";

#[test]
fn scenarios() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model");
    let mut files = Vec::new();
    for entry in fs::read_dir(&folder)? {
        files.push(entry?.path());
    }
    files.sort();
    ensure!(!files.is_empty(), "no scenario in {}", folder.display());
    for file in &files {
        check(file).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

fn check(file: &Path) -> Result<()> {
    let scenario = fs::read_to_string(file)?;
    let (given, expected) = scenario.split_once("-- plan --\n").context("no section `-- plan --`")?;
    let (events, problems) = read(given)?;
    let plan = plans(&events);

    let reversed: Vec<_> = events.iter().rev().cloned().collect();
    let (mut slices_first, rest): (Vec<_>, Vec<_>) = events.into_iter().partition(is_slice);
    slices_first.extend(rest);
    for order in [reversed, slices_first] {
        let other = plans(&order);
        ensure!(other == plan, "the order of arrival matters:\n{plan}\nbecomes\n{other}");
    }

    let problems = if problems == 0 { String::new() } else { format!("{problems} problems\n") };
    let found = problems + &plan;
    if env::var_os("UPDATE_SCENARIOS").is_some() {
        fs::write(file, format!("{given}-- plan --\n{found}"))?;
    } else {
        ensure!(found == expected, "expected:\n{expected}\nfound:\n{found}");
    }
    Ok(())
}

/// The events that a scenario's manifests give, and how many problems they have: what those are, the source tests.
fn read(given: &str) -> Result<(Vec<Event>, usize)> {
    let mut events = Vec::new();
    let mut problems = 0;
    for (origin, header) in [(Origin::Static, "-- static.yaml --\n"), (Origin::Api, "-- api.yaml --\n")] {
        let Some((_, section)) = given.split_once(header) else { continue };
        let manifests = section.split("\n-- ").next().unwrap_or_default();
        let folder = Folder::with(manifests)?;
        let (read, found) = manifest::read_dir(&folder.0, Some(NODE));
        events.extend(read.into_iter().filter_map(|event| match event {
            Event::Source { change, .. } => Some(Event::Source { origin, change }),
            Event::HostAddresses(_) => None,
        }));
        problems += found.len();
    }
    Ok((events, problems))
}

/// All plans as text. Planning after every event must end where planning once does.
fn plans(events: &[Event]) -> String {
    let [stepwise, at_once] = [true, false].map(|stepwise| {
        let mut planner = planner();
        if stepwise {
            sync(&mut planner);
        }
        for event in events.iter().filter(|event| !is_synced(event)) {
            planner.apply(event.clone());
            if stepwise {
                planner.replan();
            }
        }
        sync(&mut planner);
        planner.replan();
        let node = planner.node().filter(|node| **node != NodePlan::default()).map(ToString::to_string);
        node.into_iter().chain(planner.plans().map(ToString::to_string)).collect::<String>()
    });
    assert_eq!(stepwise, at_once, "planning after every event differs from planning once");
    at_once
}

fn planner() -> Planner {
    Planner::new(Settings {
        node_name: NODE.into(),
        origins: vec![Origin::Static, Origin::Api],
        node_address: None,
        pod_cidrs: PodCidrs::Unknown,
        nodeport_addresses: NodePortAddresses::PRIMARY,
        own_ports: vec![OwnPort { server: "health", address: ([0, 0, 0, 0], 10256).into() }],
    })
}

fn sync(planner: &mut Planner) {
    for origin in [Origin::Static, Origin::Api] {
        planner.apply(Event::Source { origin, change: Change::Synced });
    }
}

fn is_slice(event: &Event) -> bool {
    matches!(event, Event::Source { change: Change::Slice(_) | Change::SliceGone(_), .. })
}

fn is_synced(event: &Event) -> bool {
    matches!(event, Event::Source { change: Change::Synced, .. })
}

/// A manifest folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn with(manifests: &str) -> Result<Self> {
        let folder = Self(env::temp_dir().join(format!("kube-lane-model-{}", std::process::id())));
        fs::create_dir_all(&folder.0)?;
        fs::write(folder.0.join("manifests.yaml"), manifests)?;
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Nothing hangs on a folder that is left in the system's temporary directory.
        let _ = fs::remove_dir_all(&self.0);
    }
}
