//! `kubeLane.socketLB`: how the socket layer of `--proxy-mode ebpf` works, and where its cgroup and its pins are.

use std::path::{Component, Path, PathBuf};

use clap::Args;
use kube_lane_common::POD_CGROUPS;

use super::check::Checker;
use super::file::{KubeLaneSection, KubeProxyConfiguration};
use super::values::go_bool;
use super::{Detector, Mode};

const BPF_ROOT: &str = "/sys/fs/bpf/kube-lane";
const FRONTENDS: u32 = 1 << 18;
const SERVICE_PORTS: u32 = 1 << 17;
const ENDPOINTS: u32 = 1 << 20;
const AFFINITY_CLIENTS: u32 = 1 << 20;
/// Where kubelet puts pods: with systemd's cgroups or its own, and in kind, with `--cgroup-root=/kubelet`.
const POD_PATHS: [&str; POD_CGROUPS] =
    ["kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubelet/kubepods"];
/// What an id has room for in the maps' words.
const MOST: u32 = 1 << 24;

/// How the socket layer works. Counts in [`Mode::Ebpf`] alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketLb {
    /// The cgroup v2 whose processes are answered; `None`: the root of the hierarchy, wherever that is mounted.
    pub cgroup_root: Option<PathBuf>,
    /// The folder of a BPF file system where maps and links are pinned.
    pub bpf_root: PathBuf,
    /// Answer unconnected UDP sockets, too.
    pub udp: bool,
    /// Answer NodePorts, load balancer and external IPs, too: the endpoint sees the client's own address.
    pub external: bool,
    /// Answer NodePorts on 127.0.0.0/8, too, to the host's own processes; counts beside `external` alone.
    pub loopback_nodeports: bool,
    /// Answer the processes of the host's network namespace alone, no pods.
    pub host_namespace_only: bool,
    /// Cgroups that are left to nftables with all that is below them: paths relative to the cgroup root.
    pub leave_alone: Vec<PathBuf>,
    /// Cgroups that pods run below: paths relative to the cgroup root; an empty one is that root.
    pub pod_cgroups: Vec<PathBuf>,
    /// How many addresses and ports can be answered at most, a NodePort counted once for each family.
    pub max_frontends: u32,
    /// How many ports of Services, counted once for each family.
    pub max_service_ports: u32,
    /// How many endpoints of these ports.
    pub max_endpoints: u32,
    /// How many clients of ports with session affinity are remembered, each counted once for each port.
    pub max_affinity_clients: u32,
}

impl Default for SocketLb {
    fn default() -> Self {
        Self {
            cgroup_root: None,
            bpf_root: BPF_ROOT.into(),
            udp: false,
            external: false,
            loopback_nodeports: false,
            host_namespace_only: false,
            leave_alone: Vec::new(),
            pod_cgroups: POD_PATHS.map(PathBuf::from).to_vec(),
            max_frontends: FRONTENDS,
            max_service_ports: SERVICE_PORTS,
            max_endpoints: ENDPOINTS,
            max_affinity_clients: AFFINITY_CLIENTS,
        }
    }
}

/// Which frontends are answered to whom.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct AnswerFlags {
    /// Beside --proxy-mode ebpf: answer unconnected UDP sockets, too
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    socket_lb_udp: Option<bool>,
    /// Answer NodePorts, load balancer and external IPs at the socket, too
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    socket_lb_external: Option<bool>,
    /// Answer NodePorts on 127.0.0.0/8, too, to the host's own processes (with --socket-lb-external)
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    socket_lb_loopback_nodeports: Option<bool>,
    /// Answer the host's own processes alone: for nodes whose pods have a service mesh
    #[arg(long, value_parser = go_bool(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    socket_lb_host_namespace_only: Option<bool>,
}

/// All flags about the socket layer.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct SocketLbFlags {
    #[command(flatten)]
    answer: AnswerFlags,
    /// A cgroup to leave to nftables, relative to the cgroup root; may be given several times
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    socket_lb_leave_alone: Option<Vec<PathBuf>>,
    /// A cgroup that pods run below, relative to the cgroup root; may be given several times [default: kubelet's usual
    /// ones]
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    socket_lb_pod_cgroups: Option<Vec<PathBuf>>,
    #[command(flatten)]
    roots: Roots,
}

/// Where the cgroup and the pins are.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Roots {
    /// The cgroup v2 whose processes --proxy-mode ebpf answers [default: the root of the hierarchy]
    #[arg(long, value_name = "PATH")]
    cgroup_root: Option<PathBuf>,
    /// Folder of a BPF file system for the maps and links of --proxy-mode ebpf [default: /sys/fs/bpf/kube-lane]
    #[arg(long, value_name = "PATH")]
    bpf_root: Option<PathBuf>,
}

impl From<Roots> for SocketLbFlags {
    fn from(roots: Roots) -> Self {
        Self { roots, ..Self::default() }
    }
}

impl AnswerFlags {
    /// Puts the flags into the form of a file.
    pub(super) fn fill(&self, file: &mut KubeProxyConfiguration) {
        let section = &mut file.kube_lane.socket_lb;
        section.udp = self.socket_lb_udp;
        section.external = self.socket_lb_external;
        section.loopback_node_ports = self.socket_lb_loopback_nodeports;
        section.host_namespace_only = self.socket_lb_host_namespace_only;
    }
}

impl SocketLbFlags {
    /// Puts the flags into the form of a file.
    pub(super) fn fill(&self, file: &mut KubeProxyConfiguration) {
        let own = &mut file.kube_lane;
        own.cgroup_root = self.roots.cgroup_root.clone();
        own.bpf_root = self.roots.bpf_root.clone();
        own.socket_lb.leave_alone = self.socket_lb_leave_alone.clone();
        own.socket_lb.pod_cgroups = self.socket_lb_pod_cgroups.clone();
        self.answer.fill(file);
    }
}

impl SocketLb {
    /// Resolves what there is of it in our own section.
    pub(super) fn resolve(own: &KubeLaneSection, check: &mut Checker) -> Self {
        let section = &own.socket_lb;
        Self {
            cgroup_root: absolute("kubeLane.cgroupRoot (--cgroup-root)", &own.cgroup_root, check),
            bpf_root: absolute("kubeLane.bpfRoot (--bpf-root)", &own.bpf_root, check)
                .unwrap_or_else(|| BPF_ROOT.into()),
            udp: section.udp.unwrap_or_default(),
            external: section.external.unwrap_or_default(),
            loopback_nodeports: section.loopback_node_ports.unwrap_or_default(),
            host_namespace_only: section.host_namespace_only.unwrap_or_default(),
            leave_alone: leave_alone(section.leave_alone.as_deref().unwrap_or_default(), check),
            pod_cgroups: pod_cgroups(section.pod_cgroups.as_deref(), check),
            max_frontends: size("kubeLane.socketLB.maxFrontends", section.max_frontends, FRONTENDS, check),
            max_service_ports: size(
                "kubeLane.socketLB.maxServicePorts",
                section.max_service_ports,
                SERVICE_PORTS,
                check,
            ),
            max_endpoints: size("kubeLane.socketLB.maxEndpoints", section.max_endpoints, ENDPOINTS, check),
            max_affinity_clients: size(
                "kubeLane.socketLB.maxAffinityClients",
                section.max_affinity_clients,
                AFFINITY_CLIENTS,
                check,
            ),
        }
    }

    /// What a user may not expect of these settings beside the others.
    pub(super) fn warnings(&self, mode: Mode, detector: &Detector, masquerade_all: bool) -> Vec<String> {
        let mut warnings = Vec::new();
        if mode != Mode::Ebpf {
            let defaults = Self { cgroup_root: None, bpf_root: BPF_ROOT.into(), ..Self::default() };
            let written = Self { cgroup_root: None, bpf_root: BPF_ROOT.into(), ..self.clone() };
            if written != defaults {
                warnings.push("kubeLane.socketLB has an effect only in mode (--proxy-mode) ebpf".to_owned());
            }
            return warnings;
        }
        if self.loopback_nodeports && !self.external {
            warnings.push(
                "kubeLane.socketLB.loopbackNodePorts counts only beside kubeLane.socketLB.external"
                    .to_owned(),
            );
        }
        if masquerade_all {
            warnings.push(
                "masqueradeAll (--masquerade-all): connections to cluster IPs have to be masqueraded, which nftables \
                 does: none is answered at the socket"
                    .to_owned(),
            );
        } else if self.host_namespace_only && *detector == Detector::None {
            warnings.push(
                "kubeLane.socketLB.hostNamespaceOnly without a way to tell pods (clusterCIDR, detectLocalMode): no \
                 connection to a cluster IP is answered at the socket"
                    .to_owned(),
            );
        }
        warnings
    }
}

pub(super) fn not_empty(path: Option<PathBuf>) -> Option<PathBuf> {
    path.filter(|path| !path.as_os_str().is_empty())
}

fn absolute(field: &'static str, written: &Option<PathBuf>, check: &mut Checker) -> Option<PathBuf> {
    let path = not_empty(written.clone())?;
    if !path.is_absolute() {
        check.invalid(field, &path.display().to_string(), "is no absolute path", "begin it with /");
    }
    Some(path)
}

/// A path at or below the cgroup root, as `/proc/PID/cgroup` shows it, without what it begins with.
fn relative(path: &Path) -> Option<PathBuf> {
    path.components()
        .filter(|part| !matches!(part, Component::RootDir | Component::CurDir))
        .map(|part| matches!(part, Component::Normal(_)).then_some(part))
        .collect()
}

fn leave_alone(written: &[PathBuf], check: &mut Checker) -> Vec<PathBuf> {
    const FIELD: &str = "kubeLane.socketLB.leaveAlone (--socket-lb-leave-alone)";
    let wrong = "is no path of a cgroup below the cgroup root";
    let remedy = "write it as /proc/PID/cgroup does, like /system.slice/libvirtd.service";
    cgroups(written, |path| not_empty(relative(path)), |path| check.invalid(FIELD, path, wrong, remedy))
}

fn pod_cgroups(written: Option<&[PathBuf]>, check: &mut Checker) -> Vec<PathBuf> {
    const FIELD: &str = "kubeLane.socketLB.podCgroups (--socket-lb-pod-cgroups)";
    let Some(written) = written else { return POD_PATHS.map(PathBuf::from).to_vec() };
    if !(1..=POD_CGROUPS).contains(&written.len()) {
        let count = written.len().to_string();
        check.invalid(FIELD, &count, "is no number of cgroups that can be told", "name one to four");
    }
    let remedy = "write it as /proc/PID/cgroup does, without the pod's own part, like /kubepods.slice";
    cgroups(written, relative, |path| check.invalid(FIELD, path, "is no path of a cgroup", remedy))
}

/// What is written, as `read` has it; `invalid` hears of each that it has not.
fn cgroups(
    written: &[PathBuf],
    read: impl Fn(&Path) -> Option<PathBuf>,
    mut invalid: impl FnMut(&str),
) -> Vec<PathBuf> {
    let mut paths = Vec::with_capacity(written.len());
    for path in written {
        match read(path) {
            Some(path) => paths.push(path),
            None => invalid(&path.display().to_string()),
        }
    }
    paths
}

fn size(field: &'static str, written: Option<i64>, default: u32, check: &mut Checker) -> u32 {
    let Some(written) = written else { return default };
    match u32::try_from(written) {
        Ok(size @ 1..=MOST) => size,
        _ => {
            check.invalid(field, &written.to_string(), "is no size of a map", "use 1 to 16777216");
            default
        }
    }
}
