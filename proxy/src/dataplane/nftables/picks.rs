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
use super::lower::{SlotsAt, Target, sizes};
use super::schema::CLASSES;
use crate::model::plan::{Frontend, PortPlan};

/// The picks from one endpoint set of a frontend, as far as it has been asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Picks {
    slots: SlotsAt,
    /// The class of sizes that has been asked for, if any.
    asked: Option<u32>,
    /// The class to ask for: up to 2^k slots.
    class: u32,
}

impl Picks {
    /// Those of the frontend with this name, as one set of names has it; `None`: nothing is picked because of that set.
    /// `slots`: how many there probably are.
    pub(crate) fn of(name: &Place, slots: usize) -> Option<Self> {
        let class = slots.next_power_of_two().trailing_zeros().min(CLASSES - 1);
        Some(Self { slots: SlotsAt::of(name)?, asked: None, class })
    }

    /// Those of a frontend that is taken over as planned; `is_there`: whether the kernel has this name.
    pub(crate) fn of_frontend(
        port: &PortPlan,
        frontend: &Frontend,
        is_there: impl Fn(&Place) -> bool,
    ) -> impl Iterator<Item = Self> {
        let names = Target::new(port, frontend).slots.map(|slots| slots.named);
        names.into_iter().zip(sizes(port, frontend)).filter_map(move |(name, size)| {
            // Where it has no name there are no slots, unless somebody else took the name away.
            let slots = if is_there(&name) { size.unwrap_or_default() } else { size.map(|_| 0)? };
            Self::of(&name, slots)
        })
    }

    /// What to ask for: the slots of the class, and where `more` says whether there are more than that.
    pub(crate) fn places(&self) -> impl Iterator<Item = Place> + use<> {
        let Self { slots, asked, class } = *self;
        let of_slots = asked.map_or(0, |asked| 1 << asked)..1 << class;
        let of_more = asked.map_or(0, |asked| asked + 1)..(class + 1).min(CLASSES - 1);
        of_slots.map(move |slot| slots.slot(slot)).chain(of_more.map(move |i| slots.more(1 << i)))
    }

    /// What is to be asked for then; `is_there`: what has been found.
    pub(crate) fn next(self, is_there: impl Fn(&Place) -> bool) -> Option<Self> {
        let top = self.slots.more(1 << self.class);
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
    use crate::dataplane::nftables::schema::Set;
    use crate::model::input::{Family, Protocol};

    fn name(set: Set) -> Place {
        let key = Key::vip("10.96.0.1:80".parse().unwrap(), Protocol::Tcp);
        Place { family: Family::V4, set, key }
    }

    /// The numbers of the slots and of `more` that are asked for, round by round, where the kernel has so many slots.
    fn asked(set: Set, expected: usize, held: u32) -> Vec<(Vec<u32>, Vec<u32>)> {
        let number = |place: &Place| u32::from_ne_bytes(*place.key.as_bytes().last_chunk().unwrap());
        let is_there = |place: &Place| place.set == Set::More && number(place) < held;
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
        let local = Picks::of(&name(Set::VipsLocal), 2).unwrap().places().map(|place| place.set);
        let (slots, more) = (Set::EndpointsLocal, Set::MoreLocal);
        assert_eq!(local.collect::<Vec<_>>(), [slots, slots, more, more]);
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
