//! arm64, in a virtual machine: an emulated processor boots Debian's kernel with the files of kube-lane's image for arm64,
//! and `init.sh` runs the scenarios there. `cargo xtask test --lane vm --long` runs it, since that image takes a release
//! build. Needs no root, and nothing of this machine's architecture.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result};
use kube_lane_tests::vm::{Archive, OnDemand, Plan};
use libtest_mimic::{Arguments, Failed, Trial};

/// In the order in which `init.sh` runs them.
const SCENARIOS: [&str; 4] = [
    "the_image_is_for_this_machine",
    "check_finds_both_modes_to_work",
    "services_are_served_in_mode_nftables",
    "services_are_served_in_mode_ebpf",
];

/// The programs of busybox that `init.sh` calls. The kernel calls `modprobe`.
const PROGRAMS: [&str; 17] = [
    "cat", "grep", "httpd", "ip", "mkdir", "modprobe", "mount", "nc", "nsenter", "poweroff", "seq", "sh",
    "sleep", "timeout", "unshare", "usleep", "wget",
];

const PLAN: Plan = Plan {
    kernel: "6.1-arm64",
    memory: 1024,
    modules: &[],
    more: "",
    silence: Duration::from_secs(300),
    fill,
};

fn main() -> Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let machine = Arc::new(OnDemand::arm64(PLAN));
    let trial = |name: &'static str| {
        let machine = Arc::clone(&machine);
        Trial::test(format!("arm64::{name}"), move || match machine.outcome(name) {
            Ok(_) => Ok(()),
            Err(error) => Err(Failed::from(format!("{error:#}"))),
        })
    };
    Ok(libtest_mimic::run(&arguments, SCENARIOS.map(trial).into()).exit_code())
}

/// The image, busybox, `init.sh` and what it serves.
fn fill(archive: &mut Archive) -> Result<()> {
    let image = env::var_os("KUBE_LANE_ARM64_FILES")
        .context("KUBE_LANE_ARM64_FILES is not set: run this through `cargo xtask test --lane vm --long`")?;
    let image = Path::new(&image);
    for (folder, to) in [("usr", "/"), ("etc", "/"), ("lib", "/usr")] {
        archive.below(image, &image.join(folder), Path::new(to))?;
    }
    let busybox = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/vm/6.1-arm64/bin/busybox");
    archive.file(&busybox, Path::new("/usr/bin/busybox"))?;
    for program in PROGRAMS {
        let folder = if program == "modprobe" { "/usr/sbin" } else { "/usr/bin" };
        archive.symlink(&Path::new(folder).join(program), "/usr/bin/busybox")?;
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/arm64");
    archive.file(&here.join("init.sh"), Path::new("/init"))?;
    archive.text(Path::new("/manifests/web.yaml"), &fs::read_to_string(here.join("services.yaml"))?)
}
