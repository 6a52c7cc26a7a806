//! The summary of a run: how many flows each scenario had over each proxy, and where proxies differ.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use super::flows::Done;
use super::format::{Family, Proxy, Scenario};

/// Flows of one scenario over one proxy, by family.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    flows: [usize; 2],
    differing: usize,
    at_socket: usize,
    wrong: usize,
}

/// What a run showed.
#[derive(Debug, Default)]
pub(super) struct Report {
    rows: BTreeMap<String, BTreeMap<Proxy, Count>>,
    /// Scenario, proxy and reason.
    differences: BTreeSet<(String, Proxy, String)>,
    skipped: BTreeSet<(String, Proxy, String)>,
    orders: usize,
    unfinished: BTreeSet<String>,
}

impl Report {
    /// Takes a scenario up, with what it says of proxies that it leaves out.
    pub(super) fn begin(&mut self, scenario: &Scenario) {
        self.rows.entry(scenario.name.clone()).or_default();
        for (proxy, why) in &scenario.skips {
            self.skipped.insert((scenario.name.clone(), *proxy, why.clone()));
        }
    }

    /// Counts flows.
    pub(super) fn add(&mut self, scenario: &Scenario, done: &[Done]) {
        let row = self.rows.entry(scenario.name.clone()).or_default();
        for flow in done {
            let count = row.entry(flow.proxy).or_default();
            count.flows[flow.family.index()] += 1;
            count.differing += usize::from(flow.why.is_some());
            count.at_socket += usize::from(flow.at_socket);
            count.wrong += usize::from(flow.wrong.is_some());
            if let Some(why) = &flow.why {
                let why = why.split_whitespace().collect::<Vec<_>>().join(" ");
                self.differences.insert((scenario.name.clone(), flow.proxy, why));
            }
        }
    }

    /// Marks a scenario that could not be run to its end.
    pub(super) fn give_up(&mut self, scenario: &Scenario) {
        self.unfinished.insert(scenario.name.clone());
    }

    /// Counts flows of a further order, which have no place in the table.
    pub(super) fn add_order(&mut self, done: &[Done]) {
        self.orders += done.len();
    }

    /// The summary as Markdown.
    ///
    /// `others` are the [lines](run_line()) of runs with other releases of kube-proxy.
    pub(super) fn markdown(&self, elapsed: Duration, version: &str, others: &[String]) -> String {
        let mut text = String::from(
            "# Conformance\n\nWhat `cargo xtask test --lane oracle` has shown: every scenario of `tests/scenarios/`, \
             flow by flow, over kube-lane and\nover the real kube-proxy. A cell counts the flows over IPv4 + IPv6; \
             \"n at the socket\" were answered, or refused, by\n`connect()` itself, and all others were not: both is \
             checked. \"n differ\" have an outcome of this proxy's own, which the\nscenario states with its reason \
             (below). Flows with any other outcome than stated are \"wrong\".\n\n",
        );
        let totals = self.rows.values().flat_map(BTreeMap::iter).fold(
            BTreeMap::<Proxy, Count>::new(),
            |mut totals, (proxy, count)| {
                let total = totals.entry(*proxy).or_default();
                for family in Family::ALL {
                    total.flows[family.index()] += count.flows[family.index()];
                }
                total.differing += count.differing;
                total.at_socket += count.at_socket;
                total.wrong += count.wrong;
                totals
            },
        );
        let (date, scenarios, seconds) = (Timestamp::now().to_string(), self.rows.len(), elapsed.as_secs());
        let wrong = totals.values().map(|total| total.wrong).sum::<usize>();
        let wrong = if wrong == 0 { "no flow wrong".to_owned() } else { format!("**{wrong} flows wrong**") };
        let day = &date[..10];
        let _ = writeln!(text, "{day}, {scenarios} scenarios in {seconds} s{RUN_LINE}{version}: {wrong}.\n");
        if !others.is_empty() {
            let _ = writeln!(text, "Runs with other releases, which this table does not show:\n");
            for other in others {
                let _ = writeln!(text, "- {other}");
            }
            text.push('\n');
        }
        text.push_str(
            "| scenario | kube-lane | kube-lane ebpf | kube-proxy nftables | kube-proxy iptables |\n\
             |---|---|---|---|---|\n",
        );
        let rows = self.rows.iter().map(|(name, row)| (name.clone(), row));
        for (name, row) in rows.chain([("**all**".to_owned(), &totals)]) {
            let cells = Proxy::ALL.map(|proxy| row.get(&proxy).map_or("–".to_owned(), cell));
            let end = if self.unfinished.contains(&name) { " (**not run to its end**)" } else { "" };
            let _ = writeln!(text, "| {name}{end} | {} |", cells.join(" | "));
        }
        let _ = writeln!(
            text,
            "\nBesides, {} flows over kube-lane in both modes after the same objects had come in other orders: Services first, \
             slices first, one by one,\nand deleted and created again.",
            self.orders
        );
        list(&mut text, "Where they differ", &self.differences);
        list(&mut text, "Where a proxy takes no part", &self.skipped);
        text
    }
}

/// What marks the line of a summary that says of which run it is.
const RUN_LINE: &str = ", kube-proxy ";

/// The line of a summary that says of which run it is.
pub(super) fn run_line(summary: &str) -> Option<&str> {
    summary.lines().find(|line| line.contains(RUN_LINE))
}

fn list(text: &mut String, title: &str, entries: &BTreeSet<(String, Proxy, String)>) {
    if entries.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n## {title}\n");
    for (scenario, proxy, why) in entries {
        let _ = writeln!(text, "- {scenario}, {proxy}: {why}");
    }
}

fn cell(count: &Count) -> String {
    let mut text = format!("{} + {}", count.flows[0], count.flows[1]);
    let at_socket = (count.at_socket, "at the socket");
    for (number, what) in [at_socket, (count.differing, "differ"), (count.wrong, "**wrong**")] {
        if number > 0 {
            let _ = write!(text, ", {number} {what}");
        }
    }
    text
}
