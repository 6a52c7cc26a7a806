//! What the kernel was found to hold: read back at start, after a refusal that shows a disagreement, and after
//! somebody else changed our tables.
//!
//! Owns the read-back. The sets that name frontends are listed, and all others that are small; what is behind a name, in the
//! maps of slots, is asked for by its keys when a Service takes the frontend over, or the sweep removes it
//! ([`super::picks`]). Never runs for a change of a Service: what was committed is known, not listed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};

use nftnl::nftnl_sys::libc;
use nix::errno::Errno;
use tracing::warn;

use super::element::{Data, Element, Place};
use super::kernel::Kernel;
use super::message::Wanted;
use super::netlink::Netlink;
use super::parse::{SetInfo, parse_elements, parse_set};
use super::picks::Picks;
use super::schema::{Set, len_of};
use crate::model::input::Family;
use crate::model::plan::{Frontend, PortPlan};

/// How often a dump is begun again because the set changed under it.
const ATTEMPTS: usize = 20;

/// Elements that the kernel holds and that nothing applied has claimed yet.
#[derive(Debug, Default)]
pub(crate) struct Found {
    elements: HashMap<Place, Held>,
    /// Those of the sets that are searched by prefix, in order.
    ordered: BTreeSet<Place>,
    /// What has to be made anew of each table since its elements count and should not, or the reverse.
    outdated: BTreeMap<Family, Outdated>,
    /// What each table has that is no Service's.
    fixtures: BTreeMap<Family, Fixtures>,
    /// The maps of slots that exist and were not listed.
    unlisted: BTreeSet<(Family, Set)>,
    counting: bool,
    /// Comments are compared, not kept.
    hasher: RandomState,
    /// How many elements were listed.
    pub(crate) count: usize,
}

/// Takes an element: where it is, its data, its comment.
pub(crate) type Each<'a> = dyn FnMut(&Place, Option<Data>, Option<&[u8]>) + 'a;

/// Who can be asked for single elements.
pub(crate) trait LookUp {
    /// Calls `each` with every element that is there.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn look_up(&mut self, places: &[Place], each: &mut Each<'_>) -> Result<(), Errno>;
}

impl LookUp for Netlink {
    fn look_up(&mut self, places: &[Place], each: &mut Each<'_>) -> Result<(), Errno> {
        self.ask_for(places, |place, message| {
            parse_elements(message, |element| each(place, element.data, element.comment));
        })
    }
}

/// Copies what is found in outdated sets.
struct Copying<'a> {
    netlink: &'a mut Netlink,
    outdated: &'a mut Outdated,
}

impl LookUp for Copying<'_> {
    fn look_up(&mut self, places: &[Place], each: &mut Each<'_>) -> Result<(), Errno> {
        let sets = &mut self.outdated.sets;
        self.netlink.look_up(places, &mut |place, data, comment| {
            if let Some((_, copies)) = sets.iter_mut().find(|(set, _)| *set == place.set) {
                copies.push(Element::copied(*place, data, comment));
            }
            each(place, data, comment);
        })
    }
}

/// How the maps of slots are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// By key: what packets may meet.
    Reachable,
    /// Listed: also what somebody else put where no pick looks, and where a new slot would be in its way.
    Everything,
}

#[derive(Debug)]
struct Held {
    data: Option<Data>,
    comment: u64,
}

/// What of a table is made anew, with all that it holds.
#[derive(Debug, Default)]
pub(crate) struct Outdated {
    /// The sets, and their elements.
    pub(crate) sets: Vec<(Set, Vec<Element>)>,
    /// The chains that may name them.
    pub(crate) chains: Vec<String>,
}

/// What of a table is no Service's.
#[derive(Debug, Default)]
pub(crate) struct Fixtures {
    /// Its chains, whosever they are.
    pub(crate) chains: Vec<String>,
    /// The sets that this build does not know.
    pub(crate) strange_sets: Vec<String>,
}

/// The state of one of our tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableState {
    /// It does not exist.
    Absent,
    /// It lacks sets.
    Partial,
    /// Its sets are laid out as this build lays them out.
    Current,
    /// A set of the same name has another layout: another build's.
    Foreign,
}

impl Found {
    /// As if these had been read.
    #[cfg(test)]
    pub(crate) fn holding<'a>(elements: impl Iterator<Item = &'a Element>) -> Self {
        let mut found = Self::default();
        for Element { place, data, comment } in elements {
            found.put(*place, *data, comment.as_deref().map(str::as_bytes));
        }
        found
    }

    /// As if all but the maps of slots had been read.
    #[cfg(test)]
    pub(crate) fn listed<'a>(elements: impl Iterator<Item = &'a Element>) -> Self {
        let maps = Set::ALL.into_iter().filter(|set| set.has_slots());
        let unlisted = maps.flat_map(|set| Family::ALL.map(|family| (family, set))).collect();
        Self { unlisted, ..Self::holding(elements.filter(|element| !element.place.set.has_slots())) }
    }

    /// Reads one family's table, and adds its elements.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub(crate) fn read(
        &mut self,
        netlink: &mut Netlink,
        family: Family,
        depth: Depth,
    ) -> Result<TableState, Errno> {
        self.counting = netlink.counting();
        let mut infos = Vec::new();
        match again(|| {
            infos.clear();
            netlink.read(family, Wanted::Sets, |message| infos.extend(parse_set(message)))
        }) {
            Ok(()) => {}
            Err(Errno::ENOENT) => return Ok(TableState::Absent),
            Err(errno) => return Err(errno),
        }
        let counting = self.counting;
        let counts_wrongly = |set: Set, info: &SetInfo| info.counts != (counting && set.counts());
        if Set::ALL
            .iter()
            .any(|set| infos.iter().any(|info| info.name == set.name() && !fits(*set, family, info)))
        {
            return Ok(TableState::Foreign);
        }
        let chains = again(|| netlink.chains(family))?;
        let mut outdated = Outdated::default();
        for info in &infos {
            if let Some(set) = Set::named(&info.name) {
                let mut copies = counts_wrongly(set, info).then(Vec::new);
                if set.has_slots() && depth == Depth::Reachable {
                    self.unlisted.insert((family, set));
                } else if !set.is_filled_by_packets() {
                    self.read_set(netlink, family, set, copies.as_mut())?;
                }
                outdated.sets.extend(copies.map(|copies| (set, copies)));
            }
        }
        if !outdated.sets.is_empty() {
            let names = self.elements.keys().filter(|name| name.family == family);
            let picks = names.filter_map(|name| Picks::of(name, 0)).collect();
            self.ask(&mut Copying { netlink, outdated: &mut outdated }, picks)?;
            outdated.chains.clone_from(&chains);
            self.outdated.insert(family, outdated);
        }
        let is_strange = |info: &&SetInfo| {
            // What has no name of its own goes with the rule that it is in.
            let is_anonymous = info.flags & libc::NFT_SET_ANONYMOUS as u32 != 0;
            Set::named(&info.name).is_none() && !is_anonymous
        };
        let strange_sets = infos.iter().filter(is_strange).map(|info| info.name.clone()).collect();
        self.fixtures.insert(family, Fixtures { chains, strange_sets });
        let complete = Set::ALL.iter().all(|set| infos.iter().any(|info| info.name == set.name()));
        Ok(if complete { TableState::Current } else { TableState::Partial })
    }

    /// Reads the elements of a set, and copies them where it is outdated.
    fn read_set(
        &mut self,
        netlink: &mut Netlink,
        family: Family,
        set: Set,
        mut copies: Option<&mut Vec<Element>>,
    ) -> Result<(), Errno> {
        again(|| {
            if let Some(copies) = &mut copies {
                copies.clear();
            }
            netlink.read(family, Wanted::Elements(set.name()), |message| {
                parse_elements(message, |element| match element.key {
                    Some(key) => {
                        let place = Place { family, set, key };
                        if let Some(copies) = &mut copies {
                            copies.push(Element::copied(place, element.data, element.comment));
                        }
                        self.count += 1;
                        self.put(place, element.data, element.comment);
                    }
                    None => warn!(set = set.name(), "an element of a strange size is left alone"),
                });
            })
        })
    }

    fn put(&mut self, place: Place, data: Option<Data>, comment: Option<&[u8]>) {
        let comment = self.hasher.hash_one(comment);
        self.elements.insert(place, Held { data, comment });
        if place.set.is_searched_by_prefix() {
            self.ordered.insert(place);
        }
    }

    /// Looks up what is behind the names of these frontends, which are about to be taken over. Tells how many elements
    /// it asked for.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub(crate) fn look_up<'a>(
        &mut self,
        kernel: &mut impl LookUp,
        frontends: impl Iterator<Item = (&'a PortPlan, &'a Frontend)>,
    ) -> Result<usize, Errno> {
        let is_there = |name: &Place| self.elements.contains_key(name);
        let picks = frontends.flat_map(|(port, frontend)| Picks::of_frontend(port, frontend, is_there));
        let picks = picks.collect();
        self.ask(kernel, picks)
    }

    /// Looks up what is behind all names that nobody has claimed. Tells how many elements it asked for.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub(crate) fn look_up_rest(&mut self, kernel: &mut impl LookUp) -> Result<usize, Errno> {
        let picks = self.elements.keys().filter_map(|name| Picks::of(name, 0)).collect();
        self.ask(kernel, picks)
    }

    /// Asks for the elements of the maps that were not listed, round by round.
    fn ask(&mut self, kernel: &mut impl LookUp, mut picks: Vec<Picks>) -> Result<usize, Errno> {
        let mut asked = 0;
        while !picks.is_empty() && !self.unlisted.is_empty() {
            let is_unlisted = |place: &Place| self.unlisted.contains(&(place.family, place.set));
            let places: Vec<_> = picks.iter().flat_map(Picks::places).filter(is_unlisted).collect();
            asked += places.len();
            kernel.look_up(&places, &mut |place, data, comment| self.put(*place, data, comment))?;
            let is_there = |place: &Place| self.elements.contains_key(place);
            picks = picks.into_iter().filter_map(|picks| picks.next(is_there)).collect();
        }
        Ok(asked)
    }

    /// As if a family had no table.
    pub(crate) fn forget(&mut self, family: Family) {
        self.elements.retain(|place, _| place.family != family);
        self.ordered.retain(|place| place.family != family);
        self.fixtures.remove(&family);
        self.unlisted.retain(|(of, _)| *of != family);
    }

    /// What has to be made anew of a table.
    pub(crate) fn take_outdated(&mut self, family: Family) -> Outdated {
        self.outdated.remove(&family).unwrap_or_default()
    }

    /// What of a table is no Service's.
    pub(crate) fn take_fixtures(&mut self, family: Family) -> Fixtures {
        self.fixtures.remove(&family).unwrap_or_default()
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
        if place.set.is_searched_by_prefix() {
            self.ordered.remove(place);
        }
    }

    /// The numbers of ports with session affinity that a table's elements name, each maybe many times.
    pub(crate) fn ids(&self, family: Family) -> impl Iterator<Item = u16> {
        let of_family = self.elements.iter().filter(move |(place, _)| place.family == family);
        of_family.filter_map(|(place, held)| {
            let number = match place.set {
                Set::AffinityIds | Set::NpAffinityIds => held.data?.to_id()?,
                Set::AffinityTimeouts
                | Set::AffinityBackends
                | Set::AffinityMembers
                | Set::AffinityCluster
                | Set::AffinityLocal => place.key.to_id()?,
                _ => return None,
            };
            u16::try_from(number >> 16).ok().filter(|id| *id != 0)
        })
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

    fn data(&self, place: &Place) -> Option<Data> {
        self.elements.get(place)?.data
    }

    fn below(&self, place: Place) -> impl Iterator<Item = (Place, Option<Data>)> {
        let is_below = move |held: &&Place| {
            (held.family, held.set) == (place.family, place.set) && held.key.starts_with(&place.key)
        };
        self.ordered.range(place..).take_while(is_below).map(|held| (*held, self.data(held)))
    }

    fn counts(&self) -> bool {
        self.counting
    }
}

fn fits(set: Set, family: Family, info: &SetInfo) -> bool {
    info.flags == set.flags()
        && info.key_len as usize == len_of(set.key(), family)
        && info.data_len as usize == set.data().map_or(0, |data| len_of(data, family))
}

/// Repeats a dump that was interrupted by a change.
pub(crate) fn again<T>(mut dump: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 1..ATTEMPTS {
        match dump() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
    dump()
}
