//! The kernel's limits and timeouts of connection tracking, as the configuration asks for them (`conntrack`).
//!
//! Owns these sysctls of the node, as kube-proxy does, but never lowers what an administrator raised, and no failure
//! ends anything: the kernel's own values serve, too.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use procfs::CurrentSI;
use tracing::{info, warn};

use crate::config::Conntrack;
use crate::dataplane::conntrack;

/// Where the sysctls are: as a process sees them, and where a pod, whose own are read-only, may have mounted the node's.
const PLACES: [&str; 2] = ["/proc/sys/net/netfilter", "/host/proc/sys/net/netfilter"];
/// kube-proxy asks for no more entries than this, however many processors there are.
const MOST: u64 = 1 << 20;

/// One sysctl and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Setting {
    name: &'static str,
    value: u64,
    /// A higher value stays.
    at_least: bool,
}

/// Sets what is asked for. All that fails is one warning.
pub(super) fn apply(config: &Conntrack) {
    if let Err(error) = conntrack::load() {
        warn!(%error, "connection tracking cannot be had (it needs CAP_NET_ADMIN and a kernel with nf_conntrack_netlink)");
    }
    let processors = procfs::KernelStats::current().map_or(1, |stat| stat.cpu_time.len() as u64);
    let places = PLACES.map(PathBuf::from);
    let failed: Vec<_> = settings(config, processors)
        .into_iter()
        .filter_map(|setting| match set(&places, setting) {
            Ok(true) => {
                info!(value = setting.value, "set {}", setting.name);
                None
            }
            Ok(false) => None,
            Err(error) => Some(format!("{} = {} ({error})", setting.name, setting.value)),
        })
        .collect();
    if !failed.is_empty() {
        warn!(
            "cannot set {}: the kernel's own values stay; in a pod, mount the node's /proc/sys/net at {}",
            failed.join(", "),
            "/host/proc/sys/net"
        );
    }
}

/// What the configuration asks for, in the order in which it is set.
fn settings(config: &Conntrack, processors: u64) -> Vec<Setting> {
    let max = config.max_per_core.map(|per_core| {
        let scaled = u64::from(per_core) * processors;
        scaled.max(config.min.into()).min(MOST)
    });
    let limit = |name, value: Option<u64>| value.map(|value| Setting { name, value, at_least: true });
    let exactly = |name, value: Option<u64>| value.map(|value| Setting { name, value, at_least: false });
    let seconds = |timeout: Option<Duration>| timeout.map(|timeout| timeout.as_secs());
    [
        limit("nf_conntrack_max", max),
        // Four entries a bucket, as kube-proxy has it.
        limit("nf_conntrack_buckets", max.map(|max| max / 4)),
        exactly("nf_conntrack_tcp_timeout_established", seconds(config.tcp_established)),
        exactly("nf_conntrack_tcp_timeout_close_wait", seconds(config.tcp_close_wait)),
        exactly("nf_conntrack_tcp_be_liberal", config.tcp_be_liberal.then_some(1)),
        exactly("nf_conntrack_udp_timeout", seconds(config.udp)),
        exactly("nf_conntrack_udp_timeout_stream", seconds(config.udp_stream)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Sets one where it is not so already; tells whether it was changed. The error is that of the first place.
fn set(places: &[PathBuf; 2], setting: Setting) -> io::Result<bool> {
    let [own, mounted] = places;
    set_at(own, setting).or_else(|error| set_at(mounted, setting).map_err(|_| error))
}

fn set_at(place: &Path, Setting { name, value, at_least }: Setting) -> io::Result<bool> {
    let file = place.join(name);
    let current: Option<u64> = fs::read_to_string(&file)?.trim().parse().ok();
    if current.is_some_and(|current| current == value || at_least && current > value) {
        return Ok(false);
    }
    fs::write(&file, value.to_string()).map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(settings: &[Setting], name: &str) -> Option<u64> {
        settings.iter().find(|setting| setting.name == name).map(|setting| setting.value)
    }

    #[test]
    fn the_limit_is_kube_proxys() {
        let config = Conntrack::default();
        for (processors, max) in [(1, 131_072), (4, 131_072), (8, 262_144), (128, 1_048_576)] {
            let settings = settings(&config, processors);
            assert_eq!(value(&settings, "nf_conntrack_max"), Some(max), "{processors} processors");
            assert_eq!(value(&settings, "nf_conntrack_buckets"), Some(max / 4));
        }
        let unlimited = settings(&Conntrack { max_per_core: None, ..config }, 8);
        assert_eq!(value(&unlimited, "nf_conntrack_max"), None);
        assert_eq!(value(&unlimited, "nf_conntrack_tcp_timeout_established"), Some(86_400));
        assert_eq!(value(&unlimited, "nf_conntrack_tcp_timeout_close_wait"), Some(3_600));
        assert_eq!(unlimited.len(), 2, "the rest stays as the kernel has it");
    }

    #[test]
    fn a_higher_limit_stays_and_a_timeout_is_what_is_asked_for() {
        let dir = std::env::temp_dir().join(format!("kube-lane-sysctls-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let places = [dir.join("absent"), dir.clone()];
        let check = |before: &str, at_least, changed, after: &str| {
            fs::write(dir.join("x"), before).unwrap();
            let setting = Setting { name: "x", value: 100, at_least };
            assert_eq!(set(&places, setting).unwrap(), changed);
            assert_eq!(fs::read_to_string(dir.join("x")).unwrap().trim(), after);
        };
        check("99\n", true, true, "100");
        check("100\n", true, false, "100");
        check("101\n", true, false, "101");
        check("101\n", false, true, "100");
        let absent = Setting { name: "y", value: 1, at_least: false };
        assert_eq!(set(&places, absent).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::remove_dir_all(&dir).unwrap();
    }
}
