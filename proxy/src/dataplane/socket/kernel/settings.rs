//! What the programs read of the node: who is answered at all.
//!
//! Owns how that changes under running programs. Never decides it: `answers` does.

use kube_lane_common::{Answered, PodCgroups, Settings};

use super::super::answers::{Clients, Policy};
use super::SocketError;
use super::maps::Maps;
use super::sys::GracePeriod;
use crate::model::plan::NodePlan;

/// Until it is known what this run answers, that is no more than an earlier run answered, and no more than the options
/// allow at most.
pub(super) fn restrict(
    maps: &Maps,
    grace: &GracePeriod,
    policy: &Policy,
    host: u64,
    pods: PodCgroups,
) -> Result<(), SocketError> {
    let found = maps.settings()?;
    let detector = if policy.detector == Clients::None { Clients::None } else { Clients::Interface };
    let most = Policy { detector, ..*policy }.settings(&NodePlan::default(), host, pods).answered.0;
    let sources = [false, true].map(|is_ipv6| Answered::SOURCE << Answered::family(is_ipv6));
    let answered = Answered(found.answered.0 & (most | sources[0] | sources[1]));
    store(maps, grace, Settings { answered, host, pods, ..found })
}

/// Nobody is answered while more than [`Settings::answered`] changes.
pub(super) fn store(maps: &Maps, grace: &GracePeriod, new: Settings) -> Result<(), SocketError> {
    let old = maps.settings()?;
    if new == old {
        return Ok(());
    }
    if new != (Settings { answered: new.answered, ..old }) {
        maps.set_settings(Settings { answered: Answered::NOTHING, ..old })?;
        grace.wait().map_err(SocketError::Grace)?;
    }
    maps.set_settings(new)
}
