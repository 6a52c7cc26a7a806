//! Loads the programs and attaches them. What is attached here goes with the value that holds it.

use std::fs::File;
use std::path::Path;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use aya::programs::{CgroupAttachMode, CgroupSockAddr};
use kube_lane_common::{FrontendKey, maps, programs};

use super::SocketError;

/// The programs, loaded and attached to a cgroup; dropping it detaches and unloads them.
#[derive(Debug)]
pub struct SocketPrograms {
    connects: HashMap<MapData, FrontendKey, u64>,
    /// Holds the programs and their links.
    _ebpf: Ebpf,
}

impl SocketPrograms {
    /// Loads `object` and attaches its programs to the cgroup v2 at `cgroup`. Programs of others there stay.
    ///
    /// # Errors
    /// When the kernel refuses any of it; nothing stays attached.
    pub fn attach(object: &[u8], cgroup: &Path) -> Result<Self, SocketError> {
        let mut ebpf = Ebpf::load(object).map_err(|source| SocketError::Object(Box::new(source)))?;
        let at =
            File::open(cgroup).map_err(|source| SocketError::Cgroup { path: cgroup.to_owned(), source })?;

        let name = programs::CONNECT4;
        let load = |source| SocketError::Load { name, source: Box::new(source) };
        let program = ebpf.program_mut(name).ok_or(SocketError::Missing(name))?;
        let connect4: &mut CgroupSockAddr = program.try_into().map_err(load)?;
        connect4.load().map_err(load)?;
        // A link never excludes the programs of others, whatever the mode: the kernel takes no flag here.
        connect4.attach(at, CgroupAttachMode::Single).map_err(|source| SocketError::Attach {
            name,
            path: cgroup.to_owned(),
            source: std::io::Error::other(source),
        })?;

        let connects = ebpf.take_map(maps::CONNECTS).ok_or(SocketError::Missing(maps::CONNECTS))?;
        Ok(Self { connects: connects.try_into().map_err(connects_error)?, _ebpf: ebpf })
    }

    /// Counts TCP connects to `to` from now on, from zero.
    ///
    /// # Errors
    /// When the map is full.
    pub fn watch(&mut self, to: FrontendKey) -> Result<(), SocketError> {
        self.connects.insert(to, 0, 0).map_err(connects_error)
    }

    /// TCP connects to `to` since it is watched; `None` where it is not.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn connects(&self, to: FrontendKey) -> Result<Option<u64>, SocketError> {
        match self.connects.get(&to, 0) {
            Ok(count) => Ok(Some(count)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(connects_error(source)),
        }
    }
}

fn connects_error(source: MapError) -> SocketError {
    SocketError::Map { name: maps::CONNECTS, source: Box::new(source) }
}
