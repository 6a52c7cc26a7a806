//! Giving memory back to the system.
//!
//! Owns the one call to the allocator that is not an allocation.

/// Returns what the allocator keeps for later. Listing everything at the start takes far more memory than what is kept
/// of it, and glibc would hold on to the difference.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no preconditions; it only touches memory that is free (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}
