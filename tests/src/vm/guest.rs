//! The guest's half: runs the scenarios and says on the second serial port how each ended, one line each; all else that
//! is written goes to the console, the first.

use std::fs::{self, File};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use super::{MARK, RESULT};

/// A scenario and its name. A scenario that fails panics.
pub type Scenario = (&'static str, fn());

/// Mounts file systems of these kinds at these folders, which it makes.
///
/// # Errors
/// When the kernel refuses one.
pub fn mount_all(mounts: &[(&str, &str)]) -> Result<()> {
    for (kind, at) in mounts {
        fs::create_dir_all(at).with_context(|| format!("cannot make {at}"))?;
        mount(Some(*kind), *at, Some(*kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {at}"))?;
    }
    Ok(())
}

/// Runs every scenario, then turns the machine off. Needs `/dev` and `/proc`.
///
/// # Errors
/// When the machine is not as expected. The kernel then panics, as always where `/init` ends, and so says it.
#[expect(clippy::print_stderr, reason = "the console")]
pub fn run(scenarios: &[Scenario]) -> Result<()> {
    let mut results = File::options().write(true).open("/dev/ttyS1").context("no second serial port")?;
    for (name, scenario) in scenarios {
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
