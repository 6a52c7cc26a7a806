//! A compiler and a linker for `proxy-ebpf`: rustup's nightly with `rust-src` and a `bpf-linker` in PATH, where the
//! user has them and they build it; else Debian's, unpacked below `target/` and never installed. Debian ships `core`
//! ready-made for this target, so nothing of the standard library is compiled here.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use super::cargo_tools::Tool;
use super::{Cost, Step, apt, debian};
use crate::process;

/// Links LLVM bitcode to one object. It needs only LLVM's shared library, the one that the compiler has.
const LINKER: Tool = Tool {
    name: "bpf-linker",
    version: "0.13.0",
    arguments: &["--no-default-features", "--features", "llvm-22"],
};

/// Debian's compiler (one that browsers are built with, hence the name), its clippy, `core` for BPF, LLVM, and what
/// LLVM links that a small system may lack. They conflict with rustup where installed, not where unpacked.
const PACKAGES: &[&str] = &[
    "rustc-web",
    "rust-web-clippy",
    "libstd-rust-web-1.96",
    "libstd-rust-web-dev",
    "libstd-rust-web-dev-bpf",
    "libllvm22",
    "libbsd0",
    "libedit2",
    "libicu72",
    "libxml2",
    "libz3-4",
];

/// `cargo SUBCOMMAND` in `proxy-ebpf`, with a compiler and a linker for its target.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut cargo = if nightly_works() { nightly(subcommand) } else { debian(subcommand) };
    // They would replace those of proxy-ebpf/.cargo/config.toml.
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.current_dir(process::root().join("proxy-ebpf")).arg("--target-dir").arg(process::target("ebpf"));
    cargo
}

fn nightly(subcommand: &str) -> Command {
    let mut cargo = Command::new("rustup");
    cargo.args(["run", "nightly", "cargo", subcommand, "-Z", "build-std=core"]);
    cargo
}

/// The pinned cargo with Debian's compiler, which allows the few unstable features that eBPF needs only when told to.
fn debian(subcommand: &str) -> Command {
    let programs = debian_root().join("usr/bin");
    let mut cargo = process::cargo();
    if subcommand == "clippy" {
        // It calls the clippy-driver beside it, and the cargo that this names.
        let pinned = cargo.get_program().to_owned();
        cargo = Command::new(programs.join("cargo-clippy"));
        cargo.env("CARGO", pinned);
    }
    use_debian(&mut cargo);
    cargo
        .arg(subcommand)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", LINKER.path());
    cargo
}

/// Has `cargo` use Debian's compiler.
pub(super) fn use_debian(cargo: &mut Command) {
    cargo.env("RUSTC", debian_root().join("usr/bin/rustc")).env("LD_LIBRARY_PATH", debian_libraries());
}

/// Where the packages are unpacked.
pub(super) fn debian_root() -> PathBuf {
    process::target("ebpf-toolchain/debian")
}

fn debian_libraries() -> PathBuf {
    debian_root().join(format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH))
}

/// Whether the user's own nightly builds `proxy-ebpf`. Tried once for each release of it, and remembered.
fn nightly_works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| {
        let Some(release) = nightly_release() else { return false };
        let stamp = process::target("ebpf-toolchain/nightly");
        if let Ok(tried) = fs::read_to_string(&stamp)
            && let Some(outcome) = tried.strip_prefix(&release)
        {
            return outcome == "works";
        }
        println!("setup: trying rustup's nightly for eBPF");
        let mut build = nightly("build");
        build.current_dir(process::root().join("proxy-ebpf")).args(["--locked", "--release", "--target-dir"]);
        let works = match process::output(build.arg(process::target("ebpf"))) {
            Ok(_) => true,
            Err(error) => {
                println!("setup: rustup's nightly does not build proxy-ebpf: {error:#}");
                false
            }
        };
        // A stamp that cannot be written costs another try, no more.
        let outcome = if works { "works" } else { "fails" };
        drop(fs::create_dir_all(process::target("ebpf-toolchain")));
        drop(fs::write(stamp, release + outcome));
        works
    })
}

/// What rustup's nightly says it is, if it has the source of `core` and PATH has a linker for its bitcode.
fn nightly_release() -> Option<String> {
    process::find_program("bpf-linker")?;
    let rustc = |arguments: &[&str]| {
        process::output(Command::new("rustup").args(["run", "nightly", "rustc"]).args(arguments)).ok()
    };
    let sysroot = rustc(&["--print", "sysroot"])?;
    Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").is_dir().then_some(())?;
    rustc(&["--version", "--verbose"])
}

/// Debian's compiler.
pub(super) enum Compiler {
    /// For eBPF: needed where no nightly does.
    Ebpf,
    /// For an architecture that this machine does not have.
    Cross,
}

impl Compiler {
    /// What the stamp says once all packages are unpacked: other packages, another stamp.
    fn stamp() -> (PathBuf, String) {
        (debian_root().join("unpacked"), PACKAGES.join("\n"))
    }
}

impl Step for Compiler {
    fn name(&self) -> String {
        "Debian's Rust 1.96, below target/".into()
    }

    fn is_done(&self) -> Result<bool> {
        let (stamp, packages) = Self::stamp();
        let is_unpacked = || fs::read_to_string(stamp).is_ok_and(|unpacked| unpacked == packages);
        Ok(matches!(self, Self::Ebpf) && nightly_works() || is_unpacked())
    }

    fn run(&self) -> Result<()> {
        if process::find_program("apt-get").is_none() || process::find_program("dpkg").is_none() {
            bail!(match self {
                Self::Ebpf => {
                    "this is no Debian: please install rustup's nightly with rust-src, and bpf-linker \
                     (plain `cargo build` needs neither, and makes a kube-lane without eBPF)"
                }
                Self::Cross => "this is no Debian: please install the target by `rustup target add`",
            });
        }
        let root = debian_root();
        let archives = process::target("ebpf-toolchain/archives");
        [&root, &archives].into_iter().try_for_each(|dir| apt::empty(dir))?;
        debian::download(PACKAGES, &archives)?;
        println!("  unpacking {} packages", PACKAGES.len());
        apt::unpack(&archives, &root)?;
        fs::remove_dir_all(&archives)?;

        // Where bpf-linker's build looks for it.
        symlink("libLLVM.so.22.1", debian_libraries().join("libLLVM.so"))?;
        let mut rustc = Command::new(root.join("usr/bin/rustc"));
        process::output(rustc.arg("--version").env("LD_LIBRARY_PATH", debian_libraries()))
            .context("the compiler does not start")?;
        let (stamp, packages) = Self::stamp();
        fs::write(stamp, packages).context("cannot write the stamp")
    }

    fn cost(&self) -> Cost {
        Cost { minutes: 2, megabytes: 140 }
    }
}

/// [`LINKER`], where no nightly does. Comes after [`Compiler`].
pub(super) struct Linker;

impl Step for Linker {
    fn name(&self) -> String {
        LINKER.name()
    }

    fn is_done(&self) -> Result<bool> {
        Ok(nightly_works() || LINKER.is_done()?)
    }

    fn run(&self) -> Result<()> {
        let prefix = process::target("ebpf-toolchain/llvm");
        if !prefix.is_dir() {
            fs::create_dir_all(&prefix)?;
            symlink(debian_libraries(), prefix.join("lib"))?;
        }
        let mut install = LINKER.install();
        // The first finds LLVM, the second what LLVM's library needs in turn.
        install.env("LLVM_PREFIX", prefix).env("LD_LIBRARY_PATH", debian_libraries());
        process::run_long(&format!("cargo install {}", LINKER.name), &mut install)
    }
}
