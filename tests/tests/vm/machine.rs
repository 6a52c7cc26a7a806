//! A virtual machine that boots a kernel with our initramfs, and what its guest says about the scenarios.
//!
//! Owns QEMU's process and the folder of initramfs and console. Knows scenarios by name only.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::{guest, initramfs};

/// A guest that says nothing for so long hangs. Emulated on a busy machine, the slowest scenario takes a tenth of it.
const SILENCE: Duration = Duration::from_secs(300);
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
    qemu: Child,
    results: Receiver<String>,
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
        let console = format!("file:{}", console(dir.path()).display());
        qemu.args(["-append", &append, "-serial", &console, "-serial", "stdio"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut qemu = qemu.spawn().context("cannot start qemu-system-x86_64")?;
        let (sender, results) = channel();
        if let Some(stdout) = qemu.stdout.take() {
            std::thread::spawn(move || {
                let lines = BufReader::new(stdout).lines().map_while(Result::ok);
                // Until nobody listens any more.
                lines.map(|line| sender.send(line)).take_while(Result::is_ok).for_each(drop);
            });
        }
        Ok(Self { qemu, results, dir })
    }

    /// How the scenario of this name ended; waits for it.
    ///
    /// # Errors
    /// When it failed, or the guest hangs or is gone; with the end of the console.
    pub(crate) fn outcome(&mut self, name: &str) -> Result<()> {
        loop {
            let line = match self.results.recv_timeout(SILENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    // Whoever asks for the next one need not wait as long.
                    self.end();
                    bail!("the guest hangs: nothing for {SILENCE:?}\n{}", self.console(name));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the machine ended before the scenario did\n{}", self.console(name));
                }
            };
            match line.trim_end().strip_prefix("scenario ").and_then(|rest| rest.split_once(' ')) {
                Some((of, "ok")) if of == name => return Ok(()),
                Some((of, _)) if of == name => bail!("{}", self.console(name)),
                // Of one that was not asked for.
                _ => {}
            }
        }
    }

    /// The end of what a scenario wrote, or of all where it never began.
    fn console(&self, name: &str) -> String {
        let console = fs::read(console(self.dir.path())).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let mark = format!("{}{name}", guest::MARK);
        let own = console.lines().skip_while(|line| line.trim_end() != mark);
        let mut lines: Vec<_> =
            own.take_while(|line| line.trim_end() == mark || !line.starts_with(guest::MARK)).collect();
        if lines.is_empty() {
            lines = console.lines().collect();
        }
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    fn end(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

fn console(dir: &Path) -> PathBuf {
    dir.join("console")
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
