//! The constant rules, as data: how a packet finds its backend and when its source is rewritten.
//!
//! Owns chains and rules. Never knows a Service: the number of rules depends on the configuration alone.
//!
//! A pick climbs 1, 2, 4 … by `more`, so a VIP of N backends lands in the class of the smallest 2^k ≥ N. It draws a
//! slot mod 2^k, again on a miss, climbs and draws again while it misses, and ends with slot 0, else drop. That ending is
//! not decoration: a transaction is atomic for one lookup, not for a packet's several, so while the backends change a pick
//! can miss each time, and must still never let the packet through untranslated.
//!
//! Rules that look a map up are few: for each element that is added to it the kernel walks them all. That is why a pick
//! goes around by a jump, and does not have a rule of its own for each draw.
//!
//! The same holds between the sets. What is in `vips-local` or `vips-masq` is in `vips` too (NodePorts likewise), so
//! that a packet which looks one up before and the other after a change of policy is still translated; a pick from a
//! Local set that is gone goes on with the Cluster set; what is translated from now on and passed the DNAT before is
//! refused, as it was until now; and a client of a Local VIP that was led to another node is masqueraded.

use std::collections::BTreeSet;
use std::num::NonZeroU32;

use nftnl::{ChainType, Hook};

use super::affinity_rules;

use super::expr::{
    ADDRESS_LOCAL, ConnectionWord, Expr, LookupIn, Reg, STATE_INVALID, STATE_NEW, STATUS_DNAT, Verdict,
};
use super::schema::{CLASSES, NODEPORT_SLOTS, Set, SlotSets, VIP_SLOTS, address_len};
use crate::model::input::Family;

/// A chain and its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Its name.
    pub(crate) name: String,
    /// Where it is hooked in; `None` for one that others jump to.
    pub(crate) base: Option<Base>,
    /// Its rules, in order.
    pub(crate) rules: Vec<Vec<Expr>>,
}

/// Where a base chain is hooked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    /// `filter` or `nat`.
    pub(crate) kind: ChainType,
    /// The hook.
    pub(crate) hook: Hook,
    /// The priority.
    pub(crate) priority: i32,
}

/// What the rules of one family depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    /// How this node's pods are told from other clients.
    pub(crate) detection: Detection,
    /// Masquerade everybody who dials a cluster IP.
    pub(crate) masquerade_all: bool,
    /// Drop forwarded packets that conntrack finds invalid.
    pub(crate) drop_invalid: bool,
    /// The timeouts of session affinity that there are, in seconds.
    pub(crate) timeouts: BTreeSet<NonZeroU32>,
}

/// How this node's pods are told from other clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Detection {
    /// They are not.
    None,
    /// By their address: it is in `pod-cidrs`.
    PodCidrs,
    /// By the interface that their packets come in through.
    Interface(String),
    /// By the beginning of its name.
    InterfacePrefix(String),
}

/// Ours come just before kube-proxy's (−100, 100), so that both can run side by side: the first DNAT decides.
const FIREWALL_PRIORITY: i32 = -115;
const DNAT_PRIORITY: i32 = -105;
const SNAT_PRIORITY: i32 = 95;
const FILTER_PRIORITY: i32 = 0;

/// `IFNAMSIZ`: what `iifname` loads, the name padded with zeros.
const INTERFACE_NAME: usize = 16;

/// How often a packet draws before it climbs again: more of them cost commits, fewer cost packets.
const DRAWS: usize = 3;

/// How often it climbs. More than half of a class's slots exist: at most one packet of 2^24 misses each time, of which
/// the first of 8,193 backends gets 0.05 % more than its share.
const ROUNDS: usize = 8;

/// What a rule looks up: by the packet's destination, or by that of the connection's first packet.
pub(crate) struct Keys {
    pub(crate) family: Family,
}

impl Keys {
    pub(crate) fn v6(&self) -> bool {
        self.family == Family::V6
    }

    fn len(&self) -> u32 {
        address_len(self.family) as u32
    }

    /// Where the second component of a key starts that begins with an address.
    pub(crate) fn after_address(&self) -> Reg {
        Reg(self.len())
    }

    /// `ip saddr`.
    pub(crate) fn source(&self, reg: Reg) -> Expr {
        let offset = if self.v6() { 8 } else { 12 };
        Expr::Network { offset, len: self.len(), reg }
    }

    /// `ip daddr`.
    pub(crate) fn destination(&self, reg: Reg) -> Expr {
        let offset = if self.v6() { 24 } else { 16 };
        Expr::Network { offset, len: self.len(), reg }
    }

    /// `ip daddr . meta l4proto . th dport`; the next component goes to the returned register.
    pub(super) fn vip(&self) -> (Vec<Expr>, Reg) {
        self.vip_with(|reg| Expr::Protocol { reg })
    }

    /// The same with `ct protocol`, for a set with ranges: there nft swaps the bytes of `meta l4proto`, which has one,
    /// and recent kernels refuse that (6.12.117).
    fn tracked_vip(&self) -> (Vec<Expr>, Reg) {
        self.vip_with(|reg| Expr::TrackedProtocol { reg })
    }

    fn vip_with(&self, protocol: impl FnOnce(Reg) -> Expr) -> (Vec<Expr>, Reg) {
        let at = self.len();
        let key =
            vec![self.destination(Reg(0)), protocol(Reg(at)), Expr::DestinationPort { reg: Reg(at + 4) }];
        (key, Reg(at + 8))
    }

    /// `meta l4proto . th dport`.
    pub(super) fn nodeport(&self) -> (Vec<Expr>, Reg) {
        (vec![Expr::Protocol { reg: Reg(0) }, Expr::DestinationPort { reg: Reg(4) }], Reg(8))
    }

    /// `ip daddr @nodeport-ips`, then the key.
    fn on_nodeport_address(&self) -> Vec<Expr> {
        let mut rule = vec![self.destination(Reg(0)), is_in(Set::NodeportIps)];
        rule.extend(self.nodeport().0);
        rule
    }

    /// `ct original ip daddr . meta l4proto . ct original proto-dst`. The protocol is tested first: without that
    /// nft lists the rule but does not take it back.
    pub(super) fn original_vip(&self) -> Vec<Expr> {
        let at = self.len();
        vec![
            Expr::Protocol { reg: Reg(0) },
            Expr::Lookup { set: LookupIn::Protocols, key: Reg(0), data: None, invert: false },
            Expr::OriginalAddress { v6: self.v6(), reg: Reg(0) },
            Expr::Protocol { reg: Reg(at) },
            Expr::OriginalPort { reg: Reg(at + 4) },
        ]
    }

    /// The same for a NodePort.
    pub(super) fn original_nodeport(&self) -> Vec<Expr> {
        vec![
            Expr::OriginalAddress { v6: self.v6(), reg: Reg(0) },
            is_in(Set::NodeportIps),
            Expr::Protocol { reg: Reg(0) },
            Expr::Lookup { set: LookupIn::Protocols, key: Reg(0), data: None, invert: false },
            Expr::Protocol { reg: Reg(0) },
            Expr::OriginalPort { reg: Reg(4) },
        ]
    }

    /// `ip daddr . ip daddr`.
    fn twice_destination(&self) -> Vec<Expr> {
        vec![self.destination(Reg(0)), self.destination(self.after_address())]
    }

    /// The client is a pod of this node, as a packet shows it that comes in; `None` where that cannot be told.
    fn pod_client(&self, detection: &Detection) -> Option<Vec<Expr>> {
        let reg = Reg(0);
        match detection {
            Detection::None => None,
            Detection::PodCidrs => Some(vec![self.source(reg), is_in(Set::PodCidrs)]),
            Detection::Interface(_) | Detection::InterfacePrefix(_) => {
                let named = Expr::Compare { reg, bytes: interface(detection), invert: false };
                Some(vec![Expr::InInterface { reg }, named])
            }
        }
    }

    /// The client is a pod of this node, as a packet shows it that goes from one port of a bridge to another and that this
    /// host has not sent. There it has no interface that it came in through (`br_netfilter`'s `br_nf_post_routing`): it came
    /// in through the bridge that it goes out by.
    fn bridged_pod_client(&self, detection: &Detection) -> Option<Vec<Expr>> {
        let (reg, invert) = (Reg(0), false);
        let name = matches!(detection, Detection::Interface(_) | Detection::InterfacePrefix(_))
            .then(|| interface(detection))?;
        Some(vec![
            Expr::InInterfaceNumber { reg },
            Expr::Compare { reg, bytes: vec![0; 4], invert },
            Expr::OutInterface { reg },
            Expr::Compare { reg, bytes: name, invert },
        ])
    }
}

/// What the name of a pod's interface begins with: all of it, padded with zeros, or its first letters.
fn interface(detection: &Detection) -> Vec<u8> {
    let (Detection::Interface(name) | Detection::InterfacePrefix(name)) = detection else {
        return Vec::new();
    };
    let mut bytes = name.clone().into_bytes();
    let len = if matches!(detection, Detection::Interface(_)) { INTERFACE_NAME } else { bytes.len() };
    bytes.resize(len.min(INTERFACE_NAME), 0);
    bytes
}

/// Every chain of the table.
pub(crate) fn chains(family: Family, policy: &Policy) -> Vec<Chain> {
    let keys = Keys { family };
    let mut chains = Vec::new();
    let kinds = [
        ("vip", keys.vip(), VIP_SLOTS, Set::Affinity),
        ("np", keys.nodeport(), NODEPORT_SLOTS, Set::NpAffinity),
    ];
    for (prefix, key, [cluster, local], affinity) in kinds {
        let pick = |sets| Pick { keys: &keys, key: key.clone(), sets, affinity };
        let drop = vec![Expr::Verdict(Verdict::Drop)];
        pick(cluster).chains(&mut chains, prefix, drop.clone(), drop);
        let empty = then(key.0.clone(), local.named, Verdict::Drop);
        let gone = goto(&format!("{prefix}-balance"));
        pick(local).chains(&mut chains, &format!("{prefix}-local"), empty, gone);
        chains.push(short_circuit(prefix, &keys, policy));
    }
    translation(&mut chains, &keys);
    firewall(&mut chains, &keys);
    let learn = [dnatted(), goto("learn")].concat();
    chains.push(base("nat-input", ChainType::Nat, Hook::In, SNAT_PRIORITY, vec![learn]));
    affinity_rules::chains(&mut chains, &keys, &policy.timeouts);
    refusals(&mut chains, &keys, policy);
    masquerading(&mut chains, &keys, policy);
    chains
}

/// How a backend of one endpoint set of a kind of frontend is found.
struct Pick<'a> {
    keys: &'a Keys,
    /// The frontend's key, and the register of the slot behind it.
    key: (Vec<Expr>, Reg),
    sets: SlotSets,
    /// The frontends with session affinity.
    affinity: Set,
}

impl Pick<'_> {
    /// One backend of the set. Clients enter by `…-balance`: who is remembered is led back to its backend. `empty` is what
    /// happens where not even the first slot exists, `end` where that lets a packet pass.
    fn chains(&self, chains: &mut Vec<Chain>, prefix: &str, empty: Vec<Expr>, end: Vec<Expr>) {
        let class = |k: u32| format!("{prefix}-{k}");
        chains.push(regular(&class(1), vec![self.draw(1), empty]));
        for k in (1..CLASSES).map(|i| 1 << i) {
            let draws = if k > 2 { DRAWS } else { 1 };
            chains.push(regular(&class(k), vec![self.draw(k); draws]));
        }
        let climb = (0..CLASSES - 1).map(|i| {
            // `numgen random mod 1 offset K` is the one constant that nft can print inside a concatenation.
            let mut rule = self.key(1, 1 << i);
            rule.push(Expr::Lookup {
                set: LookupIn::Table(self.sets.more),
                key: Reg(0),
                data: None,
                invert: true,
            });
            rule.push(Expr::Verdict(Verdict::Goto(class(1 << i))));
            rule
        });
        let rules = climb.chain([goto(&class(1 << (CLASSES - 1)))]).collect();
        let pick = format!("{prefix}-pick");
        chains.push(regular(&pick, rules));
        let remembered = then(self.key.0.clone(), self.affinity, Verdict::Jump(format!("{prefix}-affinity")));
        let rounds = vec![jump(&pick); ROUNDS];
        let rules = [vec![remembered], rounds, vec![jump(&class(1)), end]].concat();
        chains.push(regular(&format!("{prefix}-balance"), rules));
    }

    /// DNAT to a slot that is drawn.
    fn draw(&self, modulus: u32) -> Vec<Expr> {
        let mut rule = self.key(modulus, 0);
        let slots = LookupIn::Table(self.sets.slots);
        rule.push(Expr::Lookup { set: slots, key: Reg(0), data: Some(Reg(0)), invert: false });
        rule.push(Expr::Dnat { v6: self.keys.v6(), address: Reg(0), port: self.keys.after_address() });
        rule
    }

    fn key(&self, modulus: u32, offset: u32) -> Vec<Expr> {
        let (mut key, reg) = self.key.clone();
        key.push(Expr::Random { modulus, offset, reg });
        key
    }
}

/// `externalTrafficPolicy: Local`: this node's own clients get the Cluster set all the same.
fn short_circuit(prefix: &str, keys: &Keys, policy: &Policy) -> Chain {
    let cluster = goto(&format!("{prefix}-balance"));
    let pods = keys.pod_client(&policy.detection).map(|pod| [pod, cluster.clone()].concat());
    let mut rules: Vec<_> = pods.into_iter().collect();
    rules.push([host_client(), cluster].concat());
    rules.push(goto(&format!("{prefix}-local-balance")));
    regular(&format!("{prefix}-etp-local"), rules)
}

/// DNAT: VIPs are decided before NodePorts, so a VIP that is one of the node's addresses stays a VIP. What is no
/// Service's, as most connections are, is looked up twice and goes on.
fn translation(chains: &mut Vec<Chain>, keys: &Keys) {
    let go = |chain: &str| Verdict::Goto(chain.into());
    let vip = vec![then(keys.vip().0, Set::VipsLocal, go("vip-etp-local")), goto("vip-balance")];
    let nodeport = vec![
        then(keys.nodeport().0, Set::NpsLocal, go("np-etp-local")),
        then(keys.nodeport().0, Set::Nps, go("np-balance")),
    ];
    let services = vec![
        then(keys.vip().0, Set::Vips, go("vip-services")),
        then(vec![keys.destination(Reg(0))], Set::NodeportIps, go("np-services")),
    ];
    for (name, rules) in [("vip-services", vip), ("np-services", nodeport), ("services", services)] {
        chains.push(regular(name, rules));
    }
    for (name, hook) in [("nat-prerouting", Hook::PreRouting), ("nat-output", Hook::Out)] {
        chains.push(base(name, ChainType::Nat, hook, DNAT_PRIORITY, vec![goto("services")]));
    }
}

/// `loadBalancerSourceRanges`: who is in none of them is dropped, before the DNAT.
fn firewall(chains: &mut Vec<Chain>, keys: &Keys) {
    let (vip, client) = keys.tracked_vip();
    let ranged = [keys.vip().0, vec![is_in(Set::Ranged)]].concat();
    let outside = Expr::Lookup { set: LookupIn::Table(Set::Ranges), key: Reg(0), data: None, invert: true };
    let drop = vec![keys.source(client), outside, Expr::Verdict(Verdict::Drop)];
    chains.push(regular("firewall", vec![[ranged, vip, drop].concat()]));
    let enter = [state_new(), goto("firewall")].concat();
    for (name, hook) in [("pre-dnat", Hook::PreRouting), ("out-pre-dnat", Hook::Out)] {
        chains.push(base(name, ChainType::Filter, hook, FIREWALL_PRIORITY, vec![enter.clone()]));
    }
}

/// ICMP for what has no endpoint and for unused ports; drop for unallocated ServiceCIDR addresses.
fn refusals(chains: &mut Vec<Chain>, keys: &Keys, policy: &Policy) {
    let reject = || vec![Expr::Reject { v6: keys.v6() }];
    let refuse = |rule: Vec<Expr>, set| [rule, vec![is_in(set)], reject()].concat();
    let vips = refuse(keys.vip().0, Set::VipsReject);
    let missed = refuse([bit(ConnectionWord::Status, STATUS_DNAT, false), keys.vip().0].concat(), Set::Vips);
    let nodeports = refuse(keys.on_nodeport_address(), Set::NpsReject);
    chains.push(regular("refused", vec![vips, missed]));
    chains.push(regular(
        "cluster-ips-check",
        vec![
            refuse(vec![keys.destination(Reg(0))], Set::ClusterIps),
            then(vec![keys.destination(Reg(0))], Set::ServiceCidrs, Verdict::Drop),
        ],
    ));
    let hooks = [
        ("input", Hook::In, vec![nodeports.clone(), goto("refused")]),
        ("forward", Hook::Forward, vec![jump("refused"), goto("cluster-ips-check")]),
        ("output", Hook::Out, vec![jump("refused"), nodeports, goto("cluster-ips-check")]),
    ];
    for (name, hook, rules) in hooks {
        let new = format!("new-{name}");
        let enter = [state_new(), goto(&new)].concat();
        chains.push(regular(&new, rules));
        let mut entered = vec![enter];
        if hook == Hook::Forward && policy.drop_invalid {
            let invalid = bit(ConnectionWord::State, STATE_INVALID, true);
            entered.push([invalid, vec![Expr::Verdict(Verdict::Drop)]].concat());
        }
        chains.push(base(&format!("filter-{name}"), ChainType::Filter, hook, FILTER_PRIORITY, entered));
    }
}

/// SNAT, decided by the destination that the connection was opened to: no packet marks.
fn masquerading(chains: &mut Vec<Chain>, keys: &Keys, policy: &Policy) {
    let masquerade = |rule: Vec<Expr>| [rule, vec![Expr::Masquerade]].concat();
    chains.push(regular("masq", vec![masquerade(vec![])]));
    let not_local =
        Expr::Lookup { set: LookupIn::Table(Set::Hairpin), key: Reg(0), data: None, invert: true };
    let accept = |client: Vec<Expr>| [client, vec![Expr::Verdict(Verdict::Accept)]].concat();
    let pod = keys.pod_client(&policy.detection).map(accept);
    let bridged_pod = keys.bridged_pod_client(&policy.detection).map(accept);
    let host = masquerade(host_client());
    let mut local = vec![host.clone()];
    local.extend(pod.clone().into_iter().chain(bridged_pod.clone()));
    local.push(masquerade([keys.twice_destination(), vec![not_local]].concat()));
    chains.push(regular("masq-etp-local", local));
    let cluster_ip = match (policy.masquerade_all, pod, bridged_pod) {
        (true, ..) => vec![masquerade(vec![])],
        // Where pods cannot be told from others, nobody is masqueraded.
        (false, None, _) => vec![],
        (false, Some(pod), None) => vec![pod, masquerade(vec![])],
        (false, Some(pod), Some(bridged_pod)) => vec![pod, host, bridged_pod, masquerade(vec![])],
    };
    chains.push(regular("masq-cluster-ip", cluster_ip));
    let go = |chain: &str| Verdict::Goto(chain.into());
    let itself = vec![keys.source(Reg(0)), keys.destination(keys.after_address())];
    let original = vec![Expr::OriginalAddress { v6: keys.v6(), reg: Reg(0) }];
    let rules = vec![
        jump("learn"),
        then(itself, Set::Hairpin, go("masq")),
        then(keys.original_vip(), Set::VipsMasq, go("masq")),
        then(keys.original_vip(), Set::VipsLocal, go("masq-etp-local")),
        then(original, Set::ClusterIps, go("masq-cluster-ip")),
        then(keys.original_vip(), Set::Vips, Verdict::Accept),
        then(keys.original_nodeport(), Set::NpsLocal, go("masq-etp-local")),
        then(keys.original_nodeport(), Set::Nps, go("masq")),
    ];
    chains.push(regular("dnatted", rules));
    let enter = [dnatted(), goto("dnatted")].concat();
    chains.push(base("nat-postrouting", ChainType::Nat, Hook::PostRouting, SNAT_PRIORITY, vec![enter]));
}

/// `fib saddr type local`: a process of this host.
fn host_client() -> Vec<Expr> {
    let (reg, bytes) = (Reg(0), ADDRESS_LOCAL.to_ne_bytes().to_vec());
    vec![Expr::SourceType { reg }, Expr::Compare { reg, bytes, invert: false }]
}

pub(super) fn regular(name: &str, rules: Vec<Vec<Expr>>) -> Chain {
    Chain { name: name.into(), base: None, rules }
}

fn base(name: &str, kind: ChainType, hook: Hook, priority: i32, rules: Vec<Vec<Expr>>) -> Chain {
    Chain { name: name.into(), base: Some(Base { kind, hook, priority }), rules }
}

pub(super) fn is_in(set: Set) -> Expr {
    Expr::Lookup { set: LookupIn::Table(set), key: Reg(0), data: None, invert: false }
}

pub(super) fn then(mut rule: Vec<Expr>, set: Set, verdict: Verdict) -> Vec<Expr> {
    rule.push(is_in(set));
    rule.push(Expr::Verdict(verdict));
    rule
}

pub(super) fn jump(chain: &str) -> Vec<Expr> {
    vec![Expr::Verdict(Verdict::Jump(chain.into()))]
}

pub(super) fn goto(chain: &str) -> Vec<Expr> {
    vec![Expr::Verdict(Verdict::Goto(chain.into()))]
}

/// `ct status dnat`.
fn dnatted() -> Vec<Expr> {
    bit(ConnectionWord::Status, STATUS_DNAT, true)
}

fn state_new() -> Vec<Expr> {
    bit(ConnectionWord::State, STATE_NEW, true)
}

/// Goes on where the bit is set, or where it is not.
fn bit(word: ConnectionWord, bits: u32, set: bool) -> Vec<Expr> {
    let reg = Reg(0);
    let compare = Expr::Compare { reg, bytes: vec![0; 4], invert: set };
    vec![Expr::Connection { word, reg }, Expr::Mask { reg, bits }, compare]
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
