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
use serde_json::{Value, json};

use super::{Output, settings};
use crate::config::{Config, Environment, Mode, PlanFlags, Resolved};
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
    #[command(flatten)]
    plan: PlanFlags,
    /// Form of the plan
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// The JSON form.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Rendered<'a> {
    node: Option<&'a NodePlan>,
    services: Vec<Value>,
    not_served: Vec<Value>,
    problems: Vec<String>,
}

pub(super) fn run(flags: &RenderFlags) -> anyhow::Result<ExitCode> {
    if !flags.folder.is_dir() {
        bail!("{} is not a folder; name one that holds manifests", flags.folder.display());
    }
    let Resolved { config, warnings, .. } = flags.plan.resolve(&Environment::read())?;
    let Checked { events, problems, not_served } =
        manifest::check_dir(&flags.folder, Some(&config.node_name));
    let mut planner = Planner::new(settings::planner(&config, vec![Origin::Static]));
    // Nothing is known of that node's interfaces: they are taken to have the addresses of its Node.
    let addresses = events.iter().find_map(|event| match event {
        Event::Source { change: Change::Node(node), .. } => node.as_ref().map(|node| node.addresses.clone()),
        _ => None,
    });
    planner.apply(Event::HostAddresses(addresses.unwrap_or_default()));
    events.into_iter().for_each(|event| planner.apply(event));
    planner.replan();

    let inspect = inspect(&config, &planner);
    let mut out = io::stdout().lock();
    match flags.output {
        Output::Text => {
            for plan in planner.plans() {
                writeln!(out, "{}", Annotated(plan, inspect(plan)))?;
            }
            for (service, why) in &not_served {
                writeln!(out, "service {service}\n  nothing to program: {why}\n")?;
            }
            if let Some(node) = planner.node() {
                write!(out, "{node}")?;
            }
        }
        Output::Json => {
            let rendered = Rendered {
                node: planner.node(),
                services: planner.plans().map(|plan| inspect(plan).annotate(plan)).collect(),
                not_served: not_served
                    .iter()
                    .map(|(service, why)| json!({ "service": service, "why": why }))
                    .collect(),
                problems: problems.iter().map(ToString::to_string).collect(),
            };
            writeln!(out, "{}", serde_json::to_string_pretty(&rendered)?)?;
        }
    }
    if let Some(unknown) = planner.unknown_node() {
        writeln!(io::stderr(), "{unknown}; name a node with --node-name")?;
    }
    warnings.iter().try_for_each(|warning| writeln!(io::stderr(), "{warning}"))?;
    for problem in &problems {
        writeln!(io::stderr(), "{problem}")?;
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the layers would say of a Service.
fn inspect(config: &Config, planner: &Planner) -> impl Fn(&Plan) -> Inspection {
    let lowering = (config.mode == Mode::Ebpf).then(|| {
        let Config { socket_lb, network, masquerade_all, .. } = config;
        let policy = settings::policy(socket_lb, &network.detector, *masquerade_all);
        let sizes = settings::room(socket_lb).services;
        let (mut lowering, _) = Lowering::adopt(policy, Found::default(), sizes);
        let services = planner.plans().map(|plan| (plan.service.clone(), Some(Arc::clone(plan)))).collect();
        lowering.apply(&Batch { node: planner.node().cloned(), services, sweep: true }, &mut drop);
        lowering
    });
    move |plan| {
        let ports = lowering.as_ref().and_then(|lowering| lowering.service(&plan.service));
        let answers = ports.into_iter().flatten().map(|port| port.answers);
        Inspection { answers: answers.collect(), ..Inspection::default() }
    }
}
