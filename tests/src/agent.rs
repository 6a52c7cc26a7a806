//! The agent on a node of the lab, as a user would run it: the binary with its flags, nothing in-process.
//!
//! Owns starting it and asking it how it is. Never looks at its internals: health, metrics and logs say enough.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kube_lane_lab::{Host, Process};
use serde_json::Value;

/// kube-proxy's ports; every node has its own network namespace.
const HEALTHZ: u16 = 10256;
const METRICS: u16 = 10249;

/// A running agent. Killed when dropped; what it programmed stays, as after a crash.
#[derive(Debug)]
pub struct Agent {
    host: Host,
    process: Process,
    log: PathBuf,
}

/// The agent's binary: `KUBE_LANE_BIN`, which `cargo xtask` sets.
///
/// # Errors
/// When the variable is not set.
pub fn binary() -> Result<PathBuf> {
    let path = env::var_os("KUBE_LANE_BIN").context(
        "KUBE_LANE_BIN is not set: run this through `cargo xtask test`, or name the kube-lane binary in it",
    )?;
    Ok(path.into())
}

/// The arguments that keep the eBPF programs of a host's agent to this host.
pub fn places(host: &Host) -> [String; 2] {
    [
        format!("--cgroup-root={}", host.cgroup().display()),
        format!("--bpf-root={}", host.bpf_root().display()),
    ]
}

/// Runs `kube-lane cleanup` on a host, or another `way` to say it: whether it succeeds, and what it says.
///
/// # Errors
/// When it cannot be started.
pub fn clean_up(host: &Host, way: &str) -> Result<(bool, String)> {
    let mut command = Command::new(binary()?);
    command.arg(way).args(places(host));
    let output = host.run(move || command.output())??;
    Ok((output.status.success(), String::from_utf8(output.stderr)?))
}

impl Agent {
    /// Starts the agent on a host with these arguments; its log is appended to `log`. Returns at once.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(host: &Host, arguments: &[&str], log: &Path) -> Result<Self> {
        Self::start_binary(&binary()?, host, arguments, log)
    }

    /// The same with a given binary.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_binary(binary: &Path, host: &Host, arguments: &[&str], log: &Path) -> Result<Self> {
        let mut command = Command::new(binary);
        command.args(arguments);
        let process = host.spawn_logged(command, log)?;
        Ok(Self { host: host.clone(), process, log: log.to_owned() })
    }

    /// Waits until everything that its sources listed is programmed (`/healthz` says that it is healthy, whether or not
    /// there is a Node to send traffic to).
    ///
    /// # Errors
    /// With the end of its log, when it ends or takes longer than `timeout`.
    pub fn wait_synced(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.process.try_wait()? {
                bail!("the agent ended: {status}\n{}", self.log_tail());
            }
            let healthy = |body: &str| {
                serde_json::from_str::<Value>(body).is_ok_and(|answer| answer["healthy"] == Value::Bool(true))
            };
            if self.healthz().is_ok_and(|(_, body)| healthy(&body)) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "not synced after {timeout:?}\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The value of a metric without labels.
    ///
    /// # Errors
    /// When the agent does not answer or has no such metric.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let (_, body) = self.get(METRICS, "/metrics")?;
        let line = body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse().ok())
            .with_context(|| format!("no metric {name} in\n{body}"))
    }

    /// What `/healthz` says: a status code and a body.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn healthz(&self) -> Result<(u16, String)> {
        self.get(HEALTHZ, "/healthz")
    }

    /// What a server on this port of its host says: a status code and a body.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn get(&self, port: u16, path: &str) -> Result<(u16, String)> {
        self.get_at((Ipv4Addr::LOCALHOST, port).into(), path)
    }

    /// The same at one of the host's addresses.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn get_at(&self, at: SocketAddr, path: &str) -> Result<(u16, String)> {
        let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
        let answer = self.host.run(move || -> std::io::Result<String> {
            let timeout = Duration::from_secs(2);
            let mut stream = TcpStream::connect_timeout(&at, timeout)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })??;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")?;
        Ok((code, body.to_owned()))
    }

    /// What `kube-lane status` prints of it with these arguments: whether it succeeds, and standard output.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn status(&self, arguments: &[&str]) -> Result<(bool, String)> {
        let mut command = Command::new(binary()?);
        command.arg("status").args(arguments);
        let output = self.host.run(move || command.output())??;
        Ok((output.status.success(), String::from_utf8(output.stdout)?))
    }

    /// The process: signals, end, memory.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// All of its log.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}
