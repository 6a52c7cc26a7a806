//! One node as a machine: it is switched on, runs programs, and is switched off. It has namespaces for network, mounts,
//! processes, IPC and its name, a cgroup in each hierarchy, and a folder as its disk, which outlives a restart.
//!
//! The end of its process 1 ends every process of the node, and with them go their mounts and the namespaces of their
//! pods: nothing has to be taken apart. Knows no program of Kubernetes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kube_lane_lab::{Host, Process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cgroup::Cgroups;

/// How long the kernel and a shell may take for their part on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A node that can be switched off and on.
#[derive(Debug)]
pub struct Machine {
    host: Host,
    disk: PathBuf,
    logs: PathBuf,
    cgroups: Cgroups,
    running: Option<Running>,
}

/// What ends when the machine is switched off.
#[derive(Debug)]
struct Running {
    init: Process,
    /// Process 1 of the node, by its number outside.
    pid: u32,
    services: Vec<(String, Process)>,
}

impl Machine {
    /// A machine in the network namespace of `host`, which is off. Its disk and its logs are in `folder`.
    ///
    /// # Errors
    /// When the folders cannot be made.
    pub fn new(host: &Host, folder: &Path) -> Result<Self> {
        let (disk, logs) = (folder.join(host.name()), folder.join("logs").join(host.name()));
        for dir in [&disk, &logs] {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let cgroups = Cgroups::new(host.netns());
        Ok(Self { host: host.clone(), disk, logs, cgroups, running: None })
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        self.host.name()
    }

    /// The host whose network it has.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The name of its cgroup below the root of every hierarchy.
    pub fn cgroup(&self) -> &str {
        self.cgroups.name()
    }

    /// Its cgroup of version 2.
    ///
    /// # Errors
    /// When no such hierarchy is mounted.
    pub(super) fn cgroup_v2(&self) -> Result<PathBuf> {
        self.cgroups.v2()
    }

    /// The folder that is its disk.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// The network namespace of a container.
    ///
    /// # Errors
    /// When the container does not run.
    pub fn netns_of(&self, container: &str) -> Result<PathBuf> {
        self.path(&format!("/proc/{}/ns/net", self.pid_of(container)?))
    }

    /// The first process of a container, by its number on the node.
    ///
    /// # Errors
    /// When the container does not run.
    pub fn pid_of(&self, container: &str) -> Result<u32> {
        let tasks = self.run(&["ctr", "--namespace", "k8s.io", "tasks", "list"])?;
        let task = tasks.lines().find(|line| line.starts_with(container));
        let pid = task.and_then(|line| line.split_whitespace().nth(1));
        Ok(pid.with_context(|| format!("container {container} does not run"))?.parse()?)
    }

    /// Where the logs of its programs are.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// Switches it on.
    ///
    /// # Errors
    /// When the kernel refuses a namespace, a mount or a cgroup; what the boot script says is in the message.
    pub fn boot(&mut self) -> Result<()> {
        ensure!(self.running.is_none(), "{} is on already", self.name());
        self.cgroups.create()?;
        let booted = self.disk.join("booted");
        if booted.exists() {
            fs::remove_file(&booted)?;
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/nodes/boot.sh");
        let mut init = Command::new("unshare");
        init.args(["--fork", "--pid", "--kill-child", "--mount", "--uts", "--ipc", "sh"]);
        init.arg(script).arg(&self.disk).arg(self.name());
        let log = self.logs.join("boot.log");
        let mut init = self.host.spawn_logged(init, &log)?;
        let deadline = Instant::now() + LIMIT;
        while !booted.exists() {
            let said = || fs::read_to_string(&log).unwrap_or_default();
            if let Some(status) = init.try_wait()? {
                bail!("{} did not boot: {status}\n{}", self.name(), said());
            }
            ensure!(Instant::now() < deadline, "{} did not boot in {LIMIT:?}\n{}", self.name(), said());
            sleep(Duration::from_millis(20));
        }
        let children = format!("/proc/{0}/task/{0}/children", init.id());
        let children = fs::read_to_string(&children).with_context(|| format!("cannot read {children}"))?;
        let pid = children.trim().parse().context("process 1 of the node is gone")?;
        self.running = Some(Running { init, pid, services: vec![] });
        Ok(())
    }

    /// Switches it off as a power failure does: nothing is told before. Its network keeps what the kernel holds there.
    ///
    /// # Errors
    /// When the kernel does not end its processes.
    pub fn power_off(&mut self) -> Result<()> {
        let Some(mut running) = self.running.take() else { return Ok(()) };
        // It fails only where it has ended already.
        let _ = kill(Pid::from_raw(running.pid.cast_signed()), Signal::SIGKILL);
        // The kernel reports the end of process 1 once all others of its namespace have gone.
        let ended = running.init.wait_timeout(LIMIT)?;
        ensure!(ended.is_some(), "the processes of {} have not ended in {LIMIT:?}", self.name());
        drop(running);
        self.cgroups.remove();
        Ok(())
    }

    /// `program` in all namespaces of the node but the network's, where [`run`](Self::run) and
    /// [`start`](Self::start) put it.
    fn command(&self, program: &[&str]) -> Result<Command> {
        let running = self.running.as_ref().with_context(|| format!("{} is off", self.name()))?;
        let mut command = Command::new("nsenter");
        command.args(["--target", &running.pid.to_string(), "--mount", "--uts", "--ipc", "--pid", "--"]);
        command.args(program).env("PATH", super::runtime::path());
        Ok(command)
    }

    /// Runs a program on the node and returns what it printed.
    ///
    /// # Errors
    /// With what it says, when it fails.
    pub fn run(&self, program: &[&str]) -> Result<String> {
        let mut command = self.command(program)?;
        let output = self.host.run(move || command.output())?.context("cannot start nsenter")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program:?} on {}: {}\n{stderr}", self.name(), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts a program on the node that runs until it ends or the node is switched off. Its log has its name.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&mut self, name: &str, program: &[&str]) -> Result<()> {
        let process = self.host.spawn_logged(self.command(program)?, &self.log(name))?;
        let running = self.running.as_mut().context("off")?;
        running.services.push((name.to_owned(), process));
        Ok(())
    }

    /// Fails with the end of its log where a program that was started under this name has ended.
    ///
    /// # Errors
    /// When it has ended, or was never started.
    pub fn ensure_running(&mut self, name: &str) -> Result<()> {
        let log = self.log(name);
        let running = self.running.as_mut().context("the node is off")?;
        let service = running.services.iter_mut().find(|(service, _)| service == name);
        let (_, process) = service.with_context(|| format!("no {name} was started"))?;
        if let Some(status) = process.try_wait()? {
            let log = fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            bail!("{name} ended: {status}\n{}", lines[lines.len().saturating_sub(20)..].join("\n"));
        }
        Ok(())
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// Writes a file on the node: an absolute path, as its programs see it.
    ///
    /// # Errors
    /// When the node is off, or the file cannot be written.
    pub fn write(&self, path: &str, content: &str) -> Result<()> {
        let path = self.path(path)?;
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        // Programs that watch the folder see the whole file, or none: they pass over hidden ones.
        let name = path.file_name().and_then(|name| name.to_str()).context("a path without a name")?;
        let new = path.with_file_name(format!(".{name}.new"));
        fs::write(&new, content).with_context(|| format!("cannot write {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Where a path of the node is for programs outside, while the node is on.
    ///
    /// # Errors
    /// When it is off.
    pub fn path(&self, path: &str) -> Result<PathBuf> {
        let running = self.running.as_ref().with_context(|| format!("{} is off", self.name()))?;
        Ok(Path::new(&format!("/proc/{}/root", running.pid)).join(path.trim_start_matches('/')))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nobody is left to tell; the sweep of the next start finds what stays.
        let _ = self.power_off();
    }
}
