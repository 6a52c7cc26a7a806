//! Plans as text, for people and for golden files.
//!
//! Owns the `Display` forms: one fact a line, indented, so that two plans compare well with `diff`. Nothing parses
//! them; programs read the JSON form, which is `serde`'s of the same types.

use std::fmt::{self, Display, Formatter};

use super::input::Family;
use super::plan::{
    Backend, Frontend, FrontendAddress, FrontendKind, HealthCheck, NodePlan, Plan, PortPlan, Verdict,
};

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "service {}", self.service)?;
        if let Some(HealthCheck { port, v4_endpoints, v6_endpoints }) = self.health_check {
            for (family, count) in [(Family::V4, v4_endpoints), (Family::V6, v6_endpoints)] {
                count.map_or(Ok(()), |count| writeln!(f, "  health check {port} {family}: {count} local"))?;
            }
        }
        for port in &self.ports {
            port.fmt(f)?;
        }
        self.warnings.iter().try_for_each(|warning| writeln!(f, "  warning: {warning}"))
    }
}

impl Display for PortPlan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "  port")?;
        if !self.name.is_empty() {
            write!(f, " {}", self.name)?;
        }
        writeln!(f, " {} {}", self.protocol, self.family)?;
        for frontend in &self.frontends {
            writeln!(f, "    {frontend}")?;
        }
        for range in self.source_ranges.iter().flat_map(|ranges| ranges.iter()) {
            writeln!(f, "    LoadBalancer from {range}")?;
        }
        if let Some(seconds) = self.affinity {
            writeln!(f, "    affinity {seconds} s")?;
        }
        self.backends.iter().try_for_each(|backend| writeln!(f, "    to {backend}"))?;
        let local = |backend: &Backend| writeln!(f, "    locally to {}", backend.address.socket());
        self.local_backends.iter().try_for_each(local)?;
        self.draining.iter().try_for_each(|address| writeln!(f, "    draining {}", address.socket()))
    }
}

impl Display for Frontend {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.at)?;
        match self.verdict {
            Verdict::Cluster => Ok(()),
            Verdict::Local => f.write_str(" local"),
            Verdict::Reject => f.write_str(" reject"),
        }
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
        write!(f, "{}{}", self.address.socket(), if self.local { " local" } else { "" })
    }
}

impl Display for NodePlan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "node")?;
        for address in &self.nodeport_addresses {
            writeln!(f, "  NodePorts on {address}")?;
        }
        self.pod_cidrs.iter().try_for_each(|cidr| writeln!(f, "  pods in {cidr}"))?;
        self.service_cidrs.iter().try_for_each(|cidr| writeln!(f, "  ServiceCIDR {cidr}"))
    }
}
