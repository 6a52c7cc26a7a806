//! Who asks, and whether a socket may be answered: everything but what the Service has.
//!
//! Owns no rule of a Service. `None` means everywhere that the socket is left alone.

use aya_ebpf::helpers::generated::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_netns_cookie,
};
use aya_ebpf::programs::SockAddrContext;
use kube_lane_common::{Address, Answered, Client, PodCgroups, Settings};

use crate::maps::{LEFT_ALONE, NODE_ADDRESSES, SETTINGS, read};
use crate::rewrite;

/// How many cgroups above a process are looked up: enough for a cluster whose nodes are themselves pods.
const DEPTH: i32 = 16;

/// What holds for all Services at this moment.
#[derive(Clone, Copy)]
pub(crate) struct Rules {
    answered: Answered,
    settings: &'static Settings,
}

/// The rules, where anybody is answered.
#[inline(always)]
pub(crate) fn rules() -> Option<Rules> {
    let settings = SETTINGS.get(0)?;
    // One load, before everything else: the others change only while this is 0.
    let answered = read(Some(&raw const settings.answered))?;
    (answered != Answered::NOTHING).then_some(Rules { answered, settings })
}

impl Rules {
    /// Whether NodePorts answer on this address.
    #[inline(always)]
    pub(crate) fn has_nodeports(self, context: &SockAddrContext, address: Address) -> bool {
        if address.is_v4() && address.is_loopback() {
            self.answered.has(Answered::LOOPBACK_NODEPORTS) && self.is_host(netns_cookie(context))
        } else {
            NODE_ADDRESSES.get_ptr(address).is_some()
        }
    }

    /// Whether NodePorts are answered at all.
    #[inline(always)]
    pub(crate) fn nodeports(self) -> bool {
        self.answered.has(Answered::NODEPORTS)
    }

    /// The cookie of the client's network namespace, if the client is answered at such a frontend of the destination's
    /// family. `source` gives the address that it is bound to.
    #[inline(always)]
    pub(crate) fn admit(
        self,
        context: &SockAddrContext,
        is_external: bool,
        destination: Address,
        source: impl FnOnce(&SockAddrContext) -> Address,
    ) -> Option<u64> {
        if self.answered.has(Answered::LEFT_ALONE) && is_left_alone() {
            return None;
        }
        let cookie = netns_cookie(context);
        let is_ipv6 = !destination.is_v4();
        let is_answered = |client| self.answered.has(Answered::bit(client, is_external, is_ipv6));
        let is_host = self.is_host(cookie);
        let is_admitted = if is_host {
            is_answered(Client::Host)
        } else {
            is_answered(Client::Other) || is_answered(Client::Pod) && is_pod(&self.settings.pods)
        };
        if !is_admitted {
            return None;
        }
        // The way to the Service's address and the way to a backend's may be different there.
        if rewrite::has_device(context) {
            return None;
        }
        let source = source(context);
        (source.is_unspecified() || self.source_passes(is_host, is_external, is_ipv6, source))
            .then_some(cookie)
    }

    #[inline(always)]
    fn is_host(self, cookie: u64) -> bool {
        cookie == self.settings.host
    }

    /// Whether packets would leave with the source that the socket is bound to: nobody may masquerade them, and a
    /// backend elsewhere must be able to answer.
    #[inline(always)]
    fn source_passes(self, is_host: bool, is_external: bool, is_ipv6: bool, source: Address) -> bool {
        if is_host || source.is_loopback() || source.is_v4() == is_ipv6 {
            return false;
        }
        if is_external || !self.answered.has(Answered::SOURCE << Answered::family(is_ipv6)) {
            return true;
        }
        if is_ipv6 { self.settings.pods6.has(source) } else { self.settings.pods4.has(source) }
    }
}

#[inline(always)]
fn netns_cookie(context: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes the context.
    unsafe { bpf_get_netns_cookie(context.sock_addr.cast()) }
}

/// Whether the process runs below a cgroup of pods. On a node that is no container itself the first look tells.
#[inline(always)]
fn is_pod(pods: &PodCgroups) -> bool {
    is_below(pods.level as i32, |id| pods.has(id))
}

/// Whether the process runs in a cgroup that is left alone, or below one.
#[inline(always)]
fn is_left_alone() -> bool {
    let is = |id| LEFT_ALONE.get_ptr(id).is_some();
    // SAFETY: the helper takes nothing.
    is(unsafe { bpf_get_current_cgroup_id() }) || is_below(0, is)
}

/// Whether `is` holds for one of the cgroups that the process runs in, from this level of the hierarchy on.
#[inline(always)]
fn is_below(level: i32, is: impl Fn(u64) -> bool) -> bool {
    for below in 0..DEPTH {
        // SAFETY: the helper takes any level, and gives 0 below the process's own.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level + below) };
        if id == 0 {
            return false;
        }
        if is(id) {
            return true;
        }
    }
    false
}
