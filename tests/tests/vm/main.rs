//! The lane `vm`: kube-lane on kernels that are not this machine's, in virtual machines under software emulation. One
//! test for each kernel and scenario; `cargo xtask test --lane vm -- FILTER`.
//!
//! Boots each kernel with the test program as `/init` (`kube_lane_tests::vm`), and runs the lab there. Needs no root.

// Named test modules for clippy, which else forbids `unwrap` in the helpers.
#[cfg(test)]
mod scenarios;
#[cfg(test)]
mod sockets;
#[cfg(test)]
#[path = "../kernel/world.rs"]
#[expect(dead_code, reason = "the kernel lane needs more of it")]
mod world;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use kube_lane_tests::agent;
use kube_lane_tests::vm::{self, Archive, OnDemand, Plan, find};
use libtest_mimic::{Arguments, Failed, Trial};

/// The kernels, as `cargo xtask setup` names them.
const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// File systems of the guest, and where they are mounted.
const MOUNTS: [(&str, &str); 7] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
];

fn main() -> Result<ExitCode> {
    if std::process::id() == 1 {
        vm::mount_all(&MOUNTS)?;
        vm::run(scenarios::ALL)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut arguments = Arguments::from_args();
    // Those of one kernel share a machine, which runs them in this order.
    arguments.test_threads = Some(1);
    let trials = KERNELS.into_iter().flat_map(|kernel| {
        let machine = Arc::new(OnDemand::new(plan(kernel)));
        scenarios::ALL.iter().map(move |(name, _)| {
            let machine = Arc::clone(&machine);
            Trial::test(format!("{kernel}::{name}"), move || match machine.outcome(name) {
                Ok(_) => Ok(()),
                Err(error) => Err(Failed::from(format!("{error:#}"))),
            })
        })
    });
    Ok(libtest_mimic::run(&arguments, trials.collect()).exit_code())
}

fn plan(kernel: &'static str) -> Plan {
    Plan {
        kernel,
        memory: 1024,
        modules: &[],
        more: "KUBE_LANE_BIN=/usr/bin/kube-lane",
        // Emulated on a busy machine, the slowest scenario takes a tenth of it.
        silence: Duration::from_secs(300),
        fill,
    }
}

/// The agent, and what it and the lab call.
fn fill(archive: &mut Archive) -> Result<()> {
    archive.program(&agent::binary()?, Path::new("/usr/bin/kube-lane"))?;
    archive.program(&find("nft")?, Path::new("/usr/sbin/nft"))?;
    archive.program(&find("modprobe")?, Path::new("/usr/sbin/modprobe"))
}
