//! The backends of a port, each once, and what differs between two plans of it.
//!
//! Pure. Never knows how a set lies in the maps.

use itertools::{EitherOrBoth, Itertools as _};

use crate::model::plan::{AddressPort, PortPlan};

/// For the Cluster set and for the Local set, in this order.
pub(super) type Both<T> = [T; 2];

/// A backend of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) address: AddressPort,
    /// The sets that it is in.
    pub(super) within: Both<bool>,
}

/// The backends of the sets that are in use, sorted by address.
pub(super) fn members(port: &PortPlan, used: Both<bool>) -> impl Iterator<Item = Member> {
    let of = |backends: &'_ [_], used: bool| if used { backends.len() } else { 0 };
    let cluster = &port.backends[..of(&port.backends, used[0])];
    let local = &port.local_backends[..of(&port.local_backends, used[1])];
    cluster.iter().merge_join_by(local, |a, b| a.address.cmp(&b.address)).map(|pair| {
        let within = [pair.has_left(), pair.has_right()];
        Member { address: pair.into_left().address, within }
    })
}

/// What differs between the backends that have ids and those that are wanted.
#[derive(Debug, Default)]
pub(super) struct Difference {
    /// The ids of those that are wanted, sorted by address; 0: it has none yet.
    pub(super) ids: Vec<u32>,
    /// Those, and their positions in `ids`.
    pub(super) added: Vec<(usize, Member)>,
    /// The ids of those that go.
    pub(super) removed: Vec<(u32, Both<bool>)>,
    /// The ids of those that change sets: from these, to these.
    pub(super) moved: Vec<(u32, Both<bool>, Both<bool>)>,
    /// How many each set will have.
    pub(super) len: Both<u32>,
}

impl Difference {
    /// Between two lists sorted by address.
    pub(super) fn between(
        old: impl Iterator<Item = (Member, u32)>,
        new: impl Iterator<Item = Member>,
    ) -> Self {
        let mut difference = Self::default();
        for pair in old.merge_join_by(new, |(old, _), new| old.address.cmp(&new.address)) {
            let (id, wanted) = match pair {
                EitherOrBoth::Left((gone, id)) => {
                    difference.removed.push((id, gone.within));
                    continue;
                }
                EitherOrBoth::Both((old, id), new) => {
                    if old.within != new.within {
                        difference.moved.push((id, old.within, new.within));
                    }
                    (id, new)
                }
                EitherOrBoth::Right(new) => {
                    difference.added.push((difference.ids.len(), new));
                    (0, new)
                }
            };
            difference.ids.push(id);
            for (len, within) in difference.len.iter_mut().zip(wanted.within) {
                *len += u32::from(within);
            }
        }
        difference
    }

    /// The ids that leave a set, in order. Those that come without an id are not known here.
    pub(super) fn leaving(&self, set: usize) -> impl Iterator<Item = u32> {
        let removed = self.removed.iter().filter(move |(_, old)| old[set]).map(|(id, _)| *id);
        let moved = self.moved.iter().filter(move |(_, old, new)| old[set] && !new[set]);
        removed.chain(moved.map(|(id, ..)| *id))
    }

    /// The ids that join a set: once those that are new have one.
    pub(super) fn joining(&self, set: usize) -> impl Iterator<Item = u32> {
        let added =
            self.added.iter().filter(move |(_, member)| member.within[set]).map(|(i, _)| self.ids[*i]);
        let moved = self.moved.iter().filter(move |(_, old, new)| !old[set] && new[set]);
        added.chain(moved.map(|(id, ..)| *id))
    }
}
