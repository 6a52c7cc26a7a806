//! What the maps hold, as far as the next change has to know, and the edit of one endpoint set.
//!
//! Owns the order of writes within a set: after each one, whatever a program picks is in the set that was or in the one
//! that will be. Pure. Never knows a plan.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use kube_lane_common::{Frontend, FrontendKey, Member, Set, Slot};

use super::super::write::{Sizes, Write};
use super::ids::{Ids, Range, Ranges, Retired};
use super::members::Both;

/// What the maps hold.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) sizes: Sizes,
    pub(super) frontends: HashMap<FrontendKey, Frontend>,
    pub(super) node_addresses: BTreeSet<IpAddr>,
    /// The backend at each index; what lies beyond the end was never written.
    pub(super) slots: Vec<u32>,
    pub(super) ports: Ids,
    pub(super) backends: Ids,
    pub(super) ranges: Ranges,
    pub(super) retired: Retired,
}

/// An endpoint set as it lies in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) word: Set,
    /// The order of the range that its slots are the first of; `None`: it has none.
    order: Option<u8>,
}

impl Placed {
    pub(super) const NOWHERE: Self = Self::nowhere(Set::NONE);

    /// A set without slots.
    pub(super) const fn nowhere(word: Set) -> Self {
        Self { word, order: None }
    }

    /// The first `count` slots of a range.
    pub(super) fn within(range: Range, count: u32) -> Self {
        Self { word: Set::new(range.first, count), order: Some(range.order) }
    }

    /// Where it lies; `None`: it has no slots.
    fn range(self) -> Option<Range> {
        self.order.map(|order| Range { first: self.word.first(), order })
    }

    /// How many backends fit where it lies.
    pub(super) fn room(self) -> u32 {
        self.range().map_or(0, Range::room)
    }
}

impl Default for Placed {
    fn default() -> Self {
        Self::NOWHERE
    }
}

/// How the backends of a set change.
pub(super) struct Change {
    /// The ids of those that leave.
    pub(super) leaving: Vec<u32>,
    /// The ids of those that join: backends that are written already.
    pub(super) joining: Vec<u32>,
    /// Where the set moves to, since it would not fit any more.
    pub(super) moves_to: Option<Range>,
    /// What the set says where nobody is left.
    pub(super) empty: Set,
}

/// The maps, while they change.
pub(super) struct Edit<'a> {
    pub(super) image: &'a mut Image,
    /// Takes each write, in order.
    pub(super) sink: &'a mut dyn FnMut(Write),
}

impl Edit<'_> {
    pub(super) fn write(&mut self, write: Write) {
        (self.sink)(write);
    }

    /// A frontend leads elsewhere, or nowhere.
    pub(super) fn frontend(&mut self, key: FrontendKey, to: Option<Frontend>) {
        let before = match to {
            Some(word) => self.image.frontends.insert(key, word),
            None => self.image.frontends.remove(&key),
        };
        if before != to {
            self.write(Write::Frontend(key, to));
        }
    }

    /// The sets that a backend is in, for clients that were led to it before.
    pub(super) fn member(&mut self, backend: u32, port: u32, within: Both<bool>) {
        self.write(Write::Member(backend, Member::new(port, within[0], within[1])));
    }

    /// NodePorts answer on an address, or no more.
    pub(super) fn node_address(&mut self, address: IpAddr, answers: bool) {
        let changed = match answers {
            true => self.image.node_addresses.insert(address),
            false => self.image.node_addresses.remove(&address),
        };
        if changed {
            self.write(Write::NodeAddress(address.into(), answers));
        }
    }

    /// Changes a set.
    pub(super) fn change(&mut self, set: u32, placed: &mut Placed, change: Change) {
        let Change { mut leaving, joining, moves_to, empty } = change;
        if placed.order.is_some() && leaving.is_empty() && joining.is_empty() {
            return;
        }
        leaving.sort_unstable();
        let old = placed.word.count();
        let len = old - leaving.len() as u32 + joining.len() as u32;
        if len == 0 {
            return self.place(set, placed, Placed::nowhere(empty));
        }
        let leaves = |backend: u32| leaving.binary_search(&backend).is_ok();
        let first = placed.word.first();
        let at = |image: &Image, position: u32| image.slots[(first + position) as usize];
        if let Some(range) = moves_to {
            let staying =
                (0..old).map(|position| at(self.image, position)).filter(|backend| !leaves(*backend));
            let all: Vec<_> = staying.chain(joining).collect();
            for (slot, backend) in (range.first..).zip(all) {
                self.slot(slot, backend, set);
            }
            return self.place(set, placed, Placed::within(range, len));
        }
        let mut gaps = (0..old).filter(|position| leaves(at(self.image, *position))).collect::<Vec<_>>();
        // The last ones stay gaps: they are nearest to the end.
        let filled = gaps.len().min(joining.len());
        let behind = gaps.split_off(filled);
        for (position, backend) in gaps.into_iter().chain(old..).zip(joining) {
            self.slot(first + position, backend, set);
        }
        let last_ones = (len..old).filter(|position| behind.binary_search(position).is_err());
        for (gap, last) in behind.iter().copied().zip(last_ones).collect::<Vec<_>>() {
            self.slot(first + gap, at(self.image, last), set);
        }
        self.place(set, placed, Placed { word: Set::new(first, len), ..*placed });
    }

    /// The last backend of a set takes another's place, and the set ends before it.
    pub(super) fn shorten(&mut self, set: u32, placed: &mut Placed, position: u32) {
        let (first, last) = (placed.word.first(), placed.word.count() - 1);
        let backend = self.image.slots[(first + last) as usize];
        if position != last {
            self.slot(first + position, backend, set);
        }
        self.place(set, placed, Placed { word: Set::new(first, last), ..*placed });
    }

    /// One store says where a set lies now; the range that it leaves is retired.
    pub(super) fn place(&mut self, set: u32, placed: &mut Placed, now: Placed) {
        let before = std::mem::replace(placed, now);
        if before.word != now.word {
            self.write(Write::Set(set, now.word));
        }
        if before.range() != now.range() {
            self.image.retired.ranges.extend(before.range());
        }
    }

    fn slot(&mut self, index: u32, backend: u32, set: u32) {
        let i = index as usize;
        if self.image.slots.len() <= i {
            self.image.slots.resize(i + 1, 0);
        }
        self.image.slots[i] = backend;
        self.write(Write::Slot(index, Slot::new(backend, set)));
    }
}
