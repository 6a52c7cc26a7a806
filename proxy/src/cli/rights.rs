//! The capabilities that this process has, and words for those that it lacks.
//!
//! Owns no decision: whether something works is found by trying it, and this says why it did not.

use procfs::process::Process;

/// A capability: its number and its name, without `CAP_`, in `linux/capability.h`.
type Capability = (u32, &'static str);

const NET_ADMIN: Capability = (12, "NET_ADMIN");
const PERFMON: Capability = (38, "PERFMON");
const BPF: Capability = (39, "BPF");
/// Has the two above in it.
const SYS_ADMIN: u32 = 21;

/// What a mode takes.
pub(super) const NFTABLES: &[Capability] = &[NET_ADMIN];
pub(super) const EBPF: &[Capability] = &[NET_ADMIN, BPF, PERFMON];

/// What is missing, and where to add it; else what is there.
pub(super) fn rights(needed: &[Capability]) -> Result<String, String> {
    // What cannot be told is taken to be there.
    let status = Process::myself().and_then(|process| process.status());
    let (effective, seccomp) = status.map_or((u64::MAX, None), |status| (status.capeff, status.seccomp));
    // 2: a filter, such as a container's profile.
    compare(needed, effective, seccomp == Some(2))
}

fn compare(needed: &[Capability], effective: u64, filtered: bool) -> Result<String, String> {
    let has = |number: u32| effective & (1 << number) != 0;
    let is_missing = |capability: &&Capability| {
        let (number, _) = **capability;
        !has(number) && (number == NET_ADMIN.0 || !has(SYS_ADMIN))
    };
    let names = |capabilities: Vec<&Capability>, prefix: &str| {
        capabilities.iter().map(|(_, name)| format!("{prefix}{name}")).collect::<Vec<_>>().join(", ")
    };
    let missing: Vec<_> = needed.iter().filter(is_missing).collect();
    if missing.is_empty() {
        let under = if filtered && needed.contains(&BPF) {
            "; under a seccomp profile, which has to allow bpf(2)"
        } else {
            ""
        };
        return Ok(names(needed.iter().collect(), "CAP_") + under);
    }
    Err(format!(
        "missing: {} (in a pod: add [{}] to securityContext.capabilities of the container, which runs as user 0; in a \
         systemd unit: CapabilityBoundingSet={})",
        names(missing.clone(), "CAP_"),
        names(missing.clone(), ""),
        names(missing, "CAP_").replace(',', ""),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_where_to_add_it() {
        let all = 1 << 12 | 1 << 38 | 1 << 39;
        assert_eq!(compare(NFTABLES, all, true), Ok("CAP_NET_ADMIN".into()));
        let words = compare(EBPF, all, true).unwrap();
        assert!(words.starts_with("CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON; under a seccomp profile"), "{words}");
        let words = compare(EBPF, 1 << 12, false).unwrap_err();
        for part in [
            "missing: CAP_BPF, CAP_PERFMON (",
            "add [BPF, PERFMON]",
            "CapabilityBoundingSet=CAP_BPF CAP_PERFMON)",
        ] {
            assert!(words.contains(part), "{words}");
        }
        assert!(compare(EBPF, 1 << 12 | 1 << 21, false).is_ok(), "CAP_SYS_ADMIN has both");
        assert!(compare(NFTABLES, 1 << 21, false).is_err());
    }
}
