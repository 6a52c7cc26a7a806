//! The layer as the agent has it: opened, told what changed, asked what it counted.
//!
//! Owns the order of what the other files do, and the retry of what did not reach the maps. Never decides what is
//! answered (`answers`) or how the maps say it (`lower`).

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

use kube_lane_common::{Answered, Settings, maps as names};
use tracing::warn;

use super::affinity::Memories;
use super::answers::{Clients, Limit, Policy};
use super::cgroup::{self, Cgroup};
use super::grace::Grace;
use super::ids::Retired;
use super::lower::{Lowering, PortView};
use super::maps::{Maps, Room, open_array};
use super::pins::{Pins, Version};
use super::sys::GracePeriod;
use super::write::{Found, Write};
use super::{SocketError, available, install, sys};
use crate::dataplane::Batch;
use crate::dataplane::inspection::{Counts, Inspection};
use crate::model::input::ServiceKey;
use crate::model::plan::NodePlan;

/// How the layer is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cgroup whose sockets are answered; `None`: the root of the host's.
    pub cgroup_root: Option<PathBuf>,
    /// Where maps and links are pinned: a folder on a BPF file system, made where it is not there.
    pub bpf_root: PathBuf,
    /// Cgroups whose sockets are left alone, and those below them: paths relative to that cgroup. They may come and go.
    pub left_alone: Vec<PathBuf>,
    /// Who is answered where. [`Policy::leave_alone`] follows from `left_alone`.
    pub policy: Policy,
    /// How much the maps have room for, at least.
    pub room: Room,
}

/// The socket layer of this node. Dropping it changes nothing in the kernel.
#[derive(Debug)]
pub struct Socket {
    lowering: Lowering,
    maps: Maps,
    /// Changes that did not reach the maps when they should have, in their order.
    late: VecDeque<Write>,
    /// What they give up.
    retired: Vec<Retired>,
    period: GracePeriod,
    grace: Grace<Retired>,
    left_alone: LeftAlone,
    /// The cookie of the host's network namespace.
    host: u64,
}

/// What a commit came to.
#[derive(Debug, Default)]
pub struct Applied {
    /// Services that nftables answers alone from now on, since there is no room for them, and of what.
    pub full: Vec<(ServiceKey, Limit)>,
    /// How many words and elements were written.
    pub writes: usize,
}

impl Socket {
    /// Takes over what an earlier run left, or begins with nothing: then nothing is answered yet. The programs are
    /// attached when this returns.
    ///
    /// # Errors
    /// Where the kernel, its mounts or our rights do not allow it. Then nothing of ours is attached any more, also
    /// nothing of an earlier run: it would lead to what is no more.
    pub fn open(options: Options) -> Result<Self, SocketError> {
        let pins = Pins::new(&options.bpf_root);
        Self::take_over(&options, &pins).inspect_err(|_| {
            if let Err(error) = pins.detach() {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "eBPF programs of an earlier run stay attached"
                );
            }
        })
    }

    fn take_over(options: &Options, pins: &Pins) -> Result<Self, SocketError> {
        let object = available()?;
        let cgroup = Cgroup::find(options.cgroup_root.as_deref())?;
        let host = sys::network_namespace_cookie().map_err(SocketError::Cookie)?;
        let policy = Policy { leave_alone: !options.left_alone.is_empty(), ..options.policy };
        sys::allow_locked_memory();
        let mut prepared = install::prepare(object, pins, options.room, policy.udp)?;
        let maps = &mut prepared.maps;
        let period = GracePeriod::new().map_err(SocketError::Grace)?;
        let mut left_alone = LeftAlone::new(&cgroup, &options.left_alone);
        left_alone.follow(maps)?;
        restrict(maps, &period, &policy, host)?;

        let found = maps.read()?;
        let mut result = Ok(());
        let sizes = maps.room().services;
        let lowering = Lowering::adopt(policy, found, sizes, &mut |write| {
            if result.is_ok() {
                result = maps.write(write);
            }
        });
        result?;
        let (maps, folder) = prepared.attach(&cgroup)?;
        // Programs may still hold what the earlier run had given up.
        period.wait().map_err(SocketError::Grace)?;
        let memories = Memories::open(&folder)?;
        let grace = GracePeriod::new().and_then(|period| Grace::start(period, memories));
        let grace = grace.map_err(SocketError::Grace)?;
        Ok(Self {
            lowering,
            maps,
            late: VecDeque::new(),
            retired: Vec::new(),
            period,
            grace,
            left_alone,
            host,
        })
    }

    /// Carries a commit out, but for the Services that nftables refused: there both layers keep what they had. An empty
    /// batch carries out what is late, and what there is room for by now.
    ///
    /// # Errors
    /// Where the maps cannot be written. What did not reach them does so at the next call, in its order; until then
    /// they are as they were between two of the writes, which is sound.
    pub fn apply(
        &mut self,
        batch: &Batch,
        refused: impl Fn(&ServiceKey) -> bool,
    ) -> Result<Applied, SocketError> {
        let services = batch.services.iter().filter(|(service, _)| !refused(service)).cloned();
        let batch = Batch { node: batch.node.clone(), services: services.collect(), sweep: batch.sweep };
        let returned = self.grace.returned();
        self.reclaim(returned);
        let mut applied = Applied::default();
        self.lower(&batch, &mut applied);
        self.settle()?;
        if !applied.full.is_empty() {
            // What was given up just now may be the room that they need.
            let returned = self.grace.wait();
            self.reclaim(returned);
            self.lower(&Batch::default(), &mut applied);
            self.settle()?;
            applied.full.retain(|(service, _)| self.lowering.is_full(service));
        }
        Ok(applied)
    }

    /// There is something for [`Socket::apply`] to do without a change: room for Services that had none.
    pub fn wants_retry(&mut self) -> bool {
        let returned = self.grace.returned();
        self.reclaim(returned);
        self.lowering.wants_retry()
    }

    /// Who answers a Service's frontends, and what was counted; nothing of one that is not known.
    pub fn inspect(&self, service: &ServiceKey) -> Inspection {
        let ports: Vec<_> = self.lowering.service(service).into_iter().flatten().collect();
        let counts = |port: &PortView<'_>| Counts {
            connections: port.backends().map(|(at, id)| (at, self.maps.connections(id))).collect(),
            // What has no id has id 0, of which nothing is counted.
            refused: self.maps.refused(port.id),
        };
        Inspection {
            answers: ports.iter().map(|port| port.answers.into()).collect(),
            counts: ports.iter().map(counts).collect(),
        }
    }

    /// How much the maps have room for.
    pub fn room(&self) -> Room {
        self.maps.room()
    }

    /// Reads back what the maps hold, for tests.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn found(&self) -> Result<Found, SocketError> {
        self.maps.read()
    }

    fn reclaim(&mut self, returned: Vec<Retired>) {
        returned.into_iter().for_each(|retired| self.lowering.reclaim(retired));
    }

    /// Writes what a batch changes, or keeps it for later.
    fn lower(&mut self, batch: &Batch, applied: &mut Applied) {
        let (maps, late) = (&mut self.maps, &mut self.late);
        let lowered = self.lowering.apply(batch, &mut |write| {
            applied.writes += 1;
            if !late.is_empty() || maps.write(write).is_err() {
                late.push_back(write);
            }
        });
        applied.full.extend(lowered.full);
        self.retired.push(lowered.retired);
    }

    /// Writes what is late, and brings the rest up to date that is not the lowering's.
    fn settle(&mut self) -> Result<(), SocketError> {
        while let Some(write) = self.late.front() {
            self.maps.write(*write)?;
            self.late.pop_front();
        }
        // Only now no map names it any more.
        for retired in self.retired.drain(..).filter(|retired| !retired.is_empty()) {
            self.grace.retire(retired);
        }
        self.left_alone.follow(&mut self.maps)?;
        store_settings(&self.maps, &self.period, self.lowering.settings(self.host))
    }
}

/// Until it is known what this run answers, that is no more than an earlier run answered, and no more than the options
/// allow at most.
fn restrict(maps: &Maps, grace: &GracePeriod, policy: &Policy, host: u64) -> Result<(), SocketError> {
    let found = maps.settings()?;
    let detector = if policy.detector == Clients::None { Clients::None } else { Clients::Interface };
    let most = Policy { detector, ..*policy }.settings(&NodePlan::default(), host).answered.0;
    let sources = [false, true].map(|is_ipv6| Answered::SOURCE << Answered::family(is_ipv6));
    let answered = Answered(found.answered.0 & (most | sources[0] | sources[1]));
    store_settings(maps, grace, Settings { answered, host, ..found })
}

/// Nobody is answered while more than [`Settings::answered`] changes.
fn store_settings(maps: &Maps, grace: &GracePeriod, new: Settings) -> Result<(), SocketError> {
    let old = maps.settings()?;
    if new == old {
        return Ok(());
    }
    if new != (Settings { answered: new.answered, ..old }) {
        maps.set_settings(Settings { answered: Answered::NOTHING, ..old })?;
        grace.wait().map_err(SocketError::Grace)?;
    }
    maps.set_settings(new)
}

/// The cgroups that are left alone. A cgroup that is made anew has another id.
#[derive(Debug)]
struct LeftAlone {
    paths: Vec<PathBuf>,
    /// As the map has them; `None`: not known.
    ids: Option<BTreeSet<u64>>,
}

impl LeftAlone {
    fn new(cgroup: &Cgroup, paths: &[PathBuf]) -> Self {
        Self { paths: paths.iter().map(|path| cgroup.path().join(path)).collect(), ids: None }
    }

    /// Brings the map up to date.
    fn follow(&mut self, maps: &mut Maps) -> Result<(), SocketError> {
        let wanted: BTreeSet<_> = self.paths.iter().filter_map(|path| cgroup::id_of(path)).collect();
        let had = match self.ids.take() {
            Some(ids) => ids,
            None => maps.left_alone()?,
        };
        wanted.difference(&had).try_for_each(|id| maps.leave_alone(*id, true))?;
        had.difference(&wanted).try_for_each(|id| maps.leave_alone(*id, false))?;
        self.ids = Some(wanted);
        Ok(())
    }
}

/// As [`cleanup`], for an agent that does without the layer: what the agent of another network namespace left stays, since
/// that may still follow changes.
///
/// # Errors
/// Where something cannot be removed.
pub fn withdraw(bpf_root: &Path) -> Result<(), SocketError> {
    let host = sys::network_namespace_cookie().map_err(SocketError::Cookie)?;
    let is_others = |version: &Version| {
        let settings = open_array::<Settings>(&version.maps(), names::SETTINGS).ok();
        settings
            .and_then(|settings| settings.get(0))
            .is_some_and(|settings| ![0, host].contains(&settings.host))
    };
    let versions = Pins::new(bpf_root).versions()?;
    versions.iter().filter(|version| !is_others(version)).try_for_each(Version::remove)
}

/// Detaches and removes all of ours below `bpf_root`, of every layout. Well where there is nothing.
///
/// # Errors
/// Where something cannot be removed.
pub fn cleanup(bpf_root: &Path) -> Result<(), SocketError> {
    Pins::new(bpf_root).remove()
}
