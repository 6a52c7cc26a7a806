//! An initramfs: a Debian system of a few programs with the shared libraries that they need, and modules of the kernel.
//! The kernel loads what it needs of these itself, as on any node.
//!
//! Owns the archive's form. Never says what is in it.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cpio::newc;

/// Directories and files of `lib/modules/<release>/kernel` that a node's networks may need.
const NETWORK_MODULES: &[&str] = &["net", "lib", "crypto", "drivers/net/veth.ko"];

/// An archive that is being written.
#[derive(Debug)]
pub struct Archive {
    out: BufWriter<File>,
    /// What it holds already.
    known: BTreeSet<PathBuf>,
}

impl Archive {
    /// Begins an archive with the folders that every Debian system has, and a console.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn create(to: &Path) -> Result<Self> {
        let file = File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
        let mut archive = Self { out: BufWriter::new(file), known: BTreeSet::new() };
        // As on any Debian: whatever path a program or a library is known by, it is found.
        for dir in ["bin", "sbin", "lib", "lib64"] {
            archive.symlink(&Path::new("/").join(dir), &format!("usr/{dir}"))?;
        }
        archive.console()?;
        Ok(archive)
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn finish(self) -> Result<()> {
        newc::trailer(self.out)?.flush().context("cannot write the initramfs")
    }

    /// The modules of a kernel that is unpacked at `system` (where its `boot` and `lib` are): those for networks, those in
    /// these directories and files of `kernel`, and the index of all.
    ///
    /// # Errors
    /// When one is missing.
    pub(super) fn modules(&mut self, system: &Path, parts: &[&str]) -> Result<()> {
        for release in entries(&system.join("lib/modules"))? {
            for index in entries(&release)?.into_iter().filter(|file| file.is_file()) {
                self.below(system, &index, Path::new("/usr"))?;
            }
            for part in NETWORK_MODULES.iter().chain(parts) {
                // Some releases compress them.
                let part = release.join("kernel").join(part);
                let found =
                    [part.clone(), part.with_extension("ko.xz")].into_iter().find(|path| path.exists());
                let found = found.with_context(|| format!("no {}", part.display()))?;
                self.below(system, &found, Path::new("/usr"))?;
            }
        }
        Ok(())
    }

    /// A program, and the shared libraries that it needs.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub fn program(&mut self, program: &Path, to: &Path) -> Result<()> {
        self.file(program, to)?;
        let ldd = Command::new("ldd").arg(program).output().context("cannot start ldd")?;
        // ldd fails where a program needs none.
        if !ldd.status.success() {
            return Ok(());
        }
        // "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)", and the loader without the first half.
        let libraries = String::from_utf8(ldd.stdout)?;
        ensure!(!libraries.contains("not found"), "{} lacks libraries:\n{libraries}", program.display());
        for library in
            libraries.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':'))
        {
            let installed =
                Path::new("/usr").join(library.trim_start_matches("/usr").trim_start_matches('/'));
            self.file(Path::new(library), &installed)?;
        }
        Ok(())
    }

    /// A file or a directory with all that is in it, at the same place below `to` as it is below `top`.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn below(&mut self, top: &Path, path: &Path, to: &Path) -> Result<()> {
        let place = to.join(path.strip_prefix(top)?);
        if !path.is_dir() {
            return self.file(path, &place);
        }
        self.directory(&place)?;
        entries(path)?.iter().try_for_each(|entry| self.below(top, entry, to))
    }

    /// A file with this content.
    ///
    /// # Errors
    /// When the archive cannot be written.
    pub fn text(&mut self, at: &Path, content: &str) -> Result<()> {
        self.parents(at)?;
        self.entry(at, 0o100_755, content.as_bytes())
    }

    /// A file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn file(&mut self, from: &Path, to: &Path) -> Result<()> {
        if self.known.insert(to.to_owned()) {
            self.parents(to)?;
            let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
            self.entry(to, 0o100_755, &content)?;
        }
        Ok(())
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// When the archive cannot be written.
    pub fn symlink(&mut self, at: &Path, to: &str) -> Result<()> {
        self.parents(at)?;
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
        path.parent().map_or(Ok(()), |parent| self.directory(parent))
    }

    fn directory(&mut self, at: &Path) -> Result<()> {
        if at != Path::new("/") && self.known.insert(at.to_owned()) {
            self.parents(at)?;
            self.entry(at, 0o040_755, &[])?;
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
///
/// # Errors
/// When there is none.
pub fn find(program: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let found = dirs.find_map(|dir| Some(dir.join(program)).filter(|file| file.is_file()));
    found.with_context(|| format!("no {program}: `cargo xtask setup` installs it"))
}
