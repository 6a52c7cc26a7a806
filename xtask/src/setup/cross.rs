//! The compiler that builds for an architecture that this machine does not have: the user's own, where rustup has the
//! standard library of that target; else Debian's, the one that builds the eBPF programs, with Debian's standard library
//! of that architecture. The C compiler, which also links, is Debian's.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use anyhow::{Context, Result};

use super::debian::{Package, Probe};
use super::ebpf;
use super::sysroot::Sysroot;
use crate::build::Arch;
use crate::process;

/// Debian's standard library of the architecture that it is fetched for.
pub(super) const STANDARD_LIBRARY: &str = "libstd-rust-web-dev";

/// The C compiler for `arch`, and what links for it.
pub(super) const fn packages(arch: Arch) -> &'static [Package] {
    match arch {
        Arch::Amd64 => {
            &[Package { name: "gcc-x86-64-linux-gnu", probe: Probe::Program("x86_64-linux-gnu-gcc") }]
        }
        Arch::Arm64 => {
            &[Package { name: "gcc-aarch64-linux-gnu", probe: Probe::Program("aarch64-linux-gnu-gcc") }]
        }
    }
}

/// Whether the compiler that runs this xtask has the standard library of `arch`.
pub(super) fn compiler_has(arch: Arch) -> bool {
    let mut rustc = Command::new("rustc");
    rustc.current_dir(process::root()).args(["--print", "target-libdir", "--target", arch.triple()]);
    process::output(&mut rustc).is_ok_and(|folder| fs::exists(folder.trim()).unwrap_or_default())
}

/// Has `cargo` build for `arch`.
///
/// # Errors
/// When the standard library cannot be put where the compiler looks for it.
pub(crate) fn configure(cargo: &mut Command, arch: Arch) -> Result<()> {
    cargo.args(["--target", arch.triple()]);
    if arch.is_native() {
        return Ok(());
    }
    let root = Sysroot(arch).dir();
    if !compiler_has(arch) {
        let library = |root: &std::path::Path| root.join("usr/lib/rustlib").join(arch.triple());
        let link = library(&ebpf::debian_root());
        if fs::read_link(&link).ok().as_deref() != Some(&library(&root)) {
            symlink(library(&root), &link).with_context(|| format!("cannot make {}", link.display()))?;
        }
        ebpf::use_debian(cargo);
    }
    let gcc = format!("{}-gcc", arch.multiarch());
    let triple = arch.triple().replace('-', "_");
    // The linker and the C compiler both look for headers and libraries in the packages that are unpacked, not in this
    // machine's own.
    cargo
        .env(format!("CARGO_TARGET_{}_LINKER", triple.to_uppercase()), &gcc)
        .env(format!("CC_{triple}"), &gcc)
        .env(format!("CFLAGS_{triple}"), format!("--sysroot={}", root.display()))
        .env("PKG_CONFIG_ALLOW_CROSS", "1")
        .env("PKG_CONFIG_SYSROOT_DIR", &root)
        .env("PKG_CONFIG_LIBDIR", root.join("usr/lib").join(arch.multiarch()).join("pkgconfig"));
    Ok(())
}

/// What the linker is told: where the libraries of `arch` are.
pub(crate) fn link_flags(arch: Arch) -> Vec<String> {
    if arch.is_native() {
        return Vec::new();
    }
    vec![format!("-Clink-arg=--sysroot={}", Sysroot(arch).dir().display())]
}
