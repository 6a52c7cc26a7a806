//! Taking the layer away: all of it, or what an earlier run of an agent left that does without.
//!
//! Never takes anything from an agent that runs, or from one of another network namespace that may come back.

use std::path::Path;

use kube_lane_common::{Settings, maps};

use super::maps::open_array;
use super::owner::Owner;
use super::pins::{Pins, Version};
use super::{SocketError, sys};

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// There was nothing that had to go.
    Nothing,
    /// It has been detached and removed.
    Done,
    /// Nobody can tell from here: the place is on no BPF file system.
    Unseen,
}

/// What there is in a folder of pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Something of ours, of whatever layout.
    Pinned,
    /// Nothing of ours: no program that was pinned there is attached any more.
    Absent,
    /// Nobody can tell from here: the place is on no BPF file system.
    Unseen,
}

/// Whether there is anything of ours below `bpf_root`.
///
/// # Errors
/// Where it cannot be looked at.
pub fn presence(bpf_root: &Path) -> Result<Presence, SocketError> {
    let pins = Pins::new(bpf_root);
    if pins.check().is_err() {
        return Ok(Presence::Unseen);
    }
    Ok(if pins.versions()?.is_empty() { Presence::Absent } else { Presence::Pinned })
}

/// Detaches and removes all of ours below `bpf_root`, of every layout.
///
/// # Errors
/// Where something cannot be removed, or an agent has it.
pub fn cleanup(bpf_root: &Path) -> Result<Removal, SocketError> {
    remove(bpf_root, |_| Ok(true))
}

/// As [`cleanup`], for an agent that does without the layer: what the agent of another network namespace left stays,
/// since that may come back. `is_marked`: this network namespace has a mark that names this place.
///
/// # Errors
/// As [`cleanup`], and where it cannot be told whose it is.
pub fn withdraw(bpf_root: &Path, is_marked: bool) -> Result<Removal, SocketError> {
    remove(bpf_root, |version| {
        // To look takes CAP_BPF. What never had settings never answered.
        if is_marked || !version.maps().map(maps::SETTINGS).exists() {
            return Ok(true);
        }
        let settings = open_array::<Settings>(&version.maps(), maps::SETTINGS)?.get(0);
        let host = sys::network_namespace_cookie().map_err(SocketError::Cookie)?;
        Ok(settings.is_none_or(|settings| [0, host].contains(&settings.host)))
    })
}

fn remove(
    bpf_root: &Path,
    is_to_go: impl Fn(&Version) -> Result<bool, SocketError>,
) -> Result<Removal, SocketError> {
    let pins = Pins::new(bpf_root);
    if pins.check().is_err() {
        return Ok(Removal::Unseen);
    }
    if !bpf_root.exists() {
        return Ok(Removal::Nothing);
    }
    let _owner = Owner::claim(bpf_root)?;
    let mut removal = Removal::Nothing;
    for version in pins.versions()? {
        if is_to_go(&version)? {
            version.remove()?;
            removal = Removal::Done;
        }
    }
    pins.remove_if_empty();
    Ok(removal)
}
