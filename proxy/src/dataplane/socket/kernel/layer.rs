//! The layer as the agent has it: opened, told what changed, asked what it counted.
//!
//! Owns the order of what the other files do, and the retry of what did not reach the maps. Never decides what is
//! answered (`answers`) or how the maps say it (`lower`).

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::super::answers::{Answer, Limit, Policy};
use super::super::lower::{Lowering, PortView, Retired};
use super::super::write::Write;
use super::affinity::Memories;
use super::cgroup::Cgroup;
use super::grace::Grace;
use super::install::{self, Attached, Loader, Prepared};
use super::installed::Installed;
use super::left_alone::LeftAlone;
use super::maps::Maps;
use super::others::Others;
use super::owner::Owner;
use super::pins::Pins;
use super::pod_cgroups::PodPaths;
use super::room::Room;
use super::sys::GracePeriod;
use super::{SocketError, available, settings, sys};
use crate::dataplane::Batch;
use crate::dataplane::inspection::{Counts, Inspection};
use crate::model::input::ServiceKey;
use crate::model::plan::Plan;

/// So long after a client found no room to be remembered in there is said to be room again.
const FORGETFUL: Duration = Duration::from_secs(60);

/// How the layer is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cgroup whose sockets are answered; `None`: the root of the host's.
    pub cgroup_root: Option<PathBuf>,
    /// Cgroups whose sockets are left alone, and those below them: paths relative to that cgroup. They may come and go.
    pub left_alone: Vec<PathBuf>,
    /// Cgroups that pods run below: paths relative to that cgroup. They may come and go.
    pub pod_cgroups: Vec<PathBuf>,
    /// Who is answered where. [`Policy::leave_alone`] follows from `left_alone`.
    pub policy: Policy,
    /// How much the maps may have room for. They begin smaller, and grow where they are full.
    pub room: Room,
}

/// The socket layer of this node. Dropping it changes nothing in the kernel.
#[derive(Debug)]
pub struct Socket {
    place: Place,
    period: GracePeriod,
    left_alone: LeftAlone,
    pods: PodPaths,
    lowering: Lowering,
    maps: Maps,
    grace: Grace<Retired>,
    installed: Installed,
    others: Others,
    /// Changes that did not reach the maps when they should have, in their order.
    late: VecDeque<Write>,
    /// What they give up.
    retired: Vec<Retired>,
    /// Services that there was no room for, to be told.
    full: Vec<(ServiceKey, Limit)>,
    /// Why larger maps cannot be had for the batch that comes next: for that it is not tried again.
    cramped: Option<SocketError>,
    /// Something that nobody tells may have changed.
    looked: bool,
    /// The programs are still to be told what is known of the node.
    node_changed: bool,
    /// How many connections had been left to nftables for want of room to remember their clients.
    unremembered: u64,
    /// When that became more although the map is as large as it may be.
    forgot: Option<Instant>,
    /// Programs and maps may not belong together, or are not there: they are put in place once more.
    broken: bool,
}

/// What stays the same as long as the agent runs.
#[derive(Debug)]
struct Place {
    loader: Loader,
    /// Where maps and links are pinned.
    owner: Owner,
    pins: Pins,
    cgroup: Cgroup,
    policy: Policy,
    most: Room,
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
    /// Takes over what an earlier run left in the owner's folder, or begins with nothing: then nothing is answered yet.
    /// The programs are attached when this returns.
    ///
    /// # Errors
    /// Where the kernel, its mounts or our rights do not allow it. Then nothing of ours is attached any more, also
    /// nothing of an earlier run: it would lead to what is no more.
    pub fn open(options: Options, owner: Owner) -> Result<Self, SocketError> {
        let pins = Pins::new(owner.root());
        Self::take_over(options, owner, pins.clone()).inspect_err(|_| detach(&pins))
    }

    fn take_over(options: Options, owner: Owner, pins: Pins) -> Result<Self, SocketError> {
        let policy = Policy { leave_alone: !options.left_alone.is_empty(), ..options.policy };
        let cgroup = Cgroup::find(options.cgroup_root.as_deref())?;
        let host = sys::network_namespace_cookie().map_err(SocketError::Cookie)?;
        let mut left_alone = LeftAlone::new(&cgroup, &options.left_alone);
        let pods = PodPaths::new(&cgroup, &options.pod_cgroups);
        let mut place =
            Place { loader: Loader::new(), owner, pins, cgroup, policy, most: options.room, host };
        let period = GracePeriod::new().map_err(SocketError::Grace)?;

        sys::allow_locked_memory();
        let mut prepared = place.prepare(Room::START.at_most(options.room))?;
        left_alone.follow(&mut prepared.maps)?;
        settings::restrict(&prepared.maps, &period, &policy, host, pods.found())?;
        let (lowering, maps, grace, installed) = place.begin(prepared, &period)?;
        let unremembered = maps.unremembered();
        let mut others = Others::default();
        others.look(&place.cgroup, &place.pins.version(), &place.pins);
        Ok(Self {
            place,
            period,
            left_alone,
            pods,
            lowering,
            maps,
            grace,
            installed,
            others,
            late: VecDeque::new(),
            retired: Vec::new(),
            full: Vec::new(),
            cramped: None,
            looked: false,
            node_changed: true,
            unremembered,
            forgot: None,
            broken: false,
        })
    }

    /// Carries out what of a batch is in force in nftables. An empty batch carries out what is late, and what there is
    /// room for by now.
    ///
    /// # Errors
    /// Where the maps cannot be written. What did not reach them does so at the next call, in its order; until then
    /// they are as they were between two of the writes, which is sound.
    pub fn apply(&mut self, batch: &Batch) -> Result<Applied, SocketError> {
        let returned = self.grace.returned();
        self.reclaim(returned);
        self.node_changed |= batch.node.is_some();
        if self.cramped.is_none() {
            self.grow_for(batch);
        }
        let cramped = self.cramped.take();
        let mut writes = self.lower(batch);
        if self.broken {
            self.rebuild(self.maps.room())?;
        }
        self.settle()?;
        if !self.full.is_empty() {
            writes += self.make_room(cramped)?;
        }
        self.looked |= self.left_alone.stirred();
        if self.looked {
            self.follow()?;
            self.looked = false;
        }
        let full = mem::take(&mut self.full);
        Ok(Applied { full: full.into_iter().filter(|(key, _)| self.lowering.is_full(key)).collect(), writes })
    }

    /// Whether a batch needs larger maps.
    pub fn is_too_small_for(&self, batch: &Batch) -> bool {
        self.room_for_batch(batch) != self.maps.room()
    }

    /// Makes larger maps where a batch needs them: else all of it would be tried in vain first, as all that was listed
    /// when the agent started. Who is answered stays the same. Where they cannot be had, [`Socket::apply`] says why
    /// once Services find no room.
    pub fn grow_for(&mut self, batch: &Batch) {
        let room = self.room_for_batch(batch);
        if room == self.maps.room() {
            return;
        }
        let was_broken = self.broken;
        self.cramped = self.rebuild(room).err();
        if let Some(error) = &self.cramped {
            let error = error as &dyn std::error::Error;
            if self.broken && !was_broken {
                warn!(error, "the socket layer was lost while its maps were to grow");
            } else {
                debug!(error, "the socket layer's maps cannot grow");
            }
        }
    }

    fn room_for_batch(&self, batch: &Batch) -> Room {
        self.room_for(batch.services.iter().filter_map(|(_, plan)| plan.as_deref()))
    }

    /// Looks whether programs and maps are still where they were put. Where they are not, nothing is answered any more
    /// that nftables would not answer as well, and the next [`Socket::apply`] puts them back. Returns what is missing,
    /// for people, when it is noticed. That apply also follows whatever else nobody tells: cgroups that have come or
    /// gone, and clients that there was no room to remember.
    pub fn look(&mut self) -> Option<String> {
        self.looked = true;
        self.node_changed |= self.pods.look();
        let Place { cgroup, pins, .. } = &self.place;
        self.others.look(cgroup, &pins.version(), pins);
        let missing = self.installed.missing().filter(|_| !self.broken)?;
        self.installed.detach_lost();
        self.broken = true;
        Some(missing)
    }

    /// Programs and maps are in place, as far as is known.
    pub fn is_in_place(&self) -> bool {
        !self.broken
    }

    /// There are clients of ports with session affinity that it has no room to remember, or there were a minute ago.
    pub fn is_forgetful(&self) -> bool {
        self.forgot.is_some()
    }

    /// Why pods are not answered although they could be, for people: nobody is known to be one.
    pub fn missing_pods(&self) -> Option<String> {
        self.pods.missing().filter(|_| self.place.policy.tells_pods())
    }

    /// Another kube-lane's programs are attached at the same cgroup, or above it, so that this one may answer nobody:
    /// where they are pinned, for people.
    pub fn others(&self) -> Option<String> {
        let roots = self.others.told()?;
        let cgroup = self.place.cgroup.path().display();
        Some(format!(
            "the socket layer of another kube-lane, pinned at {roots}, is attached at {cgroup}, or above it, as well"
        ))
    }

    /// Follows what nobody tells.
    fn follow(&mut self) -> Result<(), SocketError> {
        self.left_alone.follow(&mut self.maps)?;
        let before = mem::replace(&mut self.unremembered, self.maps.unremembered());
        if before == self.unremembered {
            self.forgot = self.forgot.filter(|at| at.elapsed() < FORGETFUL);
            return Ok(());
        }
        let room = self.maps.room();
        let clients = room.clients.saturating_mul(2).min(self.place.most.clients);
        if clients <= room.clients {
            self.forgot = Some(Instant::now());
            return Ok(());
        }
        self.rebuild(Room { clients, ..room })?;
        self.settle()
    }

    /// For Services that have none. `cramped`: why larger maps cannot be had, where that was tried just now.
    fn make_room(&mut self, cramped: Option<SocketError>) -> Result<usize, SocketError> {
        // What was given up just now may be what they need.
        let returned = self.grace.wait();
        self.reclaim(returned);
        let mut writes = self.lower(&Batch::default());
        self.settle()?;
        if self.full.iter().any(|(service, _)| self.lowering.is_full(service)) {
            let everything = self.lowering.everything();
            let plans = everything.services.iter().filter_map(|(_, plan)| plan.as_deref());
            let room = self.room_for(plans);
            if room != self.maps.room() {
                cramped.map_or(Ok(()), Err)?;
                writes += self.rebuild(room)?;
                self.settle()?;
            }
        }
        Ok(writes)
    }

    /// The room that there is, or what these Services alone need, as far as the maps may grow.
    fn room_for<'a>(&self, plans: impl Iterator<Item = &'a Plan>) -> Room {
        let room = self.maps.room();
        room.for_plans(plans).at_most(self.place.most).at_least(room)
    }

    /// Puts maps, larger ones where they are too small, and programs in place, under what was applied.
    fn rebuild(&mut self, room: Room) -> Result<usize, SocketError> {
        // Or another agent's programs would be taken away.
        self.place.owner.hold()?;
        let mut prepared = self.place.prepare(room).inspect_err(|_| {
            // What is whole goes on.
            if self.broken {
                detach(&self.place.pins);
            }
        })?;
        self.left_alone.begin_again(&mut prepared.maps)?;
        let everything = self.lowering.everything();
        self.broken = true;
        let begun = self.place.begin(prepared, &self.period).inspect_err(|_| detach(&self.place.pins));
        (self.lowering, self.maps, self.grace, self.installed) = begun?;
        self.broken = false;
        self.node_changed = true;
        self.unremembered = self.maps.unremembered();
        // The new maps hold what the others held, and this says the rest.
        self.late.clear();
        self.retired.clear();
        self.full.clear();
        Ok(self.lower(&everything))
    }

    /// Who answers a Service's frontends, and what was counted; nothing of one that is not known.
    pub fn inspect(&self, service: &ServiceKey) -> Inspection {
        let ports: Vec<_> = self.lowering.service(service).into_iter().flatten().collect();
        let counts = |port: &PortView<'_>| Counts {
            connections: port.backends().map(|(at, id)| (at, self.maps.connections(id))).collect(),
            // What has no id has id 0, of which nothing is counted.
            refused: self.maps.refused(port.id),
        };
        let has_pods = self.missing_pods().is_none();
        let told = |answer: &Answer| if has_pods { *answer } else { answer.awaiting_pods() };
        Inspection {
            answers: ports.iter().map(|port| port.answers.iter().map(told).collect()).collect(),
            at_socket: ports.iter().map(counts).collect(),
            in_nftables: Vec::new(),
        }
    }

    /// The cgroups that are left alone, and whether each exists.
    pub fn left_alone(&self) -> Vec<(PathBuf, bool)> {
        self.left_alone.all()
    }

    /// A descriptor that becomes readable when one of them may have come or gone: then call [`Socket::apply`].
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn descriptor(&self) -> io::Result<Option<OwnedFd>> {
        self.left_alone.descriptor()
    }

    /// How much the maps have room for.
    pub fn room(&self) -> Room {
        self.maps.room()
    }

    fn reclaim(&mut self, returned: Vec<Retired>) {
        returned.into_iter().for_each(|retired| self.lowering.reclaim(retired));
    }

    /// Writes what a batch changes, or keeps it for later; returns how many words and elements that are.
    fn lower(&mut self, batch: &Batch) -> usize {
        let (maps, late) = (&mut self.maps, &mut self.late);
        let mut writes = 0;
        let lowered = self.lowering.apply(batch, &mut |write| {
            writes += 1;
            if !late.is_empty() || maps.write(write).is_err() {
                late.push_back(write);
            }
        });
        self.full.extend(lowered.full);
        self.retired.push(lowered.retired);
        writes
    }

    /// Writes what is late, and what the programs are to know of the node.
    fn settle(&mut self) -> Result<(), SocketError> {
        while let Some(write) = self.late.front() {
            self.maps.write(*write)?;
            self.late.pop_front();
        }
        self.maps.flush()?;
        // Only now no map names it any more.
        for retired in self.retired.drain(..).filter(|retired| !retired.is_empty()) {
            self.grace.retire(retired);
        }
        if self.node_changed {
            let new = self.lowering.settings(self.place.host, self.pods.found());
            settings::store(&self.maps, &self.period, new)?;
            self.node_changed = false;
        }
        Ok(())
    }
}

impl Place {
    fn prepare(&mut self, room: Room) -> Result<Prepared, SocketError> {
        install::prepare(&mut self.loader, available()?, &self.pins, room, self.policy.udp)
    }

    /// Takes over what the maps hold, and attaches the programs.
    fn begin(
        &self,
        mut prepared: Prepared,
        period: &GracePeriod,
    ) -> Result<(Lowering, Maps, Grace<Retired>, Installed), SocketError> {
        let found = prepared.read()?;
        let maps = &mut prepared.maps;
        let (lowering, writes) = Lowering::adopt(self.policy, found, maps.room().services);
        writes.into_iter().try_for_each(|write| maps.write(write))?;
        maps.flush()?;
        let Attached { maps, former, folder } = prepared.attach(&self.cgroup)?;
        let installed = Installed::note(self.pins.version(), install::wanted(self.policy.udp))?;
        // Programs may still hold what had been given up before, and write where maps had been too small.
        period.wait().map_err(SocketError::Grace)?;
        if let Some(Err(error)) = former.map(|former| former.catch_up(&maps)) {
            let error = &error as &dyn std::error::Error;
            warn!(error, "what was counted and remembered while the maps grew may be lost");
        }
        let memories = Memories::open(&folder)?;
        let grace = GracePeriod::new().and_then(|period| Grace::start(period, memories));
        Ok((lowering, maps, grace.map_err(SocketError::Grace)?, installed))
    }
}

/// Where the layer cannot be had, nothing of it may go on with what nobody keeps up to date.
fn detach(pins: &Pins) {
    if let Err(error) = pins.detach() {
        warn!(error = &error as &dyn std::error::Error, "eBPF programs stay attached");
    }
}
