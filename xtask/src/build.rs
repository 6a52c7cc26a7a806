//! `cargo xtask build`: the agent with its eBPF programs in it. Plain `cargo build` makes one without them.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::ebpf;
use crate::process;
use crate::setup::{self, Need, cross};

/// Names the object that `proxy/build.rs` puts into the agent.
pub(crate) const OBJECT_VARIABLE: &str = "KUBE_LANE_BPF_OBJECT";

/// An architecture that kube-lane is shipped for, by the name that container images give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    /// That of this machine.
    ///
    /// # Errors
    /// Where kube-lane is not shipped for it.
    pub(crate) fn native() -> Result<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Ok(Self::Amd64),
            "aarch64" => Ok(Self::Arm64),
            other => bail!("optimised builds are made on x86-64 and arm64, and this machine is {other}"),
        }
    }

    /// Whether this machine has it.
    pub(crate) fn is_native(self) -> bool {
        Self::native().is_ok_and(|native| native == self)
    }

    /// The name of Debian's folders of its libraries, and of its compilers.
    pub(crate) fn multiarch(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// The name that Go, Debian and container images give it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// The name of the target in Rust.
    pub(crate) fn triple(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }
}

/// What `cargo xtask build` is told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build what is shipped: optimised, stripped.
    #[arg(long)]
    release: bool,
}

/// Builds, and prints where the agent is.
///
/// # Errors
/// When something is missing that cannot be installed, or does not compile.
pub(crate) fn run(args: &Args) -> Result<()> {
    println!("{}", agent(args.release)?.display());
    Ok(())
}

/// Builds the agent with its eBPF programs in it, and says where it is.
///
/// # Errors
/// As [`run`].
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    setup::ensure(&[Need::Build])?;
    let object = ebpf::build_object()?;
    if release { release_agent(Arch::native()?, Some(object)) } else { dev_agent(object) }
}

/// Builds the optimised agent with its eBPF programs in it, for this architecture; another one than this machine's takes
/// [`Need::Image`] of it.
///
/// # Errors
/// As [`run`].
pub(crate) fn agent_for(arch: Arch) -> Result<PathBuf> {
    setup::ensure(&[Need::Build])?;
    release_agent(arch, Some(ebpf::build_object()?))
}

/// Builds the optimised agent, with eBPF programs only where this machine has the toolchain for them already: what
/// needs no more than nftables can be had sooner.
///
/// # Errors
/// As [`run`].
pub(crate) fn agent_for_nftables() -> Result<PathBuf> {
    setup::ensure(&[Need::Build])?;
    let object = if setup::has(Need::Ebpf)? { Some(ebpf::build_object()?) } else { None };
    release_agent(Arch::native()?, object)
}

fn dev_agent(object: PathBuf) -> Result<PathBuf> {
    process::run(process::cargo().args(["build", "--package", "kube-lane"]).env(OBJECT_VARIABLE, object))?;
    Ok(target_dir().join("debug/kube-lane"))
}

/// Builds the optimised agent. It names no path of this machine, so that it is the same wherever it is built.
fn release_agent(arch: Arch, object: Option<PathBuf>) -> Result<PathBuf> {
    let mut build = process::cargo();
    // With a target of its own, the flags below reach only what ends up in the agent. They also cause no rebuild in
    // `cargo build --release`, which has other flags.
    build.args(["build", "--package", "kube-lane", "--release"]);
    cross::configure(&mut build, arch)?;
    if let Some(object) = object {
        build.env(OBJECT_VARIABLE, object);
    }
    let flags = [remaps()?, cross::link_flags(arch)].concat();
    build.env_remove("RUSTFLAGS").env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    process::run(&mut build)?;
    Ok(target_dir().join(arch.triple()).join("release/kube-lane"))
}

/// Flags that give every folder that sources may be in another name: the same on every machine.
///
/// # Errors
/// When the environment does not tell where they are.
pub(crate) fn remaps() -> Result<Vec<String>> {
    let home = |variable: &str, below_home: &str| {
        let user = || Some(PathBuf::from(std::env::var_os("HOME")?).join(below_home));
        let home = std::env::var_os(variable).map(PathBuf::from).or_else(user);
        home.with_context(|| format!("neither {variable} nor HOME is set; set one of them"))
    };
    let from_to = [
        (process::root().to_owned(), "/kube-lane"),
        (home("CARGO_HOME", ".cargo")?, "/cargo"),
        (home("RUSTUP_HOME", ".rustup")?, "/rustup"),
    ];
    Ok(from_to.map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())).into())
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| process::target(""), PathBuf::from);
    process::root().join(target)
}
