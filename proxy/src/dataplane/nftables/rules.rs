//! The constant rules, as data: how a packet finds its backend and when its source is rewritten.
//!
//! Owns chains and rules. Never knows a Service: the number of rules depends on the configuration alone.
//!
//! A pick climbs 1, 2, 4 … by `more`, so a VIP of N backends lands in the class of the smallest 2^k ≥ N. It draws a
//! slot mod 2^k, again on a miss, then mod 2^(k−1), where every slot exists, and ends with slot 0, else drop. That
//! ending is not decoration: a transaction is atomic for one lookup, not for a packet's several, so while the
//! backends change a pick can miss each time, and must still never let the packet through untranslated.

use nftnl::{ChainType, Hook};

use super::expr::{ConnectionWord, Expr, LookupIn, Reg, STATE_NEW, STATUS_DNAT, Verdict};
use super::schema::{CLASSES, Set, address_len};
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

/// Whose packets to a cluster IP are masqueraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClusterIpSnat {
    /// Nobody's (but hairpin): no detector is set for the family.
    Never,
    /// Those from outside of the pods' CIDRs.
    NonLocal,
    /// All (`masqueradeAll`).
    Always,
}

/// Ours come just before kube-proxy's (−100, 100), so that both can run side by side: the first DNAT decides.
const DNAT_PRIORITY: i32 = -105;
const SNAT_PRIORITY: i32 = 95;
const FILTER_PRIORITY: i32 = 0;

/// How often a pick draws again on a miss. A class is more than half full, so 2^−8 is left at worst.
const TRIES: usize = 8;

/// What a rule looks up: by the packet's destination, or by that of the connection's first packet.
struct Keys {
    family: Family,
}

impl Keys {
    fn v6(&self) -> bool {
        self.family == Family::V6
    }

    fn len(&self) -> u32 {
        address_len(self.family) as u32
    }

    /// Where the second component of a key starts that begins with an address.
    fn after_address(&self) -> Reg {
        Reg(self.len())
    }

    fn source(&self, reg: Reg) -> Expr {
        let offset = if self.v6() { 8 } else { 12 };
        Expr::Network { offset, len: self.len(), reg }
    }

    fn destination(&self, reg: Reg) -> Expr {
        let offset = if self.v6() { 24 } else { 16 };
        Expr::Network { offset, len: self.len(), reg }
    }

    /// `ip daddr . meta l4proto . th dport`; the next component goes to the returned register.
    fn vip(&self) -> (Vec<Expr>, Reg) {
        let at = self.len();
        let key = vec![
            self.destination(Reg(0)),
            Expr::Protocol { reg: Reg(at) },
            Expr::DestinationPort { reg: Reg(at + 4) },
        ];
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
}

/// Every chain of the table, each before the first that names it.
pub(crate) fn chains(family: Family, snat: ClusterIpSnat) -> Vec<Chain> {
    let keys = Keys { family };
    let mut chains = Vec::new();
    pick_chains(&mut chains, "vip", &keys, keys.vip(), Set::Endpoints, Set::More);
    pick_chains(&mut chains, "np", &keys, keys.nodeport(), Set::NpEndpoints, Set::NpMore);
    translation(&mut chains, &keys);
    refusals(&mut chains, &keys);
    masquerading(&mut chains, &keys, snat);
    chains
}

fn pick_chains(
    chains: &mut Vec<Chain>,
    prefix: &str,
    keys: &Keys,
    (key, slot): (Vec<Expr>, Reg),
    slots: Set,
    more: Set,
) {
    let class = |k: u32| format!("{prefix}-{k}");
    let draw = |modulus: u32| {
        let mut rule = key.clone();
        rule.push(Expr::Random { modulus, offset: 0, reg: slot });
        rule.push(Expr::Lookup {
            set: LookupIn::Table(slots),
            key: Reg(0),
            data: Some(Reg(0)),
            invert: false,
        });
        rule.push(Expr::Dnat { v6: keys.v6(), address: Reg(0), port: keys.after_address() });
        rule
    };
    chains.push(regular(&class(1), vec![draw(1), vec![Expr::Verdict(Verdict::Drop)]]));
    for k in (1..CLASSES).map(|i| 1 << i) {
        let mut rules = vec![draw(k); TRIES];
        if k > 2 {
            rules.push(draw(k / 2));
        }
        rules.push(goto(&class(1)));
        chains.push(regular(&class(k), rules));
    }
    let mut climb: Vec<_> = (0..CLASSES - 1)
        .map(|i| {
            let mut rule = key.clone();
            // `numgen random mod 1 offset K` is the one constant that nft can print inside a concatenation.
            rule.push(Expr::Random { modulus: 1, offset: 1 << i, reg: slot });
            rule.push(Expr::Lookup { set: LookupIn::Table(more), key: Reg(0), data: None, invert: true });
            rule.push(Expr::Verdict(Verdict::Goto(class(1 << i))));
            rule
        })
        .collect();
    climb.push(goto(&class(1 << (CLASSES - 1))));
    chains.push(regular(&format!("{prefix}-pick"), climb));
}

/// DNAT: VIPs are decided before NodePorts, so a VIP that is one of the node's addresses stays a VIP.
fn translation(chains: &mut Vec<Chain>, keys: &Keys) {
    let services = vec![
        then(keys.vip().0, Set::Vips, Verdict::Goto("vip-pick".into())),
        then(keys.on_nodeport_address(), Set::Nps, Verdict::Goto("np-pick".into())),
    ];
    chains.push(regular("services", services));
    for (name, hook) in [("nat-prerouting", Hook::PreRouting), ("nat-output", Hook::Out)] {
        chains.push(base(name, ChainType::Nat, hook, DNAT_PRIORITY, vec![goto("services")]));
    }
}

/// ICMP for what has no endpoint and for unused ports; drop for unallocated ServiceCIDR addresses.
fn refusals(chains: &mut Vec<Chain>, keys: &Keys) {
    let refuse = |mut rule: Vec<Expr>, set| {
        rule.push(is_in(set));
        rule.push(Expr::Reject { v6: keys.v6() });
        rule
    };
    let new = |rule: Vec<Expr>| [state_new(), rule].concat();
    let vips = refuse(keys.vip().0, Set::VipsReject);
    let nodeports = refuse(keys.on_nodeport_address(), Set::NpsReject);
    chains.push(regular("refused", vec![vips]));
    chains.push(regular(
        "cluster-ips-check",
        vec![
            refuse(vec![keys.destination(Reg(0))], Set::ClusterIps),
            then(vec![keys.destination(Reg(0))], Set::ServiceCidrs, Verdict::Drop),
        ],
    ));
    let jump = |chain: &str| new(vec![Expr::Verdict(Verdict::Jump(chain.into()))]);
    let hooks = [
        ("filter-input", Hook::In, vec![new(nodeports.clone()), jump("refused")]),
        ("filter-forward", Hook::Forward, vec![jump("refused"), jump("cluster-ips-check")]),
        ("filter-output", Hook::Out, vec![jump("refused"), new(nodeports), jump("cluster-ips-check")]),
    ];
    for (name, hook, rules) in hooks {
        chains.push(base(name, ChainType::Filter, hook, FILTER_PRIORITY, rules));
    }
}

/// SNAT, decided by the destination that the connection was opened to: no packet marks.
fn masquerading(chains: &mut Vec<Chain>, keys: &Keys, snat: ClusterIpSnat) {
    chains.push(regular("masq", vec![vec![Expr::Masquerade]]));
    let cluster_ip = match snat {
        ClusterIpSnat::Never => vec![],
        ClusterIpSnat::Always => vec![vec![Expr::Masquerade]],
        ClusterIpSnat::NonLocal => vec![vec![
            keys.source(Reg(0)),
            Expr::Lookup { set: LookupIn::Table(Set::PodCidrs), key: Reg(0), data: None, invert: true },
            Expr::Masquerade,
        ]],
    };
    chains.push(regular("masq-cluster-ip", cluster_ip));
    let masq = || Verdict::Goto("masq".into());
    let dnatted = vec![
        then(vec![keys.source(Reg(0)), keys.destination(keys.after_address())], Set::Hairpin, masq()),
        then(
            vec![Expr::OriginalAddress { v6: keys.v6(), reg: Reg(0) }],
            Set::ClusterIps,
            Verdict::Goto("masq-cluster-ip".into()),
        ),
        then(keys.original_vip(), Set::Vips, Verdict::Accept),
        then(keys.original_nodeport(), Set::Nps, masq()),
    ];
    chains.push(regular("dnatted", dnatted));
    let status = bit(ConnectionWord::Status, STATUS_DNAT);
    let enter = [status, goto("dnatted")].concat();
    chains.push(base("nat-postrouting", ChainType::Nat, Hook::PostRouting, SNAT_PRIORITY, vec![enter]));
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

fn goto(chain: &str) -> Vec<Expr> {
    vec![Expr::Verdict(Verdict::Goto(chain.into()))]
}

fn state_new() -> Vec<Expr> {
    bit(ConnectionWord::State, STATE_NEW)
}

fn bit(word: ConnectionWord, bits: u32) -> Vec<Expr> {
    let reg = Reg(0);
    vec![Expr::Connection { word, reg }, Expr::Mask { reg, bits }, Expr::NotZero { reg }]
}
