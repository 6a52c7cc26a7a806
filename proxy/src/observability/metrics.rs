//! The metric families of the process itself, and the registry that modules add their own to.
//!
//! Names that kube-proxy has keep its name and prefix, so that its dashboards keep working.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::model::input::Family;
use crate::version::{COMMIT, VERSION};

/// The prefix of the families that kube-proxy has too.
pub const KUBE_PROXY: &str = "kubeproxy";

/// The prefix of the families that are ours alone.
pub const KUBE_LANE: &str = "kubelane";

/// kube-proxy's buckets of durations: 1 ms to 16 s, by doubling.
pub fn durations() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// The label of families that count IPv4 and IPv6 apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct IpFamily {
    ip_family: &'static str,
}

impl From<Family> for IpFamily {
    fn from(family: Family) -> Self {
        let ip_family = match family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        Self { ip_family }
    }
}

/// A registry that already holds the process's own families; `mode`: which dataplanes run.
pub fn registry(mode: &'static str) -> Registry {
    let mut registry = Registry::default();
    registry.sub_registry_with_prefix(KUBE_LANE).register(
        "agent",
        "The version and the commit of this agent, and the mode that runs",
        Info::new([("version", VERSION), ("commit", COMMIT), ("mode", mode)]),
    );
    registry.register_collector(Box::new(Process));
    registry
}

/// Reads `/proc/self` whenever metrics are asked for.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // A process that cannot read its own /proc has no such metrics.
        let Ok(process) = procfs::process::Process::myself() else { return Ok(()) };
        let Ok(stat) = process.stat() else { return Ok(()) };
        let ticks = procfs::ticks_per_second() as f64;
        let seconds = ConstCounter::new((stat.utime + stat.stime) as f64 / ticks);
        encode(&mut encoder, "process_cpu", "User and system CPU time", Some(&Unit::Seconds), &seconds)?;
        let resident = ConstGauge::new((stat.rss * procfs::page_size()) as i64);
        encode(&mut encoder, "process_resident_memory", "Resident memory", Some(&Unit::Bytes), &resident)?;
        let virtual_memory = ConstGauge::new(stat.vsize as i64);
        encode(
            &mut encoder,
            "process_virtual_memory",
            "Virtual memory",
            Some(&Unit::Bytes),
            &virtual_memory,
        )?;
        if let Ok(open) = process.fd_count() {
            let open = ConstGauge::new(open as i64);
            encode(&mut encoder, "process_open_fds", "Open file descriptors", None, &open)?;
        }
        if let Ok(boot) = procfs::boot_time_secs() {
            let started = ConstGauge::new(boot as f64 + stat.starttime as f64 / ticks);
            encode(
                &mut encoder,
                "process_start_time",
                "Start, since the epoch",
                Some(&Unit::Seconds),
                &started,
            )?;
        }
        Ok(())
    }
}

fn encode(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    metric: &impl EncodeMetric,
) -> fmt::Result {
    metric.encode(encoder.encode_descriptor(name, help, unit, metric.metric_type())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_reports_itself_under_the_usual_names() {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry("nftables")).unwrap();
        for name in [
            "process_cpu_seconds_total ",
            "process_resident_memory_bytes ",
            "process_virtual_memory_bytes ",
            "process_open_fds ",
            "process_start_time_seconds ",
        ] {
            assert!(text.lines().any(|line| line.starts_with(name)), "{name}: {text}");
        }
    }
}
