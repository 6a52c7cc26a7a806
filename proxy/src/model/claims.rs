//! Which Service owns an address:port/protocol or a port of the node that several ask for.
//!
//! Owns the ranking: the agent's own ports first, then the static origin, then the oldest `creationTimestamp`, then
//! `namespace/name`. A claim is held by what a Service asks for, whatever its endpoints, and does not know which field
//! asked: NodePorts and health check ports are in one space. A change costs what the claims of the changed Service
//! cost; where the owner of a claim changes, it also costs the Services whose warnings name the owner. Never plans: it
//! says whose plan to look at again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use smallvec::SmallVec;

use super::input::{Family, Origin, Protocol, Service, ServiceKey};
use super::plan::FrontendAddress;

/// What only one Service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Claim {
    /// An address and port.
    Vip(Protocol, IpAddr, u16),
    /// A port of the node: a NodePort or, in TCP, a `healthCheckNodePort`.
    NodePort(Protocol, Family, u16),
}

/// Who has what another asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner<'a> {
    /// One of the agent's own servers.
    Agent(&'static str),
    /// A Service.
    Service(&'a ServiceKey),
}

impl std::fmt::Display for Owner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Agent(server) => write!(f, "the agent's own {server} server"),
            Self::Service(service) => write!(f, "Service {service}"),
        }
    }
}

impl Claim {
    pub(super) fn new(protocol: Protocol, family: Family, at: FrontendAddress) -> Self {
        match at {
            FrontendAddress::Vip(address) => Self::Vip(protocol, address.ip, address.port),
            FrontendAddress::NodePort(port) => Self::NodePort(protocol, family, port),
        }
    }
}

impl std::fmt::Display for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Vip(protocol, ip, port) => write!(f, "{}/{protocol}", SocketAddr::new(ip, port)),
            Self::NodePort(protocol, family, port) => write!(f, "NodePort {port}/{protocol} ({family})"),
        }
    }
}

/// A Service and its rank: the least comes first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claimant {
    origin: Origin,
    created: i64,
    service: ServiceKey,
}

impl Claimant {
    pub(super) fn new(origin: Origin, service: &Service) -> Self {
        Self { origin, created: service.created, service: service.key.clone() }
    }
}

/// All that Services ask for, and who asks, by rank.
#[derive(Debug, Default)]
pub(super) struct Claims(BTreeMap<Claim, SmallVec<[Claimant; 1]>>);

impl Claims {
    /// The Service that has this claim in place of this one; `None`: this one has it.
    pub(super) fn owner(&self, claim: &Claim, claimant: &Claimant) -> Option<&ServiceKey> {
        let first = self.0.get(claim)?.first()?;
        (first != claimant).then_some(&first.service)
    }

    /// One Service asks for `after` where it asked for `before`. The other Services for which the owner of a claim has
    /// changed are added to `dirty`.
    pub(super) fn replace(
        &mut self,
        before: Option<&(Claimant, BTreeSet<Claim>)>,
        after: Option<&(Claimant, BTreeSet<Claim>)>,
        dirty: &mut BTreeSet<ServiceKey>,
    ) {
        if let Some((claimant, claims)) = before {
            for claim in claims.iter().filter(|claim| !holds(after, claimant, claim)) {
                self.withdraw(claim, claimant, dirty);
            }
        }
        if let Some((claimant, claims)) = after {
            for claim in claims.iter().filter(|claim| !holds(before, claimant, claim)) {
                self.ask(*claim, claimant, dirty);
            }
        }
    }

    /// Rebuilds the map with full nodes: the first claims leave them half empty.
    pub(super) fn pack(&mut self) {
        self.0 = std::mem::take(&mut self.0).into_iter().collect();
    }

    fn ask(&mut self, claim: Claim, claimant: &Claimant, dirty: &mut BTreeSet<ServiceKey>) {
        let claimants = self.0.entry(claim).or_default();
        if let Err(rank) = claimants.binary_search(claimant) {
            if rank == 0 {
                dirty.extend(claimants.iter().map(|other| other.service.clone()));
            }
            claimants.insert(rank, claimant.clone());
        }
    }

    fn withdraw(&mut self, claim: &Claim, claimant: &Claimant, dirty: &mut BTreeSet<ServiceKey>) {
        let Some(claimants) = self.0.get_mut(claim) else { return };
        if let Ok(rank) = claimants.binary_search(claimant) {
            claimants.remove(rank);
            if rank == 0 {
                dirty.extend(claimants.iter().map(|other| other.service.clone()));
            }
        }
        if claimants.is_empty() {
            self.0.remove(claim);
        }
    }
}

fn holds(side: Option<&(Claimant, BTreeSet<Claim>)>, claimant: &Claimant, claim: &Claim) -> bool {
    side.is_some_and(|(holder, claims)| holder == claimant && claims.contains(claim))
}
