//! What clusters of real kubelets need of Debian: containerd, runc, the CNI plugins and AppArmor's parser, and what an image
//! of kube-proxy holds besides kube-proxy. It is unpacked below `target/node` and never installed. An installed containerd
//! would run as a service, and take the place of one that the user has.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::apt::{self, Apt};
use super::{Cost, Step, debian};
use crate::build::Arch;
use crate::process;

/// The last one is for the node in a virtual machine, whose kernel has AppArmor.
const PACKAGES: &[&str] = &["containerd", "runc", "containernetworking-plugins", "apparmor"];

/// A container runtime.
pub(super) struct Runtime;

impl Runtime {
    fn root() -> PathBuf {
        process::target("node/debian")
    }

    /// Says which packages are unpacked: other packages, another stamp.
    fn stamp() -> PathBuf {
        Self::root().join("unpacked")
    }
}

impl Step for Runtime {
    fn name(&self) -> String {
        "Debian's containerd, runc, CNI plugins and apparmor, below target/".into()
    }

    fn is_done(&self) -> Result<bool> {
        Ok(fs::read_to_string(Self::stamp()).is_ok_and(|unpacked| unpacked == PACKAGES.join("\n")))
    }

    fn run(&self) -> Result<()> {
        apt::ensure_debian()?;
        let (root, archives) = (Self::root(), process::target("node/archives"));
        [&root, &archives].into_iter().try_for_each(|dir| apt::empty(dir))?;
        debian::download(PACKAGES, &archives)?;
        apt::unpack(&archives, &root)?;
        fs::remove_dir_all(&archives)?;
        fs::write(Self::stamp(), PACKAGES.join("\n")).context("cannot write the stamp")
    }

    fn cost(&self) -> Cost {
        Cost { minutes: 1, megabytes: 60 }
    }
}

/// The tools that kube-proxy calls, and the libraries that they load. They are of Debian 13: with the `nft` of Debian 12,
/// a kube-proxy in mode nftables empties its maps when it starts again beside its own table, since this `nft` prints keys
/// otherwise than kube-proxy writes them.
const TOOLS: &[&str] = &[
    "conntrack",
    "iptables",
    "libbsd0",
    "libc6",
    "libedit2",
    "libgmp10",
    "libip4tc2",
    "libip6tc2",
    "libjansson4",
    "libmd0",
    "libmnl0",
    "libnetfilter-conntrack3",
    "libnfnetlink0",
    "libnftables1",
    "libnftnl11",
    "libtinfo6",
    "libxtables12",
    "nftables",
];

/// What an image of kube-proxy holds besides kube-proxy.
pub(super) struct KubeProxyTools;

impl KubeProxyTools {
    fn root() -> PathBuf {
        process::target("node/kube-proxy")
    }

    fn stamp() -> PathBuf {
        Self::root().join("unpacked")
    }
}

impl Step for KubeProxyTools {
    fn name(&self) -> String {
        "Debian 13's nft, iptables and conntrack for images of kube-proxy, below target/".into()
    }

    fn is_done(&self) -> Result<bool> {
        Ok(fs::read_to_string(Self::stamp()).is_ok_and(|unpacked| unpacked == TOOLS.join("\n")))
    }

    fn run(&self) -> Result<()> {
        let (root, archives) = (Self::root(), process::target("node/kube-proxy-archives"));
        [&root, &archives].into_iter().try_for_each(|dir| apt::empty(dir))?;
        // The programs that this machine builds are the image's.
        let arch = Arch::native()?.as_str();
        Apt::update_release(&process::target("node/apt"), arch, "trixie")?.download(TOOLS, &archives)?;
        apt::unpack(&archives, &root)?;
        fs::remove_dir_all(&archives)?;
        fs::write(Self::stamp(), TOOLS.join("\n")).context("cannot write the stamp")
    }

    fn cost(&self) -> Cost {
        Cost { minutes: 1, megabytes: 20 }
    }
}
