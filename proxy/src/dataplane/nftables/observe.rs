//! What the kernel was found to hold: read back at start, after a refusal that shows a disagreement, and after
//! somebody else changed our tables.
//!
//! Owns the read-back. Never runs for a change of a Service: what was committed is known, not listed.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;

use nix::errno::Errno;
use tracing::warn;

use super::element::{Data, Element, Place};
use super::lower::Kernel;
use super::message::{SetInfo, parse_elements, parse_set};
use super::netlink::Netlink;
use super::schema::{Set, len_of};
use crate::model::input::Family;

/// How often a dump is begun again because the set changed under it.
const ATTEMPTS: usize = 20;

/// Elements that the kernel holds and that nothing applied has claimed yet.
#[derive(Debug, Default)]
pub(crate) struct Found {
    elements: HashMap<Place, Held>,
    /// Those of `ranges`, in order: what is there of a VIP must be known to write another range of it.
    ranges: BTreeSet<Place>,
    /// Comments are compared, not kept.
    hasher: RandomState,
}

#[derive(Debug)]
struct Held {
    data: Option<Data>,
    comment: u64,
}

/// The state of one of our tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableState {
    /// It does not exist, or lacks sets.
    Absent,
    /// Its sets are laid out as this build lays them out.
    Current,
    /// A set of the same name has another layout: another build's.
    Foreign,
}

impl Found {
    /// Reads one family's table, and adds its elements.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub(crate) fn read(&mut self, netlink: &mut Netlink, family: Family) -> Result<TableState, Errno> {
        let mut infos = Vec::new();
        match again(|| {
            infos.clear();
            netlink.dump(family, None, |message| infos.extend(parse_set(message)))
        }) {
            Ok(()) => {}
            Err(Errno::ENOENT) => return Ok(TableState::Absent),
            Err(errno) => return Err(errno),
        }
        if Set::ALL
            .iter()
            .any(|set| infos.iter().any(|info| info.name == set.name() && !fits(*set, family, info)))
        {
            return Ok(TableState::Foreign);
        }
        for info in &infos {
            let Some(set) = Set::named(&info.name) else { continue };
            self.read_set(netlink, family, set)?;
        }
        let complete = Set::ALL.iter().all(|set| infos.iter().any(|info| info.name == set.name()));
        Ok(if complete { TableState::Current } else { TableState::Absent })
    }

    fn read_set(&mut self, netlink: &mut Netlink, family: Family, set: Set) -> Result<(), Errno> {
        let (elements, ranges, hasher) = (&mut self.elements, &mut self.ranges, &self.hasher);
        again(|| {
            netlink.dump(family, Some(set), |message| {
                parse_elements(message, |key, data, comment| match key {
                    Some(key) => {
                        let (place, comment) = (Place { family, set, key }, hasher.hash_one(comment));
                        elements.insert(place, Held { data, comment });
                        if set.has_ranges() {
                            ranges.insert(place);
                        }
                    }
                    None => warn!(set = set.name(), "an element of a strange size is left alone"),
                });
            })
        })
    }

    /// Whether the kernel holds exactly this element.
    pub(crate) fn has(&self, element: &Element) -> bool {
        let comment = element.comment.as_deref().map(str::as_bytes);
        self.elements
            .get(&element.place)
            .is_some_and(|held| held.data == element.data && held.comment == self.hasher.hash_one(comment))
    }

    /// Somebody applied owns this place from now on.
    pub(crate) fn settle(&mut self, place: &Place) {
        self.elements.remove(place);
        if place.set.has_ranges() {
            self.ranges.remove(place);
        }
    }

    /// The places of one set that nobody has claimed.
    pub(crate) fn places_in(&self, family: Family, set: Set) -> Vec<Place> {
        self.elements.keys().filter(|place| (place.family, place.set) == (family, set)).copied().collect()
    }

    /// The places that nobody has claimed, in order.
    pub(crate) fn places(&self) -> Vec<Place> {
        let mut places: Vec<_> = self.elements.keys().copied().collect();
        places.sort_unstable();
        places
    }
}

impl Kernel for Found {
    fn holds(&self, place: &Place) -> bool {
        self.elements.contains_key(place)
    }

    fn backend(&self, place: &Place) -> Option<SocketAddr> {
        self.elements.get(place)?.data?.to_backend()
    }

    fn ranges(&self, vip: Place) -> impl Iterator<Item = Place> {
        let of_vip = move |place: &&Place| place.family == vip.family && place.key.starts_with(&vip.key);
        self.ranges.range(Place { set: Set::Ranges, ..vip }..).take_while(of_vip).copied()
    }
}

fn fits(set: Set, family: Family, info: &SetInfo) -> bool {
    info.flags == set.flags()
        && info.key_len as usize == len_of(set.key(), family)
        && info.data_len as usize == set.data().map_or(0, |data| len_of(data, family))
}

/// Repeats a dump that was interrupted by a change.
fn again(mut dump: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    for _ in 1..ATTEMPTS {
        match dump() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
    dump()
}
