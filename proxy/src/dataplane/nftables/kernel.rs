//! What lowering asks of the kernel's present state.
//!
//! Owns the questions alone: [`super::observe`] answers them from what it has read.

use std::net::SocketAddr;

use super::element::{Data, Place};

/// What the kernel was found to hold and nobody has claimed, when Services are taken over from an earlier run.
pub(crate) trait Kernel {
    /// Whether there is something at this place.
    fn holds(&self, place: &Place) -> bool;
    /// What the element at this place leads to, if there is one and it leads anywhere.
    fn data(&self, place: &Place) -> Option<Data>;
    /// What there is in this place's set whose keys begin with its key; of the sets that are searched so.
    fn below(&self, place: Place) -> impl Iterator<Item = (Place, Option<Data>)>;
    /// Whether elements count: those whose counters begin to mean something else are written anew.
    fn counts(&self) -> bool {
        false
    }
    /// The backend at this place of a slot map, if there is one.
    fn backend(&self, place: &Place) -> Option<SocketAddr> {
        self.data(place)?.to_backend()
    }
    /// The number of the port with session affinity that this place leads to.
    fn id(&self, place: &Place) -> Option<u16> {
        u16::try_from(self.data(place)?.to_id()? >> 16).ok().filter(|id| *id != 0)
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

    fn data(&self, _: &Place) -> Option<Data> {
        None
    }

    fn below(&self, _: Place) -> impl Iterator<Item = (Place, Option<Data>)> {
        std::iter::empty()
    }

    fn counts(&self) -> bool {
        self.counts
    }
}
