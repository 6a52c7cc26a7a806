//! What was put in place, and whether it still is: others may detach a program, remove pins, unmount their file system.
//!
//! Owns noticing it, since the kernel tells nobody. Never puts anything back: `install` does.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::SocketError;
use super::pins::{Version, pin_error};
use super::sys::{Link, LinkInfo};

/// The programs and maps of one installation.
#[derive(Debug)]
pub(super) struct Installed {
    version: Version,
    programs: Vec<Program>,
    maps: Vec<(PathBuf, Pin)>,
}

/// A program at its hook.
#[derive(Debug)]
struct Program {
    name: &'static str,
    /// Held, so that it can be detached also where its pin has gone.
    link: Link,
    info: LinkInfo,
}

/// What tells a pin from a later one of its name: the device and the number of its inode.
type Pin = (u64, u64);

impl Installed {
    /// As it is now: these programs and all maps of a layout.
    pub(super) fn note(
        version: Version,
        programs: impl Iterator<Item = &'static str>,
    ) -> Result<Self, SocketError> {
        let program = |name| {
            let link = Link::pinned(&version.link(name))?;
            Ok(Program { name, info: link.info()?, link })
        };
        let programs =
            programs.map(|name| program(name).map_err(|error| pin_error(&version.link(name), error)));
        let programs = programs.collect::<Result<_, _>>()?;
        let folder = version.maps().path().to_owned();
        let maps = pins(&folder).map_err(|error| pin_error(&folder, error))?;
        Ok(Self { version, programs, maps })
    }

    /// What is not as it was put, for people; `None`: all is. Some 30 system calls.
    pub(super) fn missing(&self) -> Option<String> {
        let program = self.programs.iter().find(|program| self.info(program) != Some(program.info));
        let program =
            program.map(|program| format!("the program {} is not attached as it was", program.name));
        let map = || self.maps.iter().find(|(path, was)| pin(path).ok() != Some(*was));
        program.or_else(|| map().map(|(path, _)| format!("{} is not pinned as it was", path.display())))
    }

    /// Detaches the programs whose pins have gone: who puts the others in place cannot find these, and they would stand
    /// before or behind them.
    pub(super) fn detach_lost(&self) {
        let lost =
            |program: &&Program| self.info(program).is_none_or(|info| !info.is_of_same_link(&program.info));
        for program in self.programs.iter().filter(lost) {
            // It may be detached already.
            let _ = program.link.detach();
        }
    }

    /// What the kernel says of the link that is pinned for a program.
    fn info(&self, program: &Program) -> Option<LinkInfo> {
        self.version.pinned_link(program.name)?.info().ok()
    }
}

fn pins(folder: &Path) -> io::Result<Vec<(PathBuf, Pin)>> {
    let path = |entry: io::Result<fs::DirEntry>| entry.map(|entry| entry.path());
    fs::read_dir(folder)?.map(|entry| path(entry).and_then(|path| Ok((path.clone(), pin(&path)?)))).collect()
}

fn pin(path: &Path) -> io::Result<Pin> {
    fs::symlink_metadata(path).map(|pin| (pin.dev(), pin.ino()))
}
