//! From what is dialled to a backend.
//!
//! Owns the walk through the maps: frontend → set → slot → backend, and session affinity. Each word says what it belongs
//! to, so that a program that was overtaken by a change notices. `None` means everywhere that the socket is left alone.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use aya_ebpf::programs::SockAddrContext;
use kube_lane_common::{Address, AffinityKey, Backend, Frontend, FrontendKey, Remembered, Set};

use crate::client::{self, Rules};
use crate::maps::{AFFINITY, BACKENDS, FRONTENDS, MEMBERS, PORTS, SETS, SLOTS, read};
use crate::stats;

/// A client that is answered, and the set that it is led to.
#[derive(Clone, Copy)]
pub(crate) struct Asked {
    /// The id of the set.
    pub(crate) set: u32,
    /// The cookie of the client's network namespace.
    client: u64,
}

/// What a client gets.
pub(crate) enum Answer {
    /// There is no endpoint of this port.
    Refused(u32),
    /// The backend with this id.
    Backend(u32, &'static Backend),
}

/// Whether and by which set a client is answered that dials `key`. `source` gives the address that it is bound to.
#[inline(always)]
pub(crate) fn asked(
    context: &SockAddrContext,
    key: &FrontendKey,
    source: impl FnOnce(&SockAddrContext) -> Address,
) -> Option<Asked> {
    // Such a socket dials the host itself; the keys of NodePorts have this address.
    if key.address.is_unspecified() {
        return None;
    }
    let rules = client::rules()?;
    let frontend = match frontend(key) {
        Some(frontend) => frontend,
        None => nodeport(rules, context, key)?,
    };
    let client = rules.admit(context, frontend.is_external(), key.address, source)?;
    Some(Asked { set: frontend.set(), client })
}

#[inline(always)]
fn frontend(key: &FrontendKey) -> Option<Frontend> {
    let fingerprint = key.fingerprint();
    // Of another key, where the element was freed and used again under our hands: then once more.
    for _ in 0..2 {
        let frontend = read(FRONTENDS.get_ptr(key))?;
        if frontend.fingerprint() == fingerprint {
            return Some(frontend);
        }
    }
    None
}

#[inline(always)]
fn nodeport(rules: Rules, context: &SockAddrContext, key: &FrontendKey) -> Option<Frontend> {
    if !rules.nodeports() {
        return None;
    }
    let frontend = frontend(&FrontendKey::new(key.address.unspecified(), key.port, key.protocol))?;
    rules.has_nodeports(context, key.address).then_some(frontend)
}

/// What the client gets now.
#[inline(always)]
pub(crate) fn answer(asked: Asked, key: &FrontendKey) -> Option<Answer> {
    let port = Set::port_of(asked.set);
    let set = read(SETS.get_ptr(asked.set))?;
    if set.is_refused() {
        return Some(Answer::Refused(port));
    }
    let affinity = read(PORTS.get_ptr(port))?.affinity();
    let id = if affinity == 0 { pick(asked.set, set)? } else { sticky(asked, set, affinity)? };
    let backend = backend(id, port)?;
    // The other family's address has no place in an IPv4 context.
    (backend.address.is_v4() == key.address.is_v4()).then_some(Answer::Backend(id, backend))
}

/// The backend with this id, if a client of the set may still be led there.
#[inline(always)]
pub(crate) fn member(id: u32, set: u32) -> Option<&'static Backend> {
    if read(MEMBERS.get_ptr(id))?.is_in(set) { backend(id, Set::port_of(set)) } else { None }
}

#[inline(always)]
fn backend(id: u32, port: u32) -> Option<&'static Backend> {
    BACKENDS.get(id).filter(|backend| backend.owner == port)
}

/// The id of a backend of the set, each as likely.
#[inline(always)]
fn pick(id: u32, mut set: Set) -> Option<u32> {
    for _ in 0..2 {
        if set.count() == 0 {
            return None;
        }
        // SAFETY: the helper takes nothing.
        let slot = read(SLOTS.get_ptr(set.pick(unsafe { bpf_get_prandom_u32() })))?;
        if slot.set() == id {
            return Some(slot.backend());
        }
        // The range is another set's by now.
        set = read(SETS.get_ptr(id))?;
    }
    None
}

/// The id of the backend that the client had, or of one that it comes back to from now on.
#[inline(always)]
fn sticky(asked: Asked, set: Set, affinity: u32) -> Option<u32> {
    let port = Set::port_of(asked.set);
    let key = AffinityKey::new(asked.client, port);
    // SAFETY: the helper takes nothing.
    let now = (unsafe { bpf_ktime_get_ns() } / 1_000_000_000) as u32;
    // Another connection of the client may be the first to be remembered: then once more.
    for _ in 0..2 {
        let had = read(AFFINITY.get_ptr(key));
        if let Some(had) = had
            && !had.has_expired(affinity, now)
            && read(MEMBERS.get_ptr(had.backend())).is_some_and(|member| member.is_in(asked.set))
        {
            // Not in place: the element may be another client's by now. Once a second is enough.
            if had.seconds() != now {
                AFFINITY.insert(key, Remembered::new(had.backend(), now), BPF_ANY.into()).ok()?;
            }
            return Some(had.backend());
        }
        let id = pick(asked.set, set)?;
        let flags = if had.is_some() { BPF_ANY } else { BPF_NOEXIST };
        if AFFINITY.insert(key, Remembered::new(id, now), flags.into()).is_ok() {
            return Some(id);
        }
    }
    // The map is full: nftables remembers, too.
    stats::unremembered();
    None
}
