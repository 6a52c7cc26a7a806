//! What the scenarios share: installing kube-lane, a Deployment behind a Service, and clients that dial it.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kube_lane_lab::{Dial, Host, Proto, Server, topology};
use kube_lane_tests::nodes::{self, NodeCluster, WAIT, workload};
use serde_json::{Value, json};

use crate::guide;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(180);

/// The replicas of the Deployment.
pub(crate) const REPLICAS: u32 = 3;

/// The folder of manifests that users apply.
pub(crate) fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Runs `kubectl apply` with `-k` or `-f` on `deploy/` or a folder in it; returns what it says.
pub(crate) fn apply(nodes: &NodeCluster, flag: &str, below: &str) -> Result<String> {
    let path = deploy().join(below);
    nodes.kubectl(&["apply", flag, path.to_str().context("a path that is no text")?])
}

/// Waits until the rollout of `what` (`daemonset/kube-lane`) is complete.
pub(crate) fn rolled_out(nodes: &NodeCluster, namespace: &str, what: &str) -> Result<()> {
    nodes.kubectl(&["--namespace", namespace, "rollout", "status", what, WAIT])?;
    Ok(())
}

/// Installs kube-lane on a cluster that never had kube-proxy (docs/install.md, "Without kube-proxy from the start"), and
/// waits until its pods are ready. Returns the folder that has `my-cluster`.
pub(crate) fn install(nodes: &NodeCluster) -> Result<PathBuf> {
    nodes.import(&nodes::kube_lane()?)?;
    let address = nodes.cluster().control_plane().address();
    let [v4, v6] = topology::cluster_cidrs();
    let values = [
        ("192.0.2.1", address.ip().to_string()),
        ("6443", address.port().to_string()),
        ("10.244.0.0/16", format!("{v4},{v6}")),
    ];
    let values: Vec<_> = values.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let overlay = guide::file("install.md", "# my-cluster/kustomization.yaml", &values)?;
    let folder = guide::beside_the_clone(nodes, "my-cluster", &overlay)?;
    let apply = guide::commands("install.md", "kubectl apply -k my-cluster/\nkubectl -n", &[])?;
    guide::administrator_in(nodes, &folder, &apply)?;
    Ok(folder)
}

/// What `kube-lane status` says on a node.
pub(crate) fn status(nodes: &NodeCluster, node: usize) -> Result<Value> {
    let on = format!("--field-selector=spec.nodeName={}", nodes.machine(node).name());
    let pods = nodes.list(&["--namespace=kube-system", "pods", "--selector=k8s-app=kube-lane", &on])?;
    let [pod] = &pods[..] else {
        bail!("{} has {} pods of kube-lane", nodes.machine(node).name(), pods.len())
    };
    let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
    let command = ["kube-lane", "status", "--output=json"];
    let mut exec = vec!["--namespace=kube-system", "exec", name, "--"];
    exec.extend(command);
    Ok(serde_json::from_str(&nodes.kubectl(&exec)?)?)
}

/// The Deployment `web`, its Service, and those who dial it.
pub(crate) struct Web {
    /// The Service's addresses.
    pub(crate) cluster_ips: [IpAddr; 2],
    /// A pod on each node.
    pub(crate) pods: Vec<Host>,
    /// The nodes themselves.
    pub(crate) nodes: Vec<Host>,
    /// A host that is no node.
    pub(crate) outside: Host,
}

impl Web {
    /// Makes all of it where it is not there, and waits until its pods are ready.
    pub(crate) fn new(nodes: &NodeCluster) -> Result<Self> {
        let lab = nodes.cluster().lab();
        let mut objects = vec![workload::deployment("web", REPLICAS), workload::service("web")];
        objects.extend(lab.nodes().iter().map(|node| {
            let name = format!("client-{}", node.name());
            workload::client(&name, node.name())
        }));
        nodes.cluster().apply_all(&objects)?;
        rolled_out(nodes, "default", "deployment/web")?;
        nodes.kubectl(&["wait", "--for=condition=Ready", "pod", "--selector=role=client", WAIT])?;
        let pods = nodes.list(&["pods", "--selector=role=client"])?;
        let service = nodes.cluster().get(
            &json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"}}),
        )?;
        let ip = |index: usize| -> Result<IpAddr> {
            let ip = service["spec"]["clusterIPs"][index].as_str();
            Ok(ip.with_context(|| format!("Service web has no two addresses: {service}"))?.parse()?)
        };
        Ok(Self {
            cluster_ips: [ip(0)?, ip(1)?],
            pods: pods.iter().map(|pod| nodes.pod(pod)).collect::<Result<_>>()?,
            nodes: lab.nodes().iter().map(|node| Host::clone(node)).collect(),
            outside: Host::clone(lab.outside()),
        })
    }

    /// Where the Service is dialled at its own addresses.
    pub(crate) fn at_cluster_ips(&self) -> Vec<(Proto, SocketAddr)> {
        self.cluster_ips.iter().flat_map(|ip| at(*ip, workload::HTTP.0, workload::UDP.0)).collect()
    }

    /// Where it is dialled at the nodes' addresses.
    pub(crate) fn at_node_ports(&self) -> Vec<(Proto, SocketAddr)> {
        let addresses = self.nodes.iter().flat_map(|node| [node.v4(), node.v6()]);
        addresses.flat_map(|ip| at(ip, workload::HTTP.1, workload::UDP.1)).collect()
    }

    /// Everyone who dials, and where: ClusterIP and NodePort from pods and nodes, NodePort from outside.
    pub(crate) fn ways(&self) -> Vec<(&Host, Proto, SocketAddr)> {
        let inside = self.pods.iter().chain(&self.nodes);
        let inside = inside.flat_map(|host| {
            let ways = self.at_cluster_ips().into_iter().chain(self.at_node_ports());
            ways.map(move |(proto, to)| (host, proto, to))
        });
        let outside = self.at_node_ports().into_iter().map(|(proto, to)| (&self.outside, proto, to));
        inside.chain(outside).collect()
    }

    /// Waits until a pod answers on every way.
    pub(crate) fn answers(&self) -> Result<()> {
        for (host, proto, to) in self.ways() {
            until(|| {
                let outcome = host.dial_with(dial(proto, to))?;
                ensure!(outcome.by().is_some(), "{} dials {proto} {to}: {outcome}", host.name());
                Ok(())
            })?;
        }
        Ok(())
    }
}

fn at(ip: IpAddr, http: u16, udp: u16) -> [(Proto, SocketAddr); 2] {
    [(Proto::Tcp, (ip, http).into()), (Proto::Udp, (ip, udp).into())]
}

/// A connection to agnhost, which waits long enough for a busy machine.
pub(crate) fn dial(proto: Proto, to: SocketAddr) -> Dial {
    Dial::new(proto, to).server(Server::Agnhost).timeout(Duration::from_secs(10))
}

/// Prints a result that is worth keeping.
pub(crate) fn report(text: &str) {
    println!("{text}");
}

/// Tries again until it succeeds.
pub(crate) fn until<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => return Err(error).context("still"),
            Err(_) => sleep(Duration::from_millis(100)),
        }
    }
}
