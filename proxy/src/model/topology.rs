//! Which Ready endpoints of a port the hints leave to this node.
//!
//! Owns the all-or-nothing rule: hints count only where every Ready endpoint has them and one of them names this node
//! (or its zone). Never reads `trafficDistribution`: what writes the hints has.

use super::objects::State;

/// The hints that count for one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Topology {
    /// Those for this node.
    SameNode,
    /// Those for this node's zone.
    SameZone,
    /// None.
    Anywhere,
}

impl Topology {
    /// Reads the hints of a port's Ready endpoints: first those for nodes, then those for zones.
    pub(super) fn of(ready: impl Iterator<Item = State> + Clone) -> Self {
        let count = |hinted: fn(State) -> bool, here: fn(State) -> bool| {
            ready.clone().all(hinted) && ready.clone().any(here)
        };
        if count(State::has_node_hints, State::for_this_node) {
            Self::SameNode
        } else if count(State::has_zone_hints, State::for_this_zone) {
            Self::SameZone
        } else {
            Self::Anywhere
        }
    }

    /// Whether this node uses a Ready endpoint.
    pub(super) fn allows(self, ready: State) -> bool {
        match self {
            Self::SameNode => ready.for_this_node(),
            Self::SameZone => ready.for_this_zone(),
            Self::Anywhere => true,
        }
    }
}
