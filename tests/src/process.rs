//! Programs that run beside a test: in a network namespace if asked, logging to a file, and never outliving
//! the process that started them. Knows no program in particular.

use std::fs::File;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::{LazyLock, mpsc};
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Lines of a log that errors show.
const TAIL_LINES: usize = 20;

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output in `log` (appended to), in the network namespace `netns` (a path such
    /// as `/run/netns/a`) or in the caller's.
    ///
    /// # Errors
    /// When the log or the namespace cannot be opened, or the program cannot be started.
    pub fn spawn(mut command: Command, log: &Path, netns: Option<&Path>) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let output = File::options().append(true).create(true).open(log)?;
        command.stdin(std::process::Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let netns = netns.map(open_netns).transpose()?;
        let before_exec = move || {
            if let Some(netns) = &netns {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
            }
            Ok(set_pdeathsig(Signal::SIGKILL)?)
        };
        // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
        unsafe { command.pre_exec(before_exec) };
        let child = spawn_from_lasting_thread(command).with_context(|| format!("cannot start {program}"))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Sends `signal` to it.
    ///
    /// # Errors
    /// When it has ended and was waited for.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = i32::try_from(self.id())?;
        Ok(kill(Pid::from_raw(id), signal)?)
    }

    /// Kills it (SIGKILL) and waits for its end.
    pub fn kill(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The last lines that it wrote.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs `task` on a thread of its own in the network namespace `netns`, or in the caller's.
///
/// # Errors
/// Those of `task`, and when the namespace cannot be entered.
pub fn in_netns<T: Send>(netns: Option<&Path>, task: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let netns = netns.map(open_netns).transpose()?;
    let on_thread = move || {
        if let Some(netns) = netns {
            setns(netns, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
        }
        task()
    };
    thread::scope(|scope| scope.spawn(on_thread).join()).map_err(|_| anyhow!("panicked"))?
}

/// `N` TCP ports of `address` that were free a moment ago.
///
/// # Errors
/// When `address` cannot be bound in `netns`.
pub fn free_ports<const N: usize>(netns: Option<&Path>, address: IpAddr) -> Result<[u16; N]> {
    in_netns(netns, || {
        let mut ports = [0; N];
        // All are held until the last is found, so that no two are the same.
        let mut held = Vec::with_capacity(N);
        for port in &mut ports {
            let listener =
                TcpListener::bind((address, 0)).with_context(|| format!("cannot bind {address}"))?;
            *port = listener.local_addr()?.port();
            held.push(listener);
        }
        Ok(ports)
    })
}

fn open_netns(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("no network namespace {}", path.display()))
}

type Order = (Command, mpsc::SyncSender<io::Result<Child>>);

/// Starts a program from a thread that lasts as long as this process: "parent death" in `PR_SET_PDEATHSIG`
/// is the end of the thread that forked, and test threads end before what they share.
fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    static SPAWNER: LazyLock<mpsc::Sender<Order>> = LazyLock::new(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                // Nobody waits any more if this fails.
                let _ = reply.send(command.spawn());
            }
        });
        orders
    });
    let gone = || io::Error::other("the thread that starts programs is gone");
    let (reply, answer) = mpsc::sync_channel(1);
    SPAWNER.send((command, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_program_outlives_the_thread_that_asked_for_it_and_dies_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let start = || {
            let mut shell = Command::new("sh");
            shell.args(["-c", "echo started; exec sleep 60"]);
            Process::spawn(shell, &log, None).unwrap()
        };
        let mut process = thread::scope(|scope| scope.spawn(start).join().unwrap());
        while process.log_tail() != "started" {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(process.try_wait().unwrap(), None);
        let id = Pid::from_raw(i32::try_from(process.id()).unwrap());
        drop(process);
        assert!(kill(id, None).is_err());
    }

    #[test]
    fn free_ports_differ() {
        let [one, other] = free_ports(None, IpAddr::from([127, 0, 0, 1])).unwrap();
        assert_ne!(one, other);
    }
}
