//! A hash map of the programs, as the agent has it: by system call.
//!
//! Owns how its elements are read and written, many at a time where there are many. Never decides what is in it.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};

use aya::Pod;
use aya::maps::{HashMap, IterableMap, Map, MapData, MapError};
use aya::sys::SyscallError;
use nix::libc;

use super::SocketError;
use super::pins::MapFolder;
use super::sys;

/// A hash map.
#[derive(Debug)]
pub(super) struct Hash<K, V> {
    name: &'static str,
    map: HashMap<MapData, K, V>,
    /// How many elements it has room for.
    pub(super) room: u32,
}

impl<K: Pod, V: Pod> Hash<K, V> {
    /// The one of this name in a folder.
    pub(super) fn open(folder: &MapFolder, name: &'static str) -> Result<Self, SocketError> {
        let (map, room) = open_map(folder, name)?;
        let map = HashMap::try_from(Map::HashMap(map)).map_err(|error| map_error(name, error))?;
        Ok(Self { name, map, room })
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.map.map().fd().as_fd()
    }

    fn failed(&self, call: &'static str, io_error: io::Error) -> SocketError {
        map_error(self.name, MapError::SyscallError(SyscallError { call, io_error }))
    }

    /// All elements. What comes or goes meanwhile is among them or not.
    pub(super) fn elements(&self) -> Result<Vec<(K, V)>, SocketError> {
        sys::all(self.descriptor()).map_err(|error| self.failed("BPF_MAP_LOOKUP_BATCH", error))
    }

    /// Writes an element, whether or not there is one.
    pub(super) fn insert(&mut self, key: K, value: V) -> Result<(), SocketError> {
        self.map.insert(key, value, 0).map_err(|error| map_error(self.name, error))
    }

    /// Writes many. After an error some of them are written.
    pub(super) fn insert_all(&mut self, elements: &[(K, V)]) -> Result<(), SocketError> {
        sys::put_all(self.descriptor(), elements).map_err(|error| self.failed("BPF_MAP_UPDATE_BATCH", error))
    }

    /// Writes an element where there is none.
    pub(super) fn put_back(&self, key: &K, value: V) -> Result<(), SocketError> {
        sys::put_back(self.descriptor(), key, value)
            .map_err(|error| self.failed("BPF_MAP_UPDATE_ELEM", error))
    }

    /// Removes an element, and tells what it was; `None`: there is none. `zero` is any value.
    pub(super) fn take(&self, key: &K, zero: V) -> Result<Option<V>, SocketError> {
        sys::take(self.descriptor(), key, zero)
            .map_err(|error| self.failed("BPF_MAP_LOOKUP_AND_DELETE_ELEM", error))
    }

    /// Removes an element. What is gone already is well.
    pub(super) fn remove(&mut self, key: &K) -> Result<(), SocketError> {
        match self.map.remove(key) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {
                Ok(())
            }
            Err(MapError::KeyNotFound) => Ok(()),
            other => other.map_err(|error| map_error(self.name, error)),
        }
    }
}

/// A pinned map, and for how many elements it has room.
pub(super) fn open_map(folder: &MapFolder, name: &'static str) -> Result<(MapData, u32), SocketError> {
    let map = MapData::from_pin(folder.map(name)).map_err(|error| map_error(name, error))?;
    let entries = map.info().map_err(|error| map_error(name, error))?.max_entries();
    Ok((map, entries))
}

fn map_error(name: &'static str, source: MapError) -> SocketError {
    SocketError::Map { name, source: Box::new(source) }
}
