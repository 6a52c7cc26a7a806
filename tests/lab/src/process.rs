//! Processes: agents that run on a host, in its namespace and cgroup.
//!
//! Owns the child until it has ended: a dropped process is killed and reaped, and one whose maker dies is killed by
//! the kernel.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Doing, Result};
use crate::host::Host;

/// A process on a host.
#[derive(Debug)]
#[must_use = "a process that is dropped is killed"]
pub struct Process {
    name: String,
    child: Child,
}

impl Host {
    /// Starts a command in the host's namespace and cgroup, with the standard streams that the command names.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, mut command: Command) -> Result<Process> {
        let name = command.get_program().to_string_lossy().into_owned();
        // SAFETY: prctl(2) is all the child does before exec, and it is async-signal-safe.
        unsafe { command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(Into::into)) };
        let child = {
            // The namespace's own thread is the parent, so that the death signal comes when the host goes, and not
            // when some shorter-lived thread ends.
            self.namespace().enter(move || command.spawn())?
        };
        let child = child.doing(|| format!("start {name} on {}", self.name()))?;
        Ok(Process { name, child })
    }

    /// The same with standard output and standard error appended to a file.
    ///
    /// # Errors
    /// When the file cannot be opened or the command cannot be started.
    pub fn spawn_logged(&self, mut command: Command, log: &Path) -> Result<Process> {
        let open = || {
            let file = File::options().create(true).append(true).open(log)?;
            Ok::<_, io::Error>((file.try_clone()?, file))
        };
        let (stdout, stderr) = open().doing(|| format!("open {}", log.display()))?;
        command.stdout(stdout).stderr(stderr);
        self.spawn(command)
    }
}

impl Process {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its standard output, where the command pipes it; the first call has it.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Its standard error, where the command pipes it; the first call has it.
    pub fn stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended and was waited for.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal)
            .doing(|| format!("send {signal} to {}", self.name))
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().doing(|| format!("wait for {}", self.name))
    }

    /// Waits until it has ended, at most this long; `None` when it has not.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn wait_timeout(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.try_wait()? {
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                ended => return Ok(ended),
            }
        }
    }

    /// Its resident memory in bytes, now.
    ///
    /// # Errors
    /// When it has ended.
    pub fn rss(&self) -> Result<u64> {
        self.status("VmRSS:")
    }

    /// The most resident memory it has had, in bytes.
    ///
    /// # Errors
    /// When it has ended.
    pub fn peak_rss(&self) -> Result<u64> {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let read = || {
            let status = fs::read_to_string(&path)?;
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            kib.map(|kib| kib * 1024).ok_or(io::Error::from(io::ErrorKind::NotFound))
        };
        read().doing(|| format!("read {field} from {path}"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
