//! `kube-lane status`: asks the agent of this node what it has programmed.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;

use super::Output;
use super::instance;
use crate::causes::with_causes;
use crate::config::SocketLb;
use crate::dataplane::nftables::{self, Marks};
use crate::dataplane::socket::{self, Presence};
use crate::status::{Head, Request};

/// A commit of very many Services may be under way.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Args, Debug)]
pub(super) struct StatusFlags {
    /// Tell of these Services, too
    #[arg(value_name = "NAMESPACE/NAME")]
    services: Vec<String>,
    /// Tell of every Service
    #[arg(long, conflicts_with = "services")]
    all: bool,
    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub(super) fn run(flags: &StatusFlags) -> anyhow::Result<ExitCode> {
    if let Some(odd) =
        flags.services.iter().find(|name| name.split('/').filter(|part| !part.is_empty()).count() != 2)
    {
        bail!("{odd:?} names no Service: write namespace/name");
    }
    let Some(mut stream) = instance::agent().context("cannot ask the agent")? else {
        bail!(nobody());
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = Request {
        services: flags.services.clone(),
        all: flags.all,
        json: matches!(flags.output, Output::Json),
        probe: None,
    };
    writeln!(stream, "{}", serde_json::to_string(&request)?).context("cannot ask the agent")?;
    stream.shutdown(Shutdown::Write)?;

    let mut answer = BufReader::new(stream);
    let mut head = String::new();
    answer.read_line(&mut head).context("the agent does not answer")?;
    let head: Head =
        serde_json::from_str(&head).context("the agent does not answer: is it of another version?")?;
    let mut out = io::stdout().lock();
    let mut piece = [0; 1 << 16];
    loop {
        match answer.read(&mut piece).context("the agent's answer broke off")? {
            0 => break,
            length => out.write_all(&piece[..length])?,
        }
    }
    for name in &head.unknown {
        writeln!(io::stderr(), "the agent knows no Service {name}")?;
    }
    Ok(if head.unknown.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What there is to say where no agent runs.
fn nobody() -> String {
    let mark = Marks::open().and_then(|mut marks| marks.read()).ok().flatten();
    let is_marked = mark.is_some();
    let (bpf_root, root) = match &mark {
        None => {
            let usual = SocketLb::default().bpf_root;
            (Some(usual.clone()), usual.display().to_string())
        }
        Some(mark) => {
            let here = mark.bpf_root();
            let words = here.as_ref().map_or_else(|| mark.to_string(), |root| root.display().to_string());
            (here, words)
        }
    };
    let tables = nftables::is_installed().map_err(|error| with_causes(&error));
    let programs = bpf_root.map_or(Ok(Presence::Unseen), |root| socket::presence(&root));
    let programs = programs.map_err(|error| with_causes(&error));
    let (tables, programs) = match (tables, programs) {
        (Ok(tables), Ok(programs)) => (tables, programs),
        (Err(error), _) | (_, Err(error)) => {
            return format!("no kube-lane runs here; what one may have left cannot be told: {error}");
        }
    };
    let programs = match programs {
        Presence::Pinned => Some(format!("its eBPF programs, pinned in {root}")),
        Presence::Absent if is_marked => {
            Some(format!("the mark of eBPF programs that were pinned in {root} and have gone"))
        }
        Presence::Unseen if is_marked => Some(format!(
            "perhaps its eBPF programs, which it pinned in {root}: that is on no BPF file system that is mounted here"
        )),
        Presence::Absent | Presence::Unseen => None,
    };
    let tables = tables.then(|| "its nftables tables".to_owned());
    let left: Vec<_> = tables.into_iter().chain(programs).collect();
    if left.is_empty() {
        return format!(
            "no kube-lane runs here, and nothing of it is in the kernel: no nftables tables in this network namespace, no \
             eBPF programs pinned in {root}. `kube-lane check` tells whether it can run on this node"
        );
    }
    format!(
        "no kube-lane runs here (in this network namespace, as this user); what it left is in force and follows no change: \
         {}. Start it again, or remove that with `kube-lane cleanup`",
        left.join(", and ")
    )
}
