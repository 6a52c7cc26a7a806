//! Whether this machine can run a lane at all. Asks the kernel, installs nothing and leaves nothing behind.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::process;

/// Looks for what labs need: namespaces whose sysctls can be set, both IP families, cgroup v2, nf_tables and BPF.
///
/// # Errors
/// Names in one line everything that this machine lacks, with the remedy.
pub(crate) fn lab() -> Result<()> {
    if !process::is_root() {
        bail!("the lab makes network namespaces: run it as root");
    }
    report(&missing(&Machine::ask()))
}

fn report(missing: &[&str]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    bail!("this machine lacks {}", missing.join("; "))
}

/// What this machine's kernel and its file systems allow.
#[derive(Clone, Copy)]
struct Machine {
    ipv6: bool,
    namespaces: bool,
    sysctls: bool,
    cgroup2: bool,
    nf_tables: bool,
    bpf: bool,
}

impl Machine {
    fn ask() -> Self {
        let in_namespace = |script: &str| {
            let mut unshare = Command::new("unshare");
            process::output(unshare.args(["--net", "sh", "-c", script])).is_ok()
        };
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        Self {
            ipv6: Path::new("/proc/sys/net/ipv6").is_dir(),
            namespaces: in_namespace("true"),
            // The namespace goes with the process.
            sysctls: in_namespace("echo 0 > /proc/sys/net/ipv4/ip_forward"),
            cgroup2: mounts.lines().any(is_writable_cgroup2),
            nf_tables: has_function("nft_register_expr") || load("nf_tables"),
            // What eBPF programs for `connect()` are called by.
            bpf: has_function("__cgroup_bpf_run_filter_sock_addr"),
        }
    }
}

fn missing(machine: &Machine) -> Vec<&'static str> {
    let checks = [
        (machine.ipv6, "IPv6 (boot without ipv6.disable=1)"),
        (machine.namespaces, "network namespaces (`unshare --net` fails: CAP_SYS_ADMIN in this container?)"),
        (
            // Without a namespace nothing is known of its sysctls.
            machine.sysctls || !machine.namespaces,
            "writable sysctls (/proc/sys is read-only: run a privileged container)",
        ),
        (machine.cgroup2, "a writable cgroup v2 hierarchy (mount -t cgroup2 none /sys/fs/cgroup/unified)"),
        (machine.nf_tables, "nf_tables (CONFIG_NF_TABLES or the module nf_tables)"),
        (machine.bpf, "eBPF programs on cgroups (CONFIG_CGROUP_BPF)"),
    ];
    checks.into_iter().filter(|(there, _)| !there).map(|(_, what)| what).collect()
}

/// Whether a line of `/proc/self/mounts` is of a cgroup v2 hierarchy that can be written.
fn is_writable_cgroup2(line: &str) -> bool {
    let mut fields = line.split(' ').skip(2);
    let (kind, options) = (fields.next(), fields.next().unwrap_or_default());
    kind == Some("cgroup2") && options.split(',').all(|option| option != "ro")
}

/// Whether the running kernel has a function, or tells no function at all.
fn has_function(name: &str) -> bool {
    let symbols = fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    // Address, kind, name and, for one of a module, the module.
    symbols.is_empty() || symbols.lines().any(|line| line.split_whitespace().nth(2) == Some(name))
}

/// Loads a module of the kernel, as its first user would.
fn load(module: &str) -> bool {
    process::find_program("modprobe")
        .is_some_and(|modprobe| process::output(Command::new(modprobe).arg(module)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPLETE: Machine =
        Machine { ipv6: true, namespaces: true, sysctls: true, cgroup2: true, nf_tables: true, bpf: true };

    #[test]
    fn what_is_missing_is_told_in_one_line() {
        assert!(report(&missing(&COMPLETE)).is_ok());
        for (machine, told) in [
            (Machine { ipv6: false, ..COMPLETE }, "ipv6.disable=1"),
            (Machine { namespaces: false, sysctls: false, ..COMPLETE }, "CAP_SYS_ADMIN"),
            (Machine { sysctls: false, ..COMPLETE }, "read-only"),
            (Machine { cgroup2: false, ..COMPLETE }, "cgroup v2"),
            (Machine { nf_tables: false, ..COMPLETE }, "CONFIG_NF_TABLES"),
            (Machine { bpf: false, ..COMPLETE }, "CONFIG_CGROUP_BPF"),
        ] {
            assert_eq!(missing(&machine).len(), 1, "{told}");
            let error = report(&missing(&machine)).unwrap_err().to_string();
            assert!(error.contains(told) && error.lines().count() == 1, "{error}");
        }
        let all = missing(&Machine { ipv6: false, bpf: false, ..COMPLETE });
        assert_eq!(report(&all).unwrap_err().to_string().lines().count(), 1);
    }

    #[test]
    fn only_a_writable_cgroup2_counts() {
        assert!(is_writable_cgroup2("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0"));
        assert!(!is_writable_cgroup2("cgroup2 /sys/fs/cgroup cgroup2 ro,nosuid 0 0"));
        assert!(!is_writable_cgroup2("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0"));
    }

    #[test]
    fn functions_of_the_kernel_are_found_by_name() {
        assert!(!has_function("kube_lane_no_such_function") || !Path::new("/proc/kallsyms").exists());
    }
}
