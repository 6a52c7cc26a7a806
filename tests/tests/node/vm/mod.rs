//! One node in a virtual machine, for what this machine's kernel cannot show: cgroup v2 alone, so that pods are in it, and
//! AppArmor, which containerd then confines every container with. containerd and a kubelet without an API server run in
//! the guest; kube-lane is the static pod of `deploy/static-pod`.
//!
//! Owns what the machine is made of. It takes minutes under software emulation: `cargo xtask test --lane node --long`.

mod client;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod scenarios;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube_lane_tests::agent;
use kube_lane_tests::controlplane::program;
use kube_lane_tests::nodes::{self, kubelet, runtime};
use kube_lane_tests::vm::{Archive, OnDemand, Plan, find};
use libtest_mimic::{Failed, Trial};

use crate::guide;

/// The kernel that the machine boots, and what it has besides.
const PLAN: Plan = Plan {
    kernel: "6.12",
    memory: 3072,
    modules: &["fs/overlayfs"],
    more: "",
    silence: Duration::from_secs(1800),
    fill,
};

/// The folder of images that the guest imports.
const IMAGES: &str = "/images";
/// The manifest and the configuration of kube-lane as a static pod in mode `ebpf`, before the guest puts them in place.
const MANIFEST: &str = "/made/kube-lane.yaml";
const CONFIGURATION: &str = "/made/config.conf";
/// The pods' range.
const PODS: &str = "10.244.0.0/24";

/// The scenarios, each of which builds upon those before it.
pub(crate) fn trials() -> Vec<Trial> {
    let machine = Arc::new(OnDemand::new(PLAN));
    let trial = |(name, _): &(&'static str, fn())| {
        let (name, machine) = (*name, Arc::clone(&machine));
        Trial::test(format!("vm::{name}"), move || {
            let said = machine.outcome(name).map_err(|error| Failed::from(format!("{error:#}")))?;
            crate::world::report(&said);
            Ok(())
        })
    };
    scenarios::ALL.iter().map(trial).collect()
}

/// Whether this process has a part in the guest, and its end.
pub(crate) fn guest() -> Option<Result<()>> {
    if std::process::id() == 1 {
        return Some(guest::main());
    }
    let mut arguments = std::env::args().skip(1);
    (arguments.next()? == client::NAME).then(|| client::main(arguments))
}

/// What the machine holds: Debian's containerd, runc and AppArmor, kubelet, images, and kube-lane's static pod.
fn fill(archive: &mut Archive) -> Result<()> {
    for name in
        ["containerd", "containerd-shim-runc-v2", "ctr", "runc", "apparmor_parser", "ip", "nft", "modprobe"]
    {
        archive.program(&debian(name)?, &Path::new("/usr/sbin").join(name))?;
    }
    for name in ["bridge", "host-local", "loopback", "portmap"] {
        let plugin = runtime::debian().join("usr/lib/cni").join(name);
        archive.program(&plugin, &Path::new(guest::PLUGINS).join(name))?;
    }
    // containerd writes a profile of its own, from Debian's tunables and abstractions.
    for dir in ["etc/apparmor", "etc/apparmor.d", "usr/share/apparmor-features"] {
        archive.below(&runtime::debian(), &runtime::debian().join(dir), Path::new("/"))?;
    }
    archive.program(&program("kubelet")?, Path::new("/usr/bin/kubelet"))?;
    archive.program(&agent::binary()?, Path::new("/usr/bin/kube-lane"))?;

    let folder = tempfile::tempdir()?;
    let mut images = nodes::basic(folder.path())?;
    images.push(nodes::kube_lane()?);
    for image in &images {
        let name = image.file_name().context("an image without a name")?;
        archive.file(image, &Path::new(IMAGES).join(name))?;
    }

    let made = folder.path().join("made");
    std::fs::create_dir(&made)?;
    make_static_pod(&made)?;
    archive.below(folder.path(), &made, Path::new("/"))?;

    let plugins = Path::new(guest::PLUGINS);
    let files = [
        ("/etc/containerd/config.toml", runtime::configuration(plugins)),
        ("/etc/cni/net.d/10-bridge.conflist", runtime::network(&[PODS.parse()?])),
        ("/etc/kubelet.json", kubelet::configuration("", true)),
        ("/etc/passwd", "root:x:0:0::/:/bin/sh\n".into()),
        ("/etc/hosts", "127.0.0.1 localhost\n".into()),
        ("/etc/resolv.conf", "nameserver 127.0.0.1\n".into()),
    ];
    files.iter().try_for_each(|(at, content)| archive.text(Path::new(at), content))
}

/// Writes the static pod for mode `ebpf` and its configuration into a folder, with the commands of `docs/install.md`.
fn make_static_pod(folder: &Path) -> Result<()> {
    let to = folder.to_str().context("a path that is no text")?;
    let places = [("/etc/kube-lane", to), ("/etc/kubernetes/manifests", to)];
    let commands = guide::commands("install.md", "kubectl kustomize", &places)?;
    let output = guide::administrators_shell(&guide::repository(), &commands)?.output()?;
    ensure!(output.status.success(), "{commands}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A program of Debian's, unpacked or installed.
fn debian(name: &str) -> Result<PathBuf> {
    let dirs = ["usr/bin", "usr/sbin", "sbin"].map(|dir| runtime::debian().join(dir));
    let unpacked = dirs.iter().map(|dir| dir.join(name)).find(|file| file.is_file());
    unpacked.map_or_else(|| find(name), Ok)
}
