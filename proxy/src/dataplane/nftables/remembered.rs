//! What the maps of session affinity remember: which entries stay, go, move or live for another time.
//!
//! Pure: from what was read of a port's maps to edits of them. Never does I/O: [`super::commit`] reads and commits.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::affinity::Port;
use super::element::Key;
use super::object::{Object, Scope};
use crate::model::plan::AddressPort;

/// A client that is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its address.
    pub(crate) client: Key,
    /// The backend that it is led to.
    pub(crate) backend: AddressPort,
    /// For how long it is remembered after a new connection.
    pub(crate) timeout: Duration,
    /// How long from now it is remembered still.
    pub(crate) expires: Duration,
}

/// A change of one map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Edits {
    /// The map.
    pub(crate) map: Object,
    /// Entries that go.
    pub(crate) forgotten: Vec<Entry>,
    /// Entries that come, after the others have gone.
    pub(crate) remembered: Vec<Entry>,
}

impl Edits {
    /// How many elements it removes and adds.
    pub(crate) fn count(&self) -> (usize, usize) {
        (self.forgotten.len(), self.remembered.len())
    }
}

impl Entry {
    /// The same with another timeout, counted from the same new connection; `None`: it is over by then.
    fn living(&self, timeout: Duration) -> Option<Self> {
        let age = self.timeout.saturating_sub(self.expires);
        let expires = timeout.checked_sub(age).filter(|left| *left >= Duration::from_millis(1))?;
        Some(Self { timeout, expires, ..self.clone() })
    }
}

/// What has to change in the maps of `port`, where `held` is in its maps now. An endpoint set that it uses from now on
/// takes over what the other knows.
pub(crate) fn edits(port: &Port<'_>, held: &BTreeMap<Object, Vec<Entry>>) -> Vec<Edits> {
    let timeout = Duration::from_secs(u64::from(port.timeout.get()));
    let entries = |map: &Object| held.get(map).map(Vec::as_slice).unwrap_or_default();
    let mut changes = BTreeMap::new();
    for scope in port.scopes() {
        let usable = |entry: &&Entry| port.has(scope, entry.backend);
        let mut known = BTreeSet::new();
        for map in port.maps(scope) {
            let mut edits = Edits { forgotten: Vec::new(), remembered: Vec::new(), map };
            for entry in entries(&edits.map) {
                if usable(&entry) && entry.timeout == timeout {
                    known.insert(entry.client);
                    continue;
                }
                edits.forgotten.push(entry.clone());
                let living = Some(entry).filter(usable).and_then(|entry| entry.living(timeout));
                known.extend(living.as_ref().map(|entry| entry.client));
                edits.remembered.extend(living);
            }
            changes.insert(edits.map.clone(), edits);
        }
        for target in port.targets(scope) {
            let others = entries(&port.map(scope.other(), target)).iter();
            let others = others.filter(usable).filter(|entry| !known.contains(&entry.client));
            if let Some(edits) = changes.get_mut(&port.map(scope, target)) {
                edits.remembered.extend(others.filter_map(|entry| entry.living(timeout)));
            }
        }
    }
    changes.into_values().filter(|edits| edits.count() != (0, 0)).collect()
}

impl Scope {
    fn other(self) -> Self {
        match self {
            Self::Cluster => Self::Local,
            Self::Local => Self::Cluster,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::num::NonZeroU32;

    use super::*;
    use crate::model::input::{Family, Protocol, ServiceKey};
    use crate::model::plan::{Backend, Frontend, Plan, PortPlan, Verdict};

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 1, 0, n], 8080))
    }

    /// A plan of one port: the Cluster set at the cluster IP, and `nodeport` at the NodePort.
    fn plan(timeout: u32, nodeport: Verdict, cluster: &[u8], local: &[u8]) -> Plan {
        let backends = |set: &[u8]| {
            set.iter().map(|n| Backend { address: address(*n).into(), local: false }).collect::<Box<[_]>>()
        };
        let port = PortPlan {
            affinity: NonZeroU32::new(timeout),
            backends: backends(cluster),
            local_backends: backends(local),
            frontends: [
                Frontend::cluster_ip(SocketAddr::from(([10, 96, 0, 1], 80)), Verdict::Cluster),
                Frontend::nodeport(1, nodeport),
            ]
            .into(),
            ..PortPlan::new(Family::V4, Protocol::Tcp, "")
        };
        let service = ServiceKey::new("default", "web");
        Plan::new(service, [port])
    }

    /// A client of this number, led to the backend, so many seconds after its last connection.
    fn entry(client: u8, backend: u8, timeout: u64, age: u64) -> Entry {
        Entry {
            client: Key::address([192, 168, 0, client].into()),
            backend: address(backend).into(),
            timeout: Duration::from_secs(timeout),
            expires: Duration::from_secs(timeout - age),
        }
    }

    fn edits_of(plan: &Plan, held: &[(Scope, Vec<Entry>)]) -> Vec<Edits> {
        let port = Port::new(plan, &plan.ports[0]).unwrap();
        let held = held.iter().map(|(scope, entries)| (port.map(*scope, 8080), entries.clone())).collect();
        edits(&port, &held)
    }

    #[test]
    fn only_entries_of_backends_that_left_go() {
        let plan = plan(100, Verdict::Cluster, &[1, 3], &[]);
        let gone = entry(2, 2, 100, 0);
        let held = vec![entry(1, 1, 100, 5), gone.clone(), entry(3, 3, 100, 99)];
        let edits = edits_of(&plan, &[(Scope::Cluster, held)]);
        assert_eq!(edits.len(), 1);
        assert_eq!((&edits[0].forgotten, &edits[0].remembered), (&vec![gone], &vec![]));
    }

    #[test]
    fn another_timeout_counts_from_the_last_connection() {
        let held = vec![entry(1, 1, 100, 5), entry(2, 1, 100, 50), entry(3, 1, 10, 0)];
        for (timeout, left) in [(200, vec![(1, 195), (2, 150), (3, 200)]), (10, vec![(1, 5)])] {
            let plan = plan(timeout, Verdict::Cluster, &[1], &[]);
            let edits = edits_of(&plan, &[(Scope::Cluster, held.clone())]);
            let expected: Vec<_> = left
                .into_iter()
                .map(|(client, left)| entry(client, 1, timeout.into(), u64::from(timeout) - left))
                .collect();
            assert_eq!(edits[0].remembered, expected, "{timeout}");
            let kept = usize::from(timeout == 10);
            assert_eq!(edits[0].forgotten.len(), held.len() - kept, "what has the timeout already stays");
        }
    }

    #[test]
    fn a_map_takes_over_what_the_other_knows_of_its_set() {
        let plan = plan(100, Verdict::Local, &[1, 2], &[1]);
        let cluster = vec![entry(1, 1, 100, 5), entry(2, 2, 100, 5)];
        let edits = edits_of(&plan, &[(Scope::Cluster, cluster.clone())]);
        assert_eq!(edits.len(), 1);
        assert_eq!((&edits[0].forgotten, &edits[0].remembered), (&vec![], &vec![entry(1, 1, 100, 5)]));
        // Its own memory counts first, unless that backend left.
        let local = vec![entry(1, 1, 100, 9), entry(2, 3, 100, 1)];
        let edits = edits_of(&plan, &[(Scope::Cluster, cluster), (Scope::Local, local)]);
        assert_eq!((&edits[0].forgotten, &edits[0].remembered), (&vec![entry(2, 3, 100, 1)], &vec![]));
    }

    #[test]
    fn an_equal_state_needs_nothing() {
        let plan = plan(100, Verdict::Local, &[1, 2], &[1]);
        let both = |scope| (scope, vec![entry(1, 1, 100, 5)]);
        assert!(edits_of(&plan, &[both(Scope::Cluster), both(Scope::Local)]).is_empty());
        assert!(edits_of(&plan, &[]).is_empty());
    }
}
