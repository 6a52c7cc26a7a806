//! `cargo xtask setup`: installs what the tasks need and this machine lacks, and nothing else.
//!
//! A [`Need`] is what a task asks for, a [`Step`] is one thing that can be missing. Owns no task, and knows
//! of the project only where its tools are described.

mod apt;
mod cargo_tools;
mod controlplane;
pub(crate) mod cross;
mod debian;
pub(crate) mod ebpf;
pub(crate) mod go;
pub(crate) mod go_tools;
mod node;
pub(crate) mod sysroot;
mod vm;

use anyhow::{Context, Result, ensure};
pub(crate) use cargo_tools::{CYCLONEDX, DENY, MACHETE};
pub(crate) use controlplane::{Choice as KubernetesChoice, Release as KubernetesRelease};
pub(crate) use debian::{Package, Probe};

use crate::build::Arch;

/// One thing that may be missing.
pub(crate) trait Step {
    /// What is installed, as printed: "cargo-deny 1.2.3".
    fn name(&self) -> String;
    /// Whether it is there already, in the version that is needed.
    fn is_done(&self) -> Result<bool>;
    /// Installs it; says what it does where that takes long.
    fn run(&self) -> Result<()>;
    /// What that takes.
    fn cost(&self) -> Cost {
        Cost { minutes: 1, megabytes: 10 }
    }
}

/// What an installation takes, roughly, on a machine with two processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cost {
    /// To fetch and to build.
    pub(crate) minutes: u32,
    /// To fetch.
    pub(crate) megabytes: u32,
}

/// What a task needs of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// To build the workspace.
    Build,
    /// To build the programs of `proxy-ebpf`.
    Ebpf,
    /// To run kube-lane in network namespaces and to look at what it did.
    Kernel,
    /// etcd, kube-apiserver, kube-proxy and kubectl in `target/controlplane/bin`.
    ControlPlane,
    /// The same programs of another release of Kubernetes, in `target/controlplane-<release>/bin`.
    Kubernetes(KubernetesRelease),
    /// helm in `target/tools/bin`.
    Helm,
    /// To make an image of the agent for this architecture.
    Image(Arch),
    /// To run clusters of real kubelets; a control plane is another need.
    Node,
    /// To boot kernels in virtual machines.
    Vm,
    /// To boot a kernel for arm64 in one.
    VmArm64,
    /// What `cargo xtask lint` calls.
    Lint,
}

impl Need {
    const ALL: [Need; 11] = [
        Need::Build,
        Need::Ebpf,
        Need::Kernel,
        Need::ControlPlane,
        Need::Node,
        Need::Helm,
        Need::Vm,
        Need::VmArm64,
        Need::Image(Arch::Amd64),
        Need::Image(Arch::Arm64),
        Need::Lint,
    ];

    fn packages(self) -> &'static [Package] {
        const fn program(package: &'static str, name: &'static str) -> Package {
            Package { name: package, probe: Probe::Program(name) }
        }
        const fn library(package: &'static str, name: &'static str) -> Package {
            Package { name: package, probe: Probe::Library(name) }
        }
        match self {
            Need::Build => {
                &const {
                    [
                        program("git", "git"),
                        program("pkg-config", "pkg-config"),
                        library("libmnl-dev", "libmnl"),
                        library("libnftnl-dev", "libnftnl"),
                    ]
                }
            }
            Need::Image(arch) if !arch.is_native() => cross::packages(arch),
            Need::Ebpf | Need::Helm | Need::Image(_) => &[],
            Need::Kernel => {
                &const {
                    [
                        program("bpftool", "bpftool"),
                        program("iproute2", "ip"),
                        program("nftables", "nft"),
                        program("conntrack", "conntrack"),
                        // Clients of the tests.
                        program("openssl", "openssl"),
                        program("curl", "curl"),
                        program("bind9-dnsutils", "dig"),
                        // Runs the units of `deploy/systemd`.
                        program("systemd", "systemd-analyze"),
                    ]
                }
            }
            // kube-proxy calls nft or iptables, whichever mode it runs in.
            Need::ControlPlane => &const { [program("nftables", "nft"), program("iptables", "iptables")] },
            // Older ones call ipset when they clean up.
            Need::Kubernetes(_) => {
                &const { [program("nftables", "nft"), program("iptables", "iptables"), program("ipset", "ipset")] }
            }
            Need::Node => {
                &const {
                    [
                        program("util-linux", "nsenter"),
                        Package { name: "netbase", probe: Probe::File("/etc/protocols") },
                    ]
                }
            }
            Need::Vm => {
                &const {
                    [
                        program("qemu-system-x86", "qemu-system-x86_64"),
                        program("kmod", "modprobe"),
                        program("nftables", "nft"),
                        Package { name: "debian-archive-keyring", probe: Probe::File(apt::KEYRING) },
                    ]
                }
            }
            Need::VmArm64 => {
                &const {
                    [
                        program("qemu-system-arm", "qemu-system-aarch64"),
                        program("kmod", "modprobe"),
                        Package { name: "debian-archive-keyring", probe: Probe::File(apt::KEYRING) },
                    ]
                }
            }
            Need::Lint => &const { [program("git", "git"), program("shellcheck", "shellcheck")] },
        }
    }

    fn steps(self) -> Vec<Box<dyn Step>> {
        match self {
            Need::Build | Need::Kernel => vec![],
            Need::Ebpf => vec![Box::new(ebpf::Compiler::Ebpf), Box::new(ebpf::Linker)],
            Need::ControlPlane => {
                vec![Box::new(go::Toolchain), Box::new(controlplane::Programs::control_plane(None))]
            }
            Need::Kubernetes(release) => {
                vec![Box::new(go::Toolchain), Box::new(controlplane::Programs::control_plane(Some(release)))]
            }
            Need::Node => {
                vec![
                    Box::new(node::Runtime),
                    Box::new(go::Toolchain),
                    Box::new(controlplane::Programs::node()),
                ]
            }
            Need::Helm => vec![Box::new(go::Toolchain), Box::new(go_tools::HELM)],
            Need::Image(arch) => {
                let mut steps: Vec<Box<dyn Step>> = vec![Box::new(sysroot::Sysroot(arch))];
                if !arch.is_native() && !cross::compiler_has(arch) {
                    steps.push(Box::new(ebpf::Compiler::Cross));
                }
                steps
            }
            Need::Vm => vm::KERNELS.map(|kernel| Box::new(kernel) as Box<dyn Step>).into(),
            Need::VmArm64 => vec![Box::new(vm::ARM64)],
            Need::Lint => vec![
                Box::new(go::Toolchain),
                Box::new(cargo_tools::RustComponents),
                Box::new(MACHETE),
                Box::new(DENY),
                Box::new(go_tools::ACTIONLINT),
            ],
        }
    }
}

/// Installs all that any task needs.
pub(crate) fn all() -> Result<()> {
    ensure(&Need::ALL)?;
    println!("setup: everything is in place");
    Ok(())
}

/// Whether nothing is missing of `need`.
pub(crate) fn has(need: Need) -> Result<bool> {
    need.steps().iter().try_fold(true, |all, step| Ok(all && step.is_done()?))
}

/// Installs what is missing of `needs`; prints nothing when nothing is.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let packages = debian::Packages(needs.iter().flat_map(|need| need.packages()).copied().collect());
    ensure_step(&packages)?;
    needs.iter().flat_map(|need| need.steps()).try_for_each(|step| ensure_step(&*step))
}

/// What [`ensure()`] would install, by name, in its order.
pub(crate) fn missing(needs: &[Need]) -> Result<Vec<(String, Cost)>> {
    let packages = debian::Packages(needs.iter().flat_map(|need| need.packages()).copied().collect());
    let steps = needs.iter().flat_map(|need| need.steps());
    let mut missing: Vec<(String, Cost)> = Vec::new();
    for step in std::iter::once(Box::new(packages) as Box<dyn Step>).chain(steps) {
        // Two needs may have a step in common.
        if !step.is_done()? && !missing.iter().any(|(name, _)| *name == step.name()) {
            missing.push((step.name(), step.cost()));
        }
    }
    Ok(missing)
}

/// Installs one thing, if it is missing.
pub(crate) fn ensure_step(step: &dyn Step) -> Result<()> {
    if step.is_done()? {
        return Ok(());
    }
    let name = step.name();
    println!("setup: installing {name}");
    step.run().with_context(|| format!("cannot install {name}"))?;
    ensure!(step.is_done()?, "{name}: still missing after its installation");
    Ok(())
}
