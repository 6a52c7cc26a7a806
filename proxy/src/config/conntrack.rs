//! The `conntrack` section: kernel limits and timeouts of connection tracking, with kube-proxy's defaults.

use std::time::Duration;

use super::duration::GoDuration;
use super::file::{ConntrackSection, KubeLaneSection};

const MAX_PER_CORE: u32 = 32 << 10;
const MIN: u32 = 128 << 10;
const TCP_ESTABLISHED: Duration = Duration::from_hours(24);
const TCP_CLOSE_WAIT: Duration = Duration::from_hours(1);

/// What to ask of the kernel's connection tracking. `None` leaves a value as the kernel has it; timeouts are at least
/// a second, which is what the kernel counts in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conntrack {
    /// Entries for each processor, from which `nf_conntrack_max` follows.
    pub max_per_core: Option<u32>,
    /// The least `nf_conntrack_max`, however few the processors; counts only beside `max_per_core`.
    pub min: u32,
    /// `nf_conntrack_tcp_timeout_established`.
    pub tcp_established: Option<Duration>,
    /// `nf_conntrack_tcp_timeout_close_wait`.
    pub tcp_close_wait: Option<Duration>,
    /// Sets `nf_conntrack_tcp_be_liberal`: packets outside the TCP window are not invalid. False leaves it as it is.
    pub tcp_be_liberal: bool,
    /// `nf_conntrack_udp_timeout`.
    pub udp: Option<Duration>,
    /// `nf_conntrack_udp_timeout_stream`.
    pub udp_stream: Option<Duration>,
    /// Forget SCTP associations with endpoints that are gone, as UDP flows always are (`kubeLane.conntrackCleanSCTP`).
    pub clean_sctp: bool,
}

impl Default for Conntrack {
    fn default() -> Self {
        Self {
            max_per_core: Some(MAX_PER_CORE),
            min: MIN,
            tcp_established: Some(TCP_ESTABLISHED),
            tcp_close_wait: Some(TCP_CLOSE_WAIT),
            tcp_be_liberal: false,
            udp: None,
            udp_stream: None,
            clean_sctp: false,
        }
    }
}

impl Conntrack {
    /// Resolves the section. `count` reads a number that must not be negative, or complains of it.
    pub(super) fn resolve(
        section: &ConntrackSection,
        own: &KubeLaneSection,
        mut count: impl FnMut(&'static str, i32) -> u32,
    ) -> Self {
        let max_per_core = section
            .max_per_core
            .map_or(MAX_PER_CORE, |max| count("conntrack.maxPerCore (--conntrack-max-per-core)", max));
        let min = section.min.map_or(MIN, |min| count("conntrack.min (--conntrack-min)", min));
        Self {
            max_per_core: (max_per_core > 0).then_some(max_per_core),
            min,
            tcp_established: timeout(section.tcp_established_timeout, TCP_ESTABLISHED),
            tcp_close_wait: timeout(section.tcp_close_wait_timeout, TCP_CLOSE_WAIT),
            tcp_be_liberal: section.tcp_be_liberal.unwrap_or_default(),
            udp: timeout(section.udp_timeout, Duration::ZERO),
            udp_stream: timeout(section.udp_stream_timeout, Duration::ZERO),
            clean_sctp: own.conntrack_clean_sctp.unwrap_or_default(),
        }
    }
}

fn timeout(written: Option<GoDuration>, default: Duration) -> Option<Duration> {
    let timeout = written.map_or(default, |written| written.0);
    (!timeout.is_zero()).then(|| timeout.max(Duration::from_secs(1)))
}
