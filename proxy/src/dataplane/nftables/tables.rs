//! The families' tables: which of them are in place, and the constant part of each.
//!
//! Owns when a table comes: with the first Service or ServiceCIDR of its family, since the kernel walks every chain of a
//! namespace in each transaction, and NodePort addresses or pod CIDRs alone lead nobody anywhere. It stays while the agent
//! runs. Never takes one away, nor does the sweep: the kernel translates established connections of a family as long as
//! there is a nat chain of it, and connections may outlive the last Service.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use nftnl::MsgType;
use nftnl::nftnl_sys::libc;
use nix::errno::Errno;
use tracing::{info, warn};

use super::affinity::Ids;
use super::element::{Element, Key, Place, ranges};
use super::expr::c_name;
use super::failure::{Failure, Owner, failure, fatal, words};
use super::message::{Transaction, table};
use super::netlink::{CommitError, Netlink};
use super::observe::{Depth, Fixtures, Found, Outdated, TableState, again};
use super::readings::Readings;
use super::rules::{self, Policy};
use super::schema::{Set, TABLE};
use super::shared::SharedCounts;
use super::{Nftables, NftablesError, State};
use crate::dataplane::{Batch, Outcome};
use crate::model::input::Family;
use crate::model::plan::NodePlan;

impl Nftables {
    /// Reads back what the kernel holds and puts the constant part of the tables that are there in place, one by one. Tells
    /// which of them the kernel does not let us write, and why: as if they were not there. Afterwards nothing counts as
    /// programmed: applying everything again changes only what differs.
    pub(super) fn adopt(
        &mut self,
        depth: Depth,
        outcome: &mut Outcome,
    ) -> Result<BTreeMap<Family, String>, Failure> {
        self.applied.clear();
        self.shared = SharedCounts::default();
        self.ids = Ids::default();
        self.node_places.clear();
        self.tables.clear();
        self.expected_generation = Some(self.netlink.generation().map_err(NftablesError::ReadBack)?);
        let mut refused = BTreeMap::new();
        let mut found = Found::default();
        for family in Family::ALL {
            let state = found.read(&mut self.netlink, family, depth).map_err(NftablesError::ReadBack)?;
            if state == TableState::Absent {
                continue;
            }
            let outdated = found.take_outdated(family);
            if !outdated.sets.is_empty() {
                info!(
                    ?family,
                    counting = self.settings.count_connections,
                    "sets are made anew for their counters"
                );
            }
            found.ids(family).for_each(|id| self.ids.keep(family, id));
            let timeouts =
                found.places_in(family, Set::AffinityTimeouts).iter().filter_map(timeout).collect();
            let policy = self.settings.policy(!found.places_in(family, Set::PodCidrs).is_empty(), timeouts);
            let chains = rules::chains(family, &policy);
            let right = match state {
                TableState::Foreign => BTreeSet::new(),
                _ if !outdated.sets.is_empty() => BTreeSet::new(),
                _ => self.right(family, &chains).map_err(NftablesError::ReadBack)?,
            };
            let mut transaction = self.netlink.begin();
            if state == TableState::Foreign {
                warn!(?family, "table `kube-lane` has another layout than this build's: it is replaced");
                transaction.object(&table(family), MsgType::Del, Owner::Ruleset);
            }
            ruleset(&mut transaction, family, &chains, &right, &outdated);
            let sent = self.send(&mut transaction, 0, 0, outcome);
            if let Some(why) = self.refusal(family, sent)? {
                found.forget(family);
                refused.insert(family, why);
            } else {
                self.tables.insert(family, policy);
            }
        }
        outcome.listed += found.count;
        self.state = State::Adopted(found);
        Ok(refused)
    }

    /// What came of writing a family's table: the kernel's words where it takes none. They are said once, and that it is
    /// over.
    fn refusal(
        &mut self,
        family: Family,
        sent: Result<Readings, CommitError>,
    ) -> Result<Option<String>, Failure> {
        match sent {
            Ok(_) => {
                if self.refused.remove(&family).is_some() {
                    info!("the kernel takes a table `kube-lane` for {family} now");
                }
                Ok(None)
            }
            // What should go was there: what is missing is an expression, a type of chain, or a right.
            Err(CommitError::Refused(refusals)) if refusals.iter().all(|r| r.errno != Errno::EEXIST) => {
                let why = words(&refusals);
                if self.refused.insert(family, why.clone()).as_ref() != Some(&why) {
                    warn!(
                        why,
                        "the kernel takes no table `kube-lane` for {family}: nothing of it is programmed"
                    );
                }
                Ok(Some(why))
            }
            Err(error) => Err(failure(error)),
        }
    }

    /// Removes from the tables the chains and sets that this build does not know, once nothing of ours leads there:
    /// another build's, whose base chains would go on with the packets. What the kernel does not let go stays.
    pub(super) fn remove_strange(&mut self, outcome: &mut Outcome) -> Result<(), NftablesError> {
        let Some(found) = self.state.found_mut() else { return Ok(()) };
        let strange = self.tables.iter().map(|(family, policy)| {
            let mut fixtures = found.take_fixtures(*family);
            let ours = rules::chains(*family, policy);
            fixtures.chains.retain(|name| ours.iter().all(|chain| chain.name != *name));
            (*family, fixtures)
        });
        let strange: Vec<_> = strange.collect();
        strange.iter().try_for_each(|(family, strange)| self.remove(*family, strange, outcome))
    }

    fn remove(
        &mut self,
        family: Family,
        strange: &Fixtures,
        outcome: &mut Outcome,
    ) -> Result<(), NftablesError> {
        let Fixtures { chains, strange_sets: sets } = strange;
        if chains.is_empty() && sets.is_empty() {
            return Ok(());
        }
        let mut transaction = self.netlink.begin();
        // A set goes only when no rule names it, a chain when no rule and no element leads to it.
        chains.iter().for_each(|name| transaction.empty_chain(name, family, Owner::Ruleset));
        for name in sets {
            transaction.whole_set(libc::NFT_MSG_DELSET, name, family, Owner::Ruleset);
        }
        chains.iter().for_each(|name| transaction.delete_chain(name, family, Owner::Ruleset));
        match self.send(&mut transaction, 0, 0, outcome) {
            Ok(_) => {
                info!(?family, ?chains, ?sets, "removed from table `kube-lane` what is not this build's");
            }
            Err(CommitError::Refused(refusals)) => {
                let why = words(&refusals);
                warn!(?family, ?chains, ?sets, why, "what is not this build's stays in table `kube-lane`");
            }
            Err(error) => return Err(fatal(error, NftablesError::Ruleset)),
        }
        Ok(())
    }

    /// The names of those chains that the kernel has as they should be.
    fn right(&mut self, family: Family, chains: &[rules::Chain]) -> Result<BTreeSet<String>, Errno> {
        let table = table(family);
        let mut right = BTreeSet::new();
        for spec in chains {
            let chain = chain(spec, &table);
            if again(|| self.netlink.has_rules(family, &chain, spec))? {
                right.insert(spec.name.clone());
            }
        }
        Ok(right)
    }

    /// Puts the tables in place that a batch is the first to need, each with the node's elements as they are. Tells which
    /// families the kernel takes no table of, those that are known to be `refused` and others, and why, in its words: a
    /// Service without them is none the worse.
    ///
    /// # Errors
    /// [`NftablesError::Ruleset`] where it takes none at all; a disagreement where it takes one at last, which may hold
    /// anything.
    pub(super) fn establish(
        &mut self,
        batch: &Batch,
        mut refused: BTreeMap<Family, String>,
        outcome: &mut Outcome,
    ) -> Result<BTreeMap<Family, String>, Failure> {
        let needed = needed(batch);
        for family in needed.iter().copied() {
            if self.tables.contains_key(&family) || refused.contains_key(&family) {
                continue;
            }
            let elements: Vec<_> = first_elements(family, &self.node, batch.node.is_some()).collect();
            let has_pods =
                elements.iter().any(|(_, set, wanted)| *set == Set::PodCidrs && !wanted.is_empty());
            let policy = self.settings.policy(has_pods, BTreeSet::new());
            let chains = rules::chains(family, &policy);
            let mut transaction = self.netlink.begin();
            ruleset(&mut transaction, family, &chains, &BTreeSet::new(), &Outdated::default());
            elements.iter().for_each(|(_, _, wanted)| transaction.add_all(wanted, Owner::Node));
            let added = elements.iter().map(|(_, _, wanted)| wanted.len()).sum();
            let was_refused = self.refused.contains_key(&family);
            let sent = self.send(&mut transaction, 0, added, outcome);
            if let Some(why) = self.refusal(family, sent)? {
                refused.insert(family, why);
                continue;
            }
            if was_refused {
                return Err(Failure::Disagreement(format!("a table for {family}, which was refused before")));
            }
            let places = elements.into_iter().map(|(family, set, wanted)| {
                ((family, set), wanted.into_iter().map(|element| element.place).collect())
            });
            self.node_places.extend(places);
            self.tables.insert(family, policy);
        }
        match refused.iter().find(|(family, _)| needed.contains(family)) {
            Some((_, words)) if self.tables.is_empty() => Err(NftablesError::Ruleset(words.clone()).into()),
            _ => Ok(refused),
        }
    }
}

/// The families whose tables a batch needs.
fn needed(batch: &Batch) -> BTreeSet<Family> {
    let plans = batch.services.iter().filter_map(|(_, plan)| plan.as_deref());
    let of_services = plans.flat_map(|plan| &plan.ports).map(|port| port.family);
    let cidrs = batch.node.iter().flat_map(|node| &node.service_cidrs);
    of_services.chain(cidrs.map(|cidr| Family::of(cidr.ip()))).collect()
}

/// What a family's table holds of the node from the first moment on. With the ServiceCIDRs in force, an address that has no
/// Service yet is dropped: where the node `follows` the Services of the same batch, they come with it.
fn first_elements(
    family: Family,
    node: &NodePlan,
    follows: bool,
) -> impl Iterator<Item = (Family, Set, Vec<Element>)> {
    let comes_later = move |set| follows && set == Set::ServiceCidrs;
    node_elements(node).into_iter().filter(move |(of, set, _)| *of == family && !comes_later(*set))
}

/// The sets that belong to the node rather than to Services, and what is wanted in them.
pub(super) fn node_elements(node: &NodePlan) -> Vec<(Family, Set, Vec<Element>)> {
    let mut sets = Vec::new();
    for family in Family::ALL {
        let of_family = node.nodeport_addresses.iter().filter(|address| Family::of(**address) == family);
        let addresses = of_family.map(|address| Element {
            place: Place { family, set: Set::NodeportIps, key: Key::address(*address) },
            data: None,
            comment: None,
        });
        sets.push((family, Set::NodeportIps, addresses.collect()));
        sets.push((family, Set::ServiceCidrs, ranges(Set::ServiceCidrs, family, &node.service_cidrs)));
        sets.push((family, Set::PodCidrs, ranges(Set::PodCidrs, family, &node.pod_cidrs)));
    }
    sets
}

/// The families that have a table.
///
/// # Errors
/// [`NftablesError::ReadBack`].
pub(super) fn installed(netlink: &mut Netlink) -> Result<BTreeSet<Family>, NftablesError> {
    let mut families = BTreeSet::new();
    for family in Family::ALL {
        let found = again(|| netlink.table(&c_name(TABLE), family)).map_err(NftablesError::ReadBack)?;
        families.extend(found.map(|_| family));
    }
    Ok(families)
}

/// Puts the constant part of one family's table into a transaction: what exists stays, but for sets that are outdated and
/// the rules of chains that are not `right`.
pub(super) fn ruleset(
    transaction: &mut Transaction<Owner>,
    family: Family,
    chains: &[rules::Chain],
    right: &BTreeSet<String>,
    outdated: &Outdated,
) {
    let owner = Owner::Ruleset;
    let table = transaction.table(family);
    transaction.object(&table, MsgType::Add, owner);
    // A set goes only when no rule names it.
    for chain in &outdated.chains {
        transaction.empty_chain(chain, family, owner);
    }
    for (set, _) in &outdated.sets {
        transaction.whole_set(libc::NFT_MSG_DELSET, set.name(), family, owner);
    }
    for set in Set::ALL {
        transaction.set(set, family, owner);
    }
    for (_, elements) in &outdated.sets {
        transaction.add_all(elements, owner);
    }
    for spec in chains {
        transaction.object(&chain(spec, &table), MsgType::Add, owner);
    }
    for spec in chains.iter().filter(|spec| !right.contains(&spec.name)) {
        transaction.rules(&chain(spec, &table), spec, family, owner);
    }
}

/// Writes anew those chains whose rules differ between two policies.
pub(super) fn rewrite(
    transaction: &mut Transaction<Owner>,
    family: Family,
    old: &Policy,
    new: &Policy,
    owner: Owner,
) {
    if old == new {
        return;
    }
    let table = table(family);
    let by_name = |policy| rules::chains(family, policy).into_iter().map(|spec| (spec.name.clone(), spec));
    let (mut old, new): (BTreeMap<_, _>, BTreeMap<_, _>) = (by_name(old).collect(), by_name(new).collect());
    for spec in new.iter().filter(|(name, _)| !old.contains_key(*name)).map(|(_, spec)| spec) {
        transaction.object(&chain(spec, &table), MsgType::Add, owner);
    }
    for (name, spec) in &new {
        if old.remove(name).as_ref() != Some(spec) {
            transaction.rules(&chain(spec, &table), spec, family, owner);
        }
    }
    // Nothing leads there any more.
    for name in old.keys() {
        transaction.empty_chain(name, family, owner);
        transaction.delete_chain(name, family, owner);
    }
}

/// The seconds in an element of `affinity-timeouts`.
fn timeout(place: &Place) -> Option<NonZeroU32> {
    NonZeroU32::new(u32::from_ne_bytes(*place.key.as_bytes().last_chunk()?))
}

pub(super) fn chain<'a>(spec: &rules::Chain, table: &'a nftnl::Table) -> nftnl::Chain<'a> {
    let mut chain = nftnl::Chain::new(c_name(&spec.name), table);
    if let Some(base) = spec.base {
        chain.set_type(base.kind);
        chain.set_hook(base.hook, base.priority);
        chain.set_policy(nftnl::Policy::Accept);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::input::{Protocol, ServiceKey};
    use crate::model::plan::{Plan, PortPlan};

    #[test]
    fn services_and_service_cidrs_need_a_table() {
        let service = |families: &[Family]| {
            let ports = families.iter().map(|family| PortPlan::new(*family, Protocol::Tcp, "http"));
            let key = ServiceKey::new("default", "web");
            (key.clone(), Some(Plan::new(key, ports.collect::<Vec<_>>()).into()))
        };
        let needs = |node: NodePlan, services| {
            needed(&Batch { node: Some(node), services, sweep: true }).into_iter().collect::<Vec<_>>()
        };
        let node = NodePlan {
            nodeport_addresses: vec!["192.168.77.1".parse().unwrap(), "fd00:77::1".parse().unwrap()],
            pod_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/56".parse().unwrap()],
            ..NodePlan::default()
        };
        let of_v6 = NodePlan { service_cidrs: vec!["fd00:96::/108".parse().unwrap()], ..node.clone() };
        assert_eq!(needs(node.clone(), vec![]), []);
        assert_eq!(needs(node.clone(), vec![(ServiceKey::new("default", "web"), None)]), []);
        assert_eq!(needs(node.clone(), vec![service(&[Family::V4])]), [Family::V4]);
        assert_eq!(needs(node, vec![service(&[Family::V6, Family::V4])]), Family::ALL);
        assert_eq!(needs(of_v6.clone(), vec![]), [Family::V6]);
        assert_eq!(needs(of_v6, vec![service(&[Family::V4])]), Family::ALL);
    }

    #[test]
    fn service_cidrs_do_not_come_before_the_services_that_come_with_them() {
        let node = NodePlan {
            nodeport_addresses: vec!["192.168.77.1".parse().unwrap(), "fd00:77::1".parse().unwrap()],
            pod_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            service_cidrs: vec!["10.96.0.0/12".parse().unwrap(), "fd00:96::/108".parse().unwrap()],
            ..NodePlan::default()
        };
        let sets = |follows| {
            let sets = first_elements(Family::V4, &node, follows);
            sets.filter(|(.., wanted)| !wanted.is_empty()).map(|(_, set, _)| set).collect::<Vec<_>>()
        };
        assert_eq!(sets(true), [Set::NodeportIps, Set::PodCidrs]);
        assert_eq!(sets(false), [Set::NodeportIps, Set::ServiceCidrs, Set::PodCidrs]);
    }
}
