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

use nftnl::{ChainType, Hook};

use super::expr::{ADDRESS_LOCAL, ConnectionWord, Expr, LookupIn, Reg, STATE_NEW, STATUS_DNAT, Verdict};
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
    fn vip(&self) -> (Vec<Expr>, Reg) {
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
    fn nodeport(&self) -> (Vec<Expr>, Reg) {
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
    fn original_vip(&self) -> Vec<Expr> {
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
    fn original_nodeport(&self) -> Vec<Expr> {
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

    /// The client is a pod of this node (or, inverted, is not); `None` where that cannot be told.
    fn pod_client(&self, detection: &Detection, invert: bool) -> Option<Vec<Expr>> {
        let reg = Reg(0);
        let interface = |bytes| Some(vec![Expr::InInterface { reg }, Expr::Compare { reg, bytes, invert }]);
        match detection {
            Detection::None => None,
            Detection::PodCidrs => Some(vec![
                self.source(reg),
                Expr::Lookup { set: LookupIn::Table(Set::PodCidrs), key: reg, data: None, invert },
            ]),
            Detection::Interface(name) => {
                let mut bytes = name.clone().into_bytes();
                bytes.resize(INTERFACE_NAME, 0);
                interface(bytes)
            }
            Detection::InterfacePrefix(prefix) => {
                let mut bytes = prefix.clone().into_bytes();
                bytes.truncate(INTERFACE_NAME);
                interface(bytes)
            }
        }
    }
}

/// Every chain of the table.
pub(crate) fn chains(family: Family, policy: &Policy) -> Vec<Chain> {
    let keys = Keys { family };
    let mut chains = Vec::new();
    let kinds = [("vip", keys.vip(), VIP_SLOTS), ("np", keys.nodeport(), NODEPORT_SLOTS)];
    for (prefix, key, [cluster, local]) in kinds {
        let pick = |sets| Pick { keys: &keys, key: key.clone(), sets };
        let drop = vec![Expr::Verdict(Verdict::Drop)];
        pick(cluster).chains(&mut chains, prefix, drop.clone(), drop);
        let empty = then(key.0.clone(), local.named, Verdict::Drop);
        let gone = goto(&format!("{prefix}-balance"));
        pick(local).chains(&mut chains, &format!("{prefix}-local"), empty, gone);
        chains.push(short_circuit(prefix, &keys, policy));
    }
    translation(&mut chains, &keys);
    firewall(&mut chains, &keys);
    learning(&mut chains, &keys);
    refusals(&mut chains, &keys);
    masquerading(&mut chains, &keys, policy);
    chains
}

/// How a backend of one endpoint set of a kind of frontend is found.
struct Pick<'a> {
    keys: &'a Keys,
    /// The frontend's key, and the register of the slot behind it.
    key: (Vec<Expr>, Reg),
    sets: SlotSets,
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
        let remembered =
            [self.key.0.clone(), vec![Expr::VerdictMap { map: self.sets.affinity, key: Reg(0) }]].concat();
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
    let pods = keys.pod_client(&policy.detection, false).map(|pod| [pod, cluster.clone()].concat());
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

/// Where a new connection was led, by the destination that it was opened to, is remembered for the Service ports with
/// affinity. VIPs come before NodePorts, as in the translation. This is done where the source is decided, which a
/// connection's first packet alone comes by: `ct state new` holds for the next ones, too, until an answer comes, and a
/// client that tries a backend again which is gone must not be led there for that.
fn learning(chains: &mut Vec<Chain>, keys: &Keys) {
    let search = |mut rule: Vec<Expr>, map| {
        rule.push(Expr::VerdictMap { map, key: Reg(0) });
        rule
    };
    let on_nodeport_address = vec![Expr::OriginalAddress { v6: keys.v6(), reg: Reg(0) }];
    chains.push(regular(
        "learn-np",
        vec![
            then(keys.original_vip(), Set::Vips, Verdict::Return),
            search(keys.original_nodeport(), Set::NpAffLearn),
        ],
    ));
    chains.push(regular(
        "learn",
        vec![
            search(keys.original_vip(), Set::AffLearn),
            then(on_nodeport_address, Set::NodeportIps, Verdict::Goto("learn-np".into())),
        ],
    ));
    let enter = [dnatted(), goto("learn")].concat();
    chains.push(base("nat-input", ChainType::Nat, Hook::In, SNAT_PRIORITY, vec![enter]));
}

/// ICMP for what has no endpoint and for unused ports; drop for unallocated ServiceCIDR addresses.
fn refusals(chains: &mut Vec<Chain>, keys: &Keys) {
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
        chains.push(base(&format!("filter-{name}"), ChainType::Filter, hook, FILTER_PRIORITY, vec![enter]));
    }
}

/// SNAT, decided by the destination that the connection was opened to: no packet marks.
fn masquerading(chains: &mut Vec<Chain>, keys: &Keys, policy: &Policy) {
    let masquerade = |rule: Vec<Expr>| [rule, vec![Expr::Masquerade]].concat();
    chains.push(regular("masq", vec![masquerade(vec![])]));
    let not_local =
        Expr::Lookup { set: LookupIn::Table(Set::Hairpin), key: Reg(0), data: None, invert: true };
    let accept = vec![Expr::Verdict(Verdict::Accept)];
    let pods = keys.pod_client(&policy.detection, false).map(|pod| [pod, accept].concat());
    let mut local = vec![masquerade(host_client())];
    local.extend(pods);
    local.push(masquerade([keys.twice_destination(), vec![not_local]].concat()));
    chains.push(regular("masq-etp-local", local));
    let everybody = policy.masquerade_all.then(Vec::new);
    let whose = everybody.or_else(|| keys.pod_client(&policy.detection, true));
    chains.push(regular("masq-cluster-ip", whose.map(masquerade).into_iter().collect()));
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

fn regular(name: &str, rules: Vec<Vec<Expr>>) -> Chain {
    Chain { name: name.into(), base: None, rules }
}

fn base(name: &str, kind: ChainType, hook: Hook, priority: i32, rules: Vec<Vec<Expr>>) -> Chain {
    Chain { name: name.into(), base: Some(Base { kind, hook, priority }), rules }
}

fn is_in(set: Set) -> Expr {
    Expr::Lookup { set: LookupIn::Table(set), key: Reg(0), data: None, invert: false }
}

fn then(mut rule: Vec<Expr>, set: Set, verdict: Verdict) -> Vec<Expr> {
    rule.push(is_in(set));
    rule.push(Expr::Verdict(verdict));
    rule
}

fn jump(chain: &str) -> Vec<Expr> {
    vec![Expr::Verdict(Verdict::Jump(chain.into()))]
}

fn goto(chain: &str) -> Vec<Expr> {
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
