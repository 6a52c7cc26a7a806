//! The rules of session affinity: how a client is led back, and how it is remembered.
//!
//! Owns these chains. Never knows a Service: ports, their members and their clients are elements, and a timeout has a chain
//! of its own.
//!
//! A port with affinity has a number, and each of its backends has one: the member, which is the port's number in the upper
//! half and another in the lower. A client is remembered under (port, client) as the member that it was led to. What is
//! remembered of a member that has gone leads nowhere, since `affinity-members` has it no more, and the client's next
//! connection takes it out: a change of endpoints reads and forgets nothing.
//!
//! To search one map by what another one holds, a rule has to put that somewhere: into the packet's priority, the one place
//! that nft can print inside a concatenation and that decides nothing on the way. A packet that a device brings has none
//! (`____dev_forward_skb`), IPv4 forwarding sets it anew, and a connection's first packet alone comes by here; it leaves
//! with the priority 0.
//!
//! Of an IPv6 address a hash is the key: nft 1.0.6 puts the value of a map that a rule fills over the last bytes of a key
//! of more than 16 bytes. Two clients with one hash share what is remembered, so that each is led to a backend that it may
//! have drawn, and led back there.

use std::collections::BTreeSet;
use std::num::NonZeroU32;

use super::expr::{Expr, LookupIn, Reg, Verdict};
use super::rules::{Chain, Keys, goto, is_in, regular, then};
use super::schema::Set;
use crate::model::input::Family;

/// The half of a member's number that is the port's.
const PORT: u32 = 0xffff_0000;

/// Behind the longest key of a client.
const BEHIND_KEY: Reg = Reg(16);

/// Adds the chains of affinity: `…-affinity` lead back whom they remember and return with the others; `learn` remembers
/// where a new connection was led. There is one `remember-…` for each of the timeouts.
pub(super) fn chains(chains: &mut Vec<Chain>, keys: &Keys, timeouts: &BTreeSet<NonZeroU32>) {
    let (vip, nodeport) = (keys.vip().0, keys.nodeport().0);
    let by_vip = find_port(vip.clone(), Set::AffinityIds);
    let by_nodeport = find_port(nodeport, Set::NpAffinityIds);
    let local_only = then(vip, Set::AffinityLocalOnly, Verdict::Goto("affinity-local".into()));
    let (cluster, local) = (goto("affinity-cluster"), goto("affinity-local"));
    for (name, rules) in [
        ("vip-affinity", vec![by_vip.clone(), local_only, cluster.clone()]),
        ("vip-local-affinity", vec![by_vip, local.clone()]),
        ("np-affinity", vec![by_nodeport.clone(), cluster]),
        ("np-local-affinity", vec![by_nodeport, local]),
        ("affinity-cluster", lead_back(keys, Set::AffinityCluster, [CLUSTER.1, LOCAL.1])),
        ("affinity-local", lead_back(keys, Set::AffinityLocal, [LOCAL.1, CLUSTER.1])),
    ] {
        chains.push(regular(name, rules));
    }
    learn(chains, keys);
    for timeout in timeouts {
        chains.push(regular(&remember(*timeout), remember_rules(keys, *timeout)));
    }
    let by_timeout = timeouts.iter().map(|timeout| {
        let offset = timeout.get();
        let key = vec![Expr::Priority { reg: Reg(0) }, Expr::Random { modulus: 1, offset, reg: Reg(4) }];
        then(key, Set::AffinityTimeouts, Verdict::Goto(remember(*timeout)))
    });
    chains.push(regular("remember", by_timeout.chain([forget_priority()]).collect()));
}

/// The members of an endpoint set, and the clients that were led to one of them.
const CLUSTER: (Set, Set) = (Set::AffinityCluster, Set::AffinityClients);
const LOCAL: (Set, Set) = (Set::AffinityLocal, Set::AffinityClientsLocal);

/// The name of the chain that remembers clients for so many seconds.
fn remember(timeout: NonZeroU32) -> String {
    format!("remember-{timeout}")
}

/// `meta priority set ip daddr . meta l4proto . th dport map @affinity-ids`.
fn find_port(mut key: Vec<Expr>, ids: Set) -> Vec<Expr> {
    key.extend(into_priority(ids));
    key
}

/// Searches a map by what the registers hold from the first on, and puts what it says into the priority.
fn into_priority(map: Set) -> [Expr; 2] {
    let reg = Reg(0);
    [
        Expr::Lookup { set: LookupIn::Table(map), key: reg, data: Some(reg), invert: false },
        Expr::SetPriority { reg },
    ]
}

/// `meta priority set none`.
fn forget_priority() -> Vec<Expr> {
    vec![Expr::Immediate { bytes: vec![0; 4], reg: Reg(0) }, Expr::SetPriority { reg: Reg(0) }]
}

/// (port, client); the priority is the port or one of its members.
fn client(keys: &Keys) -> Vec<Expr> {
    let mut key = vec![Expr::Priority { reg: Reg(0) }, Expr::Mask { reg: Reg(0), bits: PORT }];
    match keys.family {
        Family::V4 => key.push(keys.source(Reg(4))),
        Family::V6 => {
            key.extend([keys.source(BEHIND_KEY), Expr::Hash { source: BEHIND_KEY, len: 16, reg: Reg(4) }]);
        }
    }
    key
}

/// Leads to the member of the set that the first map remembers of the client, or else the second: an endpoint set that a
/// port uses from now on goes on with what is remembered for the other. What the first has leads nowhere any more where the
/// last rules are reached, and rules cannot write another member over it.
fn lead_back(keys: &Keys, set: Set, [first, second]: [Set; 2]) -> Vec<Vec<Expr>> {
    let (priority, members) = (Expr::Priority { reg: Reg(0) }, LookupIn::Table(Set::AffinityMembers));
    let dnat = vec![
        priority.clone(),
        is_in(set),
        Expr::Protocol { reg: Reg(0) },
        Expr::Lookup { set: LookupIn::Protocols, key: Reg(0), data: None, invert: false },
        priority,
        Expr::Lookup { set: members, key: Reg(0), data: Some(Reg(0)), invert: false },
        Expr::Dnat { v6: keys.v6(), address: Reg(0), port: keys.after_address() },
    ];
    let recall = |map| [client(keys), into_priority(map).into()].concat();
    let data = BEHIND_KEY;
    let forget = vec![Expr::Priority { reg: data }, Expr::Delete { map: first, key: Reg(0), data }];
    let forget = [client(keys), forget].concat();
    vec![recall(first), dnat.clone(), recall(second), dnat, forget, forget_priority()]
}

/// Finds the port by the destination that the connection was opened to. VIPs come before NodePorts, as in the translation.
/// This is done where the source is decided, which a connection's first packet alone comes by: `ct state new` holds for the
/// next ones, too, until an answer comes, and a client that tries a backend again which is gone must not be led there for
/// that.
fn learn(chains: &mut Vec<Chain>, keys: &Keys) {
    let go = |chain: &str| Verdict::Goto(chain.into());
    let address = vec![Expr::OriginalAddress { v6: keys.v6(), reg: Reg(0) }];
    let (vip, nodeport) = (keys.original_vip(), keys.original_nodeport());
    for (name, rules) in [
        (
            "learn",
            vec![
                then(vip.clone(), Set::Affinity, go("learn-vip")),
                then(address, Set::NodeportIps, go("learn-np")),
            ],
        ),
        ("learn-vip", vec![find_port(vip.clone(), Set::AffinityIds), goto("remember")]),
        (
            "learn-np",
            vec![
                then(vip, Set::Vips, Verdict::Return),
                then(nodeport.clone(), Set::NpAffinity, go("learn-nodeport")),
            ],
        ),
        ("learn-nodeport", vec![find_port(nodeport, Set::NpAffinityIds), goto("remember")]),
    ] {
        chains.push(regular(name, rules));
    }
}

/// `meta priority @affinity-cluster update @affinity-clients { meta priority & ffff:0 . ip saddr timeout 3h : meta priority }`:
/// a backend that is no member any more is remembered by nobody.
fn remember_rules(keys: &Keys, timeout: NonZeroU32) -> Vec<Vec<Expr>> {
    let mut member = vec![Expr::Priority { reg: Reg(0) }, keys.destination(Reg(4))];
    member.push(Expr::DestinationPort { reg: Reg(4 + keys.after_address().0) });
    member.extend(into_priority(Set::AffinityBackends));
    let update = |(set, map): (Set, Set)| {
        let data = BEHIND_KEY;
        let mut rule = vec![Expr::Priority { reg: Reg(0) }, is_in(set)];
        rule.extend(client(keys));
        rule.extend([Expr::Priority { reg: data }, Expr::Update { map, key: Reg(0), data, timeout }]);
        rule
    };
    vec![member, update(CLUSTER), update(LOCAL), forget_priority()]
}
