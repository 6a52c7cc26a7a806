//! The maps; their names are those of [`kube_lane_common::maps`], where it stands what each holds.
//!
//! How many entries each has is set when the object is loaded. Arrays are mapped by the agent, which writes them there;
//! a hash takes memory for what it holds alone.

use core::ptr;

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, SkStorage};
use aya_ebpf::macros::btf_map;
use kube_lane_common::{
    Address, AffinityKey, Backend, Frontend, FrontendKey, Member, Peers, PortWord, Remembered, Reverse, Set,
    Settings, Slot,
};

/// As many as there are until the loader says how many.
const ENTRIES: usize = 1024;
const MAPPED: usize = BPF_F_MMAPABLE as usize;
const AS_NEEDED: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub(crate) static FRONTENDS: HashMap<FrontendKey, Frontend, ENTRIES, AS_NEEDED> = HashMap::new();
#[btf_map]
pub(crate) static SETS: Array<Set, ENTRIES, MAPPED> = Array::new();
#[btf_map]
pub(crate) static SLOTS: Array<Slot, ENTRIES, MAPPED> = Array::new();
#[btf_map]
pub(crate) static BACKENDS: Array<Backend, ENTRIES, MAPPED> = Array::new();
#[btf_map]
pub(crate) static MEMBERS: Array<Member, ENTRIES, MAPPED> = Array::new();
#[btf_map]
pub(crate) static PORTS: Array<PortWord, ENTRIES, MAPPED> = Array::new();
#[btf_map]
pub(crate) static CONNECTIONS: Array<u64, ENTRIES, MAPPED> = Array::new();
#[btf_map]
pub(crate) static REFUSED: Array<u64, ENTRIES, MAPPED> = Array::new();
#[btf_map]
pub(crate) static NODE_ADDRESSES: HashMap<Address, u64, ENTRIES, AS_NEEDED> = HashMap::new();
#[btf_map]
pub(crate) static AFFINITY: HashMap<AffinityKey, Remembered, ENTRIES, AS_NEEDED> = HashMap::new();
#[btf_map]
pub(crate) static LEFT_ALONE: HashMap<u64, u64, ENTRIES, AS_NEEDED> = HashMap::new();
#[btf_map]
pub(crate) static REVERSE: SkStorage<Reverse> = SkStorage::new();
#[btf_map]
pub(crate) static UDP_PEERS: SkStorage<Peers> = SkStorage::new();
#[btf_map]
pub(crate) static UNREMEMBERED: Array<u64, 1, MAPPED> = Array::new();
#[btf_map]
pub(crate) static SETTINGS: Array<Settings, 1, MAPPED> = Array::new();

/// Reads a word of a map by one load, whatever is made of it.
#[inline(always)]
pub(crate) fn read<T: Copy>(word: Option<*const T>) -> Option<T> {
    // SAFETY: the kernel gave a pointer to an aligned value of this type, and frees none that a running program holds.
    word.map(|word| unsafe { ptr::read_volatile(word) })
}
