//! How long to wait before what has failed is tried again.
//!
//! Pure. Never waits, and knows no clock.

use std::time::Duration;

/// `first` after the first failure, and twice as long after each further one in a row, `most` at the most. `before`: the
/// failures before the last.
pub fn backoff(first: Duration, most: Duration, before: u32) -> Duration {
    (first * 2_u32.saturating_pow(before)).min(most)
}
