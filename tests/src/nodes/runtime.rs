//! containerd, runc and the CNI plugins of a node, as `cargo xtask setup` unpacks them, and images for them.
//!
//! Owns their configuration. Never asks a registry: an image is imported from an archive.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnetwork::IpNetwork;
use serde_json::json;

use super::machine::Machine;

/// The image of a pod's sandbox.
pub(super) const PAUSE_IMAGE: &str = "registry.k8s.io/pause:3.10";

/// How long containerd may take to answer after its start.
const LIMIT: Duration = Duration::from_secs(120);

/// Where Debian's packages are unpacked.
pub fn debian() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/node/debian")
}

/// `PATH` of a node: the unpacked programs first.
pub(super) fn path() -> String {
    let debian = debian();
    let debian = debian.display();
    format!("{debian}/usr/bin:{debian}/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

/// Starts containerd on a node, with a bridge `cni0` and these ranges for its pods, and waits until it answers.
///
/// # Errors
/// When it is missing, or does not answer in time.
pub(super) fn start(machine: &mut Machine, pods: &[IpNetwork]) -> Result<()> {
    let plugins = debian().join("usr/lib/cni");
    ensure!(plugins.is_dir(), "no CNI plugins in {}: `cargo xtask setup` unpacks them", plugins.display());
    machine.write("/etc/containerd/config.toml", &configuration(&plugins))?;
    machine.write("/etc/cni/net.d/10-bridge.conflist", &network(pods))?;
    machine.start("containerd", &["containerd"])?;
    let deadline = Instant::now() + LIMIT;
    while let Err(error) = machine.run(&["ctr", "version"]) {
        machine.ensure_running("containerd")?;
        ensure!(Instant::now() < deadline, "containerd does not answer: {error:#}");
        sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Imports an image into a node's containerd, as kubelet sees it.
///
/// # Errors
/// When containerd refuses the archive.
pub fn import(machine: &Machine, archive: &Path) -> Result<()> {
    let archive = archive.to_str().context("a path that is no text")?;
    machine.run(&["ctr", "--namespace", "k8s.io", "images", "import", archive])?;
    Ok(())
}

/// containerd's configuration, with the CNI plugins in the folder `plugins`.
pub fn configuration(plugins: &Path) -> String {
    // No CAP_SYS_RESOURCE is needed: nothing asks for a lower OOM score than the machine gives.
    format!(
        r#"
version = 2
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{}"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"#,
        plugins.display()
    )
}

/// The network of pods. The lab has made the bridge, with the first address of each range; the next ones are left to the
/// lab's own pods.
pub fn network(pods: &[IpNetwork]) -> String {
    let ranges: Vec<_> = pods
        .iter()
        .map(|range| {
            let nth = |number| kube_lane_lab::topology::nth(*range, number);
            json!([{"subnet": range, "gateway": nth(1), "rangeStart": nth(20), "rangeEnd": nth(250)}])
        })
        .collect();
    let routes: Vec<_> =
        pods.iter().map(|range| json!({"dst": if range.is_ipv4() { "0.0.0.0/0" } else { "::/0" }})).collect();
    let bridge = json!({
        "type": "bridge", "bridge": kube_lane_lab::topology::BRIDGE, "isGateway": true, "hairpinMode": true,
        "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
    });
    let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, portmap]}).to_string()
}
