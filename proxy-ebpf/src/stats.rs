//! Counters that the agent reads. Nothing here decides.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use crate::maps::{CONNECTIONS, REFUSED, UNREMEMBERED};

/// Counts a connection that is sent to a backend, or a first datagram.
#[inline(always)]
pub(crate) fn connection(backend: u32) {
    count(CONNECTIONS.get_ptr_mut(backend));
}

/// Counts a connection to a port that is refused.
#[inline(always)]
pub(crate) fn refused(port: u32) {
    count(REFUSED.get_ptr_mut(port));
}

/// Counts a connection whose client there is no room to remember.
#[inline(always)]
pub(crate) fn unremembered() {
    count(UNREMEMBERED.get_ptr_mut(0));
}

#[inline(always)]
fn count(counter: Option<*mut u64>) {
    if let Some(counter) = counter {
        // SAFETY: the kernel gave a pointer to an aligned u64 of an array, which is never freed.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1) };
    }
}
