//! A virtual machine that boots a kernel with our initramfs, and what its guest says about the scenarios.
//!
//! Owns QEMU's process and a folder with the initramfs and what the guest writes. Knows scenarios by name only.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kube_lane_tests::process::Process;
use tempfile::TempDir;

use crate::{guest, initramfs};

/// A guest that says nothing for so long hangs. Emulated on a busy machine, the slowest scenario takes a tenth of it.
const SILENCE: Duration = Duration::from_secs(300);
/// What the guest's serial ports are written to.
const CONSOLE: &str = "console";
const RESULTS: &str = "results";
/// Lines of the console that a failure shows.
const TAIL_LINES: usize = 80;

/// Software emulation, so that it is the same on every machine. One processor: where the kernel patches its code while
/// another one runs it, emulation may trip over it.
const QEMU: &str = "-machine pc -accel tcg -cpu qemu64 -smp 1 -m 1024 -nodefaults -no-reboot -display none";
/// What the kernel is told. One that panics ends the machine, too; mitigations guard nothing here, and are slow in
/// emulation.
const KERNEL: &str = "console=ttyS0 loglevel=5 panic=-1 mitigations=off";

/// A running machine; killed when dropped.
#[derive(Debug)]
pub(crate) struct Machine {
    // Dropped in this order: it writes there.
    qemu: Process,
    dir: TempDir,
}

impl Machine {
    /// Starts one with the kernel of this series.
    ///
    /// # Errors
    /// When the kernel, QEMU or a program of the initramfs is missing.
    pub(crate) fn boot(series: &str) -> Result<Self> {
        let system = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/vm").join(series);
        let kernel = kernel(&system)?;
        let dir = tempfile::tempdir()?;
        let initrd = dir.path().join("initramfs");
        initramfs::write(&system, &initrd)?;

        // What the kernel does not know is `/init`'s environment.
        let append = format!("{KERNEL} PATH=/usr/sbin:/usr/bin KUBE_LANE_BIN={}", guest::AGENT);
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(QEMU.split(' ')).arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        qemu.args(["-append", &append]);
        for port in [CONSOLE, RESULTS] {
            qemu.arg("-serial").arg(format!("file:{}", dir.path().join(port).display()));
        }
        Ok(Self { qemu: Process::spawn(qemu, &dir.path().join("log"), None)?, dir })
    }

    /// How the scenario of this name ended; waits for it.
    ///
    /// # Errors
    /// When it failed, or the guest hangs or is gone; with the end of the console.
    pub(crate) fn outcome(&mut self, name: &str) -> Result<()> {
        let (mut heard, mut since) = (0, Instant::now());
        loop {
            // Asked first: what it said last counts.
            let ended = self.qemu.try_wait()?;
            let results = self.read(RESULTS);
            match outcome_in(&results, name) {
                Some("ok") => return Ok(()),
                Some(_) => bail!("{}", self.output_of(name)),
                None => {}
            }
            if let Some(status) = ended {
                let log = self.qemu.log_tail();
                bail!("the machine ended first: {status}\n{log}\n{}", self.output_of(name));
            }
            if results.len() != heard {
                (heard, since) = (results.len(), Instant::now());
            } else if since.elapsed() > SILENCE {
                // Whoever asks for the next one need not wait as long.
                self.qemu.kill();
                bail!("the guest hangs: nothing for {SILENCE:?}\n{}", self.output_of(name));
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// The end of what a scenario wrote to the console, or of all where it never began.
    fn output_of(&self, name: &str) -> String {
        let console = self.read(CONSOLE);
        let mark = format!("{}{name}", guest::MARK);
        let of_it = |line: &&str| *line == mark || !line.starts_with(guest::MARK);
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
    lines.find_map(|line| line.strip_prefix(guest::RESULT)?.strip_prefix(name)?.strip_prefix(' '))
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
