//! Tests of the rules: packets that walk through them, drawing as the kernel would.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::*;

/// What becomes of a packet that enters a chain.
#[derive(Debug, PartialEq)]
enum Met {
    /// It is led to this slot of this map.
    Slot(Set, u32),
    Dropped,
    /// It leaves the chain as it came.
    Untouched,
}

/// Walks packets through the rules of the picks, for one frontend.
struct Walk {
    chains: BTreeMap<String, Rc<[Vec<Expr>]>>,
    /// How many slots it has in each map, and more than how many it has by `more`.
    slots: BTreeMap<Set, u32>,
    more: BTreeMap<Set, u32>,
    named: BTreeSet<Set>,
    state: u64,
}

impl Walk {
    fn new() -> Self {
        let policy = Policy {
            detection: Detection::None,
            masquerade_all: false,
            drop_invalid: false,
            timeouts: BTreeSet::new(),
        };
        let chains = chains(Family::V4, &policy).into_iter();
        let chains = chains.map(|chain| (chain.name, chain.rules.into())).collect();
        let (slots, more, named) = Default::default();
        Self { chains, slots, more, named, state: 1 }
    }

    /// With so many slots in the Cluster set of a VIP, of which `more` knows so many.
    fn of(slots: u32, more: u32) -> Self {
        Self::with(VIP_SLOTS[0], slots, more)
    }

    fn with(sets: SlotSets, slots: u32, more: u32) -> Self {
        Self { slots: [(sets.slots, slots)].into(), more: [(sets.more, more)].into(), ..Self::new() }
    }

    fn random(&mut self) -> u32 {
        // SplitMix64.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 33) as u32
    }

    fn enter(&mut self, chain: &str) -> Met {
        for rule in Rc::clone(&self.chains[chain]).iter() {
            match self.rule(rule) {
                Some(Verdict::Drop) => return Met::Dropped,
                Some(Verdict::Goto(chain)) => return self.enter(&chain),
                Some(Verdict::Jump(chain)) => match self.enter(&chain) {
                    Met::Untouched => {}
                    met => return met,
                },
                Some(Verdict::Accept | Verdict::Return) => panic!("no pick has {rule:?}"),
                None => {
                    if let Some((set, number)) = self.led(rule) {
                        return Met::Slot(set, number);
                    }
                }
            }
        }
        Met::Untouched
    }

    /// The verdict that a rule comes to.
    fn rule(&mut self, rule: &[Expr]) -> Option<Verdict> {
        let mut number = 0;
        for expression in rule {
            match expression {
                Expr::Random { modulus, offset, .. } => number = offset + self.random() % modulus,
                Expr::Lookup { set: LookupIn::Table(set), data: None, invert, .. } => {
                    let has =
                        self.more.get(set).is_some_and(|more| number < *more) || self.named.contains(set);
                    if has == *invert {
                        return None;
                    }
                }
                Expr::Verdict(verdict) => return Some(verdict.clone()),
                // Nobody is remembered; a slot is `led`'s.
                Expr::Lookup { .. } => return None,
                _ => {}
            }
        }
        None
    }

    /// Where a rule that draws leads to.
    fn led(&mut self, rule: &[Expr]) -> Option<(Set, u32)> {
        let [
            ..,
            Expr::Random { modulus, .. },
            Expr::Lookup { set: LookupIn::Table(set), .. },
            Expr::Dnat { .. },
        ] = rule
        else {
            return None;
        };
        let number = self.random() % modulus;
        self.slots.get(set).is_some_and(|slots| number < *slots).then_some((*set, number))
    }
}

#[test]
fn picks_are_even() {
    const EACH: u32 = 2_000;
    let [vip, vip_local] = VIP_SLOTS;
    let [np, np_local] = NODEPORT_SLOTS;
    let picks = [("vip", vip), ("vip-local", vip_local), ("np", np), ("np-local", np_local)];
    for ((prefix, sets), slots) in picks.iter().flat_map(|pick| [1, 2, 3, 5, 8, 9, 33].map(|n| (pick, n))) {
        let mut walk = Walk::with(*sets, slots, slots);
        let mut counts = vec![0_u32; slots as usize];
        for _ in 0..slots * EACH {
            match walk.enter(&format!("{prefix}-balance")) {
                Met::Slot(set, slot) if set == sets.slots => counts[slot as usize] += 1,
                met => panic!("{prefix}, {slots}: {met:?}"),
            }
        }
        // Five standard deviations.
        let even = |count: &u32| count.abs_diff(EACH) < 5 * EACH.isqrt();
        assert!(counts.iter().all(even), "{prefix}, {slots}: {counts:?}");
    }
    let all_miss = 0.5_f64.powi((DRAWS * ROUNDS) as i32);
    let most_that_miss = f64::from((1_u32 << (CLASSES - 2)) + 1);
    assert!(all_miss * most_that_miss < 0.0005, "the first slot's excess");
}

#[test]
fn whatever_changes_meanwhile_nobody_slips_past() {
    for (slots, more) in [(0, 0), (0, 5), (0, 1 << 14), (1, 0), (1, 5), (2, 0), (5, 2), (2, 5), (1, 1 << 14)]
    {
        let mut walk = Walk::of(slots, more);
        for _ in 0..1_000 {
            match walk.enter("vip-balance") {
                Met::Slot(_, slot) => assert!(slot < slots),
                met => assert_eq!((met, slots), (Met::Dropped, 0), "{more}"),
            }
        }
    }
}

#[test]
fn a_local_set_that_has_just_gone_is_followed_by_the_cluster_set() {
    let mut walk = Walk::of(2, 2);
    assert!(matches!(walk.enter("vip-local-balance"), Met::Slot(Set::Endpoints, _)));
    walk.slots.insert(Set::EndpointsLocal, 3);
    walk.more.insert(Set::MoreLocal, 3);
    assert!(matches!(walk.enter("vip-local-balance"), Met::Slot(Set::EndpointsLocal, _)));
    walk.slots.remove(&Set::EndpointsLocal);
    walk.more.remove(&Set::MoreLocal);
    walk.named.insert(Set::VipsLocal);
    assert_eq!(walk.enter("vip-local-balance"), Met::Dropped, "there is no endpoint on this node");
    assert_eq!(Walk::new().enter("vip-local-balance"), Met::Dropped);
}

#[test]
fn few_rules_look_a_map_up() {
    let walk = Walk::new();
    let rules = walk.chains.values().flat_map(|rules| rules.iter());
    let looks_up = |rule: &&Vec<Expr>| {
        rule.iter().any(|e| matches!(e, Expr::Lookup { set: LookupIn::Table(Set::Endpoints), .. }))
    };
    assert_eq!(rules.filter(looks_up).count(), 2 + DRAWS * (CLASSES as usize - 2));
}
