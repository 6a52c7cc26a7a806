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
    /// What the socket layer counted, by port as in the plan; empty where it counts nothing.
    pub at_socket: Vec<Counts>,
    /// What nftables counted, likewise.
    pub in_nftables: Vec<Counts>,
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

/// A number of which each layer may have counted a part.
#[derive(Clone, Copy, Debug)]
struct Counted {
    at_socket: Option<u64>,
    in_nftables: Option<u64>,
}

impl Counted {
    fn total(self) -> Option<u64> {
        let parts = [self.at_socket, self.in_nftables];
        parts.iter().any(Option::is_some).then(|| parts.into_iter().flatten().sum())
    }

    fn words(self, what: &str) -> Option<String> {
        let total = self.total()?;
        Some(match (self.at_socket, self.in_nftables) {
            (Some(socket), Some(nftables)) => {
                format!("{total} {what}: {socket} at the socket, {nftables} in nftables")
            }
            (Some(_), None) => format!("{total} {what} at the socket"),
            (None, _) => format!("{total} {what}"),
        })
    }

    fn annotate(self, into: &mut Value, name: &str) {
        let parts = [("", self.total()), ("AtSocket", self.at_socket), ("InNftables", self.in_nftables)];
        for (suffix, count) in parts {
            if let Some(count) = count {
                into[format!("{name}{suffix}")] = count.into();
            }
        }
    }
}

impl Inspection {
    fn answer(&self, port: usize, frontend: usize) -> Option<&Answer> {
        self.answers.get(port)?.get(frontend)
    }

    /// What was counted of a port, as `number` has it.
    fn counted(&self, port: usize, number: impl Fn(&Counts) -> Option<u64>) -> Counted {
        let of = |counts: &[Counts]| counts.get(port).and_then(&number);
        Counted { at_socket: of(&self.at_socket), in_nftables: of(&self.in_nftables) }
    }

    fn connections(&self, port: usize, backend: AddressPort) -> Counted {
        self.counted(port, |counts| counts.connections.get(&backend).copied())
    }

    fn refused(&self, port: usize) -> Counted {
        self.counted(port, |counts| Some(counts.refused))
    }

    /// The plan's JSON, with `layer` and `answeredBy` in each frontend, `connections` in each backend and
    /// `refusedConnections` in each port, as far as they are known; beside a count its parts, `…AtSocket` and
    /// `…InNftables`.
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
                    self.connections(index, backend.address).annotate(&mut into[set][at], "connections");
                }
            }
            self.refused(index).annotate(into, "refusedConnections");
        }
        value
    }
}

impl Notes for Inspection {
    fn frontend(&self, port: usize, frontend: usize) -> Option<String> {
        self.answer(port, frontend).map(ToString::to_string)
    }

    fn backend(&self, port: usize, backend: &Backend) -> Option<String> {
        self.connections(port, backend.address).words("new")
    }

    fn port(&self, port: usize) -> Option<String> {
        let refused = self.refused(port);
        refused.words("refused").filter(|_| refused.total() > Some(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_told_with_its_parts_where_there_are_two() {
        let counted = |at_socket, in_nftables| Counted { at_socket, in_nftables };
        for (counted, text, value) in [
            (counted(None, None), None, json!({})),
            (counted(Some(2), None), Some("2 new at the socket"), json!({"n": 2, "nAtSocket": 2})),
            (counted(None, Some(3)), Some("3 new"), json!({"n": 3, "nInNftables": 3})),
            (
                counted(Some(2), Some(3)),
                Some("5 new: 2 at the socket, 3 in nftables"),
                json!({"n": 5, "nAtSocket": 2, "nInNftables": 3}),
            ),
        ] {
            let mut annotated = json!({});
            counted.annotate(&mut annotated, "n");
            assert_eq!((counted.words("new").as_deref(), annotated), (text, value));
        }
    }
}
