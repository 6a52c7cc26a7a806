//! The sysctls of the lab's network namespaces: each has the same value, whatever the host has.
//!
//! Owns the tables of settings and writes them. A new namespace takes some settings from the first one or from its
//! creator (`net.core.devconf_inherit_init_net` says which), some from the kernel's command line, and some from the
//! kernel's defaults, which change from release to release. So the lab sets all that a test may depend on. Never sets
//! what belongs to the whole machine.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Doing, Error, Result};

/// Makes every namespace begin with other values than the lab's, as on a host that is set otherwise. The tests set
/// this variable for labs of another process.
pub const CONTRARY: &str = "KUBE_LANE_LAB_CONTRARY";

/// A setting, named relative to its table's folder.
type Setting = (&'static str, &'static str);

/// In `/proc/sys/net`: not an interface's own.
const NAMESPACE: &[Setting] = &[
    ("core/somaxconn", "4096"),
    ("core/txrehash", "1"),
    ("core/xfrm_larval_drop", "1"),
    ("ipv4/fib_multipath_hash_policy", "0"),
    ("ipv4/fib_multipath_use_neigh", "0"),
    ("ipv4/fwmark_reflect", "0"),
    ("ipv4/icmp_echo_enable_probe", "0"),
    ("ipv4/icmp_echo_ignore_all", "0"),
    ("ipv4/icmp_echo_ignore_broadcasts", "1"),
    ("ipv4/icmp_errors_use_inbound_ifaddr", "0"),
    ("ipv4/icmp_ignore_bogus_error_responses", "1"),
    // No ICMP error is limited: a test may send many packets that are refused.
    ("ipv4/icmp_msgs_burst", "1000000"),
    ("ipv4/icmp_msgs_per_sec", "1000000"),
    ("ipv4/icmp_ratelimit", "0"),
    ("ipv4/icmp_ratemask", "0"),
    ("ipv4/ip_autobind_reuse", "0"),
    ("ipv4/ip_default_ttl", "64"),
    ("ipv4/ip_dynaddr", "0"),
    ("ipv4/ip_early_demux", "1"),
    ("ipv4/ip_forward_update_priority", "1"),
    ("ipv4/ip_forward_use_pmtu", "0"),
    ("ipv4/ip_local_port_range", "32768 60999"),
    ("ipv4/ip_local_reserved_ports", ""),
    ("ipv4/ip_no_pmtu_disc", "0"),
    ("ipv4/ip_nonlocal_bind", "0"),
    ("ipv4/ip_unprivileged_port_start", "1024"),
    ("ipv4/ipfrag_high_thresh", "4194304"),
    ("ipv4/ipfrag_low_thresh", "3145728"),
    ("ipv4/ipfrag_max_dist", "64"),
    ("ipv4/ipfrag_time", "30"),
    ("ipv4/ping_group_range", "1 0"),
    ("ipv4/raw_l3mdev_accept", "1"),
    ("ipv4/route/min_adv_mss", "256"),
    ("ipv4/route/min_pmtu", "552"),
    ("ipv4/route/mtu_expires", "600"),
    ("ipv4/tcp_abort_on_overflow", "0"),
    ("ipv4/tcp_adv_win_scale", "1"),
    ("ipv4/tcp_app_win", "31"),
    ("ipv4/tcp_autocorking", "1"),
    ("ipv4/tcp_base_mss", "1024"),
    ("ipv4/tcp_challenge_ack_limit", "2147483647"),
    // Every kernel has it built in.
    ("ipv4/tcp_congestion_control", "reno"),
    ("ipv4/tcp_dsack", "1"),
    ("ipv4/tcp_early_demux", "1"),
    ("ipv4/tcp_early_retrans", "3"),
    ("ipv4/tcp_ecn", "2"),
    ("ipv4/tcp_ecn_fallback", "1"),
    ("ipv4/tcp_fastopen", "1"),
    ("ipv4/tcp_fastopen_blackhole_timeout_sec", "0"),
    ("ipv4/tcp_fin_timeout", "60"),
    ("ipv4/tcp_frto", "2"),
    ("ipv4/tcp_fwmark_accept", "0"),
    ("ipv4/tcp_invalid_ratelimit", "500"),
    ("ipv4/tcp_keepalive_intvl", "75"),
    ("ipv4/tcp_keepalive_probes", "9"),
    ("ipv4/tcp_keepalive_time", "7200"),
    ("ipv4/tcp_l3mdev_accept", "0"),
    ("ipv4/tcp_max_syn_backlog", "4096"),
    ("ipv4/tcp_max_tw_buckets", "262144"),
    ("ipv4/tcp_migrate_req", "0"),
    ("ipv4/tcp_min_snd_mss", "48"),
    ("ipv4/tcp_moderate_rcvbuf", "1"),
    ("ipv4/tcp_mtu_probing", "0"),
    ("ipv4/tcp_no_metrics_save", "0"),
    ("ipv4/tcp_notsent_lowat", "4294967295"),
    ("ipv4/tcp_orphan_retries", "0"),
    ("ipv4/tcp_recovery", "1"),
    ("ipv4/tcp_reordering", "3"),
    ("ipv4/tcp_retrans_collapse", "1"),
    ("ipv4/tcp_retries1", "3"),
    ("ipv4/tcp_retries2", "15"),
    ("ipv4/tcp_rfc1337", "0"),
    ("ipv4/tcp_rmem", "4096 131072 6291456"),
    ("ipv4/tcp_rto_max_ms", "120000"),
    ("ipv4/tcp_rto_min_us", "200000"),
    ("ipv4/tcp_sack", "1"),
    ("ipv4/tcp_shrink_window", "0"),
    ("ipv4/tcp_slow_start_after_idle", "1"),
    ("ipv4/tcp_stdurg", "0"),
    ("ipv4/tcp_syn_linear_timeouts", "4"),
    ("ipv4/tcp_syn_retries", "6"),
    ("ipv4/tcp_synack_retries", "5"),
    ("ipv4/tcp_syncookies", "1"),
    ("ipv4/tcp_thin_linear_timeouts", "0"),
    ("ipv4/tcp_timestamps", "1"),
    ("ipv4/tcp_tw_reuse", "2"),
    ("ipv4/tcp_tw_reuse_delay", "1000"),
    ("ipv4/tcp_window_scaling", "1"),
    ("ipv4/tcp_wmem", "4096 16384 4194304"),
    ("ipv4/tcp_workaround_signed_windows", "0"),
    ("ipv4/udp_early_demux", "1"),
    ("ipv4/udp_l3mdev_accept", "0"),
    ("ipv4/udp_rmem_min", "4096"),
    ("ipv4/udp_wmem_min", "4096"),
    ("ipv6/anycast_src_echo_reply", "0"),
    ("ipv6/auto_flowlabels", "1"),
    ("ipv6/bindv6only", "0"),
    ("ipv6/fib_multipath_hash_policy", "0"),
    ("ipv6/flowlabel_consistency", "1"),
    ("ipv6/flowlabel_reflect", "0"),
    ("ipv6/flowlabel_state_ranges", "0"),
    ("ipv6/fwmark_reflect", "0"),
    ("ipv6/icmp/echo_ignore_all", "0"),
    ("ipv6/icmp/echo_ignore_anycast", "0"),
    ("ipv6/icmp/echo_ignore_multicast", "0"),
    ("ipv6/icmp/error_anycast_as_unicast", "0"),
    ("ipv6/icmp/ratelimit", "0"),
    // The kernel limits only these types, also by the limit of the whole machine.
    ("ipv6/icmp/ratemask", ""),
    ("ipv6/ip6frag_high_thresh", "4194304"),
    ("ipv6/ip6frag_low_thresh", "3145728"),
    ("ipv6/ip6frag_time", "60"),
    ("ipv6/ip_nonlocal_bind", "0"),
    ("ipv6/max_dst_opts_number", "8"),
    ("ipv6/max_hbh_opts_number", "8"),
    ("ipv6/route/min_adv_mss", "1220"),
    ("ipv6/route/mtu_expires", "600"),
    ("ipv6/seg6_flowlabel", "0"),
    ("mptcp/allow_join_initial_addr_port", "1"),
    ("mptcp/checksum_enabled", "0"),
    ("mptcp/enabled", "1"),
    ("unix/max_dgram_qlen", "10"),
    // The lab routes between pods in any case, so bridged packets need not meet IP rules.
    ("bridge/bridge-nf-call-arptables", "0"),
    ("bridge/bridge-nf-call-ip6tables", "0"),
    ("bridge/bridge-nf-call-iptables", "0"),
    ("bridge/bridge-nf-filter-pppoe-tagged", "0"),
    ("bridge/bridge-nf-filter-vlan-tagged", "0"),
    ("bridge/bridge-nf-pass-vlan-input-dev", "0"),
    ("netfilter/nf_conntrack_acct", "0"),
    ("netfilter/nf_conntrack_checksum", "1"),
    ("netfilter/nf_conntrack_events", "1"),
    ("netfilter/nf_conntrack_frag6_high_thresh", "4194304"),
    ("netfilter/nf_conntrack_frag6_low_thresh", "3145728"),
    ("netfilter/nf_conntrack_frag6_timeout", "60"),
    ("netfilter/nf_conntrack_generic_timeout", "600"),
    ("netfilter/nf_conntrack_gre_timeout", "30"),
    ("netfilter/nf_conntrack_gre_timeout_stream", "180"),
    ("netfilter/nf_conntrack_icmp_timeout", "30"),
    ("netfilter/nf_conntrack_icmpv6_timeout", "30"),
    ("netfilter/nf_conntrack_log_invalid", "0"),
    ("netfilter/nf_conntrack_sctp_timeout_closed", "10"),
    ("netfilter/nf_conntrack_sctp_timeout_cookie_echoed", "3"),
    ("netfilter/nf_conntrack_sctp_timeout_cookie_wait", "3"),
    ("netfilter/nf_conntrack_sctp_timeout_established", "210"),
    ("netfilter/nf_conntrack_sctp_timeout_heartbeat_sent", "30"),
    ("netfilter/nf_conntrack_sctp_timeout_shutdown_ack_sent", "3"),
    ("netfilter/nf_conntrack_sctp_timeout_shutdown_recd", "3"),
    ("netfilter/nf_conntrack_sctp_timeout_shutdown_sent", "3"),
    ("netfilter/nf_conntrack_tcp_be_liberal", "0"),
    ("netfilter/nf_conntrack_tcp_ignore_invalid_rst", "0"),
    ("netfilter/nf_conntrack_tcp_loose", "1"),
    ("netfilter/nf_conntrack_tcp_max_retrans", "3"),
    ("netfilter/nf_conntrack_tcp_timeout_close", "10"),
    ("netfilter/nf_conntrack_tcp_timeout_close_wait", "60"),
    ("netfilter/nf_conntrack_tcp_timeout_established", "432000"),
    ("netfilter/nf_conntrack_tcp_timeout_fin_wait", "120"),
    ("netfilter/nf_conntrack_tcp_timeout_last_ack", "30"),
    ("netfilter/nf_conntrack_tcp_timeout_max_retrans", "300"),
    ("netfilter/nf_conntrack_tcp_timeout_syn_recv", "60"),
    ("netfilter/nf_conntrack_tcp_timeout_syn_sent", "120"),
    ("netfilter/nf_conntrack_tcp_timeout_time_wait", "120"),
    ("netfilter/nf_conntrack_tcp_timeout_unacknowledged", "300"),
    ("netfilter/nf_conntrack_timestamp", "0"),
    ("netfilter/nf_conntrack_udp_timeout", "30"),
    ("netfilter/nf_conntrack_udp_timeout_stream", "120"),
    ("netfilter/nf_flowtable_tcp_timeout", "30"),
    ("netfilter/nf_flowtable_udp_timeout", "30"),
];

/// In `ipv4/conf/*`, after `forwarding`.
const IPV4_INTERFACE: &[Setting] = &[
    ("accept_local", "0"),
    ("accept_redirects", "0"),
    ("accept_source_route", "0"),
    ("arp_accept", "0"),
    ("arp_announce", "0"),
    ("arp_evict_nocarrier", "1"),
    ("arp_filter", "0"),
    ("arp_ignore", "0"),
    ("arp_notify", "0"),
    ("bc_forwarding", "0"),
    ("bootp_relay", "0"),
    ("disable_policy", "0"),
    ("disable_xfrm", "0"),
    ("drop_gratuitous_arp", "0"),
    ("drop_unicast_in_l2_multicast", "0"),
    ("force_igmp_version", "0"),
    ("igmpv2_unsolicited_report_interval", "10000"),
    ("igmpv3_unsolicited_report_interval", "1000"),
    ("ignore_routes_with_linkdown", "0"),
    ("log_martians", "0"),
    ("medium_id", "0"),
    ("promote_secondaries", "0"),
    ("proxy_arp", "0"),
    ("proxy_arp_pvlan", "0"),
    ("route_localnet", "0"),
    ("rp_filter", "0"),
    ("secure_redirects", "1"),
    ("send_redirects", "0"),
    ("shared_media", "1"),
    ("src_valid_mark", "0"),
    ("tag", "0"),
];

/// In `ipv6/conf/*`, after `forwarding`.
const IPV6_INTERFACE: &[Setting] = &[
    ("disable_ipv6", "0"),
    // Addresses can be used at once, and come from the lab alone.
    ("accept_dad", "0"),
    ("accept_ra", "0"),
    ("accept_ra_defrtr", "1"),
    ("accept_ra_from_local", "0"),
    ("accept_ra_min_hop_limit", "1"),
    ("accept_ra_min_lft", "0"),
    ("accept_ra_mtu", "1"),
    ("accept_ra_pinfo", "1"),
    ("accept_ra_rt_info_max_plen", "0"),
    ("accept_ra_rt_info_min_plen", "0"),
    ("accept_ra_rtr_pref", "1"),
    ("accept_redirects", "0"),
    ("accept_source_route", "0"),
    ("accept_untracked_na", "0"),
    ("addr_gen_mode", "0"),
    ("autoconf", "1"),
    ("dad_transmits", "1"),
    ("disable_policy", "0"),
    ("drop_unicast_in_l2_multicast", "0"),
    ("drop_unsolicited_na", "0"),
    ("enhanced_dad", "1"),
    ("force_forwarding", "0"),
    ("force_mld_version", "0"),
    ("force_tllao", "0"),
    ("hop_limit", "64"),
    ("ignore_routes_with_linkdown", "0"),
    ("ioam6_enabled", "0"),
    ("keep_addr_on_down", "0"),
    ("max_addresses", "16"),
    ("max_desync_factor", "600"),
    ("mldv1_unsolicited_report_interval", "10000"),
    ("mldv2_unsolicited_report_interval", "1000"),
    ("ndisc_evict_nocarrier", "1"),
    ("ndisc_notify", "0"),
    ("ndisc_tclass", "0"),
    ("optimistic_dad", "0"),
    ("proxy_ndp", "0"),
    ("ra_defrtr_metric", "1024"),
    ("ra_honor_pio_life", "0"),
    ("ra_honor_pio_pflag", "0"),
    ("regen_max_retry", "3"),
    ("regen_min_advance", "2"),
    ("router_probe_interval", "60"),
    ("router_solicitation_delay", "1"),
    ("router_solicitation_interval", "4"),
    ("router_solicitation_max_interval", "3600"),
    ("router_solicitations", "-1"),
    ("rpl_seg_enabled", "0"),
    ("seg6_enabled", "0"),
    ("seg6_require_hmac", "0"),
    ("suppress_frag_ndisc", "1"),
    ("temp_prefered_lft", "86400"),
    ("temp_valid_lft", "604800"),
    ("use_oif_addrs_only", "0"),
    ("use_optimistic", "0"),
    ("use_tempaddr", "0"),
];

/// The kernel gives the loopback interface values of its own for these.
const NOT_OF_LOOPBACK: &[&str] = &["disable_policy", "disable_xfrm", "accept_dad", "use_tempaddr"];

/// In `ipv4/neigh/*` and `ipv6/neigh/*`. Each new interface takes them from the machine's `neigh/default`, of which a
/// namespace has none.
const NEIGHBOUR: &[Setting] = &[
    ("anycast_delay", "100"),
    ("app_solicit", "0"),
    ("base_reachable_time_ms", "30000"),
    ("delay_first_probe_time", "5"),
    ("gc_stale_time", "60"),
    ("interval_probe_time_ms", "5000"),
    ("locktime", "100"),
    ("mcast_resolicit", "0"),
    ("mcast_solicit", "3"),
    ("proxy_delay", "80"),
    ("proxy_qlen", "64"),
    ("retrans_time_ms", "1000"),
    ("ucast_solicit", "3"),
    ("unres_qlen_bytes", "212992"),
];

/// What the values of `conf` are kept for besides interfaces.
const GENERAL: [&str; 2] = ["all", "default"];
const LOOPBACK: &str = "lo";

/// Sets all but what comes with further interfaces, in the namespace of the calling thread.
///
/// # Errors
/// Where the kernel has no IPv6, or refuses a value.
pub(crate) fn set_up(router: bool) -> Result<()> {
    if !Path::new("/proc/sys/net/ipv6").exists() {
        return Err(Error::NoIpv6);
    }
    let mut settings = Vec::new();
    for interface in GENERAL.into_iter().chain([LOOPBACK]) {
        settings.extend(of_interface(interface, router));
    }
    settings.extend(NAMESPACE.iter().map(|(name, value)| (PathBuf::from(name), *value)));
    settings.extend(of_neighbours(LOOPBACK));
    set(settings)
}

/// Says whether packets from one port of a bridge to another meet the rules of IP.
///
/// # Errors
/// Where the kernel refuses a value.
pub(crate) fn filter_bridged(filtered: bool) -> Result<()> {
    let value = if filtered { "1" } else { "0" };
    let names = ["bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"];
    if filtered && !names.iter().all(|name| path(Path::new(name)).exists()) {
        return Err(Error::Unsupported(
            "rules of IP for bridged packets: the kernel lacks br_netfilter".into(),
        ));
    }
    set(names.map(|name| (PathBuf::from(name), value)).into())
}

/// Sets what an interface has not got from the settings of [`set_up`].
///
/// # Errors
/// Where the kernel refuses a value.
pub(crate) fn set_up_interface(name: &str) -> Result<()> {
    set(of_neighbours(name).collect())
}

/// The settings in the namespace of the calling thread that are not as the lab sets them, with both values, and how
/// many were read.
///
/// # Errors
/// Where a setting cannot be read.
pub(crate) fn deviations(router: bool) -> Result<(Vec<String>, usize)> {
    let folder = Path::new("/proc/sys/net/ipv4/conf");
    let interfaces = fs::read_dir(folder).doing(|| format!("list {}", folder.display()))?;
    let interfaces: Vec<_> =
        interfaces.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let mut settings: Vec<_> = NAMESPACE.iter().map(|(name, value)| (PathBuf::from(name), *value)).collect();
    for interface in &interfaces {
        settings.extend(of_interface(interface, router));
        settings.extend(of_neighbours(interface));
    }
    let (mut deviations, mut read) = (Vec::new(), 0);
    for (name, value) in settings.iter().filter(|(name, _)| path(name).exists()) {
        read += 1;
        let found = get(name)?;
        if found != *value {
            deviations.push(format!("net/{}: {found}, not {value}", name.display()));
        }
    }
    Ok((deviations, read))
}

/// The settings of an interface or of one of [`GENERAL`], in the order in which they are written.
fn of_interface(name: &str, router: bool) -> impl Iterator<Item = (PathBuf, &'static str)> {
    let forwarding: &[Setting] = if router { &[("forwarding", "1")] } else { &[("forwarding", "0")] };
    let of_loopback = name == LOOPBACK;
    let families = [("ipv4", IPV4_INTERFACE), ("ipv6", IPV6_INTERFACE)];
    families.into_iter().flat_map(move |(family, settings)| {
        let folder = Path::new(family).join("conf").join(name);
        // To change it for all interfaces changes others of their settings, so it comes first.
        let settings = forwarding.iter().chain(settings);
        let settings = settings.filter(move |(name, _)| !(of_loopback && NOT_OF_LOOPBACK.contains(name)));
        settings.map(move |(name, value)| (folder.join(name), *value)).collect::<Vec<_>>()
    })
}

fn of_neighbours(interface: &str) -> impl Iterator<Item = (PathBuf, &'static str)> {
    ["ipv4", "ipv6"].into_iter().flat_map(move |family| {
        let folder = Path::new(family).join("neigh").join(interface);
        let value = move |name, value| if (family, name) == ("ipv6", "locktime") { "0" } else { value };
        NEIGHBOUR.iter().map(move |(name, ipv4)| (folder.join(name), value(*name, *ipv4))).collect::<Vec<_>>()
    })
}

/// Writes settings; not every kernel has each of them, and some come with a module.
fn set(settings: Vec<(PathBuf, &str)>) -> Result<()> {
    let settings: Vec<_> = settings.into_iter().filter(|(name, _)| path(name).exists()).collect();
    if std::env::var_os(CONTRARY).is_some() {
        settings.iter().try_for_each(|(name, value)| set_otherwise(name, value))?;
    }
    for (name, value) in &settings {
        // Linux 6.1 refuses some writes (EINVAL) of what it has already.
        if let Err(error) = write(name, value)
            && get(name)? != *value
        {
            return Err(error).doing(|| format!("set net/{} to {value:?}", name.display()));
        }
    }
    Ok(())
}

/// Gives a setting another value than this one: the first that the kernel takes of some near it.
fn set_otherwise(name: &Path, value: &str) -> Result<()> {
    let (first, rest) = value.split_once(' ').map_or((value, None), |(first, rest)| (first, Some(rest)));
    let others = match first.parse::<i64>() {
        Ok(number) => [1, 0, 2, number - 1, number + 1, number * 2].map(|other| other.to_string()).into(),
        Err(_) if first.is_empty() => vec!["7".to_owned()],
        Err(_) => vec!["cubic".to_owned(), "bbr".to_owned()],
    };
    for other in others {
        let other = rest.map_or(other.clone(), |rest| format!("{other} {rest}"));
        if write(name, &other).is_ok() && get(name)? != value {
            return Ok(());
        }
    }
    // A kernel may have one congestion control only.
    if name.ends_with("tcp_congestion_control") {
        return Ok(());
    }
    Err(Error::Unsupported(format!("net/{} takes no other value than {value:?}", name.display())))
}

/// What a setting is, with single blanks between its parts.
fn get(name: &Path) -> Result<String> {
    let text = fs::read_to_string(path(name)).doing(|| format!("read net/{}", name.display()))?;
    Ok(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn write(name: &Path, value: &str) -> std::io::Result<()> {
    // Nothing would be written where there is no character at all.
    fs::write(path(name), format!("{value}\n"))
}

fn path(name: &Path) -> PathBuf {
    Path::new("/proc/sys/net").join(name)
}
