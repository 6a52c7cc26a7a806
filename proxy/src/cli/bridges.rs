//! Bridges of pods whose packets pass by the rules of IP: what that means for Services, said in the log and by `check`.
//!
//! Never changes a sysctl: it belongs to the CNI plugin and the administrator, and concerns all that is bridged here.

use std::fs;
use std::path::Path;

use nix::net::if_::if_nametoindex;

use crate::config::{Detector, Mode};

/// What the CNI plugin `bridge` and kubenet call their bridges.
const USUAL: [&str; 2] = ["cni0", "cbr0"];
/// Where it stands, for each family, whether packets between two ports of a bridge meet the rules of IP. Without the module
/// `br_netfilter` the files are missing, and the packets meet none.
const SYSCTLS: [(&str, &str); 2] =
    [("bridge-nf-call-iptables", "IPv4"), ("bridge-nf-call-ip6tables", "IPv6")];

/// Says which bridges pods are attached to whose packets meet the rules of IP.
///
/// # Errors
/// In words, which of them are passed by, and what to do.
pub(super) fn filtered(detector: &Detector) -> Result<String, String> {
    let configured = match detector {
        Detector::BridgeInterface(name) => Some(name.as_str()),
        _ => None,
    };
    let exists = |name: &&str| if_nametoindex(*name).is_ok();
    let usual = USUAL.into_iter().filter(|name| configured != Some(*name));
    let bridges: Vec<_> = configured.into_iter().chain(usual).filter(exists).collect();
    if bridges.is_empty() {
        return Ok("no bridge of pods".into());
    }
    let bridges = bridges.join(", ");
    let is_off = |(name, _): &(&str, &str)| {
        let file = Path::new("/proc/sys/net/bridge").join(name);
        fs::read_to_string(file).map_or(true, |value| value.trim() == "0")
    };
    let (off, families): (Vec<_>, Vec<_>) = SYSCTLS
        .into_iter()
        .filter(is_off)
        .map(|(name, family)| (format!("net.bridge.{name}=1"), family))
        .unzip();
    if off.is_empty() {
        return Ok(format!("{bridges}: the rules see what is bridged"));
    }
    Err(format!(
        "pods on {bridges} cannot connect over {} to a Service whose endpoint is on the same bridge, since the answer \
         passes the bridge without translation; load br_netfilter and set {}",
        families.join(" and "),
        off.join(" and ")
    ))
}

/// Warns once of what pods on a bridge cannot reach.
pub(super) fn warn(detector: &Detector, mode: Mode) {
    if let Err(words) = filtered(detector) {
        let instead = match mode {
            Mode::Nftables => "; with --proxy-mode ebpf, TCP connections to ClusterIPs do not depend on it",
            Mode::Ebpf => "; TCP connections that the socket layer answers do not depend on it",
        };
        tracing::warn!("{words}{instead}");
    }
}
