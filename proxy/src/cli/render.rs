//! `kube-lane render`: the plan for a folder of manifests, without root and without the API server.
//!
//! The plan goes to standard output, what is wrong with the manifests to standard error and into the exit code.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::bail;
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::{Output, settings};
use crate::config::values::go_bool;
use crate::config::{AnswerFlags, Environment, Mode, Network, NetworkFlags};
use crate::dataplane::socket::lower::Lowering;
use crate::dataplane::socket::write::Found;
use crate::dataplane::{Batch, Inspection};
use crate::model::input::{Change, Event, Origin};
use crate::model::plan::{NodePlan, Plan};
use crate::model::planner::Planner;
use crate::model::render::Annotated;
use crate::source::manifest::{self, Checked};

#[derive(Args, Debug)]
pub(super) struct RenderFlags {
    /// Folder of Services, EndpointSlices and Nodes
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Plan for the node of this name [default: the host name]
    #[arg(long, value_name = "NAME", alias = "hostname-override")]
    node_name: Option<String>,
    #[command(flatten)]
    network: NetworkFlags,
    /// With ebpf, say which layer answers each address, and why
    #[arg(long, value_enum, default_value_t = Mode::Nftables)]
    proxy_mode: Mode,
    #[command(flatten)]
    answer: AnswerFlags,
    /// Masquerade every connection to a cluster IP
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    masquerade_all: Option<bool>,
    /// Form of the plan
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// The JSON form.
#[derive(Serialize)]
struct Rendered<'a> {
    node: Option<&'a NodePlan>,
    services: Vec<Value>,
    problems: Vec<String>,
}

pub(super) fn run(flags: &RenderFlags) -> anyhow::Result<ExitCode> {
    if !flags.folder.is_dir() {
        bail!("{} is not a folder; name one that holds manifests", flags.folder.display());
    }
    let name = flags.node_name.clone().unwrap_or_else(|| Environment::read().hostname).trim().to_lowercase();
    let Checked { events, problems, .. } = manifest::check_dir(&flags.folder, Some(&name));
    let network = flags.network.resolve()?;
    let mut planner = Planner::new(settings::planner(&name, vec![Origin::Static], &network));
    // Nothing is known of that node's interfaces: they are taken to have the addresses of its Node.
    let addresses = events.iter().find_map(|event| match event {
        Event::Source { change: Change::Node(node), .. } => node.as_ref().map(|node| node.addresses.clone()),
        _ => None,
    });
    planner.apply(Event::HostAddresses(addresses.unwrap_or_default()));
    events.into_iter().for_each(|event| planner.apply(event));
    planner.replan();

    let inspect = inspect(flags, &network, &planner);
    let mut out = io::stdout().lock();
    match flags.output {
        Output::Text => {
            for plan in planner.plans() {
                writeln!(out, "{}", Annotated(plan, inspect(plan)))?;
            }
            if let Some(node) = planner.node() {
                write!(out, "{node}")?;
            }
        }
        Output::Json => {
            let rendered = Rendered {
                node: planner.node(),
                services: planner.plans().map(|plan| inspect(plan).annotate(plan)).collect(),
                problems: problems.iter().map(ToString::to_string).collect(),
            };
            serde_json::to_writer_pretty(&mut out, &rendered)?;
            writeln!(out)?;
        }
    }
    if let Some(unknown) = planner.unknown_node() {
        writeln!(io::stderr(), "{unknown}; name a node with --node-name")?;
    }
    for problem in &problems {
        writeln!(io::stderr(), "{problem}")?;
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the layers would say of a Service.
fn inspect(flags: &RenderFlags, network: &Network, planner: &Planner) -> impl Fn(&Plan) -> Inspection {
    let lowering = (flags.proxy_mode == Mode::Ebpf).then(|| {
        let settings = flags.answer.resolve();
        let masquerade_all = flags.masquerade_all.unwrap_or_default();
        let policy = settings::policy(&settings, &network.detector, masquerade_all);
        let sizes = settings::room(&settings).services;
        let (mut lowering, _) = Lowering::adopt(policy, Found::default(), sizes);
        let services = planner.plans().map(|plan| (plan.service.clone(), Some(Arc::clone(plan)))).collect();
        lowering.apply(&Batch { node: planner.node().cloned(), services, sweep: true }, &mut drop);
        lowering
    });
    move |plan| {
        let ports = lowering.as_ref().and_then(|lowering| lowering.service(&plan.service));
        let answers = ports.into_iter().flatten().map(|port| port.answers.into());
        Inspection { answers: answers.collect(), ..Inspection::default() }
    }
}
