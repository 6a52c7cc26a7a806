//! kubeadm as far as kube-proxy goes: it installs kube-proxy as an add-on of a cluster, from an image that is made here.
//!
//! Owns kubeadm's configuration and the files of kube-proxy's image. Makes no cluster: the nodes are there before.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ipnetwork::IpNetwork;
use kube_lane_image::{Arch, Image};

use super::NodeCluster;
use crate::controlplane::program;
use crate::kube_proxy::Mode;

/// The names of protocols; Debian's package netbase has them, and so does the image that Kubernetes publishes.
const PROTOCOLS: &str = "/etc/protocols";

/// What kube-proxy calls besides itself: its name, and the file in `/usr/sbin`.
const TOOLS: [(&str, &str); 8] = [
    ("nft", "nft"),
    ("conntrack", "conntrack"),
    ("iptables", "iptables-nft"),
    ("iptables-save", "iptables-nft-save"),
    ("iptables-restore", "iptables-nft-restore"),
    ("ip6tables", "ip6tables-nft"),
    ("ip6tables-save", "ip6tables-nft-save"),
    ("ip6tables-restore", "ip6tables-nft-restore"),
];

/// The release of kubeadm, such as `v1.36.3`.
///
/// # Errors
/// When it has not been built.
pub fn version() -> Result<String> {
    Ok(output(Command::new(program("kubeadm")?).args(["version", "--output=short"]))?.trim().to_owned())
}

/// The manifests of kube-proxy, as `kubeadm` prints them with this configuration.
///
/// # Errors
/// When it has not been built, or refuses the configuration.
pub fn manifests(configuration: &Path) -> Result<String> {
    let mut kubeadm = Command::new(program("kubeadm")?);
    kubeadm.args(["init", "phase", "addon", "kube-proxy", "--print-manifest", "--config"]);
    output(kubeadm.arg(configuration))
}

/// Writes a configuration for [`install`] into `folder`, and returns its path. The mode `None` is kubeadm's default.
///
/// # Errors
/// When it cannot be written.
pub fn configuration(
    folder: &Path,
    api_server: SocketAddr,
    pods: &[IpNetwork],
    mode: Option<Mode>,
) -> Result<PathBuf> {
    let pods: Vec<_> = pods.iter().map(IpNetwork::to_string).collect();
    let mode = mode.map(|mode| mode.to_string()).unwrap_or_default();
    let text = format!(
        "apiVersion: kubeadm.k8s.io/v1beta4\nkind: InitConfiguration\n\
         localAPIEndpoint: {{advertiseAddress: {}, bindPort: {}}}\n\
         ---\napiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n\
         kubernetesVersion: {}\nnetworking: {{podSubnet: \"{}\"}}\n\
         ---\napiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: \"{mode}\"\n\
         # A node here has a network namespace of its own, and the kernel lets none of these set the limit.\n\
         conntrack: {{maxPerCore: 0, min: 0}}\n",
        api_server.ip(),
        api_server.port(),
        version()?,
        pods.join(",")
    );
    let path = folder.join("kubeadm.yaml");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Writes the archive of the image that kubeadm's manifests name, and returns its path.
///
/// # Errors
/// When a program is missing.
pub fn kube_proxy_image(folder: &Path) -> Result<PathBuf> {
    let mut image = Image::new(&format!("registry.k8s.io/kube-proxy:{}", version()?), Arch::native()?)?;
    image.env = vec!["PATH=/usr/local/bin:/usr/sbin".to_owned()];
    let system = Path::new("/");
    image.add_program("/usr/local/bin/kube-proxy", &program("kube-proxy")?, system)?;
    for (tool, file) in TOOLS {
        image.add_program(&format!("/usr/sbin/{tool}"), &Path::new("/usr/sbin").join(file), system)?;
    }
    // iptables loads its matches and targets by name.
    let plugins = format!("/usr/lib/{}-linux-gnu/xtables", std::env::consts::ARCH);
    for plugin in fs::read_dir(&plugins).with_context(|| format!("cannot read {plugins}"))? {
        let plugin = plugin?.path();
        image.add_program(&plugin.to_string_lossy(), &plugin, system)?;
    }
    // Without it, nft prints the numbers of protocols. A kube-proxy that starts beside its own table then takes all elements
    // for leftovers, and empties its maps.
    let protocols = fs::read(PROTOCOLS).with_context(|| format!("cannot read {PROTOCOLS}"))?;
    image.add(PROTOCOLS, 0o644, protocols);
    let archive = folder.join("kube-proxy.tar");
    image.write(&archive)?;
    Ok(archive)
}

/// Installs kube-proxy, or brings it back, as an administrator does.
///
/// # Errors
/// With what kubeadm says, when it fails.
pub fn install(nodes: &NodeCluster, configuration: &Path) -> Result<()> {
    let mut kubeadm = Command::new(program("kubeadm")?);
    kubeadm.args(["init", "phase", "addon", "kube-proxy", "--kubeconfig"]);
    kubeadm.arg(nodes.cluster().control_plane().admin_kubeconfig()).arg("--config").arg(configuration);
    nodes.cluster().run(&mut kubeadm)?;
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
