//! The nftables dataplane: a constant ruleset in our own tables, a handful of elements for each Service.
//!
//! Owns the tables `ip kube-lane` and `ip6 kube-lane`, each from the first Service or ServiceCIDR of its family on, and the mark's,
//! `ip kube-lane-socket`. Never touches any other table, never runs `nft`, never lists a table to make a change. One Service that
//! the kernel refuses is left out; the others go in.
//!
//! | file | owns |
//! |---|---|
//! | `schema`, `rules`, `expr` | the constant part: sets, chains and rules as data, and libnftnl's form of them |
//! | `fingerprint` | what tells that a chain is right as it is |
//! | `tables` | which families have a table; the constant part as messages |
//! | `element`, `lower`, `shared` | a Service's part: elements, and what a change adds and removes (pure) |
//! | `affinity`, `affinity_rules` | session affinity: the numbers of ports and members, and the rules (pure) |
//! | `readings`, `counters` | what elements have counted, and whose that is (pure) |
//! | `message`, `bulk`, `parse`, `netlink` | transactions as netlink messages, what the kernel says, the socket, refusals |
//! | `failure` | what it means that a transaction failed |
//! | `kernel`, `observe`, `picks`, `monitor` | reading the truth back, by which keys (pure), noticing foreign changes |
//! | `mark` | a table beside ours that says that the socket layer is there |
//! | `probe` | having the kernel check the ruleset |
//! | `commit` | one batch: parts, refusals, retries |

mod affinity;
mod affinity_rules;
mod bulk;
mod commit;
mod counters;
mod element;
mod expr;
mod failure;
mod fingerprint;
#[cfg(test)]
mod history_tests;
mod kernel;
mod lower;
mod mark;
mod message;
mod monitor;
mod netlink;
mod observe;
mod parse;
mod picks;
mod probe;
mod readings;
mod rules;
mod schema;
mod scratch;
mod shared;
mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;

use nftnl::MsgType;
use nix::errno::Errno;
use tracing::{debug, info};

use self::affinity::Ids;
use self::counters::Carried;
use self::element::Place;
use self::failure::{Failure, Owner, fatal};
use self::lower::Applied;
pub use self::mark::{Mark, Marks};
use self::message::{ELEMENTS_PER_MESSAGE, Wanted, table};
use self::monitor::Monitor;
use self::netlink::Netlink;
use self::observe::{Depth, Found};
pub use self::probe::try_ruleset;
use self::readings::Readings;
use self::rules::{Detection, Policy};
use self::schema::Set;
use self::shared::SharedCounts;
use super::{Batch, Counts, Dataplane, Outcome};
use crate::model::input::{Family, ServiceKey};
use crate::model::plan::{NodePlan, Plan};

/// What the ruleset depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// How this node's pods are told from other clients.
    pub detector: Detector,
    /// Masquerade everybody who dials a cluster IP.
    pub masquerade_all: bool,
    /// Count new connections to each backend, and refusals. It costs memory on each processor for each element that
    /// counts, and slows loading.
    pub count_connections: bool,
    /// Drop forwarded packets that belong to no connection as conntrack knows it: untranslated they would reach a client
    /// that knows nothing of them.
    pub drop_invalid: bool,
}

impl Settings {
    /// What the rules of one family depend on; `pod_cidrs`: whether its set of them has any.
    /// `timeouts`: those of session affinity, in seconds.
    fn policy(&self, pod_cidrs: bool, timeouts: BTreeSet<NonZeroU32>) -> Policy {
        let detection = match &self.detector {
            Detector::PodCidrs if pod_cidrs => Detection::PodCidrs,
            Detector::None | Detector::PodCidrs => Detection::None,
            Detector::Interface(name) => Detection::Interface(name.clone()),
            Detector::InterfacePrefix(prefix) => Detection::InterfacePrefix(prefix.clone()),
        };
        Policy { detection, masquerade_all: self.masquerade_all, drop_invalid: self.drop_invalid, timeouts }
    }
}

/// How this node's pods are told from other clients (`detectLocalMode`): who dials a cluster IP and is none of them is
/// masqueraded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Detector {
    /// They are not.
    #[default]
    None,
    /// By their address, in [`NodePlan::pod_cidrs`].
    PodCidrs,
    /// Their packets come in through this interface.
    Interface(String),
    /// Their packets come in through interfaces whose names begin with this.
    InterfacePrefix(String),
}

/// Why the nftables dataplane could not do anything.
#[derive(Debug, thiserror::Error)]
pub enum NftablesError {
    /// The netlink socket could not be had or failed.
    #[error("nf_tables netlink socket: {0} (kube-lane needs CAP_NET_ADMIN and a kernel with nf_tables)")]
    Socket(#[from] io::Error),
    /// Reading our tables back failed.
    #[error("reading the tables `kube-lane` back: {0}")]
    ReadBack(Errno),
    /// The kernel refused the constant part of the ruleset.
    #[error("the kernel refused the ruleset of table `kube-lane`: {0}")]
    Ruleset(String),
    /// Somebody changes our tables faster than they can be read back.
    #[error("somebody else keeps changing the tables `kube-lane`: {0}")]
    Unstable(String),
    /// The kernel refused the node's own elements.
    #[error("the kernel refused the node's elements: {0}")]
    Node(String),
}

/// The nftables dataplane.
pub struct Nftables {
    netlink: Netlink,
    monitor: Monitor,
    settings: Settings,
    /// What is programmed, by Service.
    applied: BTreeMap<ServiceKey, Applied>,
    shared: SharedCounts,
    carried: Carried,
    node: NodePlan,
    /// The numbers of ports with session affinity.
    ids: Ids,
    /// Where the node's own elements are, as programmed.
    node_places: BTreeMap<(Family, Set), BTreeSet<Place>>,
    /// The tables that are in place, and what their rules are written for.
    tables: BTreeMap<Family, Policy>,
    /// The families that the kernel takes no table of, and its words as they were said.
    refused: BTreeMap<Family, String>,
    state: State,
    /// The generation that the ruleset has if nobody but us changed it; `None` while notifications tell.
    expected_generation: Option<u32>,
}

/// What is known of the kernel.
enum State {
    /// Nothing: before the first commit, and after one that failed. All of this should be there.
    Unknown(Batch),
    /// What it holds and nobody has claimed: it stays until the sources have synced.
    Adopted(Found),
    /// It holds what was programmed and nothing else.
    Exact,
}

impl State {
    fn found(&self) -> Option<&Found> {
        match self {
            Self::Adopted(found) => Some(found),
            Self::Unknown(_) | Self::Exact => None,
        }
    }

    fn found_mut(&mut self) -> Option<&mut Found> {
        match self {
            Self::Adopted(found) => Some(found),
            Self::Unknown(_) | Self::Exact => None,
        }
    }
}

impl Nftables {
    /// Opens the dataplane of the current network namespace. The kernel is first changed by the first commit.
    ///
    /// # Errors
    /// [`NftablesError::Socket`].
    pub fn open(settings: Settings) -> Result<Self, NftablesError> {
        let netlink = Netlink::open(settings.count_connections)?;
        let monitor = Monitor::open(netlink.port())?;
        Ok(Self {
            netlink,
            monitor,
            settings,
            applied: BTreeMap::new(),
            shared: SharedCounts::default(),
            carried: Carried::default(),
            node: NodePlan::default(),
            ids: Ids::default(),
            node_places: BTreeMap::new(),
            tables: BTreeMap::new(),
            refused: BTreeMap::new(),
            state: State::Unknown(Batch::default()),
            expected_generation: None,
        })
    }

    /// A descriptor that becomes readable when somebody else may have changed our tables: then call
    /// [`Dataplane::repair`].
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.monitor.descriptor()
    }

    /// What was counted of a Service, by port of its plan; `None` where nothing counts, or it cannot be read.
    pub(super) fn counts(&mut self, plan: &Plan) -> Option<Vec<Counts>> {
        let applied = self.applied.get(&plan.service).filter(|_| self.settings.count_connections)?;
        let mut readings = Readings::default();
        for ((family, set), keys) in counters::counters(applied) {
            for keys in keys.chunks(ELEMENTS_PER_MESSAGE) {
                let read = self
                    .netlink
                    .read(family, Wanted::These(set.name(), keys), |message| readings.take(message));
                if let Err(error) = read {
                    debug!(service = %plan.service, set = set.name(), %error, "counters cannot be read");
                    return None;
                }
            }
        }
        let total = |port| self.carried.total(applied, port, &readings);
        Some(plan.ports.iter().map(total).collect())
    }

    /// A transaction of ours took effect.
    fn committed(&mut self) {
        if let Some(generation) = &mut self.expected_generation {
            *generation = generation.wrapping_add(1);
        }
    }

    /// Goes without notifications for a while, since many elements are about to be written.
    fn expect_bulk(&mut self) -> Result<(), NftablesError> {
        if self.monitor.is_subscribed() {
            self.expected_generation = Some(self.netlink.generation().map_err(NftablesError::ReadBack)?);
            self.monitor.subscribe(false)?;
        }
        Ok(())
    }

    /// Asks for notifications again; tells whether somebody else changed the ruleset in the meantime.
    fn listen(&mut self) -> Result<bool, NftablesError> {
        if self.monitor.is_subscribed() {
            return Ok(false);
        }
        self.monitor.subscribe(true)?;
        let generation = self.netlink.generation().map_err(NftablesError::ReadBack)?;
        Ok(self.expected_generation.take().is_some_and(|expected| expected != generation))
    }

    /// Asks for notifications again, and reads back once more where somebody else changed the ruleset in the meantime.
    fn listen_again(&mut self, outcome: &mut Outcome) -> Result<(), NftablesError> {
        if self.listen()? {
            outcome.absorb(self.reconcile(&Batch::default())?);
            self.listen()?;
        }
        Ok(())
    }

    /// Everything that should be programmed: what is, or is owed, with a batch on top.
    fn everything(&self, batch: &Batch) -> Batch {
        let mut services: BTreeMap<_, _> =
            self.applied.iter().map(|(key, applied)| (key.clone(), Some(applied.plan().clone()))).collect();
        let (mut owed_node, mut sweep) = (None, batch.sweep);
        match &self.state {
            State::Unknown(owed) => {
                services.extend(owed.services.iter().cloned());
                owed_node = owed.node.clone();
                sweep |= owed.sweep;
            }
            State::Adopted(_) => {}
            State::Exact => sweep = true,
        }
        services.extend(batch.services.iter().cloned());
        Batch {
            node: Some(batch.node.clone().or(owed_node).unwrap_or_else(|| self.node.clone())),
            services: services.into_iter().collect(),
            sweep,
        }
    }

    /// Whether something was committed, and what is programmed is known.
    pub(super) fn is_programmed(&self) -> bool {
        match self.state {
            State::Unknown(_) => false,
            State::Adopted(_) => !self.applied.is_empty() || self.node != NodePlan::default(),
            State::Exact => true,
        }
    }

    /// Everything that is programmed.
    pub(super) fn programmed(&self) -> Batch {
        self.everything(&Batch::default())
    }

    /// Reads the truth back, then applies everything that should be there.
    fn reconcile(&mut self, batch: &Batch) -> Result<Outcome, NftablesError> {
        let everything = self.everything(batch);
        let mut outcome = Outcome { full: true, ..Outcome::default() };
        let mut result = Ok(());
        for depth in [Depth::Reachable, Depth::Everything] {
            (outcome.failed, outcome.partly) = Default::default();
            result = self
                .adopt(depth, &mut outcome)
                .and_then(|refused| self.commit_batch(&everything, refused, &mut outcome));
            let Err(Failure::Disagreement(what)) = &result else { break };
            info!(what, ?depth, "the kernel holds something else than was read back");
        }
        let result = result.map_err(|failure| match failure {
            Failure::Disagreement(what) => NftablesError::Unstable(what),
            Failure::Error(error) => error,
        });
        if result.is_err() {
            self.state = State::Unknown(everything);
        }
        result.map(|()| outcome)
    }
}

impl Dataplane for Nftables {
    type Error = NftablesError;

    fn apply(&mut self, batch: &Batch) -> Result<Outcome, NftablesError> {
        let mut outcome = Outcome { full: self.state.found().is_some(), ..Outcome::default() };
        if let State::Unknown(_) = self.state {
            outcome = self.reconcile(batch)?;
        } else {
            match self.commit_batch(batch, BTreeMap::new(), &mut outcome) {
                Ok(()) => {}
                Err(Failure::Disagreement(what)) => {
                    info!(what, "the kernel holds something else than was programmed: reading it back");
                    (outcome.failed, outcome.partly) = Default::default();
                    outcome.absorb(self.reconcile(batch)?);
                }
                Err(Failure::Error(error)) => return Err(error),
            }
        }
        self.listen_again(&mut outcome)?;
        Ok(outcome)
    }

    fn repair(&mut self) -> Result<Option<Outcome>, NftablesError> {
        // What a repair owes that failed is tried again without another notification.
        if !self.monitor.drain()? && !matches!(self.state, State::Unknown(_)) {
            return Ok(None);
        }
        info!("somebody else changed our tables: reading them back");
        self.expect_bulk()?;
        let mut outcome = self.reconcile(&Batch::default())?;
        self.listen_again(&mut outcome)?;
        Ok(Some(outcome))
    }
}

/// Whether there is anything of ours in the current network namespace.
///
/// # Errors
/// [`NftablesError`].
pub fn is_installed() -> Result<bool, NftablesError> {
    Ok(!tables::installed(&mut Netlink::open(false)?)?.is_empty())
}

/// Removes all that is ours from the current network namespace. Established flows lose their translation unless another
/// proxy's NAT rules are in place.
///
/// # Errors
/// [`NftablesError`].
pub fn cleanup() -> Result<(), NftablesError> {
    let mut netlink = Netlink::open(false)?;
    let mut transaction = netlink.begin::<Owner>();
    for family in tables::installed(&mut netlink)? {
        transaction.object(&table(family), MsgType::Del, Owner::Ruleset);
    }
    netlink.commit(&mut transaction).map_err(|error| fatal(error, NftablesError::Ruleset))?;
    Ok(())
}
