//! Counters that the agent reads. Nothing here decides.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use kube_lane_common::FrontendKey;

use crate::maps::CONNECTS;

/// Counts a connect, if the agent watches its destination.
#[inline(always)]
pub(crate) fn connect(to: &FrontendKey) {
    if let Some(count) = CONNECTS.get_ptr_mut(to) {
        // SAFETY: the kernel gave a pointer to an aligned u64, and frees none that a running program holds.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(count, 1) };
    }
}
