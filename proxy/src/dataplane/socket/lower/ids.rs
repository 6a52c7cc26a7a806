//! Which ids and ranges of slots are free.
//!
//! What is given up may still be in the hands of a program that runs at that moment. It is *retired* first, and free
//! only once it is given back here, after a grace period.

use std::collections::{BTreeSet, VecDeque};
use std::iter;

/// Ids from 1 on.
#[derive(Debug)]
pub(super) struct Ids {
    /// What was never used begins here.
    next: u32,
    last: u32,
    /// The one that is free for longest comes first, since what a client remembers may name it.
    free: VecDeque<u32>,
}

impl Ids {
    /// The ids 1 to `last`, of which some are in use.
    pub(super) fn new(last: u32, used: &BTreeSet<u32>) -> Self {
        let next = used.last().map_or(1, |id| id + 1);
        let free = (1..next).filter(|id| !used.contains(id)).collect();
        Self { next, last, free }
    }

    /// One that is free.
    pub(super) fn take(&mut self) -> Option<u32> {
        self.free.pop_front().or_else(|| {
            let fresh = (self.next <= self.last).then_some(self.next)?;
            self.next += 1;
            Some(fresh)
        })
    }

    pub(super) fn give_back(&mut self, ids: impl IntoIterator<Item = u32>) {
        self.free.extend(ids);
    }
}

/// `2^order` slots, the first of which is a multiple of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: u32,
    pub(super) order: u8,
}

impl Range {
    /// How many orders there are: as many slots as a set can have, and more.
    const ORDERS: usize = 32;

    /// The order of a range with room for this many.
    pub(super) fn order_for(slots: u32) -> u8 {
        slots.max(1).next_power_of_two().trailing_zeros() as u8
    }

    pub(super) fn room(self) -> u32 {
        1 << self.order
    }
}

/// A buddy allocator: the free slots as ranges, as large as they can be.
#[derive(Debug)]
pub(super) struct Ranges([BTreeSet<u32>; Range::ORDERS]);

impl Ranges {
    /// All of these slots are free.
    pub(super) fn new(slots: u32) -> Self {
        let mut ranges = Self(Default::default());
        let mut first = 0;
        while first < slots {
            let largest = (slots - first).ilog2();
            let order = if first == 0 { largest } else { largest.min(first.trailing_zeros()) };
            ranges.0[order as usize].insert(first);
            first += 1 << order;
        }
        ranges
    }

    /// A range that is free, the first of the smallest that will do.
    pub(super) fn take(&mut self, order: u8) -> Option<Range> {
        let (larger, first) = (usize::from(order)..Range::ORDERS)
            .find_map(|larger| self.0[larger].pop_first().map(|first| (larger as u8, first)))?;
        Some(self.split(Range { first, order: larger }, Range { first, order }))
    }

    /// Takes a certain range; `false`: it is not free.
    pub(super) fn take_at(&mut self, range: Range) -> bool {
        let around = (range.order..Range::ORDERS as u8)
            .map(|order| Range { first: range.first >> order << order, order })
            .find(|around| self.0[usize::from(around.order)].remove(&around.first));
        around.map(|around| self.split(around, range)).is_some()
    }

    /// Frees the rest of a range `around` another.
    fn split(&mut self, around: Range, range: Range) -> Range {
        for order in range.order..around.order {
            let buddy = (range.first >> order ^ 1) << order;
            self.0[usize::from(order)].insert(buddy);
        }
        range
    }

    pub(super) fn give_back(&mut self, ranges: impl IntoIterator<Item = Range>) {
        for Range { first, order } in ranges {
            let buddies = iter::successors(Some((first, usize::from(order))), |(first, order)| {
                self.0[*order].remove(&(first ^ 1 << order)).then(|| (first & !(1 << order), order + 1))
            });
            if let Some((first, order)) = buddies.last() {
                self.0[order].insert(first);
            }
        }
    }
}

/// What no map names any more, until no program runs that may have read it before.
#[derive(Debug, Default)]
pub struct Retired {
    pub(super) ports: Vec<u32>,
    pub(super) backends: Vec<u32>,
    pub(super) ranges: Vec<Range>,
}

impl Retired {
    /// There is nothing to wait for.
    pub fn is_empty(&self) -> bool {
        self.ports.is_empty() && self.backends.is_empty() && self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_back_in_the_order_in_which_they_were_given_back() {
        let mut ids = Ids::new(4, &[2].into());
        assert_eq!([ids.take(), ids.take()], [Some(1), Some(3)]);
        ids.give_back([3, 1]);
        assert_eq!([ids.take(), ids.take(), ids.take(), ids.take()], [Some(3), Some(1), Some(4), None]);
    }

    #[test]
    fn ranges_are_split_and_joined_again() {
        let mut ranges = Ranges::new(13);
        let whole = format!("{ranges:?}");
        let taken: Vec<_> = [2, 0, 1].iter().map(|order| ranges.take(*order).unwrap()).collect();
        let first = |range: &Range| (range.first, range.room());
        assert_eq!(taken.iter().map(first).collect::<Vec<_>>(), [(8, 4), (12, 1), (0, 2)]);
        assert!(!ranges.take_at(Range { first: 8, order: 1 }));
        assert!(ranges.take_at(Range { first: 4, order: 1 }));
        assert_eq!(ranges.take(3), None);
        ranges.give_back(taken);
        ranges.give_back([Range { first: 4, order: 1 }]);
        assert_eq!(format!("{ranges:?}"), whole);
    }

    #[test]
    fn an_order_has_room_for_what_it_is_asked() {
        let rooms =
            [0, 1, 2, 3, 8, 9].map(|slots| (Range { first: 0, order: Range::order_for(slots) }).room());
        assert_eq!(rooms, [1, 1, 2, 4, 8, 16]);
    }
}
