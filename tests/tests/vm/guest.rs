//! The guest's half: what `/init` does. Says on the second serial port how each scenario ended, one line each; all
//! else that is written goes to the console, the first.

use std::fs::{self, File};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use crate::scenarios;

/// Where the programs of the initramfs are.
pub(crate) const AGENT: &str = "/usr/bin/kube-lane";
/// Precedes the output of a scenario on the console, with its name.
pub(crate) const MARK: &str = "=== scenario ";

/// Begins the line that says how a scenario ended: its name, a blank, `ok` or `FAILED`.
pub(crate) const RESULT: &str = "scenario ";

/// File systems, and where they are mounted.
const MOUNTS: [(&str, &str); 7] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
];

/// Runs every scenario, then turns the machine off.
///
/// # Errors
/// When the machine is not as expected. The kernel then panics, as always where `/init` ends, and so says it.
#[expect(clippy::print_stderr, reason = "the console")]
pub(crate) fn main() -> Result<()> {
    for (kind, at) in MOUNTS {
        fs::create_dir_all(at).with_context(|| format!("cannot make {at}"))?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {at}"))?;
    }
    let mut results = File::options().write(true).open("/dev/ttyS1").context("no second serial port")?;
    for (name, scenario) in scenarios::ALL {
        eprintln!("{MARK}{name}");
        // The message is on the console.
        let outcome = catch_unwind(AssertUnwindSafe(scenario)).map_or("FAILED", |()| "ok");
        writeln!(results, "{RESULT}{name} {outcome}")?;
    }
    fs::write("/proc/sysrq-trigger", "o").context("cannot turn the machine off")?;
    loop {
        std::thread::park();
    }
}
