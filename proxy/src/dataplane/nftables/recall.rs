//! Reads what the maps of session affinity remember, for changes after which some of it holds no longer.
//!
//! Owns when a map is read. Never decides which entries stay: [`super::remembered`] does.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix::errno::Errno;

use super::affinity::{Change, Port, find};
use super::failure::{Failure, Owner, failure};
use super::netlink::grace_period;
use super::object::Object;
use super::observe::entries;
use super::remembered::{Edits, edits};
use super::{Nftables, NftablesError};
use crate::dataplane::Outcome;
use crate::model::plan::Plan;

impl Nftables {
    /// What the maps that a change concerns have to forget, and to remember otherwise.
    pub(super) fn review(&mut self, plan: &Plan, change: &Change) -> Result<Vec<Edits>, Failure> {
        let mut changes = Vec::new();
        for review in &change.reviews {
            if let Some(port) = Port::new(plan, &plan.ports[review.port]) {
                changes.extend(self.look_through(&port, &review.sources)?);
            }
        }
        Ok(changes)
    }

    /// Looks once more through the maps of the ports whose change is committed: a packet that was on its way meanwhile
    /// may have been led to a backend before that left, and remembered after.
    pub(super) fn recheck(&mut self, outcome: &mut Outcome) -> Result<(), Failure> {
        if self.recheck.is_empty() {
            return Ok(());
        }
        grace_period();
        let mut changes = Vec::new();
        for (was, i) in self.recheck.clone() {
            let Some(plan) = self.applied.get(&was.service).map(|applied| Arc::clone(applied.plan())) else {
                continue;
            };
            if let Some(port) = find(&plan, &was.ports[i]).and_then(|port| Port::new(&plan, port)) {
                let maps: Vec<_> = port.scopes().flat_map(|scope| port.maps(scope)).collect();
                changes.extend(self.look_through(&port, &maps)?);
            }
        }
        let mut transaction = self.netlink.begin();
        transaction.edits(&changes, Owner::Node);
        let count = |of: fn((usize, usize)) -> usize| changes.iter().map(|edits| of(edits.count())).sum();
        self.send(&mut transaction, count(|(removed, _)| removed), count(|(_, added)| added), outcome)
            .map_err(failure)?;
        self.recheck.clear();
        Ok(())
    }

    fn look_through(&mut self, port: &Port<'_>, maps: &[Object]) -> Result<Vec<Edits>, Failure> {
        let mut held = BTreeMap::new();
        for map in maps {
            let entries = entries(&mut self.netlink, map).map_err(|errno| match errno {
                Errno::ENOENT => Failure::Disagreement(format!("there is no map {map}")),
                errno => NftablesError::ReadBack(errno).into(),
            })?;
            held.insert(map.clone(), entries);
        }
        Ok(edits(port, &held))
    }
}
