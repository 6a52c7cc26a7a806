//! Results for people: lines while it runs, tables afterwards, and the block of README that shows them.
//!
//! Pure but for README's file. Every ratio is computed from the figures beside it.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::proxy::Proxy;
use super::results::{Machine, Measurement, Results, Versions};

/// Between these README shows the newest results.
const BEGIN: &str = "<!-- bench:sync -->";
/// Where any block of results ends.
const END: &str = "<!-- /bench -->";

/// A row of the table.
struct Row {
    title: &'static str,
    /// `None` where it was not measured, `Err` where that was given up.
    figure: fn(&Measurement) -> Option<Result<f64, ()>>,
    /// How the figure reads.
    unit: fn(f64) -> String,
}

const ROWS: [Row; 5] = [
    Row {
        title: "start → every Service answers",
        figure: |one| (!one.start_ms.is_empty()).then(|| one.start().ok_or(())),
        unit: duration,
    },
    Row {
        title: "endpoint change, p50",
        figure: |one| Some(one.changes.as_ref()?.from_request_ms.map(|all| all.p50).ok_or(())),
        unit: duration,
    },
    Row {
        title: "endpoint change, p99",
        figure: |one| Some(one.changes.as_ref()?.from_request_ms.map(|all| all.p99).ok_or(())),
        unit: duration,
    },
    Row { title: "memory (RSS)", figure: |one| one.rss_bytes.map(|bytes| Ok(bytes as f64)), unit: mebibytes },
    Row { title: "processor time of the start", figure: |one| one.cpu_seconds.map(Ok), unit: processor_time },
];

/// What one measurement says in a line.
pub(super) fn line(measurement: &Measurement, limit: u64) -> String {
    let mut cells: Vec<_> = ROWS
        .iter()
        .filter_map(|row| {
            let figure = (row.figure)(measurement)?;
            Some(format!("{} {}", row.title, bounded(figure, row.unit, limit)))
        })
        .collect();
    cells.extend(measurement.error.clone());
    cells.join(", ")
}

/// The tables, and where the figures come from.
pub(super) fn markdown(results: &Results) -> String {
    [comparison(results), commits(results), origin(results)].join("\n")
}

/// Puts the tables between README's markers.
pub(super) fn write_readme(readme: &Path, results: &Results) -> Result<()> {
    write_block(readme, BEGIN, &markdown(results))
}

/// Puts a text between a marker of README and the end of its block.
pub(super) fn write_block(readme: &Path, begin: &str, block: &str) -> Result<()> {
    let text = fs::read_to_string(readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let text = replace_block(&text, begin, block)
        .with_context(|| format!("{} has no {begin} … {END}", readme.display()))?;
    fs::write(readme, text).with_context(|| format!("cannot write {}", readme.display()))
}

fn replace_block(text: &str, begin: &str, block: &str) -> Option<String> {
    let (before, rest) = text.split_once(begin)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{begin}\n{block}{END}{after}"))
}

/// How many rules a listing of `nft list ruleset` has: lines of chains that are neither hook nor bracket.
pub(super) fn count_rules(listing: &str) -> usize {
    let mut rules = 0;
    let mut in_chain = false;
    for line in listing.lines().map(str::trim) {
        match line {
            "}" => in_chain = false,
            _ if line.starts_with("chain ") => in_chain = true,
            _ if line.is_empty() || line.starts_with("type ") || line.starts_with("comment ") => {}
            _ => rules += usize::from(in_chain),
        }
    }
    rules
}

fn comparison(results: &Results) -> String {
    let shown = |proxy: &Proxy| results.measurements.iter().any(|one| one.proxy == *proxy);
    let proxies: Vec<_> = Proxy::ALL.into_iter().filter(shown).collect();
    let endpoints = results.endpoints_per_service;
    let mut table = format!("| Services × {endpoints} endpoints | |");
    for proxy in &proxies {
        let _ = write!(table, " {proxy} |");
    }
    let _ = writeln!(table, "\n|---:|---|{}", "---:|".repeat(proxies.len()));
    for size in results.sizes() {
        for (number, Row { title, figure, unit }) in ROWS.iter().enumerate() {
            let first = if number == 0 { thousands(size) } else { String::new() };
            let _ = write!(table, "| {first} | {title} |");
            let ours = results.of(Proxy::KubeLane, size).and_then(figure);
            for proxy in &proxies {
                let one = results.of(*proxy, size);
                let cell = match one.and_then(figure) {
                    None if one.is_some_and(|one| one.error.is_some()) => "failed".to_owned(),
                    None => "–".to_owned(),
                    Some(theirs) => {
                        let cell = bounded(theirs, *unit, results.limit_seconds);
                        let ratio =
                            (*proxy != Proxy::KubeLane).then(|| ratio(ours, theirs, results.limit_seconds));
                        format!("{cell}{}", ratio.flatten().unwrap_or_default())
                    }
                };
                let _ = write!(table, " {cell} |");
            }
            table.push('\n');
        }
    }
    table
}

/// What one endpoint change costs kube-lane, by size, and how many rules it has.
fn commits(results: &Results) -> String {
    let mut table = String::new();
    for one in &results.measurements {
        if let Some(commits) = &one.commits {
            let _ = writeln!(
                table,
                "| {} | {:.1} | {:.0} | {:.1} | {} |",
                thousands(one.services),
                commits.messages,
                commits.bytes,
                commits.elements,
                duration(commits.duration_us / 1000.0),
            );
        }
    }
    if !table.is_empty() {
        let head = "| Services | netlink messages | bytes | elements | commit |\n|---:|---:|---:|---:|---:|";
        table = format!("One endpoint change in kube-lane:\n\n{head}\n{table}");
    }
    if !results.rules.is_empty() {
        let rules: Vec<_> = results
            .rules
            .iter()
            .map(|one| format!("{} with {} Services", one.rules, thousands(one.services)))
            .collect();
        let _ = writeln!(table, "\nRules that `nft list ruleset` prints: {}.", rules.join(", "));
    }
    table
}

/// Where figures come from.
pub(super) fn surroundings(day: &str, commit: &str, machine: &Machine, versions: &Versions) -> String {
    format!(
        "Measured on {day} at commit {commit}: {} × {}, {} of memory, Linux {}; {}, {}.",
        machine.cpus,
        machine.cpu,
        mebibytes(machine.memory_bytes as f64),
        machine.kernel,
        versions.kube_lane,
        versions.kube_proxy.replacen("Kubernetes", "kube-proxy", 1),
    )
}

fn origin(results: &Results) -> String {
    format!(
        "{} A start that took longer than {} s was given up. An endpoint change lasts from the PATCH sent until only \
         the new pod answers; kube-proxy's wait between two syncs (1 s by default) was over before each.\n",
        surroundings(&results.day(), &results.commit, &results.machine, &results.versions),
        results.limit_seconds,
    )
}

fn bounded(figure: Result<f64, ()>, unit: fn(f64) -> String, limit: u64) -> String {
    figure.map_or_else(|()| format!("> {limit} s"), unit)
}

/// How many times ours theirs is, where both are known.
fn ratio(ours: Option<Result<f64, ()>>, theirs: Result<f64, ()>, limit: u64) -> Option<String> {
    let ours = ours?.ok().filter(|ours| *ours > 0.0)?;
    let (more, theirs) = theirs.map_or(("> ", limit as f64 * 1000.0), |theirs| ("", theirs));
    let ratio = theirs / ours;
    Some(if ratio < 10.0 { format!(" ({more}{ratio:.1}×)") } else { format!(" ({more}{ratio:.0}×)") })
}

/// Of milliseconds.
pub(super) fn duration(milliseconds: f64) -> String {
    match milliseconds {
        ms if ms < 1.0 => format!("{:.0} µs", ms * 1000.0),
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms if ms < 10_000.0 => format!("{:.2} s", ms / 1000.0),
        ms => format!("{:.0} s", ms / 1000.0),
    }
}

/// Of seconds, which the kernel counts in hundredths.
fn processor_time(seconds: f64) -> String {
    if seconds < 0.01 { "< 10 ms".to_owned() } else { duration(seconds * 1000.0) }
}

pub(super) fn mebibytes(bytes: f64) -> String {
    format!("{:.0} MiB", bytes / f64::from(1 << 20))
}

pub(super) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::{Changes, Rules, Spread};

    fn measurement(proxy: Proxy, start: Option<f64>, change: Option<f64>) -> Measurement {
        let spread = change.map(|ms| Spread { p50: ms, p99: 2.0 * ms, max: 3.0 * ms });
        let changes = Changes { count: 1, from_request_ms: spread, from_response_ms: spread };
        Measurement {
            start_ms: vec![start],
            rss_bytes: Some(20 << 20),
            cpu_seconds: Some(0.25),
            changes: Some(changes),
            ..Measurement::new(proxy, 10_000)
        }
    }

    fn results() -> Results {
        let text = String::new;
        Results {
            date: "2026-01-31T12:00:00Z".to_owned(),
            commit: "abc".to_owned(),
            machine: Machine {
                kernel: text(),
                cpu: text(),
                cpus: 2,
                memory_bytes: 1 << 30,
                nftables_listeners: vec![],
            },
            versions: Versions { kube_lane: text(), kube_proxy: text(), nft: text() },
            limit_seconds: 180,
            endpoints_per_service: 5,
            measurements: vec![
                measurement(Proxy::KubeLane, Some(400.0), Some(4.0)),
                measurement(Proxy::Nftables, Some(12_000.0), Some(3600.0)),
                measurement(Proxy::Iptables, None, None),
            ],
            rules: vec![Rules { services: 10, rules: 93 }],
        }
    }

    #[test]
    fn ratios_are_computed_and_what_was_given_up_says_so() {
        let table = markdown(&results());
        for row in [
            "| Services × 5 endpoints | | kube-lane | kube-proxy nftables | kube-proxy iptables |",
            "| 10,000 | start → every Service answers | 400 ms | 12 s (30×) | > 180 s (> 450×) |",
            "|  | endpoint change, p50 | 4.0 ms | 3.60 s (900×) | > 180 s (> 45000×) |",
            "|  | memory (RSS) | 20 MiB | 20 MiB (1.0×) | 20 MiB (1.0×) |",
            "Rules that `nft list ruleset` prints: 93 with 10 Services.",
        ] {
            assert!(table.contains(row), "{row}\n{table}");
        }
    }

    #[test]
    fn a_proxy_that_failed_is_shown() {
        let mut results = results();
        let failed =
            Measurement { error: Some("it ended".to_owned()), ..Measurement::new(Proxy::Iptables, 10_000) };
        assert_eq!(line(&failed, 180), "it ended");
        results.measurements[2] = failed;
        assert!(markdown(&results).contains("| 12 s (30×) | failed |"));
    }

    #[test]
    fn results_are_read_back_as_written() {
        let dir = tempfile::tempdir().unwrap();
        let results = results();
        results.save(dir.path()).unwrap();
        Results { date: "2025-12-31T12:00:00Z".to_owned(), ..results.clone() }.save(dir.path()).unwrap();
        let newest = Results::newest(dir.path()).unwrap();
        assert_eq!(markdown(&newest), markdown(&results));
    }

    #[test]
    fn readme_changes_between_its_markers_alone() {
        let text = format!("# A\n{BEGIN}\nold\n{END}\nB\n");
        let new = replace_block(&text, BEGIN, "new\n").unwrap();
        assert_eq!(new, format!("# A\n{BEGIN}\nnew\n{END}\nB\n"));
        assert_eq!(replace_block(&new, BEGIN, "new\n").unwrap(), new);
        assert!(replace_block("# A\n", BEGIN, "new\n").is_none());
    }

    #[test]
    fn rules_are_what_chains_hold() {
        let listing = "table ip t {\n\tset s {\n\t\ttypeof ip daddr\n\t\telements = { 10.0.0.1 }\n\t}\n\n\
                       \tchain c {\n\t\ttype nat hook prerouting priority 0; policy accept;\n\
                       \t\tip daddr @s accept\n\t\tdrop\n\t}\n}\n";
        assert_eq!(count_rules(listing), 2);
    }
}
