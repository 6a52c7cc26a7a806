//! The layer as the agent has it: opened, told what changed, asked what it counted.
//!
//! Owns the order of what the other files do, and the retry of what did not reach the maps. Never decides what is
//! answered (`answers`) or how the maps say it (`lower`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use kube_lane_common::{Answered, Settings};
use tracing::warn;

use super::SocketError;
use super::affinity::Memories;
use super::answers::{Clients, Policy};
use super::cgroup::{self, Cgroup};
use super::maps::{Maps, Room};
use super::pins::Pins;
use super::sys::GracePeriod;
use super::write::{Found, Write};
use super::{available, install, sys};
use crate::model::plan::NodePlan;

/// How the layer is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cgroup whose sockets are answered; `None`: the root of the host's.
    pub cgroup_root: Option<PathBuf>,
    /// Where maps and links are pinned: a folder on a BPF file system, made where it is not there.
    pub bpf_root: PathBuf,
    /// Cgroups whose sockets are left alone, and those below them. They may come and go.
    pub left_alone: Vec<PathBuf>,
    /// Who is answered where. [`Policy::leave_alone`] follows from `left_alone`.
    pub policy: Policy,
    /// How much the maps have room for, at least.
    pub room: Room,
}

/// The socket layer of this node. Dropping it changes nothing in the kernel.
#[derive(Debug)]
pub struct Socket {
    maps: Maps,
    policy: Policy,
    /// The cookie of the host's network namespace.
    host: u64,
    left_alone: LeftAlone,
    grace: GracePeriod,
    memories: Memories,
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
        Self::take_over(options, &pins).inspect_err(|_| {
            if let Err(error) = pins.detach() {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "eBPF programs of an earlier run stay attached"
                );
            }
        })
    }

    fn take_over(options: Options, pins: &Pins) -> Result<Self, SocketError> {
        let object = available()?;
        let cgroup = Cgroup::find(options.cgroup_root.as_deref())?;
        let host = sys::network_namespace_cookie().map_err(SocketError::Cookie)?;
        let policy = Policy { leave_alone: !options.left_alone.is_empty(), ..options.policy };
        sys::allow_locked_memory();
        let mut prepared = install::prepare(object, pins, options.room, policy.udp)?;
        let grace = GracePeriod::new().map_err(SocketError::Grace)?;
        let mut left_alone = LeftAlone::new(options.left_alone);
        left_alone.follow(&mut prepared.maps)?;
        restrict(&prepared.maps, &grace, &policy, host)?;
        let (maps, folder) = prepared.attach(&cgroup)?;
        Ok(Self { maps, policy, host, left_alone, grace, memories: Memories::open(&folder)? })
    }

    /// Carries changes out, in their order.
    ///
    /// # Errors
    /// Where one cannot be; those before it are in force.
    pub fn write(&mut self, writes: &[Write]) -> Result<(), SocketError> {
        writes.iter().try_for_each(|write| self.maps.write(*write))
    }

    /// Reads back what the maps hold.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn read(&self) -> Result<Found, SocketError> {
        self.maps.read()
    }

    /// How much the maps have room for.
    pub fn room(&self) -> Room {
        self.maps.room()
    }

    /// New connections that were sent to a backend, by its id.
    pub fn connections(&self, backend: u32) -> u64 {
        self.maps.connections(backend)
    }

    /// Connections that were refused, by the id of the port.
    pub fn refused(&self, port: u32) -> u64 {
        self.maps.refused(port)
    }

    /// Removes what clients of ports with session affinity no longer come back for.
    ///
    /// # Errors
    /// Where the map cannot be read or written.
    pub fn sweep(&self) -> Result<(), SocketError> {
        self.memories.sweep()
    }

    /// Follows the node: who is answered, and the cgroups that are left alone.
    ///
    /// # Errors
    /// Where a map cannot be written.
    pub fn set_node(&mut self, node: &NodePlan) -> Result<(), SocketError> {
        self.left_alone.follow(&mut self.maps)?;
        store_settings(&self.maps, &self.grace, self.policy.settings(node, self.host))
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
    fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, ids: None }
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

/// Detaches and removes all of ours below `bpf_root`, of every layout. Well where there is nothing.
///
/// # Errors
/// Where something cannot be removed.
pub fn cleanup(bpf_root: &Path) -> Result<(), SocketError> {
    Pins::new(bpf_root).remove()
}
