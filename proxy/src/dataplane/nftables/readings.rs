//! What elements have counted, as the kernel tells it: of those that were asked for, and of those that went.
//!
//! Pure: takes messages, yields numbers by place. Never decides whose they are: [`super::counters`] does.

use std::collections::BTreeMap;

use nftnl::nftnl_sys::libc;

use super::element::{Data, Place};
use super::parse::parse_elements;
use super::schema::Set;
use crate::dataplane::netlink::Header;
use crate::model::plan::AddressPort;

/// How many packets found each element.
#[derive(Debug, Default)]
pub(crate) struct Readings {
    elements: BTreeMap<Place, (Option<AddressPort>, u64)>,
}

impl Readings {
    /// There are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.elements.is_empty()
    }

    /// Takes a message of the kernel, if it is about elements.
    pub(crate) fn take(&mut self, message: &[u8]) {
        let elements = [libc::NFT_MSG_NEWSETELEM, libc::NFT_MSG_DELSETELEM];
        let is_kind =
            |kind: i32, header: &Header| i32::from(header.kind) == libc::NFNL_SUBSYS_NFTABLES << 8 | kind;
        if !Header::of(message).is_some_and(|header| elements.iter().any(|kind| is_kind(*kind, &header))) {
            return;
        }
        parse_elements(message, |element| {
            let Some(key) = element.key else { return };
            let (family, packets) = (element.family, element.packets);
            let Some(set) = Set::named(element.set) else { return };
            let backend = match set {
                Set::AffinityBackends => key.to_backend(),
                _ => element.data.and_then(Data::to_backend).map(AddressPort::from),
            };
            self.put(Place { family, set, key }, backend, packets);
        });
    }

    /// The element at this place leads to this backend, if to any, and was found so often.
    pub(crate) fn put(&mut self, place: Place, backend: Option<AddressPort>, packets: u64) {
        self.elements.insert(place, (backend, packets));
    }

    /// What the element at this place counted.
    pub(crate) fn at(&self, place: &Place) -> u64 {
        self.elements.get(place).map_or(0, |(_, packets)| *packets)
    }

    /// What the elements of a map counted whose keys begin as this place's, and where they lead to.
    pub(crate) fn below(&self, place: Place) -> impl Iterator<Item = (AddressPort, u64)> {
        let below = move |held: &Place| {
            (held.family, held.set) == (place.family, place.set) && held.key.starts_with(&place.key)
        };
        let held = self.elements.range(place..).take_while(move |(held, _)| below(held));
        held.filter_map(|(_, (backend, packets))| Some((backend.as_ref().copied()?, *packets)))
    }
}
