//! The messages that make and fill the objects of one Service port: chains, maps and sets with names of their own.
//!
//! Owns their layout in the kernel. Never decides which there are: [`super::affinity`] does.

use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{Chain, MsgType};

use super::affinity::Change;
use super::element::Key;
use super::expr::c_name;
use super::message::{ELEMENTS_PER_MESSAGE, RawElement, RawSet, Transaction, table};
use super::object::{Kind, Object};
use super::parse::SetInfo;
use super::remembered::{Edits, Entry};
use super::schema::{Field, byte_order, len_of, type_of};
use crate::model::plan::AddressPort;

/// Rules find these sets by name; the kernel wants a number of a new set all the same.
const SET_ID: u32 = 0x6b6d;

/// What a map leads to: the address of a backend.
const DATA: [Field; 1] = [Field::Address];

impl Kind {
    /// `NFT_SET_*` flags of a map or set. The kernel gives a map that rules fill room for 65,535 entries.
    fn flags(self) -> u32 {
        match self {
            Self::Map(..) => (libc::NFT_SET_MAP | libc::NFT_SET_EVAL | libc::NFT_SET_TIMEOUT) as u32,
            _ => 0,
        }
    }
}

impl Object {
    /// Whether the kernel's set has this layout.
    pub(crate) fn fits(&self, info: &SetInfo) -> bool {
        let data = if matches!(self.kind, Kind::Map(..)) { len_of(&DATA, self.family) } else { 0 };
        info.flags == self.kind.flags()
            && info.key_len as usize == len_of(self.kind.key(), self.family)
            && info.data_len as usize == data
    }
}

impl<Owner: Copy> Transaction<Owner> {
    /// Everything of a change but the frontends' elements, which go before and come after.
    pub(crate) fn affinity(&mut self, change: &Change, edits: &[Edits], owner: Owner) {
        let is_chain = |object: &&Object| object.kind.is_chain();
        let (dropped_chains, dropped_sets): (Vec<_>, Vec<_>) = change.dropped.iter().partition(is_chain);
        let (chains, sets): (Vec<_>, Vec<_>) = change.created.iter().partition(is_chain);
        dropped_chains.into_iter().for_each(|object| self.drop_object(object, owner));
        for object in &change.replaced {
            match object.kind.is_chain() {
                true => self.empty_chain(&object.name(), object.family, owner),
                false => self.drop_object(object, owner),
            }
        }
        for object in sets {
            self.create_set(object, owner);
        }
        for object in chains {
            let table = table(object.family);
            self.object(&Chain::new(c_name(&object.name()), &table), MsgType::Add, owner);
        }
        for (object, rules) in &change.rules {
            let table = table(object.family);
            self.rules(&Chain::new(c_name(&object.name()), &table), rules, object.family, owner);
        }
        // Not before: a chain that stays may have named it until now.
        for object in dropped_sets {
            if self.counting && matches!(object.kind, Kind::Members(_)) {
                // The kernel tells what goes, not what goes with its set.
                self.whole_set(libc::NFT_MSG_DELSETELEM, &object.name(), object.family, owner);
            }
            self.drop_object(object, owner);
        }
        for (object, left, joined) in &change.members {
            match left {
                Some(left) => self.members(libc::NFT_MSG_DELSETELEM, object, left, owner),
                None => self.whole_set(libc::NFT_MSG_DELSETELEM, &object.name(), object.family, owner),
            }
            self.members(libc::NFT_MSG_NEWSETELEM, object, joined, owner);
        }
        self.edits(edits, owner);
    }

    /// Changes what maps remember.
    pub(crate) fn edits(&mut self, edits: &[Edits], owner: Owner) {
        const ADD: i32 = libc::NFT_MSG_NEWSETELEM;
        for Edits { map, forgotten, remembered } in edits {
            // An entry may run out at any time, and removing what is not there fails: it is added first.
            self.entries(ADD, map, forgotten, owner);
            self.entries(libc::NFT_MSG_DELSETELEM, map, forgotten, owner);
            self.entries(ADD, map, remembered, owner);
        }
    }

    /// Removes an object that nothing names any more. Chains must be empty before a chain or map can go that one of
    /// their rules names; none of these names another chain.
    pub(crate) fn drop_object(&mut self, object: &Object, owner: Owner) {
        if object.kind.is_chain() {
            self.empty_chain(&object.name(), object.family, owner);
            self.delete_chain(&object.name(), object.family, owner);
        } else {
            self.whole_set(libc::NFT_MSG_DELSET, &object.name(), object.family, owner);
        }
    }

    fn create_set(&mut self, object: &Object, owner: Owner) {
        let (family, key) = (object.family, object.kind.key());
        let raw = RawSet::new(&object.name(), family);
        raw.u32(sys::NFTNL_SET_FLAGS, object.kind.flags());
        raw.u32(sys::NFTNL_SET_ID, SET_ID);
        raw.u32(sys::NFTNL_SET_KEY_TYPE, type_of(key, family));
        raw.u32(sys::NFTNL_SET_KEY_LEN, len_of(key, family) as u32);
        let has_data = matches!(object.kind, Kind::Map(..));
        if has_data {
            raw.u32(sys::NFTNL_SET_DATA_TYPE, type_of(&DATA, family));
            raw.u32(sys::NFTNL_SET_DATA_LEN, len_of(&DATA, family) as u32);
        }
        raw.bytes(sys::NFTNL_SET_USERDATA, &byte_order(key, has_data));
        if self.counting && matches!(object.kind, Kind::Members(_)) {
            raw.counter();
        }
        self.build_set(&raw, family, owner);
    }

    fn members(&mut self, kind: i32, object: &Object, members: &[AddressPort], owner: Owner) {
        for members in members.chunks(ELEMENTS_PER_MESSAGE) {
            let raw = RawSet::new(&object.name(), object.family);
            members.iter().for_each(|member| raw.add(RawElement::of(&Key::backend(member.socket()))));
            self.build_elements(kind, &raw, object.family, owner);
        }
    }

    fn entries(&mut self, kind: i32, map: &Object, entries: &[Entry], owner: Owner) {
        let flags = if kind == libc::NFT_MSG_NEWSETELEM { libc::NLM_F_CREATE } else { 0 };
        for entries in entries.chunks(ELEMENTS_PER_MESSAGE) {
            let raw = RawSet::new(&map.name(), map.family);
            for entry in entries {
                let element = RawElement::of(&entry.client);
                if kind == libc::NFT_MSG_NEWSETELEM {
                    element.bytes(sys::NFTNL_SET_ELEM_DATA, Key::address(entry.backend.ip).as_bytes());
                    element.lifetime(entry.timeout, entry.expires);
                }
                raw.add(element);
            }
            self.build_elements_with(kind, flags, &raw, map.family, owner);
        }
    }
}
