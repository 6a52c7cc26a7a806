//! What tells a chain whose rules are right from one that has to be written anew.
//!
//! Owns the mark that each rule of ours carries in its user data: a hash of what was sent. nft shows it to nobody and gives
//! it to no rule of its own. Never reads rules themselves back: the kernel says them in other words.
//!
//! What is right is not written again, also for the sake of time: for each new rule that searches a map, the kernel walks
//! all of the map.

use nftnl::{Chain, MsgType, NlMsg, Rule};

use super::element::fnv1a;
use super::expr::{Expr, InRule};
use super::scratch::Scratch;
use crate::dataplane::netlink::HEADER;

/// `NFTA_RULE_USERDATA`.
pub(crate) const RULE_USERDATA: u16 = 7;

/// The type of the mark among the types of user data, of which nft knows 0 and 1.
const UDATA: u8 = 0x6b;

/// A hash of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint(u64);

impl Fingerprint {
    /// That of a rule in this chain.
    pub(crate) fn of(chain: &Chain<'_>, expressions: &[Expr], scratch: &mut Scratch) -> Self {
        // The number of an anonymous set is another each time.
        let rule = rule(chain, expressions, 0);
        // What pads the attributes is whatever was there before: the second time that is zeros.
        written(&rule, scratch).fill(0);
        Self(fnv1a(written(&rule, scratch).get(HEADER..).unwrap_or_default()))
    }

    /// The attribute of a rule's message that holds it.
    pub(crate) fn attribute(self) -> [u8; 16] {
        const LEN: u16 = 4 + 2 + 8;
        let mut attribute = [0; 16];
        attribute[..2].copy_from_slice(&LEN.to_ne_bytes());
        attribute[2..4].copy_from_slice(&RULE_USERDATA.to_ne_bytes());
        attribute[4..6].copy_from_slice(&[UDATA, size_of::<u64>() as u8]);
        attribute[6..14].copy_from_slice(&self.0.to_be_bytes());
        attribute
    }

    /// From a rule's user data; `None`: it is no rule of ours.
    pub(crate) fn from_userdata(userdata: &[u8]) -> Option<Self> {
        let [UDATA, _, hash @ ..] = userdata else { return None };
        Some(Self(u64::from_be_bytes(hash.try_into().ok()?)))
    }
}

fn written<'a>(rule: &Rule<'_>, scratch: &'a mut Scratch) -> &'a mut [u8] {
    // SAFETY: `write` asks for `nft_nlmsg_maxsize` bytes, which the scratch buffer has.
    unsafe { rule.write(scratch.start(), 0, MsgType::Add) };
    scratch.message()
}

/// A rule, as libnftnl has it.
pub(crate) fn rule<'a>(chain: &'a Chain<'_>, expressions: &[Expr], anonymous_set: u32) -> Rule<'a> {
    let mut rule = Rule::new(chain);
    for expression in expressions {
        rule.add_expr(&InRule { expression, anonymous_set });
    }
    rule
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::nftables::message::table;
    use crate::dataplane::nftables::rules::{Detection, Policy, chains};
    use crate::dataplane::nftables::tables::chain;
    use crate::model::input::Family;

    fn fingerprints(family: Family, masquerade_all: bool, scratch: &mut Scratch) -> Vec<u64> {
        let timeouts = [std::num::NonZeroU32::MIN].into();
        let policy = Policy { detection: Detection::PodCidrs, masquerade_all, drop_invalid: false, timeouts };
        let mut fingerprints = Vec::new();
        for spec in chains(family, &policy) {
            let table = table(family);
            let chain = chain(&spec, &table);
            fingerprints.extend(spec.rules.iter().map(|rule| Fingerprint::of(&chain, rule, scratch).0));
        }
        fingerprints
    }

    #[test]
    fn another_rule_has_another_fingerprint_and_the_same_has_the_same() {
        let mut scratch = Scratch::default();
        let first = fingerprints(Family::V4, false, &mut scratch);
        let others = fingerprints(Family::V6, true, &mut scratch);
        assert!(first.iter().all(|fingerprint| !others.contains(fingerprint)), "the table is a part of it");
        assert_ne!(first, fingerprints(Family::V4, true, &mut scratch));
        assert_eq!(first, fingerprints(Family::V4, false, &mut scratch), "whatever was in the buffer");
    }

    #[test]
    fn it_reads_back() {
        let fingerprint = Fingerprint(0x0123_4567_89ab_cdef);
        assert_eq!(Fingerprint::from_userdata(&fingerprint.attribute()[4..14]), Some(fingerprint));
        assert_eq!(Fingerprint::from_userdata(b"\0\x05text\0"), None, "a comment");
    }
}
