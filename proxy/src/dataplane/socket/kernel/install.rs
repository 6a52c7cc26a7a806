//! Puts maps and programs in place: those of an earlier run are taken over, at any moment that run may have ended.
//!
//! Owns the order: maps, then programs loaded, then programs attached. A program that is attached is replaced where it
//! is, so that no connect() meets none, or two. Never decides what is answered.

use std::os::fd::{AsFd, BorrowedFd};

use aya::programs::{CgroupSockAddr, ProgramError, ProgramType};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfLoader};
use kube_lane_common::programs;
use tracing::debug;

use super::super::write::Found;
use super::SocketError;
use super::cgroup::Cgroup;
use super::maps::growth::Former;
use super::maps::{Layout, Maps, Pinned, inspect, layouts};
use super::pins::{MapFolder, Pins, Version};
use super::room::Room;
use super::sys::Link;

/// The constant of the programs: not 0 where `bpf_set_retval` exists.
const CAN_REFUSE: &str = "CAN_REFUSE";

/// Loads the object, as often as maps have to grow.
///
/// aya reads the kernel's own types whenever it makes a loader, which takes as long as all the rest. They are for programs
/// that look into the kernel's structures: ours do not.
#[derive(Debug)]
pub(super) struct Loader(EbpfLoader<'static>);

/// Maps and loaded programs that are not attached yet. Where an earlier run's are attached, they use these maps, or
/// others that are given up with them.
pub(super) struct Prepared {
    pub(super) maps: Maps,
    /// Those whose place some of them take.
    former: Option<Former>,
    ebpf: Ebpf,
    version: Version,
    /// Some maps are not in use yet.
    are_new: bool,
    udp: bool,
}

/// Maps in use.
pub(super) struct Attached {
    pub(super) maps: Maps,
    /// Those that programs which still run may use.
    pub(super) former: Option<Former>,
    /// Where the maps are pinned.
    pub(super) folder: MapFolder,
}

/// Takes maps over or makes them, and loads the programs. What an agent of another layout left is gone.
pub(super) fn prepare(
    loader: &mut Loader,
    object: &[u8],
    pins: &Pins,
    room: Room,
    udp: bool,
) -> Result<Prepared, SocketError> {
    let version = pins.create()?;
    for older in pins.versions()?.iter().filter(|found| **found != version) {
        version.succeed(older)?;
    }
    let layouts = layouts(room);
    let pinned = inspect(&version.maps(), &layouts);
    let folder = match &pinned {
        Pinned::Usable => version.maps(),
        Pinned::TooSmall(too_small) => {
            let kept = layouts.iter().map(|layout| layout.name).filter(|name| !too_small.contains(name));
            renew(&version, kept)?
        }
        Pinned::Unusable(kept) => renew(&version, kept.iter().copied())?,
    };
    let mut ebpf = loader.load(object, Some(&folder), &layouts)?;
    for name in wanted(udp) {
        load_program(&mut ebpf, name)?;
    }
    let mut maps = Maps::open(&folder)?;
    let are_new = pinned != Pinned::Usable;
    let former = match pinned {
        Pinned::TooSmall(too_small) => {
            Some(Former::copy(Maps::open(&version.maps())?, too_small, &mut maps)?)
        }
        Pinned::Usable | Pinned::Unusable(_) => None,
    };
    Ok(Prepared { maps, former, ebpf, version, are_new, udp })
}

/// The programs that there are.
pub(super) fn wanted(udp: bool) -> impl Iterator<Item = &'static str> {
    programs::TCP.into_iter().chain(programs::UDP.into_iter().filter(move |_| udp))
}

impl Prepared {
    /// What an earlier run wrote. Where maps are new, only as much is looked at as was copied to them.
    pub(super) fn read(&self) -> Result<Found, SocketError> {
        let written = match &self.former {
            Some(former) => former.room(),
            None if self.are_new => Room::NONE,
            None => self.maps.room(),
        };
        self.maps.read(written.services)
    }

    /// Brings maps and programs into use.
    pub(super) fn attach(mut self, cgroup: &Cgroup) -> Result<Attached, SocketError> {
        if self.are_new {
            self.version.finish_new_maps()?;
        }
        if !self.udp {
            programs::UDP.iter().try_for_each(|name| self.version.detach_program(name))?;
        }
        for name in wanted(self.udp) {
            attach(name, program(&mut self.ebpf, name)?, &self.version, cgroup)?;
        }
        Ok(Attached { maps: self.maps, former: self.former, folder: self.version.maps() })
    }
}

/// A folder of maps to come that has these of the present ones already.
fn renew<'a>(version: &Version, kept: impl IntoIterator<Item = &'a str>) -> Result<MapFolder, SocketError> {
    let folder = version.begin_new_maps()?;
    kept.into_iter().try_for_each(|name| folder.share(&version.maps(), name))?;
    Ok(folder)
}

impl Loader {
    pub(super) fn new() -> Self {
        let mut loader = EbpfLoader::new();
        loader.btf(None).override_global(CAN_REFUSE, if can_refuse() { &1_u8 } else { &0_u8 }, true);
        Self(loader)
    }

    /// Loads the object with the maps of `folder`, where what is missing is made and pinned; without one, which has to be
    /// the first time, with maps of its own.
    fn load(
        &mut self,
        object: &[u8],
        folder: Option<&MapFolder>,
        layouts: &[Layout],
    ) -> Result<Ebpf, SocketError> {
        for layout in layouts {
            if let Some(folder) = folder {
                self.0.map_pin_path(layout.name, folder.map(layout.name));
            }
            if let Some(entries) = layout.entries {
                self.0.map_max_entries(layout.name, entries);
            }
        }
        self.0.load(object).map_err(|source| SocketError::Object(Box::new(source)))
    }
}

/// Loads programs with small maps of their own, which nobody fills.
pub(super) fn load_alone(object: &[u8], names: &[&'static str]) -> Result<Ebpf, SocketError> {
    let mut ebpf = Loader::new().load(object, None, &layouts(Room::SMALL))?;
    names.iter().try_for_each(|name| load_program(&mut ebpf, name))?;
    Ok(ebpf)
}

/// Attaches a loaded program, does something with the link, and detaches it.
pub(super) fn attach_for_a_moment(
    ebpf: &mut Ebpf,
    name: &'static str,
    cgroup: &Cgroup,
    meanwhile: impl FnOnce(BorrowedFd<'_>) -> Result<(), SocketError>,
) -> Result<(), SocketError> {
    let program = program(ebpf, name)?.fd().map_err(|source| load_error(name, source))?.as_fd();
    let link = Link::attach(program, cgroup.as_fd(), attach_type(name));
    let link = link.map_err(|source| SocketError::Attach { name, path: cgroup.path().to_owned(), source })?;
    meanwhile(link.as_fd())
}

/// `bpf_set_retval` (Linux 5.18): without it, what is refused could only be told EPERM.
pub(super) fn can_refuse() -> bool {
    is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval).unwrap_or(false)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut CgroupSockAddr, SocketError> {
    let program = ebpf.program_mut(name).ok_or(SocketError::Missing(name))?;
    program.try_into().map_err(|source| load_error(name, source))
}

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), SocketError> {
    program(ebpf, name)?.load().map_err(|source| load_error(name, source))
}

fn load_error(name: &'static str, source: ProgramError) -> SocketError {
    match source {
        ProgramError::LoadError { io_error: source, verifier_log } => {
            let log = verifier_log.to_string();
            debug!(program = name, "{log}");
            SocketError::Refused { name, reason: reason(&log).to_owned(), source }
        }
        source => SocketError::Load { name, source: Box::new(source) },
    }
}

/// Why a verifier refused a program: the end of what it says, before its statistics.
fn reason(log: &str) -> &str {
    const STATISTICS: [&str; 3] = ["verification time ", "stack depth ", "processed "];
    let is_reason = |line: &&str| !line.is_empty() && !STATISTICS.iter().any(|words| line.starts_with(words));
    log.lines().rev().map(str::trim).find(is_reason).unwrap_or("its verifier says nothing")
}

/// Puts a program in the place of its predecessor; where there is none at this hook of this cgroup, attaches it.
fn attach(
    name: &'static str,
    program: &CgroupSockAddr,
    version: &Version,
    cgroup: &Cgroup,
) -> Result<(), SocketError> {
    let program = program.fd().map_err(|source| load_error(name, source))?.as_fd();
    let attach_error = |source| SocketError::Attach { name, path: cgroup.path().to_owned(), source };
    let attach_type = attach_type(name);
    if let Some(link) = version.pinned_link(name) {
        let at = link.info().map_err(attach_error)?;
        // The kernel would put any program of this type at any of these hooks.
        if (at.cgroup, at.attach_type) == (cgroup.id(), attach_type) {
            return link.replace(program).map_err(attach_error);
        }
    }
    // Not before the other has gone: where one cgroup is below the other, a connect() would meet both.
    version.detach_program(name)?;
    let link = Link::attach(program, cgroup.as_fd(), attach_type).map_err(attach_error)?;
    link.pin(&version.link(name)).map_err(attach_error)
}

/// The hook of a program: `enum bpf_attach_type` of `linux/bpf.h`.
pub(super) fn attach_type(name: &str) -> u32 {
    match name {
        programs::CONNECT4 => 10,
        programs::CONNECT6 => 11,
        programs::SENDMSG4 => 14,
        programs::SENDMSG6 => 15,
        programs::RECVMSG4 => 19,
        programs::RECVMSG6 => 20,
        programs::GETPEERNAME4 => 29,
        programs::GETPEERNAME6 => 30,
        // The kernel refuses what has another hook than its object says.
        _ => u32::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifier_is_quoted_where_it_says_why() {
        let log = "0: R1=ctx() R10=fp0\n537: (63) *(u32 *)(r10 -112) = r1\nattempt to corrupt spilled pointer on stack\n\
                   verification time 6063 usec\nstack depth 136\nprocessed 371 insns (limit 1000000)\n";
        assert_eq!(reason(log), "attempt to corrupt spilled pointer on stack");
        assert_eq!(reason(""), "its verifier says nothing");
    }
}
