//! Results for people: lines while it runs, and README's table.

use std::fmt::Write as _;

use super::rounds::To;
use super::{Measurement, Results, Way};
use crate::bench::report::{duration, mebibytes, surroundings, thousands};

/// Between this and the end of the block README shows the newest results.
pub(super) const BEGIN: &str = "<!-- bench:connect -->";

/// What stands in a column: a way, and whom its clients dial where they do not dial a Service.
const COLUMNS: [(&str, Way, Option<To>); 7] = [
    ("direct, no ruleset", Way::Bare, Some(To::Pod)),
    ("direct, kube-lane's ruleset", Way::Ebpf, Some(To::Pod)),
    ("direct, past the programs", Way::Ebpf, Some(To::PodPastPrograms)),
    ("kube-lane ebpf", Way::Ebpf, None),
    ("kube-lane nftables", Way::Nftables, None),
    ("kube-proxy nftables", Way::KubeProxyNftables, None),
    ("kube-proxy iptables", Way::KubeProxyIptables, None),
];

/// A row: its title, whether it has a figure where a pod is dialled, and the figure.
type Row = (&'static str, fn(&Measurement, Option<To>) -> Option<String>);

const ROWS: [Row; 9] = [
    ("`connect()`, first Service", |one, to| microseconds(one, to.unwrap_or(To::First))),
    ("`connect()`, last Service", |one, to| microseconds(one, to.unwrap_or(To::Last))),
    ("kept connection", |one, to| {
        let shown = to.is_none() || one.way == Way::Bare;
        let gigabits = one.stream.filter(|_| shown)?.bytes_per_second * 8.0 / 1e9;
        Some(format!("{gigabits:.1} Gbit/s"))
    }),
    ("processor time of it", |one, to| {
        let shown = to.is_none() || one.way == Way::Bare;
        let per_mib = one.stream.filter(|_| shown)?.cpu_ns_per_kib * 1024.0;
        Some(format!("{} per MiB", duration(per_mib / 1e6)))
    }),
    ("start → first and last Service answer", |one, to| {
        to.is_none().then(|| one.start_ms.map(duration))?
    }),
    ("of that, into the socket layer's maps", |one, to| {
        let socket = one.socket.filter(|_| to.is_none())?;
        Some(format!("{}, {} writes", duration(socket.start_ms), thousands(socket.start_writes as usize)))
    }),
    ("endpoint change in these maps", |one, to| {
        let socket = one.socket.filter(|_| to.is_none())?;
        Some(format!("{}, {:.1} writes", duration(socket.change_us / 1e3), socket.change_writes))
    }),
    ("memory of the agent (RSS)", |one, to| {
        to.is_none().then(|| one.rss_bytes.map(|bytes| mebibytes(bytes as f64)))?
    }),
    ("memory of the eBPF maps", |one, to| {
        to.is_none().then(|| one.map_bytes.map(|bytes| mebibytes(bytes as f64)))?
    }),
];

fn microseconds(one: &Measurement, to: To) -> Option<String> {
    let dialled = one.connects.iter().find(|dialled| dialled.to == to)?;
    Some(format!("{:.2} µs", dialled.best_us))
}

/// What one measurement says in a line.
pub(super) fn line(one: &Measurement) -> String {
    let cell = |(title, figure): &Row| Some(format!("{title} {}", figure(one, None)?));
    let direct = one.connects.iter().filter(|dialled| matches!(dialled.to, To::Pod | To::PodPastPrograms));
    let direct = direct.map(|dialled| format!("{:?} {:.2} µs", dialled.to, dialled.best_us));
    let cells: Vec<_> = direct.chain(ROWS.iter().filter_map(cell)).collect();
    format!("{:?}: {}", one.way, cells.join(", "))
}

/// The table, and where its figures come from.
pub(super) fn markdown(results: &Results) -> String {
    let shown = |way| results.measurements.iter().any(|one| one.way == way);
    let columns: Vec<_> = COLUMNS.into_iter().filter(|(_, way, _)| shown(*way)).collect();
    let mut text = format!("| Services × {} endpoints | |", results.endpoints_per_service);
    for (title, ..) in &columns {
        let _ = write!(text, " {title} |");
    }
    let _ = writeln!(text, "\n|---:|---|{}", "---:|".repeat(columns.len()));
    let mut sizes: Vec<_> = results.measurements.iter().map(|one| one.services).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for size in sizes {
        for (number, (title, figure)) in ROWS.iter().enumerate() {
            let first = if number == 0 { thousands(size) } else { String::new() };
            let _ = write!(text, "| {first} | {title} |");
            for (_, way, to) in &columns {
                let one = results.of(*way, size);
                let cell = match one.and_then(|one| figure(one, *to)) {
                    Some(cell) => cell,
                    None if number < 2 && one.is_some_and(|one| one.error.is_some()) => {
                        "not in time".to_owned()
                    }
                    None => "–".to_owned(),
                };
                let _ = write!(text, " {cell} |");
            }
            text.push('\n');
        }
    }
    let _ = writeln!(
        text,
        "\n{} Each figure of `connect()` is the least of {} rounds' medians of {} connections; the rounds of all \
         columns alternate. A start that took longer than {} s was given up.",
        surroundings(results.day(), &results.commit, &results.machine, &results.versions),
        results.rounds,
        results.dials_per_round,
        results.limit_seconds,
    );
    text
}
