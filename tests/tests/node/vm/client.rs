//! A client in a pod of the guest: this program again, in the cgroup and the network namespace of a container.
//!
//! Owns entering them, and one dial. Prints who answered and where that was decided.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kube_lane_lab::Proto;
use nix::sched::{CloneFlags, setns};

use crate::world::dial;

/// The first argument of this program as a client.
pub(crate) const NAME: &str = "vm-client";

/// How a client dials.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way {
    /// TCP.
    Tcp,
    /// A UDP socket that is connected.
    Connected,
    /// A UDP socket that is not: the layer sees `sendmsg()`.
    Unconnected,
}

/// Who answered a client.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The pod's name.
    pub(crate) by: String,
    /// Whether the kernel has the socket connected to another address than `getpeername()` tells; of TCP.
    pub(crate) at_socket: bool,
}

/// Dials from the container in which process `pid` runs.
pub(crate) fn dial_from(pid: u32, way: Way, to: SocketAddr) -> Result<Answer> {
    let mut client = Command::new("/proc/self/exe");
    client.args([NAME, &pid.to_string(), &format!("{way:?}"), &to.to_string()]);
    let output = client.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{way:?} to {to}: {complaint}");
    let (by, place) = said.trim_end().split_once(' ').context("no answer")?;
    Ok(Answer { by: by.to_owned(), at_socket: place == "socket" })
}

/// Dials from here.
pub(crate) fn dial_here(way: Way, to: SocketAddr) -> Result<Answer> {
    let (outcome, at_socket) = match way {
        Way::Tcp => {
            let met = dial(Proto::Tcp, to).meet();
            (met.outcome, met.at_socket)
        }
        Way::Connected => (dial(Proto::Udp, to).ask(), false),
        Way::Unconnected => return Ok(Answer { by: ask_unconnected(to)?, at_socket: false }),
    };
    let by = outcome.by().with_context(|| format!("{to}: {outcome}"))?.to_owned();
    Ok(Answer { by, at_socket })
}

fn ask_unconnected(to: SocketAddr) -> Result<String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.send_to(b"hostname\n", to)?;
    let mut answer = [0; 256];
    let (length, from) = socket.recv_from(&mut answer).with_context(|| format!("{to}"))?;
    // Applications are to see whom they asked.
    ensure!(from == to, "{from} answers in the place of {to}");
    Ok(String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).trim().to_owned())
}

/// The client's own process.
pub(crate) fn main(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let mut next = || arguments.next().context("no argument");
    enter(next()?.parse()?)?;
    let way = match next()?.as_str() {
        "Tcp" => Way::Tcp,
        "Connected" => Way::Connected,
        "Unconnected" => Way::Unconnected,
        other => bail!("{other}"),
    };
    let answer = dial_here(way, next()?.parse()?)?;
    crate::world::report(&format!("{} {}", answer.by, if answer.at_socket { "socket" } else { "packets" }));
    Ok(())
}

/// Joins the cgroup and the network namespace of a process.
fn enter(pid: u32) -> Result<()> {
    let cgroup =
        Path::new("/sys/fs/cgroup").join(cgroup_of(pid)?.trim_start_matches('/')).join("cgroup.procs");
    fs::write(&cgroup, "0").with_context(|| format!("cannot enter {}", cgroup.display()))?;
    let netns = File::open(format!("/proc/{pid}/ns/net"))?;
    setns(netns, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")
}

/// The cgroup (v2) of a process: a path below the root.
pub(crate) fn cgroup_of(pid: u32) -> Result<String> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(path.with_context(|| format!("process {pid} is in no cgroup v2: {cgroups}"))?.to_owned())
}
