//! The initramfs: a Debian system of a few programs with the shared libraries that they need, and the kernel's modules
//! for networks. The kernel loads what it needs of these itself, as on any node.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cpio::newc;
use kube_lane_tests::agent;

use crate::guest;

/// Directories and files of `lib/modules/<release>/kernel` that a node's networks may need.
const MODULES: [&str; 4] = ["net", "lib", "crypto", "drivers/net/veth.ko"];

/// Writes the archive for a kernel that is unpacked at `system` (where its `boot` and `lib` are).
///
/// # Errors
/// When a program or a module cannot be found.
pub(crate) fn write(system: &Path, to: &Path) -> Result<()> {
    let file = File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    let mut archive = Archive { out: BufWriter::new(file), known: BTreeSet::new() };
    // As on any Debian: whatever path a program or a library is known by, it is found.
    for dir in ["bin", "sbin", "lib", "lib64"] {
        archive.symlink(&Path::new("/").join(dir), &format!("usr/{dir}"))?;
    }
    archive.console()?;
    archive.program(&env::current_exe()?, Path::new("/init"))?;
    archive.program(&agent::binary()?, Path::new(guest::AGENT))?;
    archive.program(&find("nft")?, Path::new("/usr/sbin/nft"))?;
    archive.program(&find("modprobe")?, Path::new("/usr/sbin/modprobe"))?;

    let modules = system.join("lib/modules");
    for release in entries(&modules)? {
        for index in entries(&release)?.into_iter().filter(|file| file.is_file()) {
            archive.below(system, &index)?;
        }
        for part in MODULES {
            // Some releases compress them.
            let part = release.join("kernel").join(part);
            let found = [part.clone(), part.with_extension("ko.xz")].into_iter().find(|path| path.exists());
            archive.below(system, &found.with_context(|| format!("no {}", part.display()))?)?;
        }
    }
    newc::trailer(archive.out)?.flush().context("cannot write the initramfs")
}

struct Archive {
    out: BufWriter<File>,
    /// What it holds already.
    known: BTreeSet<PathBuf>,
}

impl Archive {
    /// A program, and the shared libraries that it needs.
    fn program(&mut self, program: &Path, to: &Path) -> Result<()> {
        self.file(program, to)?;
        let ldd = Command::new("ldd").arg(program).output().context("cannot start ldd")?;
        ensure!(ldd.status.success(), "ldd {}: {}", program.display(), ldd.status);
        // "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)", and the loader without the first half.
        let libraries = String::from_utf8(ldd.stdout)?;
        for library in
            libraries.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':'))
        {
            let installed =
                Path::new("/usr").join(library.trim_start_matches("/usr").trim_start_matches('/'));
            self.file(Path::new(library), &installed)?;
        }
        Ok(())
    }

    /// A file or a directory with all that is in it, at the same place as below `top`.
    fn below(&mut self, top: &Path, path: &Path) -> Result<()> {
        if path.is_dir() {
            return entries(path)?.iter().try_for_each(|entry| self.below(top, entry));
        }
        let to = Path::new("/usr").join(path.strip_prefix(top)?);
        self.file(path, &to)
    }

    fn file(&mut self, from: &Path, to: &Path) -> Result<()> {
        if self.known.insert(to.to_owned()) {
            self.parents(to)?;
            let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
            self.entry(to, 0o100_755, &content)?;
        }
        Ok(())
    }

    fn symlink(&mut self, at: &Path, to: &str) -> Result<()> {
        self.entry(at, 0o120_777, to.as_bytes())
    }

    /// What `/init` has as its standard streams.
    fn console(&mut self) -> Result<()> {
        let console = Path::new("/dev/console");
        self.parents(console)?;
        let node = newc::Builder::new(name(console)).mode(0o020_600).rdev_major(5).rdev_minor(1);
        node.write(&mut self.out, 0).finish()?;
        Ok(())
    }

    fn parents(&mut self, path: &Path) -> Result<()> {
        let Some(parent) = path.parent().filter(|parent| *parent != Path::new("/")) else { return Ok(()) };
        if self.known.insert(parent.to_owned()) {
            self.parents(parent)?;
            self.entry(parent, 0o040_755, &[])?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len()).with_context(|| format!("{} is too long", path.display()))?;
        let mut entry = newc::Builder::new(name(path)).mode(mode).nlink(1).write(&mut self.out, size);
        entry.write_all(content)?;
        entry.finish()?;
        Ok(())
    }
}

/// As the archive writes it: paths are relative to the root.
fn name(path: &Path) -> &str {
    // All paths here are of Debian's packages.
    path.to_str().unwrap_or_default().trim_start_matches('/')
}

/// What a directory has, in one order on every machine.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    let mut entries = read().with_context(|| format!("cannot read {}", dir.display()))?;
    entries.sort();
    Ok(entries)
}

/// The program of this name, also where an unprivileged PATH does not lead.
fn find(program: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let found = dirs.find_map(|dir| Some(dir.join(program)).filter(|file| file.is_file()));
    found.with_context(|| format!("no {program}: `cargo xtask setup` installs it"))
}
