//! A virtual machine that boots a kernel with an initramfs, and what its guest says about the scenarios.
//!
//! Owns QEMU's process and a folder with the initramfs and what the guest writes.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::{Archive, Fill, MARK, RESULT};
use crate::process::Process;

/// What the guest's serial ports are written to.
const CONSOLE: &str = "console";
const RESULTS: &str = "results";
/// Lines of the console that a failure shows.
const TAIL_LINES: usize = 80;

/// Software emulation, so that it is the same on every machine. One processor: where the kernel patches its code while
/// another one runs it, emulation may trip over it.
const QEMU: &str = "-accel tcg -smp 1 -nodefaults -no-reboot -display none";
/// What the kernel is told. One that panics ends the machine, too; mitigations guard nothing here, and are slow in
/// emulation. What the kernel does not know is `/init`'s environment.
const KERNEL: &str = "loglevel=5 panic=-1 mitigations=off PATH=/usr/sbin:/usr/bin";

/// An emulated machine.
#[derive(Debug)]
struct Hardware {
    qemu: &'static str,
    machine: &'static str,
    /// The kernel's name of the first serial port.
    console: &'static str,
    /// How QEMU adds the second one.
    second: &'static [&'static str],
    /// Whether `/init` is this program, built for it.
    runs_this_program: bool,
}

/// One that is x86-64.
const PC: Hardware = Hardware {
    qemu: "qemu-system-x86_64",
    machine: "-machine pc -cpu qemu64",
    console: "ttyS0",
    second: &["-serial", "chardev:results"],
    runs_this_program: true,
};

/// One that is arm64. Its only serial port by itself has another driver, so the one that is added is `ttyS0`.
const VIRT: Hardware = Hardware {
    qemu: "qemu-system-aarch64",
    machine: "-machine virt -cpu cortex-a72",
    console: "ttyAMA0",
    second: &["-device", "pci-serial,chardev=results"],
    runs_this_program: false,
};

/// How a machine is made.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The kernel, as `cargo xtask setup` names it.
    pub kernel: &'static str,
    /// MiB.
    pub memory: u32,
    /// Parts of `lib/modules/<release>/kernel` beside those for networks.
    pub modules: &'static [&'static str],
    /// What the kernel and `/init` are told besides.
    pub more: &'static str,
    /// A guest that ends no scenario for so long hangs.
    pub silence: Duration,
    /// What the initramfs holds besides.
    pub fill: Fill,
}

/// A machine that is booted when its first scenario is asked for: a list of names needs none.
#[derive(Debug)]
pub struct OnDemand {
    plan: Plan,
    hardware: &'static Hardware,
    machine: Mutex<Option<Machine>>,
}

impl OnDemand {
    /// A machine that is not booted yet.
    pub fn new(plan: Plan) -> Self {
        Self { plan, hardware: &PC, machine: Mutex::default() }
    }

    /// The same, but one that is arm64. The plan says what its `/init` is, which writes to `/dev/ttyS0` how each scenario
    /// ended.
    pub fn arm64(plan: Plan) -> Self {
        Self { plan, hardware: &VIRT, machine: Mutex::default() }
    }

    /// Waits for the end of the scenario of this name, and returns what it wrote to the console.
    ///
    /// # Errors
    /// When it failed, or the guest cannot be booted, hangs or is gone; with the end of the console.
    pub fn outcome(&self, name: &str) -> Result<String> {
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        let machine = match &mut *machine {
            Some(machine) => machine,
            none => none.insert(Machine::boot(&self.plan, self.hardware)?),
        };
        machine.outcome(name, self.plan.silence)
    }
}

/// A running machine; killed when dropped.
#[derive(Debug)]
struct Machine {
    // Dropped in this order: it writes there.
    qemu: Process,
    dir: TempDir,
}

impl Machine {
    fn boot(plan: &Plan, hardware: &Hardware) -> Result<Self> {
        let system = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/vm").join(plan.kernel);
        let kernel = kernel(&system)?;
        let dir = tempfile::tempdir()?;
        let initrd = dir.path().join("initramfs");
        let mut archive = Archive::create(&initrd)?;
        if hardware.runs_this_program {
            archive.program(&env::current_exe()?, Path::new("/init"))?;
        }
        archive.modules(&system, plan.modules)?;
        (plan.fill)(&mut archive)?;
        archive.finish()?;

        let mut qemu = Command::new(hardware.qemu);
        qemu.args(hardware.machine.split(' ')).args(QEMU.split(' ')).args(["-m", &plan.memory.to_string()]);
        qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        qemu.args(["-append", &format!("console={} {KERNEL} {}", hardware.console, plan.more)]);
        for port in [CONSOLE, RESULTS] {
            let file = dir.path().join(port);
            qemu.arg("-chardev").arg(format!("file,id={port},path={}", file.display()));
        }
        qemu.args(["-serial", &format!("chardev:{CONSOLE}")]).args(hardware.second);
        Ok(Self { qemu: Process::spawn(qemu, &dir.path().join("log"), None)?, dir })
    }

    fn outcome(&mut self, name: &str, silence: Duration) -> Result<String> {
        let (mut heard, mut since) = (0, Instant::now());
        loop {
            // Asked first: what it said last counts.
            let ended = self.qemu.try_wait()?;
            let results = self.read(RESULTS);
            match outcome_in(&results, name) {
                Some("ok") => return Ok(self.output_of(name)),
                Some(_) => bail!("{}", self.output_of(name)),
                None => {}
            }
            if let Some(status) = ended {
                let log = self.qemu.log_tail();
                bail!("the machine ended first: {status}\n{log}\n{}", self.output_of(name));
            }
            if results.len() != heard {
                (heard, since) = (results.len(), Instant::now());
            } else if since.elapsed() > silence {
                // Whoever asks for the next one need not wait as long.
                self.qemu.kill();
                bail!("the guest hangs: nothing for {silence:?}\n{}", self.output_of(name));
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// The end of what a scenario wrote to the console, or of all where it never began.
    fn output_of(&self, name: &str) -> String {
        let console = self.read(CONSOLE);
        let mark = format!("{MARK}{name}");
        let of_it = |line: &&str| *line == mark || !line.starts_with(MARK);
        let mut lines: Vec<_> = console.lines().skip_while(|line| *line != mark).take_while(of_it).collect();
        if lines.is_empty() {
            lines = console.lines().collect();
        }
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    /// What the guest has written to a serial port.
    fn read(&self, port: &str) -> String {
        let bytes = fs::read(self.dir.path().join(port)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// How a scenario ended, where a complete line says so.
fn outcome_in<'a>(results: &'a str, name: &str) -> Option<&'a str> {
    let (complete, _) = results.rsplit_once('\n')?;
    // The port ends lines as terminals do.
    let mut lines = complete.lines().map(str::trim_end);
    lines.find_map(|line| line.strip_prefix(RESULT)?.strip_prefix(name)?.strip_prefix(' '))
}

/// The image of a kernel that is unpacked at `system`.
fn kernel(system: &Path) -> Result<PathBuf> {
    let boot = system.join("boot");
    let entries = fs::read_dir(&boot)
        .with_context(|| format!("no {}: `cargo xtask setup` fetches it", boot.display()))?;
    let mut images = entries.flatten().map(|entry| entry.path());
    let image = images
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")));
    image.with_context(|| format!("no vmlinuz in {}", boot.display()))
}
