//! The lane `vm`: kube-lane on kernels that are not this machine's, in virtual machines under software emulation. One
//! test for each kernel and scenario; `cargo xtask test --lane vm -- FILTER`.
//!
//! The same program is both sides: here it boots a kernel, whose initramfs has this program as `/init`, where it runs
//! the scenarios and says how each ended. Needs no root.

mod guest;
mod initramfs;
mod machine;
// Named test modules for clippy, which else forbids `unwrap` in the helpers.
#[cfg(test)]
mod scenarios;
#[cfg(test)]
mod sockets;
#[cfg(test)]
#[path = "../kernel/world.rs"]
#[expect(dead_code, reason = "the kernel lane needs more of it")]
mod world;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};

use self::machine::Machine;

/// The kernels, as `cargo xtask setup` names them.
const KERNELS: [&str; 2] = ["6.1", "6.12"];

fn main() -> Result<ExitCode> {
    if std::process::id() == 1 {
        guest::main()?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut arguments = Arguments::from_args();
    // Those of one kernel share a machine, which runs them in this order.
    arguments.test_threads = Some(1);
    let trials = KERNELS.into_iter().flat_map(|kernel| {
        // Booted by the first scenario; a list of names needs none.
        let machine: Arc<Mutex<Option<Machine>>> = Arc::default();
        scenarios::ALL.iter().map(move |(name, _)| {
            let machine = Arc::clone(&machine);
            Trial::test(format!("{kernel}::{name}"), move || {
                let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
                let mut outcome = || {
                    if machine.is_none() {
                        *machine = Some(Machine::boot(kernel)?);
                    }
                    machine.as_mut().map_or(Ok(()), |machine| machine.outcome(name))
                };
                outcome().map_err(|error: anyhow::Error| Failed::from(format!("{error:#}")))
            })
        })
    });
    Ok(libtest_mimic::run(&arguments, trials.collect()).exit_code())
}
