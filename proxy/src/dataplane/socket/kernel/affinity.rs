//! What clients of ports with session affinity come back to, and the removal of what they no longer come back for.
//!
//! Owns no policy: whether a memory counts the programs decide, by the same words. Never removes one that counts.

use kube_lane_common::{AffinityKey, Member, PortWord, Remembered, maps};
use nix::time::{ClockId, clock_gettime};

use super::SocketError;
use super::hash::Hash;
use super::maps::open_array;
use super::pins::MapFolder;
use super::sys::Words;

/// The memories, and what tells whether one counts.
#[derive(Debug)]
pub(super) struct Memories {
    memories: Hash<AffinityKey, Remembered>,
    ports: Words<PortWord>,
    members: Words<Member>,
}

impl Memories {
    pub(super) fn open(folder: &MapFolder) -> Result<Self, SocketError> {
        Ok(Self {
            memories: Hash::open(folder, maps::AFFINITY)?,
            ports: open_array(folder, maps::PORTS)?,
            members: open_array(folder, maps::MEMBERS)?,
        })
    }

    /// Removes what no longer counts.
    pub(super) fn sweep(&self) -> Result<(), SocketError> {
        let now = now()?;
        for (client, memory) in self.memories.elements()? {
            if self.counts(&client, memory, now) {
                continue;
            }
            let taken = self.memories.take(&client, Remembered(0))?;
            // The client came meanwhile.
            if let Some(fresh) = taken.filter(|taken| *taken != memory) {
                self.memories.put_back(&client, fresh)?;
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
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|error| SocketError::Clock(error.into()))?;
    Ok(now.tv_sec().unsigned_abs())
}
