//! What the picks of a frontend may meet in the maps of slots: the keys to ask the kernel for when it is read back.
//!
//! Pure. The kernel dumps a set by 32 KiB, and walks it from its start again for each: listing a map takes a time that
//! grows with the square of its size, minutes for hundreds of thousands of slots. Asking for a key takes microseconds,
//! whatever there is. So only the sets that name frontends are listed, and these keys follow from the names. Never decides
//! what becomes of what is found.
//!
//! A pick draws from 2^k slots where `more` has 1, 2, 4 … 2^(k−1), and looks at no other: an element that is not among
//! these keys leads nobody anywhere.

use super::element::Place;
use super::lower::{BASES, Target, sizes};
use super::schema::{CLASSES, Set};
use crate::model::plan::{Frontend, PortPlan};

/// The picks from one endpoint set of a frontend, as far as it has been asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Picks {
    /// The beginnings of the keys in the map of slots and in the set `more` beside it.
    slots: Place,
    more: Place,
    /// The first slot.
    first: u32,
    /// The class of sizes that has been asked for, if any.
    asked: Option<u32>,
    /// The class to ask for: up to 2^k slots.
    class: u32,
}

impl Picks {
    /// Those of the frontend with this name, as one set of names has it; `None`: nothing is picked because of that set.
    /// `slots`: how many there probably are.
    pub(crate) fn of(name: &Place, slots: usize) -> Option<Self> {
        let (map, more, first) = match name.set {
            Set::Vips => (Set::Endpoints, Set::More, BASES[0]),
            Set::VipsLocal => (Set::Endpoints, Set::More, BASES[1]),
            Set::Nps => (Set::NpEndpoints, Set::NpMore, BASES[0]),
            Set::NpsLocal => (Set::NpEndpoints, Set::NpMore, BASES[1]),
            _ => return None,
        };
        let class = slots.next_power_of_two().trailing_zeros().min(CLASSES - 1);
        let (slots, more) = (Place { set: map, ..*name }, Place { set: more, ..*name });
        Some(Self { slots, more, first, asked: None, class })
    }

    /// Those of a frontend that is taken over as planned; `is_there`: whether the kernel has this name.
    pub(crate) fn of_frontend(
        port: &PortPlan,
        frontend: &Frontend,
        is_there: impl Fn(&Place) -> bool,
    ) -> impl Iterator<Item = Self> {
        let named = Target::new(port, frontend).picked();
        named.into_iter().zip(sizes(port, frontend)).filter_map(move |(name, size)| {
            // Where it has no name there are no slots, unless somebody else took the name away.
            let slots = if is_there(&name) { size.unwrap_or_default() } else { size.map(|_| 0)? };
            Self::of(&name, slots)
        })
    }

    /// What to ask for: the slots of the class, and where `more` says whether there are more than that.
    pub(crate) fn places(&self) -> impl Iterator<Item = Place> + use<> {
        let Self { slots, more, first, asked, class } = *self;
        let at =
            move |beginning: Place, number| Place { key: beginning.key.slot(first + number), ..beginning };
        let of_slots = asked.map_or(0, |asked| 1 << asked)..1 << class;
        let of_more = asked.map_or(0, |asked| asked + 1)..(class + 1).min(CLASSES - 1);
        let of_more = of_more.map(|i| 1 << i);
        of_slots.map(move |slot| at(slots, slot)).chain(of_more.map(move |step| at(more, step)))
    }

    /// What is to be asked for then; `is_there`: what has been found.
    pub(crate) fn next(self, is_there: impl Fn(&Place) -> bool) -> Option<Self> {
        let top = Place { key: self.more.key.slot(self.first + (1 << self.class)), ..self.more };
        (self.class < CLASSES - 1 && is_there(&top)).then_some(Self {
            asked: Some(self.class),
            class: self.class + 1,
            ..self
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::nftables::element::Key;
    use crate::model::input::{Family, Protocol};

    fn name(set: Set) -> Place {
        let key = Key::vip("10.96.0.1:80".parse().unwrap(), Protocol::Tcp);
        Place { family: Family::V4, set, key }
    }

    /// The numbers of the slots and of `more` that are asked for, round by round, where the kernel has so many slots.
    fn asked(set: Set, expected: usize, held: u32) -> Vec<(Vec<u32>, Vec<u32>)> {
        let number = |place: &Place| u32::from_ne_bytes(*place.key.as_bytes().last_chunk().unwrap());
        let first = number(&Picks::of(&name(set), 0).unwrap().places().next().unwrap());
        let is_there = |place: &Place| place.set == Set::More && number(place) - first < held;
        let (mut rounds, mut picks) = (Vec::new(), Picks::of(&name(set), expected));
        while let Some(round) = picks {
            let (slots, more): (Vec<_>, Vec<_>) = round.places().partition(|at| at.set == Set::Endpoints);
            rounds.push((slots.iter().map(number).collect(), more.iter().map(number).collect()));
            picks = round.next(is_there);
        }
        rounds
    }

    #[test]
    fn one_round_reads_all_that_a_pick_may_meet() {
        for (slots, expected) in [
            (0, (vec![0], vec![1])),
            (1, (vec![0], vec![1])),
            (2, (vec![0, 1], vec![1, 2])),
            (5, ((0..8).collect(), vec![1, 2, 4, 8])),
            (8, ((0..8).collect(), vec![1, 2, 4, 8])),
        ] {
            assert_eq!(asked(Set::Vips, slots, slots as u32), [expected], "{slots}");
        }
        assert_eq!(asked(Set::VipsLocal, 2, 2), [(vec![65536, 65537], vec![65537, 65538])]);
        let (slots, more) = asked(Set::Vips, 1 << 20, 1 << 14).remove(0);
        assert_eq!((slots.len(), more.len()), (1 << 14, 14), "no port has more");
    }

    #[test]
    fn where_there_are_more_than_expected_the_next_classes_follow() {
        let rounds = asked(Set::Vips, 1, 3);
        assert_eq!(rounds, [(vec![0], vec![1]), (vec![1], vec![2]), (vec![2, 3], vec![4])]);
        assert_eq!(
            asked(Set::Vips, 5, 9),
            [((0..8).collect(), vec![1, 2, 4, 8]), ((8..16).collect::<Vec<_>>(), vec![16])]
        );
    }

    #[test]
    fn other_sets_name_nobody_who_is_led_anywhere() {
        assert!(
            [Set::VipsReject, Set::Endpoints, Set::ClusterIps]
                .iter()
                .all(|set| { Picks::of(&name(*set), 1).is_none() })
        );
    }
}
