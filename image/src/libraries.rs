//! The shared libraries that a program loads, found as the dynamic loader finds them, in a system that is unpacked in a
//! folder. Runs neither the program nor the loader, so the architecture does not matter.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use object::Endianness;
use object::elf::{DT_NEEDED, FileHeader64};
use object::read::elf::{FileHeader as _, ProgramHeader as _};

/// Where a Debian system has libraries, `MULTIARCH` being such as `x86_64-linux-gnu`.
const DIRECTORIES: [&str; 4] = ["lib/MULTIARCH", "usr/lib/MULTIARCH", "lib", "usr/lib"];

/// The loader and the libraries of `program`, which may be a library itself: where each lies in an image, and its file
/// below `root`. A static program has none.
///
/// # Errors
/// When a library is missing, or a file is not an ELF file of 64 bits.
pub(crate) fn of(program: &Path, root: &Path, multiarch: &str) -> Result<BTreeMap<String, PathBuf>> {
    let Elf { interpreter, needed } = Elf::read(program)?;
    let mut found = BTreeMap::new();
    // A library leaves the choice of the loader to the programs that load it.
    let loader = interpreter.map(|path| path.trim_start_matches('/').to_owned());
    if let Some(loader) = &loader {
        found.insert(loader.clone(), resolve(root, loader, multiarch)?);
    }
    let mut wanted = needed;
    while let Some(name) = wanted.pop() {
        let path = format!("lib/{multiarch}/{name}");
        // libc needs the loader in turn, which is in memory already.
        let is_loader = loader.as_ref().is_some_and(|loader| loader.ends_with(&format!("/{name}")));
        if is_loader || found.contains_key(&path) {
            continue;
        }
        let file = resolve(root, &path, multiarch)?;
        wanted.extend(Elf::read(&file)?.needed);
        found.insert(path, file);
    }
    Ok(found)
}

/// The file of this name below `root`. Its links lead to other files beside it, by relative names, or by names that are
/// absolute in the system of `root`; those of a loader do.
fn resolve(root: &Path, path: &str, multiarch: &str) -> Result<PathBuf> {
    let name = path.rsplit('/').next().unwrap_or(path);
    let beside = DIRECTORIES.map(|dir| root.join(dir.replace("MULTIARCH", multiarch)).join(name));
    beside
        .iter()
        .find_map(|file| file.canonicalize().ok())
        .with_context(|| format!("no {name} below {}: remove that folder to fetch it anew", root.display()))
}

/// What a program or a library says that it needs.
struct Elf {
    interpreter: Option<String>,
    needed: Vec<String>,
}

impl Elf {
    fn read(file: &Path) -> Result<Self> {
        let data = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        Self::parse(&data).with_context(|| format!("{} is no ELF file that can be read", file.display()))
    }

    fn parse(data: &[u8]) -> Result<Self> {
        let header = FileHeader64::<Endianness>::parse(data)?;
        let endian = header.endian()?;
        let mut elf = Self { interpreter: None, needed: Vec::new() };
        for segment in header.program_headers(endian, data)? {
            if let Some(path) = segment.interpreter(endian, data)? {
                elf.interpreter = Some(String::from_utf8(path.to_vec())?);
            }
        }
        let dynamic = header.sections(endian, data)?.dynamic_table(endian, data)?;
        for entry in dynamic.iter().filter(|entry| entry.tag == DT_NEEDED) {
            elf.needed.push(String::from_utf8(dynamic.string(entry)?.to_vec())?);
        }
        Ok(elf)
    }
}
