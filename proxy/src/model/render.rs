//! Plans as text, for people and for golden files.
//!
//! Owns the `Display` forms: one fact a line, indented, so that two plans compare well with `diff`. Nothing parses
//! them; programs read the JSON form, which is `serde`'s of the same types.

use std::fmt::{self, Display, Formatter};

use super::input::Family;
use super::plan::{
    Backend, Frontend, FrontendAddress, FrontendKind, HealthCheck, NodePlan, Plan, PortPlan, Verdict,
};

/// What is known beside a plan, written where it belongs. Ports and frontends are given by their index.
pub trait Notes {
    /// Beside a frontend.
    fn frontend(&self, _port: usize, _frontend: usize) -> Option<String> {
        None
    }

    /// Beside a backend, once for each set that it is in.
    fn backend(&self, _port: usize, _backend: &Backend) -> Option<String> {
        None
    }

    /// In a line of its own at the end of a port.
    fn port(&self, _port: usize) -> Option<String> {
        None
    }
}

/// No notes.
impl Notes for () {}

impl<N: Notes> Notes for &N {
    fn frontend(&self, port: usize, frontend: usize) -> Option<String> {
        (**self).frontend(port, frontend)
    }

    fn backend(&self, port: usize, backend: &Backend) -> Option<String> {
        (**self).backend(port, backend)
    }

    fn port(&self, port: usize) -> Option<String> {
        (**self).port(port)
    }
}

/// A plan as text, with notes.
#[derive(Clone, Copy, Debug)]
pub struct Annotated<'a, N>(pub &'a Plan, pub N);

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Annotated(self, ()).fmt(f)
    }
}

impl<N: Notes> Display for Annotated<'_, N> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self(plan, notes) = self;
        writeln!(f, "service {}", plan.service)?;
        if let Some(HealthCheck { port, v4_endpoints, v6_endpoints }) = plan.health_check.as_deref() {
            for (family, count) in [(Family::V4, v4_endpoints), (Family::V6, v6_endpoints)] {
                let Some(count) = count else { continue };
                writeln!(f, "  health check {port} {family}: {count} on this node")?;
            }
        }
        plan.ports.iter().enumerate().try_for_each(|(index, port)| fmt_port(index, port, notes, f))?;
        plan.warnings.iter().try_for_each(|warning| writeln!(f, "  warning: {warning}"))
    }
}

fn fmt_port(index: usize, port: &PortPlan, notes: &impl Notes, f: &mut Formatter<'_>) -> fmt::Result {
    let blank = if port.name.is_empty() { "" } else { " " };
    writeln!(f, "  port{blank}{} {} {}", port.name, port.protocol, port.family)?;
    for (at, frontend) in port.frontends.iter().enumerate() {
        let met = met(port, frontend);
        writeln!(f, "    {} {}{met}{}", frontend.kind, frontend.at, Note(notes.frontend(index, at)))?;
    }
    if port.source_ranges.as_ref().is_some_and(|ranges| ranges.is_empty()) {
        writeln!(f, "    LoadBalancer from nowhere")?;
    }
    for range in port.source_ranges.iter().flat_map(|ranges| ranges.iter()) {
        writeln!(f, "    LoadBalancer from {range}")?;
    }
    if let Some(seconds) = port.affinity {
        writeln!(f, "    affinity {seconds} s")?;
    }
    for (policy, backends) in [("", &port.backends), ("policy Local ", &port.local_backends)] {
        for backend in backends {
            writeln!(f, "    {policy}to {backend}{}", Note(notes.backend(index, backend)))?;
        }
    }
    port.draining.iter().try_for_each(|address| writeln!(f, "    draining {}", address.socket()))?;
    notes.port(index).map_or(Ok(()), |note| writeln!(f, "    {note}"))
}

/// What a new connection meets where that is not any backend.
fn met(port: &PortPlan, frontend: &Frontend) -> &'static str {
    match (frontend.verdict, port.local_backends.is_empty(), frontend.kind) {
        (Verdict::Cluster, ..) => "",
        (Verdict::Reject, ..) => " refused: no endpoint",
        (Verdict::Local, false, _) => " policy Local",
        (Verdict::Local, true, FrontendKind::ClusterIp) => " policy Local: dropped, no endpoint on this node",
        // This node's pods and processes get the Cluster set.
        (Verdict::Local, true, _) => " policy Local: dropped from outside, no endpoint on this node",
    }
}

struct Note(Option<String>);

impl Display for Note {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |note| write!(f, " [{note}]"))
    }
}

impl Display for FrontendAddress {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vip(address) => address.socket().fmt(f),
            Self::NodePort(port) => write!(f, "*:{port}"),
        }
    }
}

impl Display for FrontendKind {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterIp => "ClusterIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalIp => "externalIP",
            Self::NodePort => "NodePort",
        })
    }
}

impl Display for Backend {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.address.socket(), if self.local { " on this node" } else { "" })
    }
}

impl Display for NodePlan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "node")?;
        for address in &self.nodeport_addresses {
            writeln!(f, "  NodePorts on {address}")?;
        }
        self.pod_cidrs.iter().try_for_each(|cidr| writeln!(f, "  pods in {cidr}"))?;
        self.service_cidrs.iter().try_for_each(|cidr| writeln!(f, "  ServiceCIDR {cidr}"))?;
        self.warnings.iter().try_for_each(|warning| writeln!(f, "  warning: {warning}"))
    }
}
