//! The maps of the programs, as the agent has them: arrays in its own memory, hash maps by system call.
//!
//! Owns what each map looks like and how `Write`s reach it. Never decides what is written.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError, MapInfo, MapType};
use kube_lane_common::{
    Address, AffinityKey, Backend, Frontend, FrontendKey, Member, Peers, PortWord, Remembered, Reverse, Set,
    Settings, Slot, maps,
};

use super::SocketError;
use super::pins::MapFolder;
use super::room::Room;
use super::sys::Words;
use super::write::{Found, Sizes, Write};

/// `BPF_F_NO_PREALLOC`.
const NO_PREALLOC: u32 = 1;
/// `BPF_F_MMAPABLE`.
pub(super) const MMAPABLE: u32 = 1 << 10;
/// Where NodePorts answer, and which cgroups are left alone.
const FEW: u32 = 1024;

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
    frontends: HashMap<MapData, FrontendKey, Frontend>,
    sets: Words<Set>,
    slots: Words<Slot>,
    backends: Words<Backend>,
    members: Words<Member>,
    ports: Words<PortWord>,
    connections: Words<u64>,
    refused: Words<u64>,
    node_addresses: HashMap<MapData, Address, u64>,
    affinity: HashMap<MapData, AffinityKey, Remembered>,
    left_alone: HashMap<MapData, u64, u64>,
    settings: Words<Settings>,
    room: Room,
}

impl Maps {
    /// The maps of a folder, of which all look as [`layouts`] says.
    pub(super) fn open(folder: &MapFolder) -> Result<Self, SocketError> {
        let (frontends, frontend_count) = open_hash(folder, maps::FRONTENDS)?;
        let (affinity, clients) = open_hash(folder, maps::AFFINITY)?;
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
                frontends: frontend_count,
                ports: least(&[sets.len() / 2, ports.len(), refused.len()]),
                slots: u32::try_from(slots.len()).unwrap_or(u32::MAX),
                backends: least(&[backends.len(), members.len(), connections.len()]),
            },
            clients,
        };
        Ok(Self {
            frontends,
            sets,
            slots,
            backends,
            members,
            ports,
            connections,
            refused,
            node_addresses: open_hash(folder, maps::NODE_ADDRESSES)?.0,
            affinity,
            left_alone: open_hash(folder, maps::LEFT_ALONE)?.0,
            settings: open_array(folder, maps::SETTINGS)?,
            room,
        })
    }

    /// Copies the content of these of other maps, each at most as large as the one here. Those of sockets are shared
    /// instead.
    pub(super) fn copy(&mut self, from: &Self, which: &[&str]) -> Result<(), SocketError> {
        let copied = |name: &&str| which.contains(name);
        for name in layouts(self.room).iter().map(|layout| layout.name).filter(copied) {
            match name {
                maps::FRONTENDS => copy_hash(name, &from.frontends, &mut self.frontends),
                maps::NODE_ADDRESSES => copy_hash(name, &from.node_addresses, &mut self.node_addresses),
                maps::AFFINITY => copy_hash(name, &from.affinity, &mut self.affinity),
                maps::LEFT_ALONE => copy_hash(name, &from.left_alone, &mut self.left_alone),
                maps::SETS => copy_array(name, &from.sets, &self.sets),
                maps::SLOTS => copy_array(name, &from.slots, &self.slots),
                maps::BACKENDS => copy_array(name, &from.backends, &self.backends),
                maps::MEMBERS => copy_array(name, &from.members, &self.members),
                maps::PORTS => copy_array(name, &from.ports, &self.ports),
                maps::CONNECTIONS => copy_array(name, &from.connections, &self.connections),
                maps::REFUSED => copy_array(name, &from.refused, &self.refused),
                maps::SETTINGS => copy_array(name, &from.settings, &self.settings),
                _ => Ok(()),
            }?;
        }
        Ok(())
    }

    /// How much room there is.
    pub(super) fn room(&self) -> Room {
        self.room
    }

    /// Carries a change out.
    pub(super) fn write(&mut self, write: Write) -> Result<(), SocketError> {
        match write {
            Write::Frontend(key, Some(frontend)) => {
                self.frontends.insert(key, frontend, 0).map_err(|error| map_error(maps::FRONTENDS, error))
            }
            Write::Frontend(key, None) => removed(maps::FRONTENDS, self.frontends.remove(&key)),
            Write::NodeAddress(address, true) => self
                .node_addresses
                .insert(address, 1, 0)
                .map_err(|error| map_error(maps::NODE_ADDRESSES, error)),
            Write::NodeAddress(address, false) => {
                removed(maps::NODE_ADDRESSES, self.node_addresses.remove(&address))
            }
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

    /// Reads back what the maps hold.
    pub(super) fn read(&self) -> Result<Found, SocketError> {
        let frontends = self.frontends.iter().collect::<Result<_, _>>();
        let node_addresses = self.node_addresses.keys().collect::<Result<_, _>>();
        Ok(Found {
            frontends: frontends.map_err(|error| map_error(maps::FRONTENDS, error))?,
            node_addresses: node_addresses.map_err(|error| map_error(maps::NODE_ADDRESSES, error))?,
            sets: written(&self.sets, |set| *set == Set::NONE),
            slots: written(&self.slots, |slot| slot.0 == 0),
            backends: written(&self.backends, |backend| backend.owner == 0),
            members: written(&self.members, |member| *member == Member::NONE),
            ports: written(&self.ports, |port| port.0 == 0),
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
        let ids = self.left_alone.keys().collect::<Result<_, _>>();
        ids.map_err(|error| map_error(maps::LEFT_ALONE, error))
    }

    /// Leaves a cgroup alone, or no longer.
    pub(super) fn leave_alone(&mut self, cgroup: u64, yes: bool) -> Result<(), SocketError> {
        if yes {
            self.left_alone.insert(cgroup, 1, 0).map_err(|error| map_error(maps::LEFT_ALONE, error))
        } else {
            removed(maps::LEFT_ALONE, self.left_alone.remove(&cgroup))
        }
    }

    /// New connections that were sent to a backend, by its id.
    pub(super) fn connections(&self, backend: u32) -> u64 {
        self.connections.get(backend as usize).unwrap_or_default()
    }

    /// Connections that were refused, by the id of the port.
    pub(super) fn refused(&self, port: u32) -> u64 {
        self.refused.get(port as usize).unwrap_or_default()
    }
}

/// The entries up to the last that is not empty.
fn written<T: Pod>(array: &Words<T>, is_empty: impl Fn(&T) -> bool) -> Vec<T> {
    let used = (0..array.len()).rev().find(|&index| array.get(index).is_some_and(|entry| !is_empty(&entry)));
    used.map_or_else(Vec::new, |last| (0..=last).map_while(|index| array.get(index)).collect())
}

pub(super) fn open_array<T: Pod>(folder: &MapFolder, name: &'static str) -> Result<Words<T>, SocketError> {
    let (map, entries) = open_map(folder, name)?;
    Words::map(map.fd().as_fd(), entries as usize).map_err(|source| SocketError::Memory { name, source })
}

/// And for how many entries it has room.
pub(super) fn open_hash<K: Pod, V: Pod>(
    folder: &MapFolder,
    name: &'static str,
) -> Result<(HashMap<MapData, K, V>, u32), SocketError> {
    let (map, entries) = open_map(folder, name)?;
    let map = HashMap::try_from(Map::HashMap(map)).map_err(|error| map_error(name, error))?;
    Ok((map, entries))
}

fn open_map(folder: &MapFolder, name: &'static str) -> Result<(MapData, u32), SocketError> {
    let map = MapData::from_pin(folder.map(name)).map_err(|error| map_error(name, error))?;
    let entries = map.info().map_err(|error| map_error(name, error))?.max_entries();
    Ok((map, entries))
}

fn store<T: Pod>(name: &'static str, array: &Words<T>, index: u32, value: T) -> Result<(), SocketError> {
    if array.set(index as usize, value) { Ok(()) } else { Err(SocketError::NoEntry { name, index }) }
}

fn copy_array<T: Pod>(name: &'static str, from: &Words<T>, to: &Words<T>) -> Result<(), SocketError> {
    let mut entries = (0_u32..).map_while(|index| Some((index, from.get(index as usize)?)));
    entries.try_for_each(|(index, entry)| store(name, to, index, entry))
}

fn copy_hash<K: Pod, V: Pod>(
    name: &'static str,
    from: &HashMap<MapData, K, V>,
    to: &mut HashMap<MapData, K, V>,
) -> Result<(), SocketError> {
    from.iter()
        .try_for_each(|entry| entry.and_then(|(key, value)| to.insert(key, value, 0)))
        .map_err(|error| map_error(name, error))
}

/// What is to be gone and is gone already is well.
fn removed(name: &'static str, result: Result<(), MapError>) -> Result<(), SocketError> {
    match result {
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(nix::libc::ENOENT) => {
            Ok(())
        }
        Err(MapError::KeyNotFound) => Ok(()),
        other => other.map_err(|error| map_error(name, error)),
    }
}

pub(super) fn map_error(name: &'static str, source: MapError) -> SocketError {
    SocketError::Map { name, source: Box::new(source) }
}
