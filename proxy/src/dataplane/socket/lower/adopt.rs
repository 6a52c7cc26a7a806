//! What an earlier run left in the maps: what of it is sound, and what is put right.
//!
//! An agent may have been killed between any two writes, so a set may name a backend twice and a backend may claim to be
//! where it is not: that is mended. Whatever no such end explains is not trusted: its frontends are withdrawn. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use kube_lane_common::{Backend, Frontend, FrontendKey, Member, PortWord, Set, Slot, TCP, UDP};

use super::super::write::{Found, Sizes, Write};
use super::ids::{Ids, Range, Ranges, Retired};
use super::image::{Edit, Image, Placed};
use super::members::{self, Both};
use crate::model::plan::{self, AddressPort, FrontendAddress, FrontendKind, PortPlan, Verdict};

/// A port of an earlier run that no Service has claimed yet.
#[derive(Debug)]
pub(super) struct FoundPort {
    pub(super) affinity: PortWord,
    pub(super) frontends: Vec<FrontendKey>,
    pub(super) sets: Both<Placed>,
    /// Its backends and their ids, sorted by address.
    pub(super) members: Vec<(members::Member, u32)>,
}

impl FoundPort {
    /// The plan that it had, as far as it can be told: the name is that of the port which claims it.
    pub(super) fn plan(&self, claims: &PortPlan) -> PortPlan {
        let backends = |set: usize| {
            let members = self.members.iter().filter(move |(member, _)| member.within[set]);
            members.map(|(member, _)| plan::Backend { address: member.address, local: false }).collect()
        };
        PortPlan {
            backends: backends(0),
            local_backends: backends(1),
            frontends: self.frontends.iter().map(frontend).collect(),
            ..PortPlan::new(claims.family, claims.protocol, Arc::clone(&claims.name))
        }
    }
}

/// A frontend by its key; kind and verdict are not told apart in the maps.
fn frontend(key: &FrontendKey) -> plan::Frontend {
    let (ip, port) = (IpAddr::from(key.address), key.port.to_host());
    let at = match ip.is_unspecified() {
        true => FrontendAddress::NodePort(port),
        false => FrontendAddress::Vip(AddressPort { ip, port }),
    };
    plan::Frontend { at, kind: FrontendKind::ClusterIp, verdict: Verdict::Cluster }
}

/// What an earlier run left that is sound.
pub(super) fn adopt(
    found: Found,
    sizes: Sizes,
    sink: &mut dyn FnMut(Write),
) -> (Image, BTreeMap<u32, FoundPort>) {
    let mut ranges = Ranges::new(sizes.slots);
    let mut ports = BTreeMap::new();
    let mut stale = Vec::new();
    for (id, frontends) in by_port(&found, sizes, &mut stale) {
        match port(id, &frontends, &found, sizes, &mut ranges) {
            Some(port) => drop(ports.insert(id, port)),
            None => stale.extend(frontends.iter().map(|(key, _)| *key)),
        }
    }
    let backends = ports.values().flat_map(|port: &FoundPort| port.members.iter().map(|(_, id)| *id));
    let mut image = Image {
        sizes,
        frontends: found.frontends.iter().copied().collect(),
        node_addresses: found.node_addresses.iter().map(|address| IpAddr::from(*address)).collect(),
        slots: found.slots.iter().map(|slot| slot.backend()).collect(),
        ports: Ids::new(sizes.ports, &ports.keys().copied().collect()),
        backends: Ids::new(sizes.backends, &backends.collect()),
        ranges,
        retired: Retired::default(),
    };
    let mut edit = Edit { image: &mut image, sink };
    stale.into_iter().for_each(|key| edit.frontend(key, None));
    mend(&mut ports, &found, &mut edit);
    (image, ports)
}

/// The frontends that lead to each port; those that lead nowhere are stale.
fn by_port(
    found: &Found,
    sizes: Sizes,
    stale: &mut Vec<FrontendKey>,
) -> BTreeMap<u32, Vec<(FrontendKey, Frontend)>> {
    let mut ports: BTreeMap<u32, Vec<_>> = BTreeMap::new();
    for (key, word) in &found.frontends {
        let port = Set::port_of(word.set());
        let known = word.fingerprint() == key.fingerprint() && [TCP, UDP].contains(&key.protocol);
        if known && (1..=sizes.ports).contains(&port) {
            ports.entry(port).or_default().push((*key, *word));
        } else {
            stale.push(*key);
        }
    }
    ports
}

/// A port that some frontends lead to; `None`: what there is of it does not fit together.
fn port(
    id: u32,
    frontends: &[(FrontendKey, Frontend)],
    found: &Found,
    sizes: Sizes,
    ranges: &mut Ranges,
) -> Option<FoundPort> {
    let (first, _) = frontends.first()?;
    let alike =
        |key: &FrontendKey| key.protocol == first.protocol && key.address.is_v4() == first.address.is_v4();
    if !frontends.iter().all(|(key, _)| alike(key)) {
        return None;
    }
    let mut taken = Vec::new();
    let port = sets(id, frontends, found, sizes, ranges, &mut taken).and_then(|(sets, within)| {
        let is_v4 = first.address.is_v4();
        let of = |(backend, within): (u32, Both<bool>)| {
            let Backend { address, port, .. } = *found.backends.get(backend as usize)?;
            let address = AddressPort { ip: address.into(), port: port.to_host() };
            (address.ip.is_ipv4() == is_v4).then_some((members::Member { address, within }, backend))
        };
        let mut members = within.into_iter().map(of).collect::<Option<Vec<_>>>()?;
        members.sort_unstable_by_key(|(member, _)| member.address);
        let unique = members.is_sorted_by(|(a, _), (b, _)| a.address < b.address);
        let affinity = found.ports.get(id as usize).copied().unwrap_or(PortWord::new(0));
        let frontends = frontends.iter().map(|(key, _)| *key).collect();
        unique.then_some(FoundPort { affinity, frontends, sets, members })
    });
    if port.is_none() {
        ranges.give_back(taken);
    }
    port
}

/// Which sets each backend is in, by its id.
type Within = BTreeMap<u32, Both<bool>>;

/// Where a port's sets lie, and which of them each of its backends is in.
fn sets(
    id: u32,
    frontends: &[(FrontendKey, Frontend)],
    found: &Found,
    sizes: Sizes,
    ranges: &mut Ranges,
    taken: &mut Vec<Range>,
) -> Option<(Both<Placed>, Within)> {
    let mut placed = [Placed::NOWHERE; 2];
    let mut within = Within::new();
    for (i, set) in [Set::cluster_of(id), Set::local_of(id)].into_iter().enumerate() {
        let word = found.sets.get(set as usize).copied().unwrap_or(Set::NONE);
        // A set that nobody is led to may be half written.
        if !frontends.iter().any(|(_, frontend)| frontend.set() == set) {
            continue;
        }
        placed[i] = Placed::nowhere(word);
        if word.count() == 0 {
            if word != Set::NONE && word != Set::REFUSED {
                return None;
            }
            continue;
        }
        let range = Range { first: word.first(), order: Range::order_for(word.count()) };
        if word != Set::new(word.first(), word.count()) || !ranges.take_at(range) {
            return None;
        }
        taken.push(range);
        placed[i] = Placed::within(range, word.count());
        let slots = found.slots.get(word.first() as usize..)?.get(..word.count() as usize)?;
        for slot in slots {
            let backend = slot.backend();
            let owner = found.backends.get(backend as usize).map(|backend| backend.owner);
            if *slot != Slot::new(backend, set)
                || owner != Some(id)
                || !(1..=sizes.backends).contains(&backend)
            {
                return None;
            }
            within.entry(backend).or_default()[i] = true;
        }
    }
    Some((placed, within))
}

/// Mends what a killed agent left half done.
fn mend(ports: &mut BTreeMap<u32, FoundPort>, found: &Found, edit: &mut Edit<'_>) {
    for (id, port) in ports.iter_mut() {
        for (set, placed) in [Set::cluster_of(*id), Set::local_of(*id)].into_iter().zip(&mut port.sets) {
            forget_doubles(set, placed, edit);
        }
    }
    for (id, word) in (0u32..).zip(&found.sets) {
        let port = ports.get(&Set::port_of(id));
        let wanted = port.map_or(Set::NONE, |port| port.sets[(id & 1) as usize].word);
        // Those of the ports above have been mended.
        if *word != wanted && wanted == Set::NONE {
            edit.write(Write::Set(id, Set::NONE));
        }
    }
    let members = ports.iter().flat_map(|(id, port)| {
        port.members
            .iter()
            .map(|(member, backend)| (*backend, Member::new(*id, member.within[0], member.within[1])))
    });
    let members: HashMap<_, _> = members.collect();
    let end = found.members.len().max(found.backends.len()) as u32;
    for id in 0..end {
        let wanted = members.get(&id).copied().unwrap_or(Member::NONE);
        if found.members.get(id as usize).copied().unwrap_or(Member::NONE) != wanted {
            edit.write(Write::Member(id, wanted));
        }
    }
}

/// Where a set names a backend twice, a removal was about to shorten it: the later ones go.
fn forget_doubles(set: u32, placed: &mut Placed, edit: &mut Edit<'_>) {
    let mut seen = BTreeSet::new();
    let mut position = 0;
    while position < placed.word.count() {
        let backend = edit.image.slots[(placed.word.first() + position) as usize];
        if seen.insert(backend) {
            position += 1;
        } else {
            edit.shorten(set, placed, position);
        }
    }
}
