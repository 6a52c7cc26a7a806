//! `kube-lane probe`: an `exec` probe of the kubelet.
//!
//! Owns the question and the exit code; what is healthy the agent tells. Asks the agent of its own container through the
//! agent's socket, so that no port decides which another program may own. Starts fast: no runtime, no log.

use std::io::{self, BufRead, BufReader, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;

use super::instance;
use crate::status::{Probe, Request, Verdict};

/// How long the agent may take to answer. It never waits for a commit; a machine under load may need a moment.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Args, Debug)]
pub(super) struct ProbeFlags {
    /// What to ask
    #[arg(value_enum)]
    probe: Probe,
}

/// Succeeds silently, so that a kubelet has nothing to store; fails with the reason, which the kubelet puts into an Event.
pub(super) fn run(flags: &ProbeFlags) -> anyhow::Result<ExitCode> {
    match ask(flags.probe)?.failure {
        None => Ok(ExitCode::SUCCESS),
        Some(failure) => bail!(failure),
    }
}

fn ask(probe: Probe) -> anyhow::Result<Verdict> {
    let mut stream = instance::own_agent()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = Request { probe: Some(probe), ..Request::default() };
    writeln!(stream, "{}", serde_json::to_string(&request)?).context("cannot ask the agent")?;
    let mut answer = String::new();
    match BufReader::new(stream).read_line(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            bail!("the agent has not answered for {} s", PATIENCE.as_secs());
        }
        Err(error) => return Err(error).context("cannot read the agent's answer"),
    }
    serde_json::from_str(&answer).context("the agent gives no verdict: is it of another version?")
}
