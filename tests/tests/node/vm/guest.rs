//! The guest as a node: its file systems and networks, containerd, kubelet, and what the scenarios ask of both.
//!
//! Owns the programs that run in the guest. Never judges.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kube_lane_tests::nodes::kubelet;
use kube_lane_tests::objects::{self, Endpoint, Port};
use kube_lane_tests::process::{Process, in_netns};
use kube_lane_tests::vm;
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot, sethostname};
use serde_json::Value;

use super::{IMAGES, scenarios};
use crate::world::report;

/// The node's name.
pub(super) const NODE: &str = "node0";
/// Its address.
pub(super) const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
/// The network namespace of a host that is no node.
pub(super) const OUTSIDE: &str = "/run/netns/outside";
/// Where the CNI plugins are.
pub(super) const PLUGINS: &str = "/opt/cni/bin";

/// How long anything may take that has to happen: many times what it does under emulation.
const PATIENCE: Duration = Duration::from_secs(900);
/// Lines of each log that a failure shows.
const TAIL_LINES: usize = 25;

/// File systems of the guest, and where they are mounted.
const MOUNTS: [(&str, &str); 11] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("tmpfs", "/var"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("securityfs", "/sys/kernel/security"),
    ("bpf", "/sys/fs/bpf"),
];

/// What `/init` does.
pub(super) fn main() -> Result<()> {
    leave_the_initramfs().context("cannot leave the initramfs")?;
    vm::mount_all(&MOUNTS)?;
    // As systemd does it: containers see what the node mounts later.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SHARED, None::<&str>)?;
    vm::run(scenarios::ALL)
}

/// No container can leave the root of an initramfs by `pivot_root()`. It can leave a mount of that root in its place.
fn leave_the_initramfs() -> Result<()> {
    let bind = |flags, from, to| mount(Some(from), to, None::<&str>, flags, None::<&str>);
    fs::create_dir("/tree")?;
    bind(MsFlags::MS_BIND, "/", "/tree")?;
    chdir("/tree")?;
    bind(MsFlags::MS_MOVE, ".", "/")?;
    chroot(".")?;
    Ok(chdir("/")?)
}

/// The programs that run as long as the machine does.
static PROGRAMS: Mutex<Vec<Process>> = Mutex::new(vec![]);

fn start(program: &str, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(program);
    command.args(arguments);
    let process = Process::spawn(command, &log_of(program), None)?;
    PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner).push(process);
    Ok(())
}

fn log_of(program: &str) -> PathBuf {
    Path::new("/var/log").join(program)
}

/// Makes the machine a node with a host outside, and starts containerd and kubelet.
pub(super) fn become_a_node() -> Result<()> {
    sethostname(NODE)?;
    fs::create_dir_all("/var/log")?;
    fs::create_dir_all(kubelet::MANIFESTS)?;
    // As systemd does it: this process is in a cgroup, and all below the root may have all controllers.
    fs::create_dir("/sys/fs/cgroup/init")?;
    fs::write("/sys/fs/cgroup/init/cgroup.procs", "1")?;
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    for controller in controllers.split_whitespace() {
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", format!("+{controller}"))?;
    }
    run("modprobe", &["br_netfilter"])?;
    for sysctl in ["ipv4/ip_forward", "bridge/bridge-nf-call-iptables"] {
        fs::write(Path::new("/proc/sys/net").join(sysctl), "1").context(sysctl)?;
    }
    for line in [
        "link set lo up",
        "netns add outside",
        "link add uplink type veth peer name uplink netns outside",
        "address add 192.0.2.1/24 dev uplink",
        "link set uplink up",
        "route add default via 192.0.2.2",
        "-netns outside address add 192.0.2.2/24 dev uplink",
        "-netns outside link set uplink up",
    ] {
        run("ip", &line.split(' ').collect::<Vec<_>>())?;
    }

    start("containerd", &[])?;
    until("containerd", || run("ctr", &["version"]))?;
    for image in fs::read_dir(IMAGES)? {
        let image = image?.path();
        report(&format!("{}: importing {}", uptime()?, image.display()));
        ctr(&["images", "import", image.to_str().context("a path that is no text")?])?;
        // It is in memory, like all files here.
        fs::remove_file(image)?;
    }
    let arguments = ["--config=/etc/kubelet.json", "--hostname-override=node0", "--node-ip=192.0.2.1"];
    start("kubelet", &arguments)
}

/// How long the machine has been running, by its own clock.
pub(super) fn uptime() -> Result<String> {
    let uptime = fs::read_to_string("/proc/uptime")?;
    Ok(format!("{} s", uptime.split('.').next().unwrap_or_default()))
}

/// Runs a program to its end and returns what it printed.
pub(super) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let (succeeded, said) = try_run(program, arguments)?;
    ensure!(succeeded, "{program} {arguments:?}: {said}");
    Ok(said)
}

/// Whether a program succeeds, and what it printed.
pub(super) fn try_run(program: &str, arguments: &[&str]) -> Result<(bool, String)> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("no {program}"))?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

fn ctr(arguments: &[&str]) -> Result<String> {
    run("ctr", &[&["--namespace", "k8s.io"], arguments].concat())
}

/// Has kubelet run a static pod, or another one in its place.
pub(super) fn put_static_pod(name: &str, manifest: &str) -> Result<()> {
    let file = static_pod(name);
    // kubelet reads whatever file it finds, but for those that begin with a dot.
    let new = file.with_file_name(format!(".{name}"));
    fs::write(&new, manifest)?;
    Ok(fs::rename(new, file)?)
}

/// Has kubelet end a static pod.
pub(super) fn remove_static_pod(name: &str) -> Result<()> {
    Ok(fs::remove_file(static_pod(name))?)
}

fn static_pod(name: &str) -> PathBuf {
    Path::new(kubelet::MANIFESTS).join(format!("{name}.yaml"))
}

/// The running container of this name, and its process.
pub(super) fn container(name: &str) -> Result<(String, u32)> {
    let filter = format!("labels.\"io.kubernetes.container.name\"=={name}");
    let ids = ctr(&["containers", "list", "--quiet", &filter])?;
    let tasks = ctr(&["tasks", "list"])?;
    for task in tasks.lines() {
        let fields: Vec<_> = task.split_whitespace().collect();
        if let [id, pid, "RUNNING"] = fields[..]
            && ids.lines().any(|line| line == id)
        {
            return Ok((id.to_owned(), pid.parse()?));
        }
    }
    bail!("no container {name} runs: {ids}{tasks}")
}

/// Whether a program succeeds in the running container of this name, and what it printed.
pub(super) fn exec(name: &str, program: &[&str]) -> Result<(bool, String)> {
    let (id, _) = container(name)?;
    let exec = ["--namespace", "k8s.io", "tasks", "exec", "--exec-id", "test", &id];
    try_run("ctr", &[&exec, program].concat())
}

/// The address of the pod of a container.
pub(super) fn pod_address(container_name: &str) -> Result<IpAddr> {
    let (_, pid) = container(container_name)?;
    in_netns(Some(Path::new(&format!("/proc/{pid}/ns/net"))), || {
        // No packet is sent: the kernel says where one would come from.
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((ADDRESS, 9))?;
        Ok(socket.local_addr()?.ip())
    })
}

/// What kube-lane's `status` tells on the node, in JSON.
pub(super) fn status() -> Result<Value> {
    let said = run("kube-lane", &["status", "--all", "--output=json"])?;
    serde_json::from_str(&said).with_context(|| format!("status: {said}"))
}

/// Waits until kube-lane serves with everything programmed, and returns its process.
pub(super) fn agent_serves() -> Result<u32> {
    until("kube-lane", || {
        let status = status()?;
        ensure!(status["agent"]["synced"] == true, "{status:#}");
        let (_, pid) = container("kube-lane")?;
        Ok(pid)
    })
}

/// The Service `web`, of a pod in the guest: its addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Web;

impl Web {
    pub(super) const TCP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);
    pub(super) const UDP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 81);
    /// At the node's address.
    pub(super) const NODE_PORTS: [SocketAddr; 2] =
        [SocketAddr::new(ADDRESS, 30080), SocketAddr::new(ADDRESS, 30081)];

    /// Puts it into the folder that kube-lane follows, with this endpoint.
    pub(super) fn put(endpoint: IpAddr) -> Result<()> {
        let ports = [
            Port::new("TCP", Self::TCP.port(), 8080).node_port(Self::NODE_PORTS[0].port()),
            Port::new("UDP", Self::UDP.port(), 8081).node_port(Self::NODE_PORTS[1].port()),
        ];
        let mut all =
            vec![objects::node(NODE, &[ADDRESS]), objects::service("web", &[Self::TCP.ip()], &ports)];
        all.extend(objects::slices("web", &ports, &[Endpoint::ready(endpoint, NODE)]));
        let documents: Vec<_> = all.iter().map(Value::to_string).collect();
        Ok(fs::write("/etc/kube-lane/services/web.yaml", documents.join("\n---\n"))?)
    }

    /// Connections that the layer answered at sockets: of TCP, of UDP.
    pub(super) fn answered_at_sockets() -> Result<[u64; 2]> {
        let status = status()?;
        let ports = status["services"][0]["ports"].as_array().with_context(|| format!("{status:#}"))?;
        let count = |protocol: &str| {
            let of_it = ports.iter().filter(|port| port["protocol"] == protocol);
            let backends = of_it.flat_map(|port| port["backends"].as_array().into_iter().flatten());
            backends.filter_map(|backend| backend["connectionsAtSocket"].as_u64()).sum()
        };
        Ok(["TCP", "UDP"].map(count))
    }
}

/// The logs of the containers of this name, the present one's and those before it.
pub(super) fn log(container_name: &str) -> Result<String> {
    let mut all = String::new();
    for pod in fs::read_dir("/var/log/pods")? {
        let folder = pod?.path().join(container_name);
        let mut logs: Vec<_> =
            fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        logs.sort();
        for log in logs {
            all += &fs::read_to_string(log)?;
        }
    }
    Ok(all)
}

/// Tries again until it succeeds; shows all logs now and then where it does not.
pub(super) fn until<T>(what: &str, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    report(&format!("{}: waiting for {what}", uptime()?));
    let deadline = Instant::now() + PATIENCE;
    let mut shown = Instant::now();
    loop {
        let error = match attempt() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let is_late = Instant::now() > deadline;
        if is_late || shown.elapsed() > PATIENCE / 8 {
            shown = Instant::now();
            report(&format!("{}\n{}: still waiting for {what}: {error:#}", logs(), uptime()?));
        }
        if is_late {
            return Err(error).context(what.to_owned());
        }
        sleep(Duration::from_secs(1));
    }
}

/// The ends of all logs.
fn logs() -> String {
    let read = |name| fs::read_to_string(log_of(name)).unwrap_or_default();
    let programs = ["containerd", "kubelet"].map(|name| (name, read(name)));
    let containers = ["kube-lane", "web"].map(|name| (name, log(name).unwrap_or_default()));
    let all = programs.into_iter().chain(containers);
    all.map(|(name, log)| format!("--- {name}\n{}", tail(&log))).collect()
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].iter().map(|line| format!("{line}\n")).collect()
}
