//! The maps of the programs, as the agent has them: arrays in its own memory, hash maps by system call.
//!
//! Owns what each map looks like and how `Write`s reach it. Never decides what is written.

pub(super) mod growth;

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use aya::Pod;
use aya::maps::{MapInfo, MapType};
use kube_lane_common::{
    Address, AffinityKey, Backend, Frontend, FrontendKey, Member, Peers, PortWord, Remembered, Reverse, Set,
    Settings, Slot, maps,
};

use super::super::write::{Found, Sizes, Write};
use super::SocketError;
use super::hash::{Hash, open_map};
use super::pins::MapFolder;
use super::room::Room;
use super::sys::Words;

/// `BPF_F_NO_PREALLOC`.
const NO_PREALLOC: u32 = 1;
/// `BPF_F_MMAPABLE`.
pub(super) const MMAPABLE: u32 = 1 << 10;
/// Where NodePorts answer, and which cgroups are left alone.
const FEW: u32 = 1024;

/// How many frontends are written at a time: a call costs as much as some ten of them.
const TOGETHER: usize = 1 << 12;

/// What a map looks like.
pub(super) struct Layout {
    pub(super) name: &'static str,
    kind: MapType,
    key: usize,
    value: usize,
    flags: u32,
    /// How many entries it has to have; `None`: it grows by itself.
    pub(super) entries: Option<u32>,
}

/// All maps with this much room, but for `.rodata`, which goes with the programs.
pub(super) fn layouts(room: Room) -> Vec<Layout> {
    let Sizes { frontends, ports, slots, backends } = room.services;
    // Ids count from 1.
    let [sets, ports, backends] = [2 * (ports + 1), ports + 1, backends + 1];
    vec![
        hash::<FrontendKey, Frontend>(maps::FRONTENDS, frontends),
        array::<Set>(maps::SETS, sets),
        array::<Slot>(maps::SLOTS, slots),
        array::<Backend>(maps::BACKENDS, backends),
        array::<Member>(maps::MEMBERS, backends),
        array::<PortWord>(maps::PORTS, ports),
        array::<u64>(maps::CONNECTIONS, backends),
        array::<u64>(maps::REFUSED, ports),
        hash::<Address, u64>(maps::NODE_ADDRESSES, FEW),
        hash::<AffinityKey, Remembered>(maps::AFFINITY, room.clients),
        hash::<u64, u64>(maps::LEFT_ALONE, FEW),
        storage::<Reverse>(maps::REVERSE),
        storage::<Peers>(maps::UDP_PEERS),
        array::<u64>(maps::UNREMEMBERED, 1),
        array::<Settings>(maps::SETTINGS, 1),
    ]
}

fn hash<K, V>(name: &'static str, entries: u32) -> Layout {
    Layout {
        name,
        kind: MapType::Hash,
        key: size_of::<K>(),
        value: size_of::<V>(),
        flags: NO_PREALLOC,
        entries: Some(entries),
    }
}

fn array<V>(name: &'static str, entries: u32) -> Layout {
    let (key, value) = (size_of::<u32>(), size_of::<V>());
    Layout { name, kind: MapType::Array, key, value, flags: MMAPABLE, entries: Some(entries) }
}

fn storage<V>(name: &'static str) -> Layout {
    let (key, value) = (size_of::<u32>(), size_of::<V>());
    Layout { name, kind: MapType::SkStorage, key, value, flags: NO_PREALLOC, entries: None }
}

impl Layout {
    /// A map that looks otherwise is of another build: its content means nothing to this one.
    fn is_of(&self, info: &MapInfo) -> bool {
        info.map_type().is_ok_and(|kind| kind == self.kind)
            && info.key_size() as usize == self.key
            && info.value_size() as usize == self.value
            && info.map_flags() == self.flags
    }

    fn has_room(&self, info: &MapInfo) -> bool {
        self.entries.is_none_or(|entries| info.max_entries() >= entries)
    }

    /// What sockets remember: of the sockets alone, whatever the other maps hold.
    fn is_of_sockets(&self) -> bool {
        self.kind == MapType::SkStorage
    }
}

/// What the pinned maps are good for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pinned {
    /// All are there and large enough.
    Usable,
    /// All are there, but these are too small.
    TooSmall(Vec<&'static str>),
    /// There are none, some are missing, or some are of another build; these can be kept all the same.
    Unusable(Vec<&'static str>),
}

/// Looks at the pinned maps.
pub(super) fn inspect(folder: &MapFolder, layouts: &[Layout]) -> Pinned {
    let mut too_small = Vec::new();
    let mut of_sockets = Vec::new();
    let mut usable = true;
    for layout in layouts {
        match MapInfo::from_pin(folder.map(layout.name)).ok().filter(|info| layout.is_of(info)) {
            Some(_) if layout.is_of_sockets() => of_sockets.push(layout.name),
            Some(info) if !layout.has_room(&info) => too_small.push(layout.name),
            Some(_) => {}
            None => usable = false,
        }
    }
    match (usable, too_small.is_empty()) {
        (true, true) => Pinned::Usable,
        (true, false) => Pinned::TooSmall(too_small),
        (false, _) => Pinned::Unusable(of_sockets),
    }
}

/// The maps of the programs.
#[derive(Debug)]
pub(super) struct Maps {
    frontends: Hash<FrontendKey, Frontend>,
    /// Frontends that are still to be written, together.
    coming: Vec<(FrontendKey, Frontend)>,
    sets: Words<Set>,
    slots: Words<Slot>,
    backends: Words<Backend>,
    members: Words<Member>,
    ports: Words<PortWord>,
    connections: Words<u64>,
    refused: Words<u64>,
    node_addresses: Hash<Address, u64>,
    affinity: Hash<AffinityKey, Remembered>,
    left_alone: Hash<u64, u64>,
    unremembered: Words<u64>,
    settings: Words<Settings>,
    room: Room,
}

impl Maps {
    /// The maps of a folder, of which all look as [`layouts`] says.
    pub(super) fn open(folder: &MapFolder) -> Result<Self, SocketError> {
        let frontends = Hash::open(folder, maps::FRONTENDS)?;
        let affinity = Hash::open(folder, maps::AFFINITY)?;
        let sets = open_array(folder, maps::SETS)?;
        let slots = open_array(folder, maps::SLOTS)?;
        let backends = open_array(folder, maps::BACKENDS)?;
        let members = open_array(folder, maps::MEMBERS)?;
        let ports = open_array(folder, maps::PORTS)?;
        let connections = open_array(folder, maps::CONNECTIONS)?;
        let refused = open_array(folder, maps::REFUSED)?;
        let least = |lengths: &[usize]| {
            let least = lengths.iter().min().copied().unwrap_or_default();
            u32::try_from(least).unwrap_or(u32::MAX).saturating_sub(1)
        };
        let room = Room {
            services: Sizes {
                frontends: frontends.room,
                ports: least(&[sets.len() / 2, ports.len(), refused.len()]),
                slots: u32::try_from(slots.len()).unwrap_or(u32::MAX),
                backends: least(&[backends.len(), members.len(), connections.len()]),
            },
            clients: affinity.room,
        };
        Ok(Self {
            frontends,
            coming: Vec::new(),
            sets,
            slots,
            backends,
            members,
            ports,
            connections,
            refused,
            node_addresses: Hash::open(folder, maps::NODE_ADDRESSES)?,
            affinity,
            left_alone: Hash::open(folder, maps::LEFT_ALONE)?,
            unremembered: open_array(folder, maps::UNREMEMBERED)?,
            settings: open_array(folder, maps::SETTINGS)?,
            room,
        })
    }

    /// How much room there is.
    pub(super) fn room(&self) -> Room {
        self.room
    }

    /// Carries a change out, though a frontend that comes only with the next change that takes something away, or with
    /// [`Maps::flush`]: until then clients of it fare as before, and nobody is led to it otherwise.
    pub(super) fn write(&mut self, write: Write) -> Result<(), SocketError> {
        if takes_away(write) || self.coming.len() == TOGETHER {
            self.flush()?;
        }
        match write {
            Write::Frontend(key, Some(frontend)) => {
                self.coming.push((key, frontend));
                Ok(())
            }
            Write::Frontend(key, None) => self.frontends.remove(&key),
            Write::NodeAddress(address, true) => self.node_addresses.insert(address, 1),
            Write::NodeAddress(address, false) => self.node_addresses.remove(&address),
            Write::Set(id, set) => store(maps::SETS, &self.sets, id, set),
            Write::Slot(index, slot) => store(maps::SLOTS, &self.slots, index, slot),
            Write::Backend(id, backend) => {
                store(maps::CONNECTIONS, &self.connections, id, 0)?;
                store(maps::BACKENDS, &self.backends, id, backend)
            }
            Write::Member(id, member) => store(maps::MEMBERS, &self.members, id, member),
            Write::Port(id, port) => store(maps::PORTS, &self.ports, id, port),
            Write::NothingRefused(id) => store(maps::REFUSED, &self.refused, id, 0),
        }
    }

    /// Writes the frontends that are still to come.
    pub(super) fn flush(&mut self) -> Result<(), SocketError> {
        match &self.coming[..] {
            [] => return Ok(()),
            [(key, frontend)] => self.frontends.insert(*key, *frontend)?,
            coming => self.frontends.insert_all(coming)?,
        }
        self.coming.clear();
        Ok(())
    }

    /// Reads back what the maps hold; `written`: the room that whoever wrote them had.
    pub(super) fn read(&self, written: Sizes) -> Result<Found, SocketError> {
        let Sizes { ports, slots, backends, .. } = written;
        let node_addresses = self.node_addresses.elements()?;
        Ok(Found {
            frontends: self.frontends.elements()?,
            node_addresses: node_addresses.into_iter().map(|(address, _)| address).collect(),
            sets: words(&self.sets, 2 * (ports + 1), |set| *set == Set::NONE),
            slots: words(&self.slots, slots, |slot| slot.0 == 0),
            backends: words(&self.backends, backends + 1, |backend| backend.owner == 0),
            members: words(&self.members, backends + 1, |member| *member == Member::NONE),
            ports: words(&self.ports, ports + 1, |port| port.0 == 0),
        })
    }

    pub(super) fn settings(&self) -> Result<Settings, SocketError> {
        self.settings.get(0).ok_or(SocketError::NoEntry { name: maps::SETTINGS, index: 0 })
    }

    /// Writes the settings, [`Settings::answered`] last.
    pub(super) fn set_settings(&self, settings: Settings) -> Result<(), SocketError> {
        store(maps::SETTINGS, &self.settings, 0, settings)
    }

    /// The ids of the cgroups that are left alone.
    pub(super) fn left_alone(&self) -> Result<BTreeSet<u64>, SocketError> {
        Ok(self.left_alone.elements()?.into_iter().map(|(cgroup, _)| cgroup).collect())
    }

    /// Leaves a cgroup alone, or no longer.
    pub(super) fn leave_alone(&mut self, cgroup: u64, yes: bool) -> Result<(), SocketError> {
        if yes { self.left_alone.insert(cgroup, 1) } else { self.left_alone.remove(&cgroup) }
    }

    /// New connections that were sent to a backend, by its id.
    pub(super) fn connections(&self, backend: u32) -> u64 {
        self.connections.get(backend as usize).unwrap_or_default()
    }

    /// Connections that were refused, by the id of the port.
    pub(super) fn refused(&self, port: u32) -> u64 {
        self.refused.get(port as usize).unwrap_or_default()
    }

    /// Connections that were left to nftables for want of room to remember their clients.
    pub(super) fn unremembered(&self) -> u64 {
        self.unremembered.get(0).unwrap_or_default()
    }
}

/// Whether a change may end what a frontend that is still to be written replaces, or has to find it there.
fn takes_away(write: Write) -> bool {
    match write {
        Write::Frontend(_, to) => to.is_none(),
        Write::NodeAddress(..) => true,
        Write::Set(_, set) => set.count() == 0,
        Write::Member(_, member) => member == Member::NONE,
        Write::Slot(..) | Write::Backend(..) | Write::Port(..) | Write::NothingRefused(_) => false,
    }
}

/// Of the first `len` entries, those up to the last that is not empty.
fn words<T: Pod>(array: &Words<T>, len: u32, is_empty: impl Fn(&T) -> bool) -> Vec<T> {
    let used = (0..len as usize).rev().find(|&i| array.get(i).is_some_and(|entry| !is_empty(&entry)));
    used.map_or_else(Vec::new, |last| (0..=last).map_while(|index| array.get(index)).collect())
}

pub(super) fn open_array<T: Pod>(folder: &MapFolder, name: &'static str) -> Result<Words<T>, SocketError> {
    let (map, entries) = open_map(folder, name)?;
    Words::map(map.fd().as_fd(), entries as usize).map_err(|source| SocketError::Memory { name, source })
}

fn store<T: Pod>(name: &'static str, array: &Words<T>, index: u32, value: T) -> Result<(), SocketError> {
    if array.set(index as usize, value) { Ok(()) } else { Err(SocketError::NoEntry { name, index }) }
}
