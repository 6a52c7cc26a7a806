//! Clusters of real kubelets on this machine: a lab whose nodes run containerd and kubelet, and on its outside host etcd,
//! kube-apiserver, kube-controller-manager and kube-scheduler.
//!
//! Owns the nodes and what they leave behind. Installs no proxy: the tests do that as users do.
//!
//! A node ([`Machine`]) has namespaces and a disk of its own, so that every path on it is the usual one. Its processes
//! end with its process 1, which ends with the test program. Names begin with the lab's; the next start removes what
//! belongs to a program that is dead.

mod alone;
mod archives;
mod cgroup;
mod control;
pub mod kubeadm;
pub mod kubelet;
mod machine;
pub mod runtime;
pub mod systemd;
pub mod workload;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use kube_lane_lab::{Host, Lab, Node, topology};
use serde_json::Value;

pub use self::alone::LoneNode;
pub use self::archives::{AGNHOST_IMAGE, KUBE_LANE_IMAGE, basic, kube_lane};
use self::control::Controllers;
pub use self::machine::Machine;
pub use self::runtime::import;
use crate::cluster::Cluster;
use crate::controlplane::Options;

/// What `kubectl wait` may take on a busy machine.
pub const WAIT: &str = "--timeout=300s";

/// What the folders of nodes begin with; a lab's name follows.
const FOLDER: &str = "kube-lane-nodes-";

/// A cluster of two nodes without a proxy.
pub struct NodeCluster {
    // Dropped in this order: the nodes before what they talk to, the folder of their disks last.
    machines: Vec<Machine>,
    _controllers: Controllers,
    cluster: Cluster,
    folder: Folder,
}

impl NodeCluster {
    /// Starts a cluster and waits until both nodes are ready.
    ///
    /// # Errors
    /// When a program is missing or does not come up; the message names the folder of the logs.
    pub fn start() -> Result<Self> {
        sweep();
        let lab = Lab::builder().nodes(2).bridge(true).build()?;
        let folder = Folder::new(&lab)?;
        let service_addresses = topology::service_cidrs().map(|range| topology::nth(range, 1).to_string());
        let options = Options {
            for_kubelets: true,
            // Service default/kubernetes.
            extra_sans: service_addresses.into(),
            service_cidrs: topology::service_cidrs().map(|range| range.to_string()).into(),
            ..Options::default()
        };
        let cluster = Cluster::start_with(lab, options)?;
        let netns = Path::new("/run/netns").join(cluster.lab().outside().netns());
        let controllers = Controllers::start(cluster.control_plane(), &netns, &folder.logs())?;
        let machines = cluster.lab().nodes().iter().map(|node| Machine::new(node, folder.path()));
        let machines = machines.collect::<Result<_>>()?;
        let mut this = Self { machines, _controllers: controllers, cluster, folder };
        this.start_nodes().with_context(|| format!("logs: {}", this.keep_logs().display()))?;
        Ok(this)
    }

    fn start_nodes(&mut self) -> Result<()> {
        let archives = archives::basic(self.folder.path())?;
        let kubeconfig = self.cluster.control_plane().admin_kubeconfig();
        let lab = self.cluster.lab();
        thread::scope(|scope| {
            let starts = self.machines.iter_mut().zip(lab.nodes()).map(|(machine, node)| {
                let (archives, kubeconfig) = (&archives, &kubeconfig);
                scope.spawn(move || start_node(machine, node, archives, Some(kubeconfig)))
            });
            let starts: Vec<_> = starts.collect();
            starts.into_iter().try_for_each(|start| start.join().map_err(|_| anyhow!("panicked"))?)
        })?;
        self.wait_nodes_ready()
    }

    /// Waits until the API server says that both nodes are ready.
    ///
    /// # Errors
    /// When they are not in time.
    pub fn wait_nodes_ready(&self) -> Result<()> {
        for machine in &self.machines {
            let node = format!("node/{}", machine.name());
            self.kubectl(&["wait", "--for=create", &node, WAIT])?;
            self.kubectl(&["wait", "--for=condition=Ready", &node, WAIT])?;
        }
        Ok(())
    }

    /// The cluster without its nodes: API server, kubectl, lab.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Runs `kubectl` as one who may do anything, and returns what it printed.
    ///
    /// # Errors
    /// With what it says, when it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.cluster.kubectl(arguments)
    }

    /// What `kubectl get` lists in JSON.
    ///
    /// # Errors
    /// When it fails.
    pub fn list(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let mut all = vec!["get", "--output=json"];
        all.extend(arguments);
        let mut list: Value = serde_json::from_str(&self.kubectl(&all)?)?;
        match list["items"].take() {
            Value::Array(items) => Ok(items),
            _ => Ok(vec![list]),
        }
    }

    /// A node's machine.
    pub fn machine(&self, index: usize) -> &Machine {
        &self.machines[index]
    }

    /// A node's machine, to switch it off or start programs on it.
    pub fn machine_mut(&mut self, index: usize) -> &mut Machine {
        &mut self.machines[index]
    }

    /// Switches a node off, and on again: what the kernel held for it (nftables, connections) is gone, what is on its
    /// disk is there. Returns once its kubelet runs.
    ///
    /// # Errors
    /// When a program does not come up.
    pub fn restart_node(&mut self, index: usize) -> Result<()> {
        let kubeconfig = self.cluster.control_plane().admin_kubeconfig();
        let machine = &mut self.machines[index];
        machine.power_off()?;
        forget(machine.host())?;
        start_node(machine, self.cluster.lab().node(index), &[], Some(&kubeconfig))
    }

    /// Imports an image into both nodes.
    ///
    /// # Errors
    /// When containerd refuses it.
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.machines.iter().try_for_each(|machine| import(machine, archive))
    }

    /// A running pod as a host of the lab, to dial from.
    ///
    /// # Errors
    /// When it has no container that runs.
    pub fn pod(&self, pod: &Value) -> Result<Host> {
        let node = pod["spec"]["nodeName"].as_str();
        let index = self.machines.iter().position(|machine| Some(machine.name()) == node);
        let index = index.with_context(|| format!("a pod on no node of this cluster: {node:?}"))?;
        adopt(self.cluster.lab().node(index), &self.machines[index], pod)
    }

    /// The folder for what belongs to this cluster; it goes with the cluster.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Keeps the logs of all programs and pods beyond the end of the cluster, and says where they are.
    pub fn keep_logs(&mut self) -> PathBuf {
        let logs = self.folder.logs();
        for machine in &self.machines {
            keep_node_logs(machine);
        }
        for log in ["etcd.log", "kube-apiserver.log"] {
            let _ = fs::copy(self.cluster.control_plane().folder().join(log), logs.join(log));
        }
        for (file, arguments) in [
            ("pods.yaml", ["get", "pods", "--all-namespaces", "--output=yaml"]),
            ("events.txt", ["get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"]),
        ] {
            let said = self.kubectl(&arguments).unwrap_or_else(|error| format!("{error:#}"));
            let _ = fs::write(logs.join(file), said);
        }
        self.folder.keep()
    }
}

/// Boots a machine and starts containerd, with the images of these archives, and kubelet: without a kubeconfig, for itself
/// alone.
fn start_node(
    machine: &mut Machine,
    node: &Node,
    archives: &[PathBuf],
    kubeconfig: Option<&Path>,
) -> Result<()> {
    let mut start = || -> Result<()> {
        machine.boot()?;
        prepare_network(node)?;
        runtime::start(machine, &node.pod_cidrs())?;
        archives.iter().try_for_each(|archive| import(machine, archive))?;
        kubelet::start(machine, kubeconfig)
    };
    start().with_context(|| format!("cannot start {}", node.name()))
}

/// A pod that runs on a node, as a host of the lab.
fn adopt(node: &Node, machine: &Machine, pod: &Value) -> Result<Host> {
    let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
    let container = pod["status"]["containerStatuses"][0]["containerID"].as_str();
    let container = container.and_then(|id| id.strip_prefix("containerd://"));
    let container = container.with_context(|| format!("pod {name} has no container"))?;
    let netns = machine.netns_of(container)?;
    let addresses: Vec<_> = pod["status"]["podIPs"].as_array().into_iter().flatten().collect();
    let address = |at: usize| -> Result<std::net::IpAddr> {
        let address = addresses.get(at).and_then(|address| address["ip"].as_str());
        Ok(address.with_context(|| format!("pod {name} has not two addresses"))?.parse()?)
    };
    Ok(node.adopt(name, &netns, [address(0)?, address(1)?])?)
}

/// What an administrator sets on a node for its CNI plugin: bridged packets meet the rules for IP, and pods that leave the
/// cluster get the node's address.
fn prepare_network(node: &Node) -> Result<()> {
    let rules: String = topology::cluster_cidrs()
        .into_iter()
        .map(|range| {
            let family = if range.is_ipv4() { "ip" } else { "ip6" };
            format!(
                "table {family} cni {{\n chain pods {{\n  type nat hook postrouting priority srcnat + 10;\n  \
                 {family} saddr {range} {family} daddr != {range} masquerade\n }}\n}}\n"
            )
        })
        .collect();
    let output = node.run(move || {
        for file in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
            fs::write(Path::new("/proc/sys/net/bridge").join(file), "1")
                .context("bridged packets cannot be filtered: modprobe br_netfilter")?;
        }
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("cni.nft");
        fs::write(&file, rules)?;
        Ok::<_, anyhow::Error>(Command::new("nft").arg("-f").arg(file).output()?)
    })??;
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Empties what the kernel holds in a node's network namespace, as a restart does.
fn forget(host: &Host) -> Result<()> {
    let outputs = host.run(|| {
        [&["nft", "flush", "ruleset"][..], &["conntrack", "-F"]]
            .map(|command| Command::new(command[0]).args(&command[1..]).output())
    })?;
    for output in outputs {
        let output = output?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// The folder of a cluster's disks and logs; removed when dropped, but for logs that are kept.
struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    fn new(lab: &Lab) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("{FOLDER}{}", lab.name()));
        let this = Self { path, keep: false };
        fs::create_dir_all(this.logs()).with_context(|| format!("cannot make {}", this.path.display()))?;
        Ok(this)
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// Keeps the logs, and says where they will be.
    fn keep(&mut self) -> PathBuf {
        self.keep = true;
        self.kept()
    }

    fn kept(&self) -> PathBuf {
        let mut kept = self.path.clone().into_os_string();
        kept.push("-logs");
        kept.into()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.keep {
            // Where this fails they go with the rest: a drop cannot report it.
            let _ = fs::rename(self.logs(), self.kept());
        }
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes what clusters of dead programs left: their processes have ended with them, cgroups and disks have not.
fn sweep() {
    cgroup::sweep();
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let lab = name.to_str().and_then(|name| name.strip_prefix(FOLDER));
        let lab = lab.filter(|lab| !lab.ends_with("-logs"));
        if lab.is_some_and(kube_lane_lab::is_left_over) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Adds to a node's logs those of its pods, and what its kernel holds of the network.
fn keep_node_logs(machine: &Machine) {
    // Best effort: without them, the others are still worth having.
    let _ = copy_tree(&machine.disk().join("log/pods"), &machine.logs().join("pods"));
    for command in [&["nft", "list", "ruleset"][..], &["conntrack", "-L"]] {
        let said = machine.run(command).unwrap_or_else(|error| format!("{error:#}"));
        let _ = fs::write(machine.logs().join(format!("{}.txt", command[0])), said);
    }
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let output = Command::new("cp").arg("-rL").arg(from.join(".")).arg(to).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
