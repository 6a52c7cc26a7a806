//! Random histories through planner and lowering, into a model of the maps, with programs that read between any two
//! writes, agents that are killed there, and maps that are too small.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kube_lane_common::FrontendKey;

use super::super::answers::{Answer, Clients, EndpointSet, Policy, answers};
use super::super::write::{Sizes, Write};
use super::Lowering;
use super::addresses::{Addresses, key};
use super::ids::Retired;
use super::memory_tests::{Memory, Outcome, Reader};
use crate::dataplane::Batch;
use crate::dataplane::history::{Random, each_seed, settings};
use crate::model::input::{Protocol, ServiceKey};
use crate::model::plan::{Backend, NodePlan, Plan, Verdict};
use crate::model::planner::{Planner, PodCidrs, Settings};

const CASES: u64 = 1_500;
const STEPS: u64 = 80;
const READERS: usize = 12;

const AMPLE: Sizes = Sizes { frontends: 200, ports: 100, slots: 1_000, backends: 400 };

#[test]
fn whoever_reads_at_any_moment_is_led_right() {
    each_seed(CASES, case);
}

fn case(seed: u64) {
    let mut random = Random::new(seed);
    let policy = Policy {
        external: !random.one_in(3),
        udp: random.one_in(2),
        detector: random.pick(&[Clients::None, Clients::PodCidrs, Clients::Interface]),
        masquerade_all: random.one_in(10),
        host_namespace_only: random.one_in(10),
        ..Policy::default()
    };
    let scarce = Sizes {
        frontends: 2 + random.below(10) as u32,
        ports: 1 + random.below(8) as u32,
        slots: 2 + random.below(20) as u32,
        backends: 2 + random.below(20) as u32,
    };
    let sizes = if random.one_in(3) { scarce } else { AMPLE };
    let mut planner = Planner::new(Settings { pod_cidrs: PodCidrs::Node, ..settings() });
    let mut world = World::new(policy, sizes);
    for _ in 0..STEPS {
        planner.apply(random.event());
        if random.one_in(3) {
            let changes = planner.replan();
            let twist = |(key, plan): (_, Option<Arc<Plan>>)| (key, plan.map(|plan| twist(&plan)));
            let services = changes.services.into_iter().map(twist).collect();
            let batch = Batch { node: changes.node, services, sweep: false };
            if random.one_in(10) {
                world.restart(&batch, &mut random);
            } else {
                world.commit(&batch, &mut random);
            }
        }
    }
    world.restart_cleanly();
    let gone = world.plans.keys().map(|key| (key.clone(), None)).collect();
    world.commit(&Batch { services: gone, ..Batch::default() }, &mut random);
    assert!(world.maps.frontends.is_empty());
}

/// The same with some backends at the number of a VIP, so that some are frontends themselves.
fn twist(plan: &Plan) -> Arc<Plan> {
    let mut plan = plan.clone();
    for port in &mut plan.ports {
        let twist = |backends: &mut [Backend]| {
            for backend in backends.iter_mut().filter(|backend| backend.address.port == 8081) {
                backend.address.port = if backend.local { 81 } else { 30_081 };
            }
            backends.sort();
        };
        twist(&mut port.backends);
        twist(&mut port.local_backends);
    }
    Arc::new(plan)
}

struct World {
    policy: Policy,
    maps: Memory,
    lowering: Lowering,
    plans: BTreeMap<ServiceKey, Arc<Plan>>,
    node: NodePlan,
    readers: Vec<Living>,
    /// Which client remembers which backend, by frontend.
    remembered: BTreeMap<String, u32>,
    /// How many commits there were.
    now: u64,
    /// What a commit retired.
    retired: Vec<(u64, Retired)>,
}

struct Living {
    reader: Reader,
    key: FrontendKey,
    born: u64,
    /// It reads a word once in so many writes.
    pace: u64,
    /// Where connections have led since it began.
    right: BTreeSet<std::net::SocketAddr>,
    refusals: bool,
}

impl World {
    fn new(policy: Policy, sizes: Sizes) -> Self {
        let maps = Memory::new(sizes);
        let (lowering, _) = Lowering::adopt(policy, maps.found(), sizes);
        Self {
            policy,
            maps,
            lowering,
            plans: BTreeMap::new(),
            node: NodePlan::default(),
            readers: Vec::new(),
            remembered: BTreeMap::new(),
            now: 0,
            retired: Vec::new(),
        }
    }

    fn hear(&mut self, batch: &Batch) {
        for (key, plan) in &batch.services {
            match plan {
                Some(plan) => drop(self.plans.insert(key.clone(), Arc::clone(plan))),
                None => drop(self.plans.remove(key)),
            }
        }
        self.node = batch.node.clone().unwrap_or_else(|| self.node.clone());
    }

    fn commit(&mut self, batch: &Batch, random: &mut Random) {
        self.hear(batch);
        let mut writes = Vec::new();
        let lowered = self.lowering.apply(batch, &mut |write| writes.push(write));
        self.carry_out(&writes, random);
        self.retired.push((self.now, lowered.retired));
        self.check(batch.sweep);
        self.readers.retain(|_| !random.one_in(4));
        // Readers of a commit may have seen what it retired.
        let oldest = self.readers.iter().map(|living| living.born).min().unwrap_or(u64::MAX);
        let is_over = |(at, _): &(u64, Retired)| *at < oldest;
        let (over, waiting): (Vec<_>, _) = std::mem::take(&mut self.retired).into_iter().partition(is_over);
        self.retired = waiting;
        over.into_iter().for_each(|(_, retired)| self.lowering.reclaim(retired));
    }

    /// Writes, while programs read.
    fn carry_out(&mut self, writes: &[Write], random: &mut Random) {
        self.now += 1;
        let mut after = self.maps.clone();
        writes.iter().for_each(|write| after.write(*write));
        let keys: BTreeMap<_, _> = self
            .maps
            .frontends
            .keys()
            .chain(after.frontends.keys())
            .map(|key| (format!("{key:?}"), *key))
            .collect();
        let ends: BTreeMap<_, _> =
            keys.iter().map(|(name, key)| (name, (self.maps.outcome(key), after.outcome(key)))).collect();
        for living in &mut self.readers {
            let (before, after) = (self.maps.outcome(&living.key), after.outcome(&living.key));
            living.allow(&before);
            living.allow(&after);
        }
        let moved = |key: &FrontendKey, maps: &Memory| maps.frontends.get(key).map(|word| word.set() >> 1);
        for write in writes {
            self.maps.write(*write);
            for (name, key) in &keys {
                let (before, after_all) = &ends[name];
                let now = self.maps.outcome(key);
                let stays = moved(key, &after) == moved(key, &self.maps);
                assert!(
                    allowed(&now, before, after_all, stays),
                    "{name}: {before:?} → {now:?} → {after_all:?} at {write:?}"
                );
            }
            self.read(&keys, &ends, random);
        }
        assert_eq!(self.maps, after);
    }

    fn read(
        &mut self,
        keys: &BTreeMap<String, FrontendKey>,
        ends: &BTreeMap<&String, (Outcome, Outcome)>,
        random: &mut Random,
    ) {
        if self.readers.len() < READERS && !keys.is_empty() {
            let (name, key) = keys.iter().nth(random.below(keys.len() as u64) as usize).unwrap();
            let (before, after) = &ends[name];
            let mut living = Living {
                reader: Reader::Dials(*key),
                key: *key,
                born: self.now,
                pace: random.pick(&[1, 2, 50]),
                right: BTreeSet::new(),
                refusals: false,
            };
            living.allow(before);
            living.allow(after);
            self.readers.push(living);
        }
        for living in &mut self.readers {
            if !random.one_in(living.pace) {
                continue;
            }
            let client = format!("{:?}", living.key);
            let remembered = self.remembered.get(&client).copied().filter(|_| random.one_in(2));
            living.reader = living.reader.step(&self.maps, random.below(1 << 30), remembered);
            match living.reader {
                Reader::Led(id, at) => {
                    assert!(living.right.contains(&at), "{at} is none of {:?}", living.right);
                    self.remembered.insert(client, id);
                }
                Reader::Refused => assert!(living.refusals),
                _ => {}
            }
        }
        self.readers
            .retain(|living| !matches!(living.reader, Reader::Led(..) | Reader::Left | Reader::Refused));
    }

    /// The maps say what the plans do, as far as there is room.
    fn check(&self, swept: bool) {
        self.maps.check_members();
        let addresses = Addresses::of(self.plans.values().map(|plan| &**plan), &self.node);
        let full = |key: &ServiceKey| self.lowering.is_full(key);
        let mut expected = 0;
        for (service, plan) in &self.plans {
            let views: Vec<_> = self.lowering.service(service).unwrap().collect();
            for (port, view) in plan.ports.iter().zip(views) {
                let answers = answers(port, &self.policy, &self.node, addresses.clashes(port));
                if !full(service) {
                    assert_eq!(*view.answers, *answers, "{plan}");
                }
                for (frontend, answer) in port.frontends.iter().zip(&answers) {
                    let key = key(port, frontend.at);
                    let set = answer.set().filter(|_| !full(service));
                    expected += usize::from(set.is_some());
                    let wanted = match (set, frontend.verdict) {
                        (None, _) => Outcome::Left,
                        (Some(_), Verdict::Reject) if port.protocol == Protocol::Udp => Outcome::Left,
                        (Some(_), Verdict::Reject) => Outcome::Refused,
                        (Some(EndpointSet::Cluster), _) => led(&port.backends),
                        (Some(EndpointSet::Local), _) => led(&port.local_backends),
                    };
                    assert_eq!(self.maps.outcome(&key), wanted, "{plan}");
                    if let Answer::Socket { .. } = answer
                        && set.is_some()
                    {
                        let seconds = port.affinity.map_or(0, u32::from);
                        assert_eq!(self.maps.affinity(&key), Some(seconds));
                        assert_ne!(port.protocol, Protocol::Sctp);
                    }
                }
            }
        }
        if swept {
            assert_eq!(self.maps.frontends.len(), expected);
        }
        let node = if self.policy.external { &self.node.nodeport_addresses[..] } else { &[] };
        assert!(self.maps.node.iter().eq(node));
    }

    fn everything(&self, sweep: bool) -> Batch {
        let services = self.plans.iter().map(|(key, plan)| (key.clone(), Some(Arc::clone(plan))));
        Batch { node: Some(self.node.clone()), services: services.collect(), sweep }
    }

    /// The agent is killed while it writes a batch. Another starts, is told of some Services later, and may be killed in
    /// turn.
    fn restart(&mut self, batch: &Batch, random: &mut Random) {
        self.hear(batch);
        self.write_and_die(batch, random);
        loop {
            let (lowering, mended) = Lowering::adopt(self.policy, self.maps.found(), self.maps.sizes);
            self.lowering = lowering;
            self.carry_out(&mended, random);
            // A grace period passes.
            self.readers.clear();
            self.retired.clear();
            let all = self.everything(false);
            let (mut first, mut rest) = (Batch { node: all.node, ..Batch::default() }, Batch::default());
            for service in all.services {
                if random.one_in(2) { &mut first } else { &mut rest }.services.push(service);
            }
            if random.one_in(4) {
                self.write_and_die(&first, random);
                continue;
            }
            for batch in [&first, &rest] {
                let mut writes = Vec::new();
                let lowered = self.lowering.apply(batch, &mut |write| writes.push(write));
                self.carry_out(&writes, random);
                self.retired.push((self.now, lowered.retired));
            }
            return self.commit(&Batch { sweep: true, ..Batch::default() }, random);
        }
    }

    fn write_and_die(&mut self, batch: &Batch, random: &mut Random) {
        let mut writes = Vec::new();
        self.lowering.apply(batch, &mut |write| writes.push(write));
        writes.truncate(random.below(writes.len() as u64 + 1) as usize);
        writes.iter().for_each(|write| self.maps.write(*write));
    }

    /// A restart touches nothing that is right.
    fn restart_cleanly(&mut self) {
        if self.plans.keys().any(|key| self.lowering.is_full(key)) {
            return;
        }
        let (mut lowering, writes) = Lowering::adopt(self.policy, self.maps.found(), self.maps.sizes);
        assert_eq!(writes, []);
        let lowered = lowering.apply(&self.everything(true), &mut |write| panic!("{write:?}"));
        assert!(lowered.retired.is_empty() && lowered.full.is_empty());
        self.lowering = lowering;
        self.retired.clear();
        self.readers.clear();
    }
}

impl Living {
    fn allow(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Left => {}
            Outcome::Refused => self.refusals = true,
            Outcome::Led(to) => self.right.extend(to),
        }
    }
}

fn led(backends: &[Backend]) -> Outcome {
    if backends.is_empty() {
        return Outcome::Left;
    }
    Outcome::Led(backends.iter().map(|backend| backend.address.socket()).collect())
}

/// Whether a connection may end like this between two commits.
fn allowed(now: &Outcome, before: &Outcome, after: &Outcome, stays: bool) -> bool {
    let left = |outcome: &Outcome| *outcome == Outcome::Left;
    match now {
        Outcome::Left => left(before) || left(after) || !stays,
        Outcome::Refused => [before, after].contains(&&Outcome::Refused),
        Outcome::Led(to) => {
            let known = |outcome: &Outcome| match outcome {
                Outcome::Led(to) => to.clone(),
                Outcome::Left | Outcome::Refused => BTreeSet::new(),
            };
            to.is_subset(&(&known(before) | &known(after)))
        }
    }
}
