//! What clients of ports with session affinity come back to, and the removal of what they no longer come back for.
//!
//! Owns no policy: whether a memory counts the programs decide, by the same words. Never removes one that counts.

use std::os::fd::{AsFd, OwnedFd};

use aya::maps::{HashMap, MapData};
use kube_lane_common::{AffinityKey, Member, PortWord, Remembered, maps};
use nix::time::{ClockId, clock_gettime};

use super::SocketError;
use super::maps::{map_error, open_array, open_hash};
use super::pins::MapFolder;
use super::sys::{self, Words};

/// The memories, and what tells whether one counts.
#[derive(Debug)]
pub(super) struct Memories {
    memories: HashMap<MapData, AffinityKey, Remembered>,
    /// The same map.
    descriptor: OwnedFd,
    ports: Words<PortWord>,
    members: Words<Member>,
}

impl Memories {
    pub(super) fn open(folder: &MapFolder) -> Result<Self, SocketError> {
        let descriptor = sys::pinned(&folder.map(maps::AFFINITY)).map_err(failed)?;
        Ok(Self {
            memories: open_hash(folder, maps::AFFINITY)?.0,
            descriptor,
            ports: open_array(folder, maps::PORTS)?,
            members: open_array(folder, maps::MEMBERS)?,
        })
    }

    /// Removes what no longer counts.
    pub(super) fn sweep(&self) -> Result<(), SocketError> {
        let error = |source| map_error(maps::AFFINITY, source);
        let all = self.memories.iter().collect::<Result<Vec<_>, _>>().map_err(error)?;
        let now = now()?;
        for (client, memory) in all {
            if self.counts(&client, memory, now) {
                continue;
            }
            let map = self.descriptor.as_fd();
            let taken = sys::take(map, &client, Remembered(0)).map_err(failed)?;
            // The client came meanwhile.
            if let Some(fresh) = taken.filter(|taken| *taken != memory) {
                sys::put_back(map, &client, fresh).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn counts(&self, client: &AffinityKey, memory: Remembered, now: u64) -> bool {
        let affinity = self.ports.get(client.port as usize).map_or(0, PortWord::affinity);
        let member = self.members.get(memory.backend() as usize).unwrap_or(Member::NONE);
        // Rather a second too long.
        now <= u64::from(memory.seconds()) + u64::from(affinity) && member.0 as u32 == client.port
    }
}

/// In seconds, by the clock of the programs.
fn now() -> Result<u64, SocketError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|error| failed(error.into()))?;
    Ok(now.tv_sec().unsigned_abs())
}

fn failed(source: std::io::Error) -> SocketError {
    SocketError::Sweep(source)
}
