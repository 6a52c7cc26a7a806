//! How much the maps have room for, and need.
//!
//! Pure. Memory is taken for all of it at once, so the maps begin small and grow.

use super::super::write::Sizes;
use crate::model::plan::Plan;

/// How much all maps have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// For Services.
    pub services: Sizes,
    /// Clients of ports with session affinity: one for each pod and port.
    pub clients: u32,
}

impl Room {
    /// None at all.
    pub(super) const NONE: Self =
        Self { services: Sizes { frontends: 0, ports: 0, slots: 0, backends: 0 }, clients: 0 };

    /// For a trial.
    pub(super) const SMALL: Self =
        Self { services: Sizes { frontends: 16, ports: 16, slots: 16, backends: 16 }, clients: 16 };

    /// Where nothing is known of the Services yet: about a megabyte.
    pub(super) const START: Self = Self {
        services: Sizes { frontends: 1 << 13, ports: 1 << 12, slots: 1 << 15, backends: 1 << 14 },
        clients: 1 << 12,
    };

    /// For these Services, and a quarter as much again as they may need to change: larger maps cost a fraction of a second,
    /// in which nftables answers what is new.
    pub(super) fn for_plans<'a>(self, plans: impl Iterator<Item = &'a Plan>) -> Self {
        let [mut frontends, mut ports, mut slots, mut backends] = [0_usize; 4];
        for port in plans.flat_map(|plan| &plan.ports) {
            frontends += port.frontends.len();
            ports += 1;
            for set in [&port.backends, &port.local_backends] {
                backends += set.len();
                slots += set.len().next_power_of_two();
            }
        }
        let [frontends, ports, slots, backends] = [frontends, ports, slots, backends]
            .map(|count| u32::try_from(count + count / 4).unwrap_or(u32::MAX));
        Self { services: Sizes { frontends, ports, slots, backends }, ..self }
    }

    pub(super) fn at_most(self, other: Self) -> Self {
        self.with(other, u32::min)
    }

    pub(super) fn at_least(self, other: Self) -> Self {
        self.with(other, u32::max)
    }

    fn with(self, other: Self, choose: fn(u32, u32) -> u32) -> Self {
        let (ours, theirs) = (self.services, other.services);
        Self {
            services: Sizes {
                frontends: choose(ours.frontends, theirs.frontends),
                ports: choose(ours.ports, theirs.ports),
                slots: choose(ours.slots, theirs.slots),
                backends: choose(ours.backends, theirs.backends),
            },
            clients: choose(self.clients, other.clients),
        }
    }
}
