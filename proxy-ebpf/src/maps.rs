//! The maps; their names are those of [`kube_lane_common::maps`].

use aya_ebpf::btf_maps::HashMap;
use aya_ebpf::macros::btf_map;
use kube_lane_common::FrontendKey;

/// TCP connects to each address that the agent put here.
#[btf_map]
pub(crate) static CONNECTS: HashMap<FrontendKey, u64, 1024, 0> = HashMap::new();
