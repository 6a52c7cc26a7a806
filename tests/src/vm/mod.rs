//! Virtual machines that boot one of Debian's kernels under QEMU. The test program is both sides: here it boots the
//! kernel, whose initramfs has this program as `/init`, where it runs the scenarios and says how each ended.
//!
//! Owns QEMU's process, the form of the initramfs, and the protocol between the sides. Knows scenarios by name only.

mod guest;
mod initramfs;
mod machine;

use anyhow::Result;

pub use self::guest::{Scenario, mount_all, run};
pub use self::initramfs::{Archive, find};
pub use self::machine::{OnDemand, Plan};

/// Precedes the output of a scenario on the console, with its name.
const MARK: &str = "=== scenario ";
/// Begins the line that says how a scenario ended: its name, a blank, `ok` or `FAILED`.
const RESULT: &str = "scenario ";

/// Writes what the initramfs of a machine holds beside the kernel's modules.
pub type Fill = fn(&mut Archive) -> Result<()>;
