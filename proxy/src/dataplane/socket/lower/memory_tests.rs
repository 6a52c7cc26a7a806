//! The maps as programs read them, without a kernel: carries writes out, and tells what a program could do.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use kube_lane_common::{Backend, Frontend, FrontendKey, Member, PortWord, Set, Slot};

use super::super::write::{Found, Sizes, Write};

/// The maps.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Memory {
    pub(super) sizes: Sizes,
    pub(super) frontends: HashMap<FrontendKey, Frontend>,
    pub(super) node: BTreeSet<IpAddr>,
    sets: Vec<Set>,
    slots: Vec<Slot>,
    backends: Vec<Backend>,
    members: Vec<Member>,
    ports: Vec<PortWord>,
}

/// What can become of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// nftables answers.
    Left,
    Refused,
    /// One of these answers.
    Led(BTreeSet<SocketAddr>),
}

impl Memory {
    pub(super) fn new(sizes: Sizes) -> Self {
        let nobody = Backend::new(IpAddr::from([0; 4]).into(), kube_lane_common::Port::from_host(0), 0);
        Self {
            sizes,
            frontends: HashMap::new(),
            node: BTreeSet::new(),
            sets: vec![Set::NONE; 2 * (sizes.ports as usize + 1)],
            slots: vec![Slot(0); sizes.slots as usize],
            backends: vec![nobody; sizes.backends as usize + 1],
            members: vec![Member::NONE; sizes.backends as usize + 1],
            ports: vec![PortWord(0); sizes.ports as usize + 1],
        }
    }

    pub(super) fn write(&mut self, write: Write) {
        match write {
            Write::Frontend(key, Some(word)) => {
                self.frontends.insert(key, word);
                assert!(self.frontends.len() <= self.sizes.frontends as usize, "the map is full");
            }
            Write::Frontend(key, None) => {
                assert!(self.frontends.remove(&key).is_some(), "no such frontend: {key:?}");
            }
            Write::NodeAddress(address, true) => assert!(self.node.insert(address.into())),
            Write::NodeAddress(address, false) => assert!(self.node.remove(&address.into())),
            Write::Set(id, word) => self.sets[id as usize] = word,
            Write::Slot(i, word) => self.slots[i as usize] = word,
            Write::Backend(id, backend) => {
                assert!(id != 0 && !self.named().contains(&id), "backend {id} is in use");
                self.backends[id as usize] = backend;
            }
            Write::Member(id, word) => self.members[id as usize] = word,
            Write::Port(id, word) => self.ports[id as usize] = word,
            Write::NothingRefused(id) => assert!(id != 0),
        }
    }

    /// The backends that frontends lead to.
    fn named(&self) -> BTreeSet<u32> {
        let sets: BTreeSet<u32> = self.frontends.values().map(|word| word.set()).collect();
        sets.into_iter().flat_map(|set| self.picks(set)).map(Slot::backend).collect()
    }

    fn picks(&self, set: u32) -> impl Iterator<Item = Slot> {
        let word = self.sets[set as usize];
        self.slots[word.first() as usize..][..word.count() as usize].iter().copied()
    }

    /// What becomes of connections to a frontend, as the maps are now. Nothing may be out of place.
    pub(super) fn outcome(&self, key: &FrontendKey) -> Outcome {
        let Some(word) = self.frontends.get(key) else { return Outcome::Left };
        assert_eq!(word.fingerprint(), key.fingerprint());
        let set = word.set();
        match self.sets[set as usize] {
            Set::REFUSED => Outcome::Refused,
            Set::NONE => Outcome::Left,
            _ => Outcome::Led(
                self.picks(set)
                    .map(|slot| {
                        assert_eq!(slot.set(), set);
                        self.backend(slot.backend(), set).expect("a backend of the port")
                    })
                    .collect(),
            ),
        }
    }

    /// Where a backend is, if it is the port's that the set belongs to.
    fn backend(&self, id: u32, set: u32) -> Option<SocketAddr> {
        let Backend { address, port, owner, .. } = self.backends[id as usize];
        (owner == Set::port_of(set)).then(|| SocketAddr::new(address.into(), port.to_host()))
    }

    /// How long clients of a frontend come back, in seconds.
    pub(super) fn affinity(&self, key: &FrontendKey) -> Option<u32> {
        let set = self.frontends.get(key)?.set();
        Some(self.ports[Set::port_of(set) as usize].affinity())
    }

    /// The ids of the backends that clients may come back to are just those that frontends lead to.
    pub(super) fn check_members(&self) {
        let mut expected = vec![Member::NONE; self.members.len()];
        for set in self.frontends.values().map(|word| word.set()).collect::<BTreeSet<_>>() {
            for slot in self.picks(set) {
                let word = &mut expected[slot.backend() as usize];
                let within = |other| word.is_in(other) || other == set;
                let port = Set::port_of(set);
                *word = Member::new(port, within(Set::cluster_of(port)), within(Set::local_of(port)));
            }
        }
        assert_eq!(self.members, expected);
    }

    /// What an agent finds that starts now.
    pub(super) fn found(&self) -> Found {
        Found {
            frontends: self.frontends.iter().map(|(key, word)| (*key, *word)).collect(),
            node_addresses: self.node.iter().map(|ip| (*ip).into()).collect(),
            sets: self.sets.clone(),
            slots: self.slots.clone(),
            backends: self.backends.clone(),
            members: self.members.clone(),
            ports: self.ports.clone(),
        }
    }
}

/// A program that has read as far as this; meanwhile the maps change.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reader {
    Dials(FrontendKey),
    InSet(u32),
    Picks(u32, Set),
    /// Was led to this backend before, by session affinity.
    Remembers(u32, u32),
    Leads(u32, u32),
    /// The end: led there, or left to nftables, or refused.
    Led(u32, SocketAddr),
    Left,
    Refused,
}

impl Reader {
    /// Reads one word more. `random` draws the slot; `remembered`: the backend that this client was led to last.
    pub(super) fn step(self, maps: &Memory, random: u64, remembered: Option<u32>) -> Self {
        match self {
            Self::Dials(key) => match maps.frontends.get(&key) {
                Some(word) => {
                    remembered.map_or(Self::InSet(word.set()), |id| Self::Remembers(word.set(), id))
                }
                None => Self::Left,
            },
            Self::Remembers(set, id) if maps.members[id as usize].is_in(set) => Self::Leads(set, id),
            Self::InSet(set) | Self::Remembers(set, _) => match maps.sets[set as usize] {
                Set::REFUSED => Self::Refused,
                Set::NONE => Self::Left,
                word => Self::Picks(set, word),
            },
            Self::Picks(set, word) => {
                let slot = maps.slots[word.first() as usize + (random % u64::from(word.count())) as usize];
                if slot.set() == set { Self::Leads(set, slot.backend()) } else { Self::Left }
            }
            Self::Leads(set, id) => maps.backend(id, set).map_or(Self::Left, |at| Self::Led(id, at)),
            end => end,
        }
    }
}
