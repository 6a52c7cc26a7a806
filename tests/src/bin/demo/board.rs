//! Who answers whom: the latest connections of every client to every target, and what was expected of them.
//!
//! Owns the picture of the traffic, and the rule that any answer nobody expects ends the demo.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use kube_lane_lab::Outcome;

use crate::probe::{Sample, Target};
use crate::screen::{Ink, Screen};

/// Connections that a cell of the table shows.
const WINDOW: usize = 16;

/// What stands in the table for a connection that was not answered.
const FAILURE: char = '!';

/// So many answers in a row without a pod of three mean that it is picked no more: chance alone would do this once in
/// ten million times.
const SURE: usize = 40;

/// What has been seen so far.
#[derive(Debug)]
pub(crate) struct Board {
    clients: Vec<String>,
    targets: Arc<[Target]>,
    /// The pods that may answer.
    expected: BTreeSet<String>,
    /// By client, then by target.
    cells: Vec<Vec<Cell>>,
    /// By client.
    departures: Vec<Departure>,
    connections: usize,
}

#[derive(Clone, Debug, Default)]
struct Cell {
    latest: VecDeque<char>,
    /// The latest of them that were looked at were led there at the socket.
    at_socket: bool,
    seen: BTreeSet<String>,
}

/// What one client saw of a pod that leaves.
#[derive(Clone, Debug, Default)]
struct Departure {
    /// When the first connection ended after the last one that the pod answered.
    without_since: Option<Instant>,
    /// Connections since then.
    without: usize,
}

impl Board {
    pub(crate) fn new(clients: Vec<String>, targets: Arc<[Target]>) -> Self {
        let cells = vec![vec![Cell::default(); targets.len()]; clients.len()];
        let departures = vec![Departure::default(); clients.len()];
        Self { clients, targets, expected: BTreeSet::new(), cells, departures, connections: 0 }
    }

    /// Only these pods may answer from now on, and each cell has yet to see them.
    pub(crate) fn expect<'a>(&mut self, pods: impl IntoIterator<Item = &'a str>) {
        self.expected = pods.into_iter().map(str::to_owned).collect();
        for cell in self.cells.iter_mut().flatten() {
            cell.seen.clear();
        }
        self.departures.fill(Departure::default());
    }

    /// How many connections there were.
    pub(crate) fn connections(&self) -> usize {
        self.connections
    }

    /// Takes one connection in; `leaving` is a pod that may answer for a little while yet.
    ///
    /// # Errors
    /// When it was not answered, or by a pod that should not have.
    pub(crate) fn add(&mut self, sample: &Sample, leaving: Option<&str>) -> Result<()> {
        let cell = &mut self.cells[sample.client][sample.target];
        if cell.latest.len() == WINDOW {
            cell.latest.pop_front();
        }
        cell.latest.push_back(sample.outcome.by().map_or(FAILURE, letter));
        cell.at_socket = sample.at_socket.unwrap_or(cell.at_socket);
        self.connections += 1;

        let Target { kind, proto, at } = self.targets[sample.target];
        let place = || format!("{kind} {at} {proto}, dialled by {}", self.clients[sample.client]);
        let Outcome::Answered { by, .. } = &sample.outcome else {
            bail!("{}: {}", place(), sample.outcome);
        };
        if !self.expected.contains(by) && leaving != Some(by) {
            bail!("{}: answered by {by}, which has no endpoint any more", place());
        }
        cell.seen.insert(by.clone());

        let departure = &mut self.departures[sample.client];
        if leaving == Some(by) {
            *departure = Departure::default();
        } else {
            departure.without_since.get_or_insert(sample.ended);
            departure.without += 1;
        }
        Ok(())
    }

    /// Whether every client has met every expected pod through every target, and its cells show no other.
    pub(crate) fn is_complete(&self) -> bool {
        let letters: BTreeSet<_> = self.expected.iter().map(|pod| letter(pod)).collect();
        self.cells.iter().flatten().all(|cell| {
            cell.latest.len() == WINDOW
                && cell.seen.is_superset(&self.expected)
                && cell.latest.iter().all(|letter| letters.contains(letter))
        })
    }

    /// Whether anybody was led to a pod at the socket.
    pub(crate) fn has_sockets(&self) -> bool {
        self.cells.iter().flatten().any(|cell| cell.at_socket)
    }

    /// From when on no client met the leaving pod any more, once that is sure.
    pub(crate) fn departed(&self) -> Option<Instant> {
        let is_sure = self.departures.iter().all(|departure| departure.without >= SURE);
        let moments = self.departures.iter().filter_map(|departure| departure.without_since);
        if is_sure { moments.max() } else { None }
    }

    /// The table.
    pub(crate) fn table(&self, screen: &Screen) -> Vec<String> {
        let mut heads = String::new();
        for client in &self.clients {
            heads += &format!("{:<width$}", format!("from {client}"), width = WINDOW + 2);
        }
        let what = if self.has_sockets() {
            "last 16 at (A, B, C: at the socket)"
        } else {
            "the last 16 who answered at"
        };
        let title = format!("  {what:<38}  {heads}");
        let mut lines = vec![String::new(), screen.paint(Ink::Dim, title.trim_end())];
        for (index, Target { kind, proto, at }) in self.targets.iter().enumerate() {
            let mut line = format!("  {kind:<9}  {:<22}  {proto}  ", at.to_string());
            for cells in &self.cells {
                line += &cell(&cells[index], screen);
                line += "  ";
            }
            lines.push(line.trim_end().to_owned());
        }
        lines.push(String::new());
        lines
    }
}

/// The latest answers in alphabetical order: each pod's share is a bar of its letter.
fn cell(cell: &Cell, screen: &Screen) -> String {
    let mut letters: Vec<_> = cell.latest.iter().copied().collect();
    letters.sort_unstable();
    let mut text = String::new();
    for bar in letters.chunk_by(|one, other| one == other) {
        let ink = match bar[0] {
            'a' => Ink::Green,
            'b' => Ink::Blue,
            'c' => Ink::Yellow,
            FAILURE => Ink::Red,
            _ => Ink::Magenta,
        };
        let bar: String = bar.iter().collect();
        text += &screen.paint(ink, if cell.at_socket { bar.to_uppercase() } else { bar });
    }
    text + &" ".repeat(WINDOW - letters.len())
}

/// What stands for a pod in the table: the end of its name.
fn letter(pod: &str) -> char {
    pod.chars().last().unwrap_or('?')
}
