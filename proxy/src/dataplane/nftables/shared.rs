//! Elements that several Services may want: each exists as long as one of them does.
//!
//! Pure: counts who wants what. Never knows which Service it was.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU32;

use super::element::{Element, Key, Place};
use super::schema::Set;
use crate::model::input::Family;
use crate::model::plan::{Frontend, FrontendAddress, FrontendKind, PortPlan};

/// An element that several Services may want.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Shared {
    /// A cluster IP in use.
    ClusterIp(IpAddr),
    /// A local backend, which may dial itself through the Service.
    Hairpin(IpAddr),
    /// A timeout of session affinity, in seconds: what it stands for is a chain.
    Timeout(Family, NonZeroU32),
}

impl Shared {
    /// The element it stands for.
    pub(crate) fn place(self) -> Option<Place> {
        let (address, set, key) = match self {
            Self::ClusterIp(address) => (address, Set::ClusterIps, Key::address(address)),
            Self::Hairpin(address) => (address, Set::Hairpin, Key::to_itself(address)),
            Self::Timeout(..) => return None,
        };
        Some(Place { family: Family::of(address), set, key })
    }
}

/// What one port wants once more and once less than before, in terms of [`SharedCounts`].
#[derive(Debug, Default)]
pub(crate) struct SharedChange {
    /// What it no longer wants.
    pub(crate) lost: Vec<Shared>,
    /// What it wants from now on.
    pub(crate) gained: Vec<Shared>,
}

impl SharedChange {
    /// Adds what leads from one port to another.
    pub(crate) fn between(&mut self, old: Option<&PortPlan>, new: Option<&PortPlan>) {
        wanted(old, new, &mut self.lost);
        wanted(new, old, &mut self.gained);
    }
}

/// What `port` wants and `other` does not.
fn wanted(port: Option<&PortPlan>, other: Option<&PortPlan>, out: &mut Vec<Shared>) {
    let Some(port) = port else { return };
    let backends = [
        (&port.backends, other.map(|other| &*other.backends)),
        (&port.local_backends, other.map(|other| &*other.local_backends)),
    ];
    for (mine, others) in backends {
        let local = only_in(mine, others.unwrap_or_default()).filter(|backend| backend.local);
        out.extend(local.map(|backend| Shared::Hairpin(backend.address.ip)));
    }
    let others = other.map(|other| &*other.frontends).unwrap_or_default();
    out.extend(only_in(&port.frontends, others).filter_map(cluster_ip));
}

fn cluster_ip(frontend: &Frontend) -> Option<Shared> {
    match (frontend.kind, frontend.at) {
        (FrontendKind::ClusterIp, FrontendAddress::Vip(address)) => Some(Shared::ClusterIp(address.ip)),
        _ => None,
    }
}

/// What the first of two sorted lists has and the second has not.
pub(crate) fn only_in<'a, T: Ord>(these: &'a [T], others: &'a [T]) -> impl Iterator<Item = &'a T> {
    let mut others = others.iter().peekable();
    these.iter().filter(move |item| {
        while others.next_if(|other| other < item).is_some() {}
        others.peek() != Some(item)
    })
}

/// How often each shared element is wanted, as committed.
#[derive(Debug, Default)]
pub(crate) struct SharedCounts(BTreeMap<Shared, u32>);

impl SharedCounts {
    /// Which elements appear and vanish when Services lose and gain these.
    pub(crate) fn preview(&self, delta: &BTreeMap<Shared, i64>) -> (Vec<Place>, Vec<Element>) {
        let (mut removed, mut added) = (Vec::new(), Vec::new());
        for (shared, change) in delta {
            let before = i64::from(self.0.get(shared).copied().unwrap_or(0));
            let Some(place) = shared.place() else { continue };
            match (before > 0, before + change > 0) {
                (true, false) => removed.push(place),
                (false, true) => added.push(Element { place, data: None, comment: None }),
                _ => {}
            }
        }
        (removed, added)
    }

    /// The timeouts of session affinity that there are in a family when Services have lost and gained these.
    pub(crate) fn timeouts(&self, family: Family, delta: &BTreeMap<Shared, i64>) -> BTreeSet<NonZeroU32> {
        let all = Shared::Timeout(family, NonZeroU32::MIN)..=Shared::Timeout(family, NonZeroU32::MAX);
        let known = self.0.range(all.clone()).map(|(shared, _)| shared);
        let concerned = known.chain(delta.range(all).map(|(shared, _)| shared));
        let is_wanted = |shared: &&Shared| {
            let before = i64::from(self.0.get(shared).copied().unwrap_or(0));
            before + delta.get(shared).copied().unwrap_or(0) > 0
        };
        let timeout = |shared: &Shared| match shared {
            Shared::Timeout(_, timeout) => Some(*timeout),
            Shared::ClusterIp(_) | Shared::Hairpin(_) => None,
        };
        concerned.filter(is_wanted).filter_map(timeout).collect()
    }

    /// Takes a committed change over.
    pub(crate) fn commit(&mut self, delta: &BTreeMap<Shared, i64>) {
        for (shared, change) in delta {
            let count = self.0.entry(*shared).or_default();
            *count = u32::try_from(i64::from(*count) + change).unwrap_or(0);
            if *count == 0 {
                self.0.remove(shared);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_elements_live_as_long_as_somebody_wants_them() {
        let address = "10.1.0.1".parse().unwrap();
        let mut counts = SharedCounts::default();
        let change = |n| BTreeMap::from([(Shared::Hairpin(address), n)]);
        assert_eq!(counts.preview(&change(2)).1.len(), 1);
        counts.commit(&change(2));
        assert_eq!(counts.preview(&change(-1)), (vec![], vec![]));
        counts.commit(&change(-1));
        assert_eq!(counts.preview(&change(-1)).0.len(), 1);
    }

    #[test]
    fn differences_of_sorted_lists() {
        let only = |a: &[u8], b: &[u8]| only_in(a, b).copied().collect::<Vec<_>>();
        assert_eq!(only(&[1, 2, 5, 7], &[0, 2, 6, 7]), [1, 5]);
        assert!(only(&[], &[1]).is_empty());
        assert_eq!(only(&[1, 2], &[]), [1, 2]);
    }
}
