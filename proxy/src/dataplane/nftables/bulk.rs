//! Many elements of many sets in one transaction, in messages as large as they may be.

use std::collections::BTreeMap;

use super::element::{Element, Place};
use super::message::{ELEMENTS_PER_MESSAGE, Transaction};
use super::schema::Set;
use crate::model::input::Family;

impl<Owner: Copy> Transaction<Owner> {
    /// Removes elements.
    pub(super) fn remove_all(&mut self, places: &[Place], owner: Owner) {
        for (family, set, places) in by_set(places.iter().map(|place| (place, place))) {
            for chunk in places.chunks(ELEMENTS_PER_MESSAGE) {
                self.remove(set, family, chunk.iter().copied(), owner);
            }
        }
    }

    /// Adds elements.
    pub(super) fn add_all<'a>(&mut self, elements: impl IntoIterator<Item = &'a Element>, owner: Owner) {
        for (family, set, elements) in by_set(elements.into_iter().map(|element| (&element.place, element))) {
            for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
                self.add(set, family, chunk.iter().copied(), owner);
            }
        }
    }
}

/// Groups by set, as a message takes them; the order within a set stays.
fn by_set<'a, T>(items: impl Iterator<Item = (&'a Place, T)>) -> impl Iterator<Item = (Family, Set, Vec<T>)> {
    let mut sets: BTreeMap<_, Vec<T>> = BTreeMap::new();
    for (place, item) in items {
        sets.entry((place.family, place.set)).or_default().push(item);
    }
    sets.into_iter().map(|((family, set), items)| (family, set, items))
}
