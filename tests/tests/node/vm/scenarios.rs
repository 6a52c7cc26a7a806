//! What has to work on the node, in this order: mode `ebpf` under AppArmor, a restart of the agent, the layer without an
//! agent, and an agent whose pins AppArmor denies.
//!
//! Knows the node by what `guest` tells of it.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube_lane_tests::nodes::{AGNHOST_IMAGE, KUBE_LANE_IMAGE};
use kube_lane_tests::process::in_netns;
use kube_lane_tests::vm::Scenario;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::client::{Answer, Way, cgroup_of, dial_from, dial_here};
use super::guest::{self, NODE, OUTSIDE, Web, until, uptime};
use super::{CONFIGURATION, MANIFEST, PODS};
use crate::world::report;

pub(super) const ALL: &[Scenario] = &[
    ("kubelet_runs_the_static_pod_for_mode_ebpf", || comes_up().unwrap()),
    ("the_default_profile_of_containerd_confines_every_pod", || is_confined().unwrap()),
    ("the_agent_pins_where_the_profile_allows_it", || pins().unwrap()),
    ("check_in_the_container_agrees", || check_agrees().unwrap()),
    ("a_pod_is_answered_at_its_sockets", || answers_a_pod().unwrap()),
    ("a_host_process_is_answered_at_its_sockets", || answers_the_host().unwrap()),
    ("node_ports_answer_outside", || answers_outside().unwrap()),
    ("a_new_agent_takes_the_pins_over", || is_adopted().unwrap()),
    ("the_layer_outlives_the_pod_until_cleanup", || outlives_the_pod().unwrap()),
    ("an_agent_that_may_not_pin_names_apparmor_and_serves", || falls_back().unwrap()),
    ("check_in_that_container_agrees", || check_names_apparmor().unwrap()),
];

/// The profile that containerd gives to containers, in force.
const PROFILE: &str = "cri-containerd.apparmor.d (enforce)";
/// Where the node's programs see the pins of the agent.
const PINS: &str = "/sys/fs/bpf/kube-lane";
/// Where the agent's container has the BPF file system: where the profile allows writing, and where it denies it.
const ALLOWED: &str = "/run/kube-lane/bpf";
const DENIED: &str = "/sys/fs/bpf";

/// kube-lane in mode `ebpf`, with the BPF file system at this place in its container.
fn start_the_agent(bpf: &str) -> Result<u32> {
    let edited = |file: &str| Ok::<_, anyhow::Error>(fs::read_to_string(file)?.replace(ALLOWED, bpf));
    let pods = format!("\nclusterCIDR: {PODS}\n");
    // And UDP, which is left to nftables without the option.
    let udp = "  socketLB:\n    udp: true\n";
    fs::create_dir_all("/etc/kube-lane/services")?;
    fs::write("/etc/kube-lane/config.conf", edited(CONFIGURATION)? + udp + &pods)?;
    let manifest = edited(MANIFEST)?;
    guest::put_static_pod("kube-lane", &manifest)?;
    guest::agent_serves()
}

fn comes_up() -> Result<()> {
    guest::become_a_node()?;
    let pod = |name: &str, arguments: &[&str]| {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [{
                "name": name, "image": AGNHOST_IMAGE, "imagePullPolicy": "Never", "args": arguments,
            }]},
        })
    };
    let web = pod("web", &["netexec", "--http-port=8080", "--udp-port=8081"]);
    guest::put_static_pod("web", &web.to_string())?;
    guest::put_static_pod("client", &pod("client", &["pause"]).to_string())?;
    let agent = start_the_agent(ALLOWED)?;
    until("client", || guest::container("client"))?;
    let address = until("web", || guest::pod_address("web"))?;
    Web::put(address)?;
    until("Service web", || dial_here(Way::Tcp, Web::TCP))?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let modules = fs::read_to_string("/sys/kernel/security/lsm")?;
    let versions = ["containerd", "runc", "kubelet"].map(|name| guest::run(name, &["--version"]));
    report(&format!("Linux {}, security modules {modules}", kernel.trim()));
    for version in versions {
        report(version?.trim());
    }
    report(&format!("pod web at {address}; kube-lane is process {agent}; up after {}", uptime()?));
    Ok(())
}

fn is_confined() -> Result<()> {
    for name in ["kube-lane", "web", "client"] {
        let (_, pid) = guest::container(name)?;
        let profile = fs::read_to_string(format!("/proc/{pid}/attr/current"))?;
        ensure!(profile.trim_end() == PROFILE, "{name} runs under {profile}");
        let cgroup = cgroup_of(pid)?;
        ensure!(cgroup.starts_with("/kubepods/"), "{name} is in {cgroup}");
        report(&format!("{name}: {} in {cgroup}", profile.trim_end()));
    }
    let (_, pid) = guest::container("kube-lane")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    // NET_ADMIN, PERFMON and BPF are 12, 38 and 39.
    for line in ["CapEff:\t000000c000001000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        ensure!(status.lines().any(|has| has == line), "no {line} in {status}");
    }
    Ok(())
}

fn pins() -> Result<()> {
    let (_, pid) = guest::container("kube-lane")?;
    let in_container = format!("/proc/{pid}/root{ALLOWED}/kube-lane");
    for file in ["v1/links/connect4", "v1/maps/FRONTENDS"] {
        let (inode, _) = pin(PINS, file)?;
        ensure!(pin(&in_container, file)?.0 == inode, "{file} is another one in the container");
    }
    let status = guest::status()?;
    let agent = &status["agent"];
    ensure!(agent["mode"] == "ebpf" && agent["whyNotEbpf"].is_null(), "{agent:#}");
    ensure!(agent["troubles"] == json!([]), "{agent:#}");
    let log = guest::log("kube-lane")?;
    ensure!(!log.contains(" WARN ") && !log.contains(" ERROR "), "{log}");
    Ok(())
}

/// The inode and the device of a pin.
fn pin(folder: &str, file: &str) -> Result<(u64, u64)> {
    let path = Path::new(folder).join(file);
    let metadata = fs::metadata(&path).with_context(|| format!("no pin {}", path.display()))?;
    Ok((metadata.ino(), metadata.dev()))
}

fn check_agrees() -> Result<()> {
    let (works, said) = check()?;
    ensure!(works && said.contains("--proxy-mode ebpf: works") && said.contains(ALLOWED), "{said}");
    report(&said);
    Ok(())
}

/// Whether `kube-lane check` succeeds in the agent's container, and what it says.
fn check() -> Result<(bool, String)> {
    guest::exec("kube-lane", &["kube-lane", "check", "--config=/etc/kube-lane/config.conf"])
}

/// Dials with all kinds of sockets, and compares what the agent has counted with what there was to count.
fn is_answered_at_sockets(dial: impl Fn(Way, SocketAddr) -> Result<Answer>) -> Result<()> {
    let by = format!("web-{NODE}");
    let [tcp, udp] = Web::answered_at_sockets()?;
    for _ in 0..3 {
        let answer = dial(Way::Tcp, Web::TCP)?;
        ensure!(answer == Answer { by: by.clone(), at_socket: true }, "{answer:?}");
        let answer = dial(Way::Unconnected, Web::UDP)?;
        ensure!(answer.by == by, "{answer:?}");
    }
    let expected = [tcp + 3, udp + 3];
    let counted = Web::answered_at_sockets()?;
    ensure!(counted == expected, "connections of TCP and UDP: {counted:?}, not {expected:?}");
    // Left to nftables, and no less answered.
    let answer = dial(Way::Connected, Web::UDP)?;
    ensure!(answer.by == by && Web::answered_at_sockets()? == expected, "{answer:?}");
    report(&format!("answered at the socket until now, of TCP and UDP: {counted:?}"));
    Ok(())
}

fn answers_a_pod() -> Result<()> {
    let (_, pid) = guest::container("client")?;
    is_answered_at_sockets(|way, to| dial_from(pid, way, to))
}

fn answers_the_host() -> Result<()> {
    is_answered_at_sockets(dial_here)
}

/// From a host that is no node, whose sockets the layer answers nothing: its packets meet nftables.
fn answers_outside() -> Result<()> {
    let before = Web::answered_at_sockets()?;
    let [tcp, udp] = Web::NODE_PORTS;
    for (way, to) in [(Way::Tcp, tcp), (Way::Connected, udp)] {
        let answer = in_netns(Some(Path::new(OUTSIDE)), || dial_here(way, to))?;
        ensure!(answer == Answer { by: format!("web-{NODE}"), at_socket: false }, "{to}: {answer:?}");
    }
    let after = Web::answered_at_sockets()?;
    ensure!(after == before, "{after:?}, before {before:?}");
    Ok(())
}

fn is_adopted() -> Result<()> {
    let (_, former) = guest::container("kube-lane")?;
    let (_, client) = guest::container("client")?;
    let files = ["v1/links/connect4", "v1/links/getpeername4", "v1/maps/FRONTENDS", "v1/maps/CONNECTIONS"];
    let pins = || files.iter().map(|file| pin(PINS, file)).collect::<Result<Vec<_>>>();
    let (pins_before, [tcp, udp]) = (pins()?, Web::answered_at_sockets()?);
    let mut kept = Kept::open()?;
    kill(Pid::from_raw(former.cast_signed()), Signal::SIGKILL)?;
    until("the end of the agent", || {
        ensure!(guest::status().is_err(), "it still answers");
        Ok(())
    })?;
    // Until kubelet has noticed, which takes it some seconds at least.
    kept.ask()?;
    let answer = dial_from(client, Way::Tcp, Web::TCP)?;
    ensure!(answer.at_socket, "{answer:?}");
    let pid = until("the next agent", || {
        let pid = guest::agent_serves()?;
        ensure!(pid != former, "it is process {pid} still");
        Ok(pid)
    })?;
    kept.ask()?;
    ensure!(pins()? == pins_before, "other pins: {:?}, not {pins_before:?}", pins()?);
    let counted = Web::answered_at_sockets()?;
    // One that is kept, one that came while there was no agent.
    ensure!(counted == [tcp + 2, udp], "{counted:?}, before {:?}", [tcp, udp]);
    report(&format!("kube-lane is process {pid}, was {former}; counts went on: {counted:?}"));
    is_confined()?;
    answers_a_pod()
}

/// A connection of a host process to the Service that stays open.
struct Kept(BufReader<TcpStream>);

impl Kept {
    fn open() -> Result<Self> {
        let stream = TcpStream::connect(Web::TCP)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut this = Self(BufReader::new(stream));
        this.ask()?;
        Ok(this)
    }

    /// Asks for the pod's name.
    fn ask(&mut self) -> Result<()> {
        self.0.get_mut().write_all(b"HEAD /hostname HTTP/1.1\r\nHost: web\r\n\r\n")?;
        let mut answer = String::new();
        while !answer.ends_with("\r\n\r\n") {
            ensure!(self.0.read_line(&mut answer)? > 0, "the connection ended: {answer}");
        }
        ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        Ok(())
    }
}

fn end_the_agent() -> Result<()> {
    guest::remove_static_pod("kube-lane")?;
    until("the end of kube-lane's pod", || {
        ensure!(guest::container("kube-lane").is_err() && guest::status().is_err(), "it still runs");
        Ok(())
    })
}

fn outlives_the_pod() -> Result<()> {
    let (_, client) = guest::container("client")?;
    end_the_agent()?;
    let (_, said) = guest::try_run("kube-lane", &["status"])?;
    ensure!(said.contains("no kube-lane runs here") && said.contains(PINS), "{said}");
    let answer = dial_from(client, Way::Tcp, Web::TCP)?;
    ensure!(answer.at_socket, "{answer:?}");
    // It finds by the mark what the pod pinned at another path of its own.
    let mount = "type=bind,src=/sys/fs/bpf,dst=/sys/fs/bpf,options=rbind:rw";
    let container =
        ["--net-host", "--cap-add", "CAP_NET_ADMIN", "--mount", mount, KUBE_LANE_IMAGE, "cleanup"];
    let run = [&["--namespace", "k8s.io", "run", "--rm"], &container[..], &["kube-lane", "cleanup"]].concat();
    let said = guest::run("ctr", &run)?;
    ensure!(said.contains("removed the socket layer"), "{said}");
    let left = fs::read_dir("/sys/fs/bpf")?.count();
    ensure!(left == 0, "{left} entries are left in /sys/fs/bpf");
    ensure!(
        dial_from(client, Way::Tcp, Web::TCP).is_err(),
        "the Service answers without anyone who serves it"
    );
    Ok(())
}

/// What tells that AppArmor denied it, and the remedy.
const DENIAL: [&str; 4] = ["pin /sys/fs/bpf/kube-lane", "Permission denied", PROFILE, "--bpf-root"];

fn names_apparmor(said: &str) -> Result<()> {
    let missing: Vec<_> = DENIAL.iter().filter(|part| !said.contains(**part)).collect();
    ensure!(missing.is_empty(), "no {missing:?} in: {said}");
    Ok(())
}

fn falls_back() -> Result<()> {
    let pid = start_the_agent(DENIED)?;
    let profile = fs::read_to_string(format!("/proc/{pid}/attr/current"))?;
    ensure!(profile.trim_end() == PROFILE, "kube-lane runs under {profile}");
    let status = guest::status()?;
    ensure!(status["agent"]["mode"] == "nftables", "{status:#}");
    let why = status["agent"]["whyNotEbpf"].as_str().with_context(|| format!("{status:#}"))?;
    names_apparmor(why)?;
    report(&format!("status: not ebpf: {why}"));
    let log = guest::log("kube-lane")?;
    let warning = log.lines().find(|line| line.contains(" WARN ")).context("no warning")?;
    names_apparmor(warning).with_context(|| log.clone())?;

    let (_, client) = guest::container("client")?;
    for (way, to) in [(Way::Tcp, Web::TCP), (Way::Connected, Web::UDP), (Way::Unconnected, Web::UDP)] {
        let by_nftables = Answer { by: format!("web-{NODE}"), at_socket: false };
        let answer = until("Service web", || dial_from(client, way, to))?;
        ensure!(answer == by_nftables, "{answer:?}");
        let answer = dial_here(way, to)?;
        ensure!(answer == by_nftables, "{answer:?}");
    }
    let [to, _] = Web::NODE_PORTS;
    in_netns(Some(Path::new(OUTSIDE)), || dial_here(Way::Tcp, to))?;
    Ok(())
}

fn check_names_apparmor() -> Result<()> {
    let (works, said) = check()?;
    ensure!(!works && said.contains("--proxy-mode ebpf: does not work here"), "{said}");
    names_apparmor(&said)?;
    report(&said);
    report(&format!("all of it after {}", uptime()?));
    Ok(())
}
