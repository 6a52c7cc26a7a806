//! The `conntrack` section: kernel limits and timeouts of connection tracking, with kube-proxy's defaults.

use std::time::Duration;

use clap::Args;

use super::check::Checker;
use super::duration::GoDuration;
use super::file::{ConntrackSection, KubeLaneSection, KubeProxyConfiguration};
use super::values::go_bool;

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

/// The flags of the section.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct ConntrackFlags {
    /// Connections tracked for each processor; 0 leaves the kernel's limit [default: 32768]
    #[arg(long, value_name = "N")]
    conntrack_max_per_core: Option<i32>,
    /// Connections tracked at least, beside --conntrack-max-per-core [default: 131072]
    #[arg(long, value_name = "N")]
    conntrack_min: Option<i32>,
    /// How long an idle TCP connection is tracked; 0 leaves the kernel's value [default: 24h0m0s]
    #[arg(long, value_name = "DURATION")]
    conntrack_tcp_timeout_established: Option<GoDuration>,
    /// The same in state CLOSE_WAIT [default: 1h0m0s]
    #[arg(long, value_name = "DURATION")]
    conntrack_tcp_timeout_close_wait: Option<GoDuration>,
    /// Packets outside the TCP window are not invalid
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    conntrack_tcp_be_liberal: Option<bool>,
    /// How long a UDP packet without an answer is tracked; 0 leaves the kernel's value
    #[arg(long, value_name = "DURATION")]
    conntrack_udp_timeout: Option<GoDuration>,
    /// The same of a UDP flow with answers
    #[arg(long, value_name = "DURATION")]
    conntrack_udp_timeout_stream: Option<GoDuration>,
    /// Forget SCTP associations with endpoints that are gone, as UDP flows always are
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    conntrack_clean_sctp: Option<bool>,
}

impl ConntrackFlags {
    /// Puts the flags into the form of a file.
    pub(super) fn fill(&self, file: &mut KubeProxyConfiguration) {
        file.conntrack = ConntrackSection {
            max_per_core: self.conntrack_max_per_core,
            min: self.conntrack_min,
            tcp_established_timeout: self.conntrack_tcp_timeout_established,
            tcp_close_wait_timeout: self.conntrack_tcp_timeout_close_wait,
            tcp_be_liberal: self.conntrack_tcp_be_liberal,
            udp_timeout: self.conntrack_udp_timeout,
            udp_stream_timeout: self.conntrack_udp_timeout_stream,
        };
        file.kube_lane.conntrack_clean_sctp = self.conntrack_clean_sctp;
    }
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
    /// Resolves the section, and what there is of it in our own.
    pub(super) fn resolve(section: &ConntrackSection, own: &KubeLaneSection, check: &mut Checker) -> Self {
        let max_per_core = section
            .max_per_core
            .map_or(MAX_PER_CORE, |max| check.count("conntrack.maxPerCore (--conntrack-max-per-core)", max));
        let min = section.min.map_or(MIN, |min| check.count("conntrack.min (--conntrack-min)", min));
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
