//! What lowering asks of the kernel's present state.
//!
//! Owns the questions alone: [`super::observe`] answers them from what it has read.

use std::net::SocketAddr;

use super::element::Place;
use super::object::Object;
use crate::model::plan::AddressPort;

/// What the kernel was found to hold and nobody has claimed, when Services are taken over from an earlier run.
pub(crate) trait Kernel {
    /// Whether there is something at this place.
    fn holds(&self, place: &Place) -> bool;
    /// The backend at this place of a slot map, if there is one.
    fn backend(&self, place: &Place) -> Option<SocketAddr>;
    /// What there is in `ranges` of the VIP with this place's family and key.
    fn ranges(&self, vip: Place) -> impl Iterator<Item = Place>;
    /// Whether there is this chain, map or set of a port with affinity.
    fn holds_object(&self, object: &Object) -> bool;
    /// Who is in this set of members; `None`: it is not there, or nobody has looked.
    fn members(&self, _set: &Object) -> Option<&[AddressPort]> {
        None
    }
    /// Whether there is this set of members, and it has to be made anew since it counts and should not, or the reverse.
    fn is_outdated(&self, _set: &Object) -> bool {
        false
    }
    /// Whether elements count: those whose counters begin to mean something else are written anew.
    fn counts(&self) -> bool {
        false
    }
}

/// A kernel that holds nothing.
#[derive(Default)]
pub(crate) struct Empty {
    /// Elements count.
    pub(crate) counts: bool,
}

impl Kernel for Empty {
    fn holds(&self, _: &Place) -> bool {
        false
    }

    fn backend(&self, _: &Place) -> Option<SocketAddr> {
        None
    }

    fn holds_object(&self, _: &Object) -> bool {
        false
    }

    fn ranges(&self, _: Place) -> impl Iterator<Item = Place> {
        std::iter::empty()
    }

    fn counts(&self) -> bool {
        self.counts
    }
}
