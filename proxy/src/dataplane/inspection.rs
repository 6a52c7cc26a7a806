//! What a dataplane knows of a Service beyond its plan, for people: who answers, and what was counted.
//!
//! Owns the two forms of it, beside the plan's: notes in its text, fields in its JSON. No decision reads it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::socket::answers::Answer;
use crate::model::plan::{AddressPort, Backend, Plan};
use crate::model::render::Notes;

/// What is known of a Service.
#[derive(Debug, Default)]
pub struct Inspection {
    /// Who answers each frontend, by port and frontend as in the plan; empty where nftables is alone.
    pub answers: Vec<Box<[Answer]>>,
    /// What was counted, by port as in the plan; empty where nothing is counted.
    pub counts: Vec<Counts>,
    /// It was counted at the socket alone: what nftables answers is not in it.
    pub at_socket_alone: bool,
}

/// What was counted of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// New connections (for UDP: first datagrams of a client) to each backend.
    pub connections: BTreeMap<AddressPort, u64>,
    /// Connections that were refused, since there was no endpoint; in nftables each attempt of a client counts.
    pub refused: u64,
}

impl Counts {
    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Self) {
        for (backend, connections) in &other.connections {
            *self.connections.entry(*backend).or_default() += connections;
        }
        self.refused += other.refused;
    }
}

impl Inspection {
    /// Adds what nftables counted, by port as in the plan.
    pub(super) fn add(&mut self, counts: Vec<Counts>) {
        self.at_socket_alone = false;
        self.counts.resize(self.counts.len().max(counts.len()), Counts::default());
        self.counts.iter_mut().zip(&counts).for_each(|(all, counts)| all.add(counts));
    }

    fn at_socket(&self) -> &'static str {
        if self.at_socket_alone { " at the socket" } else { "" }
    }

    fn answer(&self, port: usize, frontend: usize) -> Option<&Answer> {
        self.answers.get(port)?.get(frontend)
    }

    fn connections(&self, port: usize, backend: AddressPort) -> Option<u64> {
        self.counts.get(port)?.connections.get(&backend).copied()
    }

    /// The plan's JSON, with `layer` and `answeredBy` in each frontend, `connections` in each backend and
    /// `refusedConnections` in each port, as far as they are known.
    pub fn annotate(&self, plan: &Plan) -> Value {
        let mut value = json!(plan);
        for (index, port) in plan.ports.iter().enumerate() {
            let into = &mut value["ports"][index];
            for at in 0..port.frontends.len() {
                let Some(answer) = self.answer(index, at) else { continue };
                into["frontends"][at]["layer"] = answer.layer().into();
                into["frontends"][at]["answeredBy"] = answer.to_string().into();
            }
            for (set, backends) in [("backends", &port.backends), ("localBackends", &port.local_backends)] {
                for (at, backend) in backends.iter().enumerate() {
                    let Some(connections) = self.connections(index, backend.address) else { continue };
                    into[set][at]["connections"] = connections.into();
                }
            }
            if let Some(counts) = self.counts.get(index) {
                into["refusedConnections"] = counts.refused.into();
            }
        }
        value
    }
}

impl Notes for Inspection {
    fn frontend(&self, port: usize, frontend: usize) -> Option<String> {
        self.answer(port, frontend).map(ToString::to_string)
    }

    fn backend(&self, port: usize, backend: &Backend) -> Option<String> {
        let connections = self.connections(port, backend.address)?;
        Some(format!("{connections} new{}", self.at_socket()))
    }

    fn port(&self, port: usize) -> Option<String> {
        let refused = self.counts.get(port)?.refused;
        (refused > 0).then(|| format!("{refused} refused{}", self.at_socket()))
    }
}
