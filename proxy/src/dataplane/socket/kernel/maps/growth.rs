//! Larger maps that take the place of others, while programs go on with those.
//!
//! Owns the copy, and what programs wrote to the former maps after it: counts, and where clients come back to. The agent
//! itself writes neither meanwhile.

use std::collections::HashSet;

use aya::Pod;
use kube_lane_common::maps;

use super::{Maps, store};
use crate::dataplane::socket::SocketError;
use crate::dataplane::socket::kernel::hash::Hash;
use crate::dataplane::socket::kernel::room::Room;
use crate::dataplane::socket::kernel::sys::Words;

/// Maps that others take the place of.
#[derive(Debug)]
pub(in super::super) struct Former {
    maps: Maps,
    /// Those that are copied. The others are the same maps.
    copied: Vec<&'static str>,
    /// The counts that were copied.
    connections: Vec<u64>,
    refused: Vec<u64>,
}

impl Former {
    /// Copies the content of these of the maps to others, each as large or larger.
    pub(in super::super) fn copy(
        maps: Maps,
        copied: Vec<&'static str>,
        to: &mut Maps,
    ) -> Result<Self, SocketError> {
        let mut former = Self { maps, copied, connections: Vec::new(), refused: Vec::new() };
        let from = &former.maps;
        for name in &former.copied {
            match *name {
                maps::FRONTENDS => copy_hash(&from.frontends, &mut to.frontends)?,
                maps::NODE_ADDRESSES => copy_hash(&from.node_addresses, &mut to.node_addresses)?,
                maps::AFFINITY => copy_hash(&from.affinity, &mut to.affinity)?,
                maps::LEFT_ALONE => copy_hash(&from.left_alone, &mut to.left_alone)?,
                maps::SETS => drop(copy_array(name, &from.sets, &to.sets)?),
                maps::SLOTS => drop(copy_array(name, &from.slots, &to.slots)?),
                maps::BACKENDS => drop(copy_array(name, &from.backends, &to.backends)?),
                maps::MEMBERS => drop(copy_array(name, &from.members, &to.members)?),
                maps::PORTS => drop(copy_array(name, &from.ports, &to.ports)?),
                maps::CONNECTIONS => {
                    former.connections = copy_array(name, &from.connections, &to.connections)?;
                }
                maps::REFUSED => former.refused = copy_array(name, &from.refused, &to.refused)?,
                maps::SETTINGS => drop(copy_array(name, &from.settings, &to.settings)?),
                // What sockets remember is never too small.
                _ => {}
            }
        }
        Ok(former)
    }

    /// How much room there was.
    pub(in super::super) fn room(&self) -> Room {
        self.maps.room()
    }

    /// Adds what programs wrote after the copy. None may still run that has the former maps.
    pub(in super::super) fn catch_up(&self, to: &Maps) -> Result<(), SocketError> {
        count_more(maps::CONNECTIONS, &self.connections, &self.maps.connections, &to.connections)?;
        count_more(maps::REFUSED, &self.refused, &self.maps.refused, &to.refused)?;
        if self.copied.contains(&maps::AFFINITY) {
            let there: HashSet<_> = to.affinity.elements()?.into_iter().map(|(client, _)| client).collect();
            // A client that came once more since has another memory by now, which counts.
            for (client, memory) in self.maps.affinity.elements()? {
                if !there.contains(&client) {
                    to.affinity.put_back(&client, memory)?;
                }
            }
        }
        Ok(())
    }
}

/// Copies an array, and tells what was copied.
fn copy_array<T: Pod>(name: &'static str, from: &Words<T>, to: &Words<T>) -> Result<Vec<T>, SocketError> {
    let entries: Vec<_> = (0..from.len()).map_while(|index| from.get(index)).collect();
    (0..).zip(&entries).try_for_each(|(index, entry)| store(name, to, index, *entry))?;
    Ok(entries)
}

fn copy_hash<K: Pod, V: Pod>(from: &Hash<K, V>, to: &mut Hash<K, V>) -> Result<(), SocketError> {
    to.insert_all(&from.elements()?)
}

/// Adds to counters what others have more than was copied of them.
fn count_more(
    name: &'static str,
    copied: &[u64],
    from: &Words<u64>,
    to: &Words<u64>,
) -> Result<(), SocketError> {
    for (index, copied) in copied.iter().enumerate() {
        let more = from.get(index).map_or(0, |count| count.wrapping_sub(*copied));
        if more != 0 && !to.add(index, more) {
            return Err(SocketError::NoEntry { name, index: index as u32 });
        }
    }
    Ok(())
}
