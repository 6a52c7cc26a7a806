//! The security module that confines this process (AppArmor or SELinux), and words for what it denies.
//!
//! Owns no decision: whether something works is found by trying it, and this says what may have kept it from working.

use std::fs;

/// What confines this process beyond its capabilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Confinement {
    /// A profile of AppArmor that is enforced, as the kernel shows it: `NAME (enforce)`.
    AppArmor(String),
    /// A context of SELinux, which may be permissive all the same.
    Selinux(String),
}

impl Confinement {
    /// Of this process; `None` also where the kernel does not tell.
    pub(super) fn read() -> Option<Self> {
        let attribute = |name| fs::read_to_string(format!("/proc/self/attr/{name}")).ok();
        attribute("apparmor/current")
            .and_then(|text| Self::parse(&text))
            .or_else(|| Self::parse(&attribute("current")?))
    }

    fn parse(text: &str) -> Option<Self> {
        let text = text.trim_end_matches(['\0', '\n']);
        if let Some((_, mode)) = text.rsplit_once(" (") {
            // Profiles in the modes `complain` and `unconfined` deny nothing.
            return ["enforce)", "kill)"].contains(&mode).then(|| Self::AppArmor(text.to_owned()));
        }
        // user:role:type:level
        (text.split(':').count() >= 3).then(|| Self::Selinux(text.to_owned()))
    }

    /// Why something was denied although the capabilities are there, and what helps.
    pub(super) fn explain(&self) -> String {
        match self {
            Self::AppArmor(profile) => format!(
                "AppArmor confines this process with the profile {profile}. Profiles of container runtimes deny writing \
                 below /sys/fs: mount the node's BPF file system elsewhere, as deploy/ebpf does at /run/kube-lane/bpf, and \
                 name that place with --bpf-root, or run the container with the AppArmor profile Unconfined"
            ),
            Self::Selinux(context) => format!(
                "SELinux confines this process with the context {context}. `ausearch -m avc` on the node shows what it \
                 denied; docs/operations.md, \"Security modules\", says what kube-lane needs"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_confines_is_told_from_what_does_not() {
        let app_armor = |profile: &str| Some(Confinement::AppArmor(profile.into()));
        for (text, expected) in [
            ("cri-containerd.apparmor.d (enforce)\n", app_armor("cri-containerd.apparmor.d (enforce)")),
            ("a profile (with parts) (enforce)\0", app_armor("a profile (with parts) (enforce)")),
            ("cri-containerd.apparmor.d (complain)\n", None),
            ("cri-containerd.apparmor.d (unconfined)\n", None),
            ("unconfined\n", None),
            ("", None),
            (
                "system_u:system_r:container_t:s0:c1,c2\0",
                Some(Confinement::Selinux("system_u:system_r:container_t:s0:c1,c2".into())),
            ),
        ] {
            assert_eq!(Confinement::parse(text), expected, "{text:?}");
        }
        let words = app_armor("cri-containerd.apparmor.d (enforce)").unwrap().explain();
        assert!(
            words.contains("profile cri-containerd.apparmor.d (enforce)") && words.contains("--bpf-root"),
            "{words}"
        );
    }
}
