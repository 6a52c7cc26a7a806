//! A kubelet without an API server: kube-lane as a static pod, installed by the commands and files of `docs/install.md`.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use kube_lane_lab::{Host, Proto, topology};
use kube_lane_tests::nodes::{self, LoneNode, workload};
use kube_lane_tests::objects::{self, Endpoint, Port, service, slices};
use serde_json::Value;

use crate::guide;
use crate::traffic::{Connections, Traffic};
use crate::world::{self, Web, dial, until};

const GUIDE: &str = "install.md";
/// Where the document puts manifests of pods, and files of Services.
const MANIFESTS: &str = "/etc/kubernetes/manifests";
const SERVICES: &str = "/etc/kube-lane/services";
/// The pods that answer.
const BACKENDS: [&str; 2] = ["web-a", "web-b"];

/// The document's steps lead to a node that serves, follows its folder, and survives the end of the agent.
pub(crate) fn static_pod() -> Result<()> {
    let mut node = LoneNode::start()?;
    run(&node).with_context(|| format!("logs in {}", node.keep_logs().display()))
}

fn run(node: &LoneNode) -> Result<()> {
    nodes::import(node.machine(), &nodes::kube_lane()?)?;
    for name in BACKENDS {
        manifest(node, name, workload::server(name))?;
    }
    manifest(node, "client", workload::client("client", node.machine().name()))?;
    let [backend, other] = BACKENDS.map(|name| ready(node, name));
    let (backend, other) = (backend?, other?);
    let client = node.host_of(&ready(node, "client")?)?;

    install(node, &addresses(&backend)?)?;
    let name = backend["metadata"]["name"].as_str().context("a pod without a name")?;
    the_documents_service_is_reached(node, &client, name)?;

    // Another Service in the file's place: dual stack, TCP and UDP, and both pods behind it.
    let web = Web {
        cluster_ips: topology::service_cidrs().map(|range| topology::nth(range, 90)),
        pods: vec![client],
        nodes: vec![Host::clone(node.lab().node(0))],
        outside: Host::clone(node.lab().outside()),
    };
    put(node, &web, &[&backend, &other])?;
    web.answers()?;
    is_not_served(node, "10.96.0.80:80".parse()?)?;

    the_agent_is_killed(node, &web)?;

    // An endpoint leaves the file.
    put(node, &web, &[&other])?;
    let (proto, to) = web.at_cluster_ips()[0];
    until(|| {
        let name = other["metadata"]["name"].as_str();
        // Were both still chosen, this many dials would meet one alone once in 10^6 runs.
        for _ in 0..20 {
            let outcome = web.pods[0].dial_with(dial(proto, to))?;
            ensure!(outcome.by() == name, "{to}: {outcome}");
        }
        Ok(())
    })?;
    uninstall(node)
}

/// Section "A static pod": its commands, then its files.
fn install(node: &LoneNode, backend: &[IpAddr]) -> Result<()> {
    on_node(node, &guide::commands(GUIDE, "cp deploy/static-pod", &[])?)?;
    let (name, address) = (node.machine().name(), node.machine().host().v4().to_string());
    let file = guide::file(GUIDE, "kind: Node", &[("NODE-ADDRESS", &address), ("NODE", name)])?;
    node.machine().write(&format!("{SERVICES}/node.yaml"), &file)?;
    let backend = backend.first().context("a pod without an address")?.to_string();
    let file = guide::file(GUIDE, "kind: EndpointSlice", &[("POD-ADDRESS", &backend), ("NODE", name)])?;
    node.machine().write(&format!("{SERVICES}/web.yaml"), &file)?;
    let rendered = guide::commands(GUIDE, "kube-lane render", &[("NODE", name)])?;
    let program = kube_lane_tests::agent::binary()?;
    let folder = program.parent().context("a program in no folder")?.display().to_string();
    let rendered = on_node(node, &format!("PATH={folder}:$PATH\n{rendered}"))?;
    ensure!(rendered.contains(&format!("{backend}:8080")), "render names no {backend}:8080:\n{rendered}");
    // Kubelet says so because of the probes.
    ready(node, "kube-lane")?;
    Ok(())
}

fn the_documents_service_is_reached(node: &LoneNode, client: &Host, by: &str) -> Result<()> {
    let at_node = SocketAddr::new(node.machine().host().v4(), 30080);
    let at_service: SocketAddr = "10.96.0.80:80".parse()?;
    let inside = [client, node.machine().host()];
    let ways = inside.into_iter().flat_map(|host| [(host, at_service), (host, at_node)]);
    for (host, to) in ways.chain([(&**node.lab().outside(), at_node)]) {
        until(|| {
            let outcome = host.dial_with(dial(Proto::Tcp, to))?;
            ensure!(outcome.by() == Some(by), "{} dials {to}: {outcome}", host.name());
            Ok(())
        })?;
    }
    Ok(())
}

/// Writes the Service and its EndpointSlices with these pods behind it.
fn put(node: &LoneNode, web: &Web, backends: &[&Value]) -> Result<()> {
    let ports = [
        Port::new("TCP", workload::HTTP.0, workload::TARGETS.0).node_port(workload::HTTP.1),
        Port::new("UDP", workload::UDP.0, workload::TARGETS.1).node_port(workload::UDP.1),
    ];
    let mut endpoints = vec![];
    for pod in backends {
        let on = |address| Endpoint::ready(address, node.machine().name());
        endpoints.extend(addresses(pod)?.into_iter().map(on));
    }
    let mut objects = vec![service("web", &web.cluster_ips, &ports)];
    objects.extend(slices("web", &ports, &endpoints));
    let documents: Vec<_> = objects.iter().map(Value::to_string).collect();
    node.machine().write(&format!("{SERVICES}/web.yaml"), &documents.join("\n---\n"))?;
    let host = node.machine().host();
    let object = objects::node(node.machine().name(), &[host.v4(), host.v6()]);
    node.machine().write(&format!("{SERVICES}/node.yaml"), &object.to_string())
}

fn is_not_served(node: &LoneNode, to: SocketAddr) -> Result<()> {
    until(|| {
        let outcome = node.machine().host().dial_with(dial(Proto::Tcp, to))?;
        ensure!(outcome.by().is_none(), "{to} is still answered: {outcome}");
        Ok(())
    })
}

/// Kubelet starts another container; meanwhile no connection fails, new or kept.
fn the_agent_is_killed(node: &LoneNode, web: &Web) -> Result<()> {
    let traffic = Traffic::start(web, Connections::NewAndKept)?;
    let pod = ready(node, "kube-lane")?;
    let before = &pod["status"]["containerStatuses"][0];
    let container = before["containerID"].as_str().and_then(|id| id.strip_prefix("containerd://"));
    let pid = node.machine().pid_of(container.context("kube-lane has no container")?)?;
    node.machine().run(&["kill", "-KILL", &pid.to_string()])?;
    until(|| {
        let pod = ready(node, "kube-lane")?;
        let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
        ensure!(*restarts != before["restartCount"], "not restarted: {}", pod["status"]);
        Ok(())
    })?;
    traffic.goes_on()?;
    world::report(&format!("the agent of a static pod is killed:\n{}", traffic.stop()?));
    Ok(())
}

/// As the section ends: the manifest goes, then what the kernel holds.
fn uninstall(node: &LoneNode) -> Result<()> {
    node.machine().run(&["rm", &format!("{MANIFESTS}/kube-lane.yaml")])?;
    until(|| {
        ensure!(node.pod("kube-lane").is_err(), "kubelet still has the pod");
        Ok(())
    })?;
    // Kubelet forgets the pod once its containers have ended.
    on_node(node, &guide::commands(GUIDE, "kube-lane-cleanup", &[])?)?;
    let tables = node.machine().run(&["nft", "list", "tables"])?;
    ensure!(!tables.contains("kube-lane"), "left: {tables}");
    Ok(())
}

fn on_node(node: &LoneNode, commands: &str) -> Result<String> {
    node.machine().run(&guide::shell(commands)?.each_ref().map(String::as_str))
}

/// Puts a pod into kubelet's folder of manifests.
fn manifest(node: &LoneNode, name: &str, mut pod: Value) -> Result<()> {
    // Kubelet says itself which node that is.
    if let Some(spec) = pod["spec"].as_object_mut() {
        spec.remove("nodeName");
    }
    node.machine().write(&format!("{MANIFESTS}/{name}.yaml"), &pod.to_string())
}

/// Waits until a pod is ready.
fn ready(node: &LoneNode, name: &str) -> Result<Value> {
    until(|| {
        let pod = node.pod(name)?;
        let conditions = pod["status"]["conditions"].as_array();
        let is_ready = conditions
            .is_some_and(|all| all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"));
        ensure!(is_ready, "pod {name} is not ready: {}", pod["status"]);
        Ok(pod)
    })
}

/// A pod's addresses, as kubelet reports them.
fn addresses(pod: &Value) -> Result<Vec<IpAddr>> {
    let all = pod["status"]["podIPs"].as_array().context("a pod without addresses")?;
    all.iter().map(|one| Ok(one["ip"].as_str().context("an address that is no text")?.parse()?)).collect()
}
