//! kube-lane as a unit of systemd, on nodes whose proxy is no pod, by the commands of `docs/install.md`.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use kube_lane_lab::topology;
use kube_lane_tests::agent;
use kube_lane_tests::nodes::{NodeCluster, systemd};

use crate::guide::{self, administrator_in};
use crate::remove;
use crate::traffic::{Connections, Traffic};
use crate::world::{self, Web, until};

const GUIDE: &str = "install.md";
/// Where the test sends what the unit says: no journal runs on the node.
const LOG: &str = "/var/log/kube-lane.log";

/// The unit as it is written, with the rights of `deploy/base/rbac.yaml`, serves on both nodes; it is restarted after a
/// crash, stopped and started, and no connection fails.
pub(crate) fn unit(nodes: &mut NodeCluster) -> Result<()> {
    let kubeconfig = credentials(nodes)?;
    for node in 0..2 {
        systemd::start(nodes.machine_mut(node))?;
        install(nodes, node, &kubeconfig)?;
    }
    serve(nodes).with_context(|| {
        let logs = [0, 1].map(|node| nodes.machine(node).run(&["cat", LOG]).unwrap_or_default());
        format!("the logs of the agents:\n{}", logs.join("\n"))
    })?;
    for node in 0..2 {
        on_node(nodes, node, &guide::commands(GUIDE, "systemctl disable", &[])?)?;
    }
    nodes.kubectl(&[
        "delete",
        "--filename",
        &manifest("serviceaccount")?,
        "--filename",
        &manifest("rbac")?,
    ])?;
    remove::nothing_is_left(nodes)
}

fn serve(nodes: &NodeCluster) -> Result<()> {
    let web = Web::new(nodes)?;
    web.answers()?;
    for node in 0..2 {
        is_confined(nodes, node)?;
    }

    let traffic = Traffic::start(&web, Connections::NewAndKept)?;
    for node in 0..2 {
        on_node(nodes, node, "systemctl kill --signal=KILL kube-lane")?;
        until(|| {
            let restarts = on_node(nodes, node, "systemctl show --value --property=NRestarts kube-lane")?;
            ensure!(restarts.trim() == "1", "{} restarts", restarts.trim());
            on_node(nodes, node, "kube-lane status")
        })?;
    }
    traffic.goes_on()?;
    world::report(&format!("the units crash and restart:\n{}", traffic.stop()?));

    let traffic = Traffic::start(&web, Connections::NewAndKept)?;
    for node in 0..2 {
        on_node(nodes, node, "systemctl stop kube-lane")?;
    }
    traffic.goes_on()?;
    for node in 0..2 {
        on_node(nodes, node, "systemctl start kube-lane")?;
        until(|| on_node(nodes, node, "kube-lane status"))?;
    }
    traffic.goes_on()?;
    world::report(&format!("the units are stopped and started:\n{}", traffic.stop()?));
    web.answers()
}

/// Section "systemd": the kubeconfig.
fn credentials(nodes: &NodeCluster) -> Result<String> {
    let folder = nodes.folder().join("systemd");
    fs::create_dir_all(&folder)?;
    std::os::unix::fs::symlink(guide::repository().canonicalize()?.join("deploy"), folder.join("deploy"))?;
    fs::copy(nodes.cluster().control_plane().authority(), folder.join("ca.crt"))?;
    let api_server = nodes.cluster().control_plane().address().to_string();
    let commands = guide::commands(GUIDE, "kubectl config set-cluster", &[("API-SERVER:6443", &api_server)])?;
    administrator_in(nodes, &folder, &commands)?;
    Ok(fs::read_to_string(folder.join("kube-lane.kubeconfig"))?)
}

/// The same section: program, unit, configuration and start.
fn install(nodes: &NodeCluster, node: usize, kubeconfig: &str) -> Result<()> {
    let program = agent::binary()?.display().to_string();
    // The lane has built the program already.
    let built = [("cargo xtask build --release", ":"), ("target/release/kube-lane", &program)];
    on_node(nodes, node, &guide::commands(GUIDE, "install -D -m 644 deploy/systemd", &built)?)?;
    let machine = nodes.machine(node);
    machine.write("/etc/kube-lane/kubeconfig", kubeconfig)?;
    machine.run(&["chmod", "600", "/etc/kube-lane/kubeconfig"])?;
    let pods = topology::cluster_cidrs().map(|range| range.to_string()).join(",");
    let file = guide::file(GUIDE, "kubeconfig: /etc/kube-lane/kubeconfig", &[("10.244.0.0/16", &pods)])?;
    machine.write("/etc/kube-lane/config.conf", &file)?;
    let log = format!("[Service]\nStandardError=append:{LOG}\n");
    machine.write("/run/systemd-targets/kube-lane.service.d/log.conf", &log)?;
    on_node(nodes, node, &guide::commands(GUIDE, "systemctl enable", &[])?)?;
    until(|| on_node(nodes, node, "kube-lane status"))?;
    Ok(())
}

/// The process has the rights that the unit leaves it, and no more.
fn is_confined(nodes: &NodeCluster, node: usize) -> Result<()> {
    let machine = nodes.machine(node);
    let process = systemd::process_of(machine, "kube-lane")?;
    let status = machine.run(&["cat", &format!("/proc/{process}/status")])?;
    // NET_ADMIN is capability 12.
    let net_admin = format!("{:016x}", 1 << 12);
    for (field, value) in
        [("CapEff", &*net_admin), ("CapBnd", &net_admin), ("NoNewPrivs", "1"), ("Seccomp", "2")]
    {
        ensure!(status.contains(&format!("\n{field}:\t{value}\n")), "not {field} {value}:\n{status}");
    }
    Ok(())
}

fn manifest(name: &str) -> Result<String> {
    let path = world::deploy().join(format!("base/{name}.yaml"));
    Ok(path.to_str().context("a path that is no text")?.to_owned())
}

/// Runs commands on a node where systemd runs.
fn on_node(nodes: &NodeCluster, node: usize, commands: &str) -> Result<String> {
    systemd::run(nodes.machine(node), &guide::shell(commands)?.each_ref().map(String::as_str))
}
