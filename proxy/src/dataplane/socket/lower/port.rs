//! One port of a Service: what it becomes, and the writes that this takes.
//!
//! Owns the order of writes within a port: a backend is there before a set names it, a set before a frontend leads to it,
//! and what is given up is given up in reverse. Pure. Never decides what is answered, nor where ids come from.

use kube_lane_common::{Backend, Frontend, FrontendKey, Member, Port as PortNumber, PortWord, Set};

use super::super::write::Write;
use super::addresses::key;
use super::adopt::FoundPort;
use super::ids::Range;
use super::image::{Change, Edit, Placed};
use super::members::{self, Both, Difference, members};
use crate::model::input::Protocol;
use crate::model::plan::{self, FrontendKind, PortPlan, Verdict};

/// A port as it is in the maps; the default: it is not there.
#[derive(Debug, Default)]
pub(super) struct Port {
    pub(super) id: u32,
    /// In seconds; 0: none.
    pub(super) affinity: u32,
    /// The sets that frontends lead to.
    pub(super) used: Both<bool>,
    /// The ids of the backends of these sets, sorted by address.
    pub(super) ids: Box<[u32]>,
    pub(super) sets: Both<Placed>,
    /// Some of its backends cannot be led to.
    pub(super) clash: bool,
}

/// What becomes of a port.
pub(super) struct Next<'p> {
    pub(super) plan: &'p PortPlan,
    /// Its counterpart among the ports that there are.
    pub(super) old: Option<usize>,
    /// Its id, once it has one.
    pub(super) id: u32,
    /// Some of its backends cannot be led to.
    pub(super) clash: bool,
    /// The frontends that are in the maps, and the sets that they lead to.
    pub(super) frontends: Vec<(&'p plan::Frontend, usize)>,
    pub(super) used: Both<bool>,
    pub(super) difference: Difference,
    /// Where each set moves to.
    pub(super) moves_to: Both<Option<Range>>,
}

impl Next<'_> {
    pub(super) fn answered(&self) -> bool {
        self.used != [false, false]
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = FrontendKey> {
        self.frontends.iter().map(|(frontend, _)| key(self.plan, frontend.at))
    }
}

impl Port {
    /// A port of an earlier run.
    pub(super) fn found(id: u32, found: &FoundPort) -> Self {
        Self {
            id,
            affinity: found.affinity.affinity(),
            used: [true, true],
            ids: found.members.iter().map(|(_, id)| *id).collect(),
            sets: found.sets,
            ..Self::default()
        }
    }

    /// Its backends, as `plan` had them, and their ids.
    pub(super) fn members(&self, plan: &PortPlan) -> impl Iterator<Item = (members::Member, u32)> {
        members(plan, self.used).zip(self.ids.iter().copied())
    }

    /// Writes what the port becomes.
    pub(super) fn become_next(mut self, next: Next<'_>, edit: &mut Edit<'_>) -> Self {
        if !next.answered() {
            self.withdraw(edit);
            return Self { clash: next.clash, ..Self::default() };
        }
        let Next { plan, id, difference, .. } = next;
        let affinity = plan.affinity.map_or(0, u32::from);
        if self.id != id {
            edit.write(Write::NothingRefused(id));
        }
        if self.id != id || self.affinity != affinity {
            edit.write(Write::Port(id, PortWord::new(affinity)));
        }
        for (i, member) in &difference.added {
            let (backend, at) = (difference.ids[*i], member.address);
            let port = PortNumber::from_host(at.port);
            edit.write(Write::Backend(backend, Backend::new(at.ip.into(), port, id)));
            edit.member(backend, id, member.within);
        }
        for (backend, old, new) in &difference.moved {
            let either = [old[0] || new[0], old[1] || new[1]];
            if either != *old {
                edit.member(*backend, id, either);
            }
        }
        for (backend, _) in &difference.removed {
            edit.write(Write::Member(*backend, Member::NONE));
        }
        for (backend, old, new) in &difference.moved {
            if old.iter().zip(new).any(|(old, new)| *old && !new) {
                edit.member(*backend, id, *new);
            }
        }
        // Of UDP, nftables refuses.
        let refused = plan.protocol == Protocol::Tcp
            && plan.frontends.iter().any(|frontend| frontend.verdict == Verdict::Reject);
        for set in (0..2).filter(|set| next.used[*set]) {
            let change = Change {
                leaving: difference.leaving(set).collect(),
                joining: difference.joining(set).collect(),
                moves_to: next.moves_to[set],
                empty: if refused { Set::REFUSED } else { Set::NONE },
            };
            edit.change(set_id(id, set), &mut self.sets[set], change);
        }
        for (frontend, set) in &next.frontends {
            let key = key(plan, frontend.at);
            let flags = if frontend.kind == FrontendKind::ClusterIp { 0 } else { Frontend::EXTERNAL };
            edit.frontend(key, Some(Frontend::new(set_id(id, *set), flags, key.fingerprint())));
        }
        for set in (0..2).filter(|set| !next.used[*set]) {
            edit.place(set_id(id, set), &mut self.sets[set], Placed::NOWHERE);
        }
        edit.image.retired.backends.extend(difference.removed.iter().map(|(backend, _)| *backend));
        Self { id, affinity, used: next.used, ids: difference.ids.into(), sets: self.sets, clash: next.clash }
    }

    /// Writes that the port is gone, to which no frontend leads any more.
    pub(super) fn withdraw(mut self, edit: &mut Edit<'_>) {
        if self.id == 0 {
            return;
        }
        for set in 0..2 {
            edit.place(set_id(self.id, set), &mut self.sets[set], Placed::NOWHERE);
        }
        self.ids.iter().for_each(|backend| edit.write(Write::Member(*backend, Member::NONE)));
        edit.image.retired.backends.extend(self.ids);
        edit.image.retired.ports.push(self.id);
    }
}

/// The id of a port's set, by its position in [`Both`].
pub(super) fn set_id(port: u32, set: usize) -> u32 {
    [Set::cluster_of(port), Set::local_of(port)][set]
}
