//! Who may dial a Service's load balancer addresses.

use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::input::{External, Family};
use super::networks::disjoint;

/// The ranges of one family, disjoint; `None`: everybody. Without a range of the family everybody may, as in
/// kube-proxy, unless there are some that could not be read: then nobody may. `own` are the node's addresses.
///
/// Where the node itself may, the load balancer addresses may too: some load balancers put theirs on the node's
/// interfaces, and what the node sends there comes from there.
pub(super) fn allowed(external: &External, family: Family, own: &[IpAddr]) -> Option<Arc<[IpNetwork]>> {
    let of_family = |ip: &IpAddr| Family::of(*ip) == family;
    let ranges = external.source_ranges.iter().copied().filter(|range| of_family(&range.ip()));
    let mut allowed = disjoint(ranges);
    if allowed.is_empty() && external.ranges_unread {
        return Some(allowed.into());
    }
    if allowed.is_empty() || allowed.iter().any(|range| range.prefix() == 0) {
        return None;
    }
    if own.iter().any(|address| allowed.iter().any(|range| range.contains(*address))) {
        let load_balancer_ips = external.load_balancer_ips.iter().copied().filter(of_family);
        allowed = disjoint(allowed.into_iter().chain(load_balancer_ips.map(IpNetwork::from)));
    }
    Some(allowed.into())
}
