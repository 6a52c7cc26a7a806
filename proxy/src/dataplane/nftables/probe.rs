//! Whether this kernel takes our ruleset, found by having it check all of it.
//!
//! Owns tables of a name of their own, which never come into being: neither what is there nor an agent that runs is
//! concerned.

use std::collections::BTreeSet;
use std::num::NonZeroU32;

use super::failure::{Owner, fatal};
use super::netlink::Netlink;
use super::observe::Outdated;
use super::rules::chains;
use super::tables::ruleset;
use super::{NftablesError, Settings};
use crate::model::input::Family;

/// What the table would be called.
const TABLE: &str = "kube-lane-check";

/// Has the kernel check the whole constant ruleset of one family, in this network namespace, with the rights that an agent
/// needs.
///
/// # Errors
/// [`NftablesError::Ruleset`], where the kernel would not take it; [`NftablesError::Socket`].
pub fn try_ruleset(settings: &Settings, family: Family) -> Result<(), NftablesError> {
    let mut netlink = Netlink::open(settings.count_connections)?;
    let mut transaction = netlink.begin::<Owner>().into_tables(TABLE);
    // As with session affinity, of the timeout that is Kubernetes' default.
    let timeouts = NonZeroU32::new(10_800).into_iter().collect();
    let chains = chains(family, &settings.policy(true, timeouts));
    ruleset(&mut transaction, family, &chains, &BTreeSet::new(), &Outdated::default());
    netlink.check(&mut transaction).map_err(|error| fatal(error, NftablesError::Ruleset))
}
