//! What the kernel, its mounts and our rights allow, found by trying it.
//!
//! Owns no decision: the agent tries the real thing, and this tells a person why that would fail. Leaves nothing behind.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use aya::maps::MapType;
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported};
use kube_lane_common::programs;
use serde::Serialize;

use super::cgroup::Cgroup;
use super::install;
use super::pod_cgroups::PodPaths;
use super::sys::{GracePeriod, Words};
use super::trial::Trial;
use super::{SocketError, available};
use crate::causes::{is_not_permitted, with_causes};

/// One thing that was tried.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Feature {
    /// What it is called, for instance "cgroup v2".
    pub name: &'static str,
    /// Without it there is no socket layer; else less of one.
    pub required: bool,
    /// What the socket layer does with it.
    pub needed_for: &'static str,
    /// What was found, or why it was not.
    pub found: Result<String, Failure>,
    /// What it means for the user where it is missing.
    pub means: &'static str,
}

/// Why something does not work.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// For people.
    pub words: String,
    /// The kernel, or a security module, did not permit it.
    pub is_not_permitted: bool,
}

impl Failure {
    fn of(error: &(dyn Error + 'static)) -> Self {
        Self { words: with_causes(error), is_not_permitted: is_not_permitted(error) }
    }
}

impl From<&str> for Failure {
    fn from(words: &str) -> Self {
        Self { words: words.to_owned(), is_not_permitted: false }
    }
}

/// Nothing answers at connect().
const NO_LAYER: &str = "no socket layer: nftables answers everything";

/// Tries all that the socket layer needs. `cgroup_root`, `bpf_root` and `pod_cgroups`: as the options.
pub fn probe(cgroup_root: Option<&Path>, bpf_root: &Path, pod_cgroups: &[PathBuf]) -> Vec<Feature> {
    let required = |name, needed_for, found: Result<String, Failure>| Feature {
        name,
        required: true,
        needed_for,
        found,
        means: NO_LAYER,
    };
    let optional = |name, needed_for, found: Result<String, Failure>, means| Feature {
        name,
        required: false,
        needed_for,
        found,
        means,
    };
    let cgroup = Cgroup::find(cgroup_root);
    let at =
        cgroup.as_ref().map(|cgroup| cgroup.path().display().to_string()).map_err(|error| Failure::of(error));
    vec![
        required("eBPF programs", "they are part of the agent", built_in()),
        required("cgroup v2", "the programs are attached to its root", at),
        required(
            "BPF file system",
            "maps and programs outlive the agent in a folder there",
            file_system(bpf_root),
        ),
        required("program type cgroup_sock_addr", "runs at connect() (CAP_BPF)", program_type()),
        required("arrays in memory", "an endpoint changes by a few stores", array()),
        required("map type sk_storage", "a socket remembers what it dialled", map_type(MapType::SkStorage)),
        required("map in a map", "tells when what was removed can be used again", grace()),
        required(
            "bpf_get_netns_cookie",
            "tells pods from host processes (Linux 5.7)",
            helper(BpfHelper::BPF_FUNC_get_netns_cookie),
        ),
        required("the programs", "the kernel's verifier accepts them (CAP_BPF, CAP_PERFMON)", verifier()),
        required(
            "attaching",
            "beside the programs of others (CAP_NET_ADMIN)",
            attach(cgroup.as_ref(), bpf_root),
        ),
        optional(
            "cgroups of pods",
            "tells pods from other containers",
            pods(cgroup.as_ref(), pod_cgroups),
            "nftables answers pods, but where no detectLocalMode tells them from other clients; \
             kubeLane.socketLB.podCgroups names the cgroup that they run below",
        ),
        optional(
            "bpf_set_retval",
            "refuses a connect() where there is no endpoint (Linux 5.18)",
            helper(BpfHelper::BPF_FUNC_set_retval),
            "nftables refuses instead: as soon, but by a packet",
        ),
    ]
}

fn built_in() -> Result<String, Failure> {
    let object = available().map_err(|error| Failure::of(&error))?;
    Ok(format!("{} KiB", object.len() >> 10))
}

fn file_system(bpf_root: &Path) -> Result<String, Failure> {
    Trial::begin(bpf_root).and_then(|trial| trial.pin_map()).map_err(|error| Failure::of(&error))?;
    Ok(bpf_root.display().to_string())
}

fn program_type() -> Result<String, Failure> {
    supported(is_program_supported(ProgramType::CgroupSockAddr))
}

fn map_type(kind: MapType) -> Result<String, Failure> {
    supported(is_map_supported(kind))
}

fn helper(helper: BpfHelper) -> Result<String, Failure> {
    supported(is_helper_supported(ProgramType::CgroupSockAddr, helper))
}

fn supported<E: Error + 'static>(found: Result<bool, E>) -> Result<String, Failure> {
    match found {
        Ok(true) => Ok("yes".into()),
        Ok(false) => Err("not in this kernel".into()),
        Err(error) => Err(Failure::of(&error)),
    }
}

/// Also tells whether memory may be had: before Linux 5.11 maps counted as locked memory.
fn array() -> Result<String, Failure> {
    /// As large as one of ours is.
    const ENTRIES: u32 = 1 << 17;
    Words::create(ENTRIES).map_err(|error| Failure::of(&error))?;
    Ok("yes".into())
}

fn grace() -> Result<String, Failure> {
    let start = Instant::now();
    GracePeriod::new().and_then(|grace| grace.wait()).map_err(|error| Failure::of(&error))?;
    Ok(format!("waited {} ms", start.elapsed().as_millis()))
}

fn verifier() -> Result<String, Failure> {
    let all = programs::TCP.into_iter().chain(programs::UDP).collect::<Vec<_>>();
    let loaded = available().and_then(|object| install::load_alone(object, &all));
    loaded.map(|_| format!("{} programs", all.len())).map_err(|error| Failure::of(&error))
}

fn pods(cgroup: Result<&Cgroup, &SocketError>, paths: &[PathBuf]) -> Result<String, Failure> {
    let cgroup = cgroup.map_err(|_| Failure::from("there is no cgroup"))?;
    let pods = PodPaths::new(cgroup, paths);
    pods.missing().map_or_else(|| Ok(pods.named()), |missing| Err(missing.as_str().into()))
}

/// Attaches a program that has nothing to answer, for a moment, and pins its link where links can be pinned at all.
fn attach(cgroup: Result<&Cgroup, &SocketError>, bpf_root: &Path) -> Result<String, Failure> {
    let cgroup = cgroup.map_err(|_| Failure::from("there is no cgroup"))?;
    let attached = available().and_then(|object| {
        let name = programs::GETPEERNAME6;
        let mut ebpf = install::load_alone(object, &[name])?;
        // Why not is in the row of the file system.
        let trial = Trial::begin(bpf_root).ok();
        install::attach_for_a_moment(&mut ebpf, name, cgroup, |link| {
            trial.map_or(Ok(()), |trial| trial.pin(link))
        })
    });
    attached.map(|()| cgroup.path().display().to_string()).map_err(|error| Failure::of(&error))
}
