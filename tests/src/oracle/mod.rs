//! The oracle: scenarios that run over kube-lane and over the real kube-proxy, and are compared flow by flow.
//!
//! Owns the order of things in a scenario. The files are `tests/scenarios/*.yaml`; `format` reads them, `names` gives
//! their placeholders a meaning, `objects` puts what they want into the API, `stage` holds the labs and the proxies,
//! `flows` dials, `report` sums up.

mod flows;
mod format;
mod names;
mod objects;
mod report;
mod stage;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Error, Result, ensure};
use serde_json::Value;

pub use format::{Family, Proxy, Scenario};

use self::flows::{Done, Memory};
use self::format::{Minor, Source, Step};
use self::names::Names;
use self::objects::Objects;
use self::report::Report;
use self::stage::{Api, Stage};
use crate::controlplane::program;

/// Runs scenarios, one after the other; those with one configuration should follow each other.
pub struct Oracle {
    // Dropped in this order: proxies before their API server.
    stage: Option<Stage>,
    api: Api,
    report: Report,
    started: Instant,
    /// Of kube-proxy, such as `v1.37.2`.
    version: String,
    release: Minor,
}

impl Oracle {
    /// Starts an API server.
    ///
    /// # Errors
    /// When it does not start, or kube-proxy does not say its version.
    pub fn start() -> Result<Self> {
        let output = Command::new(program("kube-proxy")?).arg("--version").output()?;
        let version = String::from_utf8_lossy(&output.stdout).trim().replace("Kubernetes ", "");
        let release = Minor::try_from(version.clone()).map_err(Error::msg)?;
        let api = Api::start()?;
        Ok(Self { stage: None, api, report: Report::default(), started: Instant::now(), version, release })
    }

    /// Runs a scenario; `number` is its own among all. Returns what was wrong.
    ///
    /// # Errors
    /// When it could not be run to its end.
    pub fn run(&mut self, scenario: &Scenario, number: usize) -> Result<Vec<String>> {
        let scenario = scenario.for_release(self.release);
        self.report.begin(&scenario);
        let result = self.try_run(&scenario, number);
        if result.is_err() {
            self.report.give_up(&scenario);
        }
        result
    }

    fn try_run(&mut self, scenario: &Scenario, number: usize) -> Result<Vec<String>> {
        if self.stage.as_ref().is_none_or(|stage| !stage.is_of(scenario)) {
            self.stage = None;
            // What a stage before left in the API would only take the new one's time.
            self.api.push(self.api.base())?;
            let takes_config =
                |proxy: &Proxy| proxy.is_ours() || scenario.since.is_none_or(|since| since <= self.release);
            let proxies = Proxy::ALL.into_iter().filter(takes_config);
            self.stage = Some(Stage::start(scenario, proxies, &self.api)?);
        }
        let stage = self.stage.as_mut().context("no stage")?;
        let mut run = Run::new(scenario, number, stage, &mut self.api, &mut self.report)?;
        let result = run.all();
        let wrong = std::mem::take(&mut run.wrong);
        let cleaned = run.clean_up();
        if result.is_err() || cleaned.is_err() {
            // A proxy may have ended, or be far behind.
            self.stage = None;
        }
        result.and(cleaned).with_context(|| wrong.join("\n"))?;
        Ok(wrong)
    }

    /// Writes the summary of all that ran to `VERSION.md` in `folder`, where the version is kube-proxy's. It names the runs
    /// with other releases that it finds there, too.
    ///
    /// # Errors
    /// When the folder cannot be read or written.
    pub fn write_summary(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        let own = folder.join(format!("{}.md", self.version));
        let mut others = Vec::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path != own {
                others.extend(report::run_line(&fs::read_to_string(path)?).map(str::to_owned));
            }
        }
        others.sort_unstable();
        fs::write(own, self.report.markdown(self.started.elapsed(), &self.version, &others))?;
        Ok(())
    }
}

/// One scenario under way.
struct Run<'a> {
    scenario: &'a Scenario,
    stage: &'a mut Stage,
    api: &'a mut Api,
    report: &'a mut Report,
    proxies: Vec<Proxy>,
    /// What its hosts are called, kept apart from the stage, which changes.
    hosts: names::Hosts,
    number: usize,
    wrong: Vec<String>,
}

impl<'a> Run<'a> {
    fn new(
        scenario: &'a Scenario,
        number: usize,
        stage: &'a mut Stage,
        api: &'a mut Api,
        report: &'a mut Report,
    ) -> Result<Self> {
        let proxies: Vec<_> =
            Proxy::ALL.into_iter().filter(|proxy| !scenario.skips.contains_key(proxy)).collect();
        if scenario.source == Source::Manifests {
            ensure!(
                proxies.iter().all(|proxy| proxy.is_ours()),
                "only kube-lane reads manifests: say in `skips` why the others take no part"
            );
        }
        let hosts = stage.hosts.clone();
        Ok(Self { scenario, stage, api, report, proxies, hosts, number, wrong: vec![] })
    }

    fn names(&self) -> Result<Vec<Names<'_>>> {
        let names = |family: &Family| Names::new(&self.hosts, self.scenario, self.number, *family);
        self.scenario.families.iter().map(names).collect()
    }

    /// All steps, then kube-lane's other orders.
    fn all(&mut self) -> Result<()> {
        for names in self.names()? {
            self.api.namespace(&names.namespace)?;
        }
        let memory = Memory::default();
        let in_api = self.scenario.source == Source::Api;
        let mut objects = if in_api { stage::nodes() } else { Objects::default() };
        let mut states = Vec::new();
        for (number, step) in self.scenario.steps.iter().enumerate() {
            let what =
                || format!("step {number}{}{}", if step.what.is_empty() { "" } else { ": " }, step.what);
            for names in &self.names()? {
                objects.change(step, names).with_context(what)?;
            }
            self.bring(&objects, &self.proxies.clone()).with_context(what)?;
            std::thread::sleep(step.wait.unwrap_or_default());
            let done = self.dial(step, &self.proxies.clone(), &memory, false).with_context(what)?;
            self.report.add(self.scenario, &done);
            self.note(done, "");
            states.push((objects.clone(), step));
        }
        // Where the first order is wrong, the others only say it again.
        if self.scenario.orders && !self.ours().is_empty() && self.wrong.is_empty() {
            self.pause_kube_proxy(true)?;
            let result = self.other_orders(&states);
            self.pause_kube_proxy(false)?;
            result?;
        }
        Ok(())
    }

    /// Those of its proxies that are of this repository.
    fn ours(&self) -> Vec<Proxy> {
        self.proxies.iter().copied().filter(|proxy| proxy.is_ours()).collect()
    }

    fn pause_kube_proxy(&mut self, pause: bool) -> Result<()> {
        self.stage.rigs.iter_mut().try_for_each(|rig| rig.pause(pause))
    }

    /// Brings kube-lane to the first and to the last state by other ways; the same has to be met there.
    fn other_orders(&mut self, states: &[(Objects, &Step)]) -> Result<()> {
        let (Some(first), Some(last)) = (states.first(), states.last()) else { return Ok(()) };
        let services = |objects: &Objects| vec![objects.filter(|object| object["kind"] != "EndpointSlice")];
        let slices = |objects: &Objects| vec![objects.filter(|object| object["kind"] != "Service")];
        let one_by_one = |objects: &Objects| {
            let mut so_far = Objects::default();
            let add = |object: &Value| {
                so_far.insert(object.clone());
                so_far.clone()
            };
            objects.all().map(add).collect()
        };
        let recreated = |objects: &Objects| vec![objects.clone(), Objects::default()];
        type Way<'w> = &'w dyn Fn(&Objects) -> Vec<Objects>;
        let orders: [(&str, Way<'_>, _); 4] = [
            ("Services first", &services, first),
            ("slices first", &slices, first),
            ("one by one", &one_by_one, last),
            ("created again", &recreated, last),
        ];
        for (name, way, (objects, step)) in orders {
            let only = self.ours();
            self.bring(&Objects::default(), &only)?;
            for before in way(objects) {
                self.bring(&before, &only)?;
            }
            self.bring(objects, &only)?;
            let done = self.dial(step, &only, &Memory::default(), true)?;
            self.report.add_order(&done);
            self.note(done, &format!("{name}: "));
        }
        Ok(())
    }

    fn note(&mut self, done: Vec<Done>, prefix: &str) {
        let wrong = done.into_iter().filter_map(|done| done.wrong);
        self.wrong.extend(wrong.map(|wrong| format!("{prefix}{wrong}")));
    }

    /// Has these proxies program the scenario's objects.
    fn bring(&mut self, objects: &Objects, proxies: &[Proxy]) -> Result<()> {
        if self.scenario.source == Source::Manifests {
            let objects: Vec<_> = objects.all().cloned().collect();
            for rig in self.stage.rigs.iter_mut().filter(|rig| proxies.contains(&rig.proxy)) {
                rig.put_manifests(objects.clone(), &self.hosts)?;
            }
            return Ok(());
        }
        let mut all = self.api.base();
        all.extend(objects.clone());
        self.api.push(all)?;
        self.stage.settle(proxies, self.api)
    }

    fn dial(&self, step: &Step, proxies: &[Proxy], memory: &Memory, fresh_only: bool) -> Result<Vec<Done>> {
        let rigs = self.stage.rigs.iter().map(|rig| &rig.callers);
        let rigs: Vec<_> = rigs.filter(|rig| proxies.contains(&rig.proxy)).collect();
        flows::run(self.scenario, step, &rigs, &self.names()?, memory, fresh_only)
    }

    /// Removes what the scenario brought.
    fn clean_up(&mut self) -> Result<()> {
        if self.scenario.source == Source::Manifests {
            return self.bring(&Objects::default(), &self.ours());
        }
        self.api.push(self.api.base())
    }
}

/// The scenarios of a folder, those of one configuration together; each with its number.
///
/// # Errors
/// As [`Scenario::load_all`].
pub fn load(folder: &Path) -> Result<Vec<(usize, Scenario)>> {
    let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for numbered in Scenario::load_all(folder)?.into_iter().enumerate() {
        groups.entry((numbered.1.config.to_string(), numbered.1.bridge)).or_default().push(numbered);
    }
    Ok(groups.into_values().flatten().collect())
}
