//! The eBPF object: `proxy-ebpf`, built and checked by a toolchain of its own.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use object::build::elf::{Builder, SectionData};
use object::elf::{SHN_UNDEF, SHT_STRTAB};

use crate::setup::{self, Need};
use crate::{build, process};

/// Builds the object, at `target/bpf/kube-lane.bpf.o`.
///
/// # Errors
/// When there is no toolchain for it on this machine, or `proxy-ebpf` does not build.
pub(crate) fn build_object() -> Result<PathBuf> {
    setup::ensure(&[Need::Ebpf])?;
    // The lines of the sources are in its BTF. These flags are added to those in proxy-ebpf/.cargo/config.toml.
    let remaps = build::remaps()?;
    let flags = remaps.iter().map(|flag| format!("{flag:?}")).collect::<Vec<_>>().join(", ");
    let mut build = setup::ebpf::cargo("build");
    build.arg("--config").arg(format!("target.bpfel-unknown-none.rustflags=[{flags}]"));
    process::run(build.args(["--locked", "--quiet", "--release"]))?;
    let built = process::target("ebpf/bpfel-unknown-none/release/kube-lane");
    let built = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    let stripped = strip(&built)?;

    let object = process::target("bpf/kube-lane.bpf.o");
    // Cargo looks at the time of change: the same object must not build the agent again.
    if fs::read(&object).ok().as_ref() != Some(&stripped) {
        fs::create_dir_all(process::target("bpf"))?;
        fs::write(&object, stripped).with_context(|| format!("cannot write {}", object.display()))?;
    }
    Ok(object)
}

/// Checks the formatting and the lints of `proxy-ebpf`.
///
/// # Errors
/// When one of them fails; it has printed what it found.
pub(crate) fn lint() -> Result<()> {
    let manifest = ["fmt", "--check", "--manifest-path", "proxy-ebpf/Cargo.toml"];
    process::run(process::cargo().args(manifest))?;
    process::run(setup::ebpf::cargo("clippy").args([
        "--locked",
        "--quiet",
        "--release",
        "--",
        "-D",
        "warnings",
    ]))
}

/// Drops the DWARF, of which the linker has made BTF: neither the loader nor the kernel reads it. Refuses an object
/// that calls what exists nowhere, as one does of which a program may panic.
fn strip(object: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Builder::read64(object).context("what was built is no ELF object")?;
    let mut undefined = elf.symbols.iter().filter(|symbol| symbol.section.is_none());
    if let Some(symbol) = undefined.find(|symbol| symbol.st_shndx == SHN_UNDEF && !symbol.name.is_empty()) {
        bail!("a program calls {}, which exists nowhere", symbol.name);
    }
    for section in &mut elf.sections {
        let name = section.name.as_slice();
        section.delete |= name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    elf.delete_orphan_symbols();
    // LLVM keeps the names of sections among those of symbols, which the builder cannot write.
    let names = elf.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    elf.write(&mut stripped).context("cannot strip the object")?;
    Ok(stripped)
}

#[cfg(test)]
mod tests {
    use object::Endianness;
    use object::elf::SHT_SYMTAB;

    use super::*;

    /// An object with a symbol of this name that is nowhere.
    fn object(calls: &'static str) -> Vec<u8> {
        let mut elf = Builder::new(Endianness::Little, true);
        for (name, sh_type, data) in [
            (".strtab", SHT_STRTAB, SectionData::String),
            (".symtab", SHT_SYMTAB, SectionData::Symbol),
            (".shstrtab", SHT_STRTAB, SectionData::SectionString),
        ] {
            let section = elf.sections.add();
            section.name = name.as_bytes().into();
            section.sh_type = sh_type;
            section.data = data;
        }
        elf.symbols.add().name = calls.as_bytes().into();
        let mut object = Vec::new();
        elf.write(&mut object).unwrap();
        object
    }

    #[test]
    fn what_calls_nothing_that_exists_is_refused() {
        let refused = strip(&object("kube_lane_program_may_panic")).unwrap_err();
        assert_eq!(refused.to_string(), "a program calls kube_lane_program_may_panic, which exists nowhere");
    }
}
