//! One batch: Services in bounded parts, the node's elements, the sweep of what is stale.
//!
//! Owns how refusals are dealt with: a Service that the kernel refuses is left out and reported; a refusal that shows
//! that the kernel holds something else than was programmed makes the caller read the truth back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::affinity::Ids;
use super::element::{Element, Place};
use super::failure::{Failure, Owner, TOO_LARGE, blame, disagrees, failure};
use super::kernel::{Empty, Kernel};
use super::lower::{Applied, Lowered, Target, lower};
use super::message::Transaction;
use super::netlink::CommitError;
use super::observe::Found;
use super::readings::Readings;
use super::rules::Policy;
use super::schema::Set;
use super::shared::Shared;
use super::tables::{node_elements, rewrite};
use super::{Nftables, NftablesError, State};
use crate::dataplane::{Batch, Outcome};
use crate::model::input::{Family, ServiceKey};
use crate::model::plan::{Frontend, HealthCheck, NodePlan, Plan, PortPlan};

/// Elements of one part: a transaction stays at a few megabytes.
const ELEMENTS_PER_PART: usize = 20_000;

/// Services whose frontends are looked up at once when they are taken over.
const TAKEN_OVER_TOGETHER: usize = 200;

/// From how many Services on a batch is written without notifications.
const BULK: usize = 500;

/// A Service on its way, and what its change means for the kernel.
struct Staged<'a> {
    key: &'a ServiceKey,
    lowered: Lowered,
}

impl Nftables {
    /// Commits a batch on top of what is programmed. These families are known to be `refused`.
    pub(super) fn commit_batch(
        &mut self,
        batch: &Batch,
        refused: BTreeMap<Family, String>,
        outcome: &mut Outcome,
    ) -> Result<(), Failure> {
        if batch.services.len() >= BULK {
            self.expect_bulk()?;
        }
        let refused = self.establish(batch, refused, outcome)?;
        self.commit_services(&batch.services, &refused, outcome)?;
        // After the Services: with the ServiceCIDRs in force, an address that has none yet is dropped, and a client
        // whose first packet is dropped waits a second.
        self.commit_node(batch.node.as_ref(), batch.sweep, outcome)?;
        if batch.sweep { self.sweep(outcome) } else { Ok(()) }
    }

    /// The node's own elements. What an earlier run left stays until the sources have synced (`exact`).
    fn commit_node(
        &mut self,
        node: Option<&NodePlan>,
        exact: bool,
        outcome: &mut Outcome,
    ) -> Result<(), Failure> {
        if node.is_none() && self.state.found().is_none() {
            return Ok(());
        }
        let node = node.unwrap_or(&self.node).clone();
        let (mut removed, mut added, mut owned) = (Vec::new(), Vec::new(), self.node_places.clone());
        for (family, set, wanted) in node_elements(&node) {
            if !self.tables.contains_key(&family) {
                continue;
            }
            let found = self.state.found().map(|found| found.places_in(family, set)).unwrap_or_default();
            // Where pods are is known or it is not; it does not grow with what the sources have listed.
            let partial = set != Set::PodCidrs || wanted.is_empty();
            if !exact && !found.is_empty() && partial {
                continue;
            }
            let have: BTreeSet<_> = owned.remove(&(family, set)).into_iter().flatten().chain(found).collect();
            let want: BTreeSet<_> = wanted.iter().map(|element| element.place).collect();
            // The elements of a set of ranges depend on each other: it is written as a whole.
            let keep = if set.is_interval() && have != want { BTreeSet::new() } else { &have & &want };
            removed.extend(have.difference(&keep));
            added.extend(wanted.into_iter().filter(|element| !keep.contains(&element.place)));
            owned.insert((family, set), want);
        }
        let mut transaction = self.netlink.begin();
        transaction.remove_all(&removed, Owner::Node);
        transaction.add_all(&added, Owner::Node);
        let mut tables = self.tables.clone();
        for (family, policy) in &mut tables {
            // Where no pod CIDRs are owned yet, those that were found count.
            if let Some(places) = owned.get(&(*family, Set::PodCidrs)) {
                let new = self.settings.policy(!places.is_empty(), policy.timeouts.clone());
                let old = std::mem::replace(policy, new);
                rewrite(&mut transaction, *family, &old, policy, Owner::Node);
            }
        }
        self.send(&mut transaction, removed.len(), added.len(), outcome).map_err(failure)?;
        if let Some(found) = self.state.found_mut() {
            owned.values().flatten().chain(&removed).for_each(|place| found.settle(place));
        }
        self.node = node;
        self.node_places = owned;
        self.tables = tables;
        Ok(())
    }

    /// All Services of a batch. Together where they fit one transaction; else first what goes, then what changes,
    /// then what is new, so that an address which moves from one Service to another is free when it is claimed. Ports of a
    /// `refused` family are left out, and Services that have no others.
    fn commit_services(
        &mut self,
        services: &[(ServiceKey, Option<Arc<Plan>>)],
        refused: &BTreeMap<Family, String>,
        outcome: &mut Outcome,
    ) -> Result<(), Failure> {
        let mut ordered = Vec::with_capacity(services.len());
        let mut partly = Vec::new();
        for service @ (key, plan) in services {
            let mut ports = plan.iter().flat_map(|plan| &plan.ports);
            let Some((family, why)) = ports.find_map(|port| refused.get_key_value(&port.family)) else {
                ordered.push(service);
                continue;
            };
            let part = plan.as_deref().and_then(|plan| without(plan, refused));
            let rest = if part.is_some() { "; its other ports are programmed" } else { "" };
            outcome.failed.push((key.clone(), format!("no table for {family}: {why}{rest}")));
            partly.extend(part.map(|part| (key.clone(), Some(Arc::new(part)))));
        }
        ordered.extend(&partly);
        ordered.sort_by_key(|(key, plan)| match (plan, self.applied.contains_key(key)) {
            (None, _) => 0,
            (Some(_), true) => 1,
            (Some(_), false) => 2,
        });
        // What is programmed is known, and what becomes of it is in this batch. Once nothing is taken over any more,
        // nobody asks.
        let programmed: BTreeSet<_> = match self.state {
            State::Adopted(_) => {
                let programmed = services.iter().filter_map(|(key, _)| self.applied.get(key));
                programmed.flat_map(|applied| frontends(applied.plan())).map(name).collect()
            }
            State::Unknown(_) | State::Exact => BTreeSet::new(),
        };
        let mut part = Vec::new();
        let mut elements = 0;
        for services in ordered.chunks(TAKEN_OVER_TOGETHER) {
            if let State::Adopted(found) = &mut self.state {
                let frontends = services.iter().filter_map(|(_, plan)| plan.as_deref()).flat_map(frontends);
                let frontends = frontends.filter(|frontend| !programmed.contains(&name(*frontend)));
                let asked = found.look_up(&mut self.netlink, frontends);
                outcome.asked += asked.map_err(NftablesError::ReadBack)?;
            }
            for (key, plan) in services {
                let staged = self.stage(key, plan.as_ref());
                elements += staged.lowered.removed.len() + staged.lowered.added.len();
                part.push(staged);
                if elements >= ELEMENTS_PER_PART {
                    self.commit_part(std::mem::take(&mut part), outcome)?;
                    elements = 0;
                }
            }
        }
        self.commit_part(part, outcome)?;
        // The kernel may have refused the part as well.
        partly.retain(|(key, part)| self.applied.get(key).map(Applied::plan) == part.as_ref());
        outcome.partly.append(&mut partly);
        Ok(())
    }

    /// What a Service means for the kernel.
    fn stage<'a>(&mut self, key: &'a ServiceKey, plan: Option<&Arc<Plan>>) -> Staged<'a> {
        let previous = self.applied.get(key);
        let lowered = match self.state.found() {
            Some(found) => lower(previous, plan, found, &mut self.ids),
            None => {
                let nothing = Empty { counts: self.settings.count_connections };
                lower(previous, plan, &nothing, &mut self.ids)
            }
        };
        Staged { key, lowered }
    }

    /// A Service is now as the first says, and not as the second: the numbers of ports that are no more are free.
    fn release_ids(ids: &mut Ids, is: Option<&Applied>, is_not: Option<&Applied>) {
        let kept: BTreeSet<_> = is.into_iter().flat_map(Applied::ids).collect();
        ids.release(is_not.into_iter().flat_map(Applied::ids).filter(|id| !kept.contains(id)));
    }

    /// One transaction of Services; those that the kernel refuses are left out, and the others sent again.
    fn commit_part(&mut self, mut part: Vec<Staged<'_>>, outcome: &mut Outcome) -> Result<(), Failure> {
        let mut apart = false;
        while !part.is_empty() {
            let refused = match self.try_part(&part, apart, outcome) {
                Ok(gone) => {
                    self.take_over(part, &gone);
                    return Ok(());
                }
                Err((CommitError::TooLarge, _)) if part.len() > 1 => {
                    let rest = part.split_off(part.len() / 2);
                    self.commit_part(part, outcome)?;
                    part = rest;
                    continue;
                }
                Err((CommitError::TooLarge, _)) => BTreeMap::from([(0, TOO_LARGE.to_owned())]),
                Err((CommitError::Refused(refusals), owners)) => {
                    if !apart && !refusals.iter().any(disagrees) {
                        apart = true;
                        continue;
                    }
                    blame(refusals, &owners)?
                }
                Err((error, _)) => return Err(failure(error)),
            };
            apart = false;
            let mut position = 0;
            part.retain(|staged| {
                let words = refused.get(&position);
                position += 1;
                if let Some(words) = words {
                    outcome.failed.push((staged.key.clone(), words.clone()));
                    let previous = self.applied.get(staged.key);
                    Self::release_ids(&mut self.ids, previous, staged.lowered.applied.as_ref());
                }
                words.is_none()
            });
        }
        Ok(())
    }

    /// Sends what a part means: all removals first. Shared elements go with the Services that gain or lose them.
    /// `apart`: no message is of several Services. Hands back what the elements that go had counted; with an error comes
    /// who owns each refused message.
    fn try_part(
        &mut self,
        part: &[Staged<'_>],
        apart: bool,
        outcome: &mut Outcome,
    ) -> Result<Readings, (CommitError, Vec<Option<Owner>>)> {
        let owner = |position| if apart { Owner::Service(position) } else { Owner::Part };
        let shared = shared_delta(part);
        let (lost, gained) = self.shared.preview(&shared);
        let (clear, gained) = self.against_found(&gained);
        let mut removals = BTreeMap::from([(Owner::Node, [lost, clear].concat())]);
        let mut additions = BTreeMap::from([(Owner::Node, gained)]);
        for (position, staged) in part.iter().enumerate() {
            let (mut clear, add) = self.against_found(&staged.lowered.added);
            if !clear.is_empty() {
                let removed: BTreeSet<_> = staged.lowered.removed.iter().collect();
                clear.retain(|place| !removed.contains(place));
            }
            let places = removals.entry(owner(position)).or_default();
            places.extend(staged.lowered.removed.iter().copied().chain(clear));
            additions.entry(owner(position)).or_default().extend(add);
        }
        let removed = removals.values().map(Vec::len).sum::<usize>();
        let added = additions.values().map(Vec::len).sum::<usize>();
        let mut transaction = self.netlink.begin();
        for (owner, places) in removals {
            transaction.remove_all(&places, owner);
        }
        for (family, old, new) in self.policies(&shared) {
            rewrite(&mut transaction, family, old, &new, Owner::Ruleset);
        }
        for (owner, elements) in additions {
            transaction.add_all(elements, owner);
        }
        self.send(&mut transaction, removed, added, outcome).map_err(|error| {
            let owners = match &error {
                CommitError::Refused(refusals) => refusals.iter().map(|r| transaction.owner(r.seq)).collect(),
                _ => Vec::new(),
            };
            (error, owners)
        })
    }

    /// What the kernel already holds need not be added, and what it holds with other data goes first.
    fn against_found<'a>(&self, elements: &'a [Element]) -> (Vec<Place>, Vec<&'a Element>) {
        let Some(found) = self.state.found() else { return (Vec::new(), elements.iter().collect()) };
        let add: Vec<_> = elements.iter().filter(|element| !found.has(element)).collect();
        let clear = add.iter().map(|element| element.place).filter(|place| found.holds(place)).collect();
        (clear, add)
    }

    /// A part is committed, with which these elements went: it is what is programmed now.
    fn take_over(&mut self, part: Vec<Staged<'_>>, gone: &Readings) {
        let shared = shared_delta(&part);
        let policies: Vec<_> = self.policies(&shared).map(|(family, _, new)| (family, new)).collect();
        self.tables.extend(policies);
        self.shared.commit(&shared);
        for Staged { key, lowered, .. } in part {
            if let Some(found) = self.state.found_mut() {
                lowered.removed.iter().for_each(|place| found.settle(place));
                lowered.added.iter().for_each(|element| found.settle(&element.place));
                let gained = lowered.shared.gained.iter().filter_map(|shared| shared.place());
                gained.for_each(|place| found.settle(&place));
            }
            let (previous, next) = (self.applied.get(key), lowered.applied.as_ref());
            self.carried.change(key, previous, next, gone);
            Self::release_ids(&mut self.ids, next, previous);
            match lowered.applied {
                Some(applied) => self.applied.insert(key.clone(), applied),
                None => self.applied.remove(key),
            };
        }
    }

    /// Removes what the kernel was found to hold and nobody has claimed: all sources have synced.
    fn sweep(&mut self, outcome: &mut Outcome) -> Result<(), Failure> {
        if let State::Adopted(found) = &mut self.state {
            outcome.asked += found.look_up_rest(&mut self.netlink).map_err(NftablesError::ReadBack)?;
        }
        let stale = self.state.found().map(Found::places).unwrap_or_default();
        for part in stale.chunks(ELEMENTS_PER_PART) {
            let mut transaction = self.netlink.begin();
            transaction.remove_all(part, Owner::Node);
            self.send(&mut transaction, part.len(), 0, outcome).map_err(failure)?;
        }
        outcome.swept.extend(stale.iter().filter_map(Place::frontend));
        self.remove_strange(outcome)?;
        self.state = State::Exact;
        self.ids.keep_no_longer();
        self.forget_timeouts(outcome)?;
        // With full nodes: what came in the order of its keys has left them half empty.
        self.applied = std::mem::take(&mut self.applied).into_iter().collect();
        Ok(())
    }

    /// The policies that change when Services have lost and gained these. Until the sources have synced, timeouts stay that
    /// ports may have which nobody has claimed.
    fn policies(&self, delta: &BTreeMap<Shared, i64>) -> impl Iterator<Item = (Family, &Policy, Policy)> {
        self.tables.iter().filter_map(move |(family, policy)| {
            let mut timeouts = self.shared.timeouts(*family, delta);
            if self.state.found().is_some() {
                timeouts.extend(&policy.timeouts);
            }
            let new = Policy { timeouts, ..policy.clone() };
            (*policy != new).then_some((*family, policy, new))
        })
    }

    /// Takes away the chains of timeouts that no port has any more.
    fn forget_timeouts(&mut self, outcome: &mut Outcome) -> Result<(), Failure> {
        let policies: Vec<_> =
            self.policies(&BTreeMap::new()).map(|(family, old, new)| (family, old.clone(), new)).collect();
        let mut transaction = self.netlink.begin();
        for (family, old, new) in &policies {
            rewrite(&mut transaction, *family, old, new, Owner::Ruleset);
        }
        self.send(&mut transaction, 0, 0, outcome).map_err(failure)?;
        self.tables.extend(policies.into_iter().map(|(family, _, new)| (family, new)));
        Ok(())
    }

    /// Commits a transaction that removes and adds so many elements; an empty one is not sent. Hands back what those that
    /// went had counted.
    pub(super) fn send(
        &mut self,
        transaction: &mut Transaction<Owner>,
        removed: usize,
        added: usize,
        outcome: &mut Outcome,
    ) -> Result<Readings, CommitError> {
        if transaction.messages() == 0 {
            return Ok(Readings::default());
        }
        let gone = self.netlink.commit(transaction)?;
        self.committed();
        outcome.removed += removed;
        outcome.added += added;
        outcome.messages += transaction.messages();
        outcome.bytes += transaction.len();
        Ok(gone)
    }
}

/// What clients dial of a Service.
pub(super) fn frontends(plan: &Plan) -> impl Iterator<Item = (&PortPlan, &Frontend)> {
    plan.ports.iter().flat_map(|port| port.frontends.iter().map(move |frontend| (port, frontend)))
}

/// What is left of a plan without the ports of these families; `None`: no port.
fn without(plan: &Plan, refused: &BTreeMap<Family, String>) -> Option<Plan> {
    let is_left = |family| !refused.contains_key(&family);
    let ports: Vec<_> = plan.ports.iter().filter(|port| is_left(port.family)).cloned().collect();
    let health_check = plan.health_check.as_deref().map(|check| {
        let v4_endpoints = check.v4_endpoints.filter(|_| is_left(Family::V4));
        let v6_endpoints = check.v6_endpoints.filter(|_| is_left(Family::V6));
        Box::new(HealthCheck { v4_endpoints, v6_endpoints, ..*check })
    });
    (!ports.is_empty()).then(|| Plan {
        service: plan.service.clone(),
        ports: ports.into(),
        health_check,
        warnings: plan.warnings.clone(),
    })
}

/// What no two frontends have in common.
fn name((port, frontend): (&PortPlan, &Frontend)) -> Place {
    Target::new(port, frontend).refusals
}

fn shared_delta(part: &[Staged<'_>]) -> BTreeMap<Shared, i64> {
    let mut delta = BTreeMap::new();
    for staged in part {
        staged.lowered.shared.lost.iter().for_each(|shared| *delta.entry(*shared).or_default() -= 1);
        staged.lowered.shared.gained.iter().for_each(|shared| *delta.entry(*shared).or_default() += 1);
    }
    delta
}
