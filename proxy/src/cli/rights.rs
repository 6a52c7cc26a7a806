//! The capabilities that this process has, and words for those that it lacks.
//!
//! Owns no decision: whether something works is found by trying it, and this says why it did not.

use std::error::Error;

use nix::errno::Errno;
use procfs::process::Process;

use super::confinement::Confinement;
use crate::causes::{is_not_permitted, number, with_causes};

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

/// What this process may do.
#[derive(Clone, Copy, Debug)]
struct Rights {
    effective: u64,
    /// A seccomp filter is in force, such as a container's profile.
    filtered: bool,
}

impl Rights {
    /// What cannot be told is taken to be there.
    fn read() -> Self {
        let status = Process::myself().and_then(|process| process.status());
        let filter = |seccomp| seccomp == Some(2);
        status.map_or(Self { effective: u64::MAX, filtered: false }, |status| Self {
            effective: status.capeff,
            filtered: filter(status.seccomp),
        })
    }

    fn compare(self, needed: &[Capability]) -> Result<String, String> {
        let Self { effective, filtered } = self;
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

    fn explain(
        self,
        confinement: Option<&Confinement>,
        needed: &[Capability],
        error: &(dyn Error + 'static),
    ) -> String {
        let words = with_causes(error);
        match self.compare(needed) {
            Err(missing) => format!("capabilities {missing}: {words}"),
            Ok(_) if is_not_permitted(error) => {
                // Seccomp profiles of container runtimes answer EPERM, security modules mostly EACCES.
                let is_filtered = self.filtered && number(error) == Some(Errno::EPERM as i32);
                let filter = is_filtered.then(|| "under a seccomp profile: does it allow bpf(2)?".to_owned());
                let reasons: Vec<_> =
                    filter.into_iter().chain(confinement.map(Confinement::explain)).collect();
                if reasons.is_empty() { words } else { format!("{words} ({})", reasons.join("; ")) }
            }
            Ok(_) => words,
        }
    }
}

/// What is missing, and where to add it; else what is there.
pub(super) fn rights(needed: &[Capability]) -> Result<String, String> {
    Rights::read().compare(needed)
}

/// Why something failed that takes these, for people.
pub(super) fn explain(needed: &[Capability], error: &(dyn Error + 'static)) -> String {
    Rights::read().explain(Confinement::read().as_ref(), needed, error)
}

/// Words for something that was not permitted although the capabilities are there; `None` where nothing is known to
/// confine this process.
pub(super) fn confinement(needed: &[Capability]) -> Option<String> {
    Rights::read().compare(needed).ok()?;
    Some(Confinement::read()?.explain())
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn rights(effective: u64, filtered: bool) -> Rights {
        Rights { effective, filtered }
    }

    #[test]
    fn what_is_missing_is_named_with_where_to_add_it() {
        let all = 1 << 12 | 1 << 38 | 1 << 39;
        assert_eq!(rights(all, true).compare(NFTABLES), Ok("CAP_NET_ADMIN".into()));
        let words = rights(all, true).compare(EBPF).unwrap();
        assert!(words.starts_with("CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON; under a seccomp profile"), "{words}");
        let words = rights(1 << 12, false).compare(EBPF).unwrap_err();
        for part in [
            "missing: CAP_BPF, CAP_PERFMON (",
            "add [BPF, PERFMON]",
            "CapabilityBoundingSet=CAP_BPF CAP_PERFMON)",
        ] {
            assert!(words.contains(part), "{words}");
        }
        assert!(rights(1 << 12 | 1 << 21, false).compare(EBPF).is_ok(), "CAP_SYS_ADMIN has both");
        assert!(rights(1 << 21, false).compare(NFTABLES).is_err());
    }

    #[test]
    fn what_is_not_permitted_is_explained() {
        let refused = |errno: Errno| io::Error::from(errno);
        let confined = Confinement::AppArmor("a (enforce)".into());
        let explain = |rights: Rights, errno, confinement| rights.explain(confinement, EBPF, &refused(errno));
        assert!(
            explain(rights(0, true), Errno::EPERM, None).starts_with("capabilities missing: CAP_NET_ADMIN, ")
        );
        assert!(explain(rights(u64::MAX, true), Errno::EPERM, None).ends_with("does it allow bpf(2)?)"));
        for (filtered, errno) in [(false, Errno::EPERM), (true, Errno::EACCES)] {
            assert_eq!(explain(rights(u64::MAX, filtered), errno, None), refused(errno).to_string());
            let words = explain(rights(u64::MAX, filtered), errno, Some(&confined));
            assert!(words.contains("AppArmor confines this process with the profile a (enforce)"), "{words}");
        }
        let busy = explain(rights(u64::MAX, true), Errno::EBUSY, Some(&confined));
        assert_eq!(busy, refused(Errno::EBUSY).to_string());
    }
}
