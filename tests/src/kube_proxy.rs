//! The real kube-proxy, as the oracle of the lanes and the other side of the benchmarks.

use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::controlplane::program;
use crate::process::{Process, free_ports};

/// How kube-proxy programs the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Calls `nft`.
    Nftables,
    /// Calls `iptables-restore`.
    Iptables,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Nftables => "nftables",
            Mode::Iptables => "iptables",
        })
    }
}

/// Where and how kube-proxy runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// How it programs the kernel.
    pub mode: Mode,
    /// The network namespace of its node (a path such as `/run/netns/a`), or the caller's.
    pub netns: Option<PathBuf>,
    /// What it talks to the API server with.
    pub kubeconfig: PathBuf,
    /// The Node that it is.
    pub hostname: String,
    /// The pods' range, or one of each family with a comma between; none: every source counts as a pod's.
    pub cluster_cidr: Option<String>,
    /// Further fields of its KubeProxyConfiguration: an object, merged over ours, field by field.
    pub config: Value,
}

/// A running kube-proxy; killed when dropped. What it programmed stays.
#[derive(Debug)]
pub struct KubeProxy {
    process: Process,
    healthz: SocketAddr,
    metrics: SocketAddr,
    // Holds its configuration and its log.
    _dir: TempDir,
}

impl KubeProxy {
    /// Starts it and returns at once: it has not synced then.
    ///
    /// # Errors
    /// When it has not been built, or cannot be started.
    pub fn start(options: &Options) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("kube-lane-kube-proxy-").tempdir()?;
        let address = Ipv4Addr::LOCALHOST.into();
        let ports = free_ports::<2>(options.netns.as_deref(), address)?;
        let [healthz, metrics] = ports.map(|port| SocketAddr::new(address, port));
        let config = dir.path().join("config.json");
        let program = program("kube-proxy")?;
        let mut configuration = configuration(options, healthz, metrics);
        if options.mode == Mode::Nftables && is_of_1_30(&program)? {
            configuration["featureGates"] = json!({NFTABLES_GATE: true});
        }
        fs::write(&config, serde_json::to_vec_pretty(&configuration)?)?;

        let mut command = Command::new(program);
        command.arg("--config").arg(config).args(["--hostname-override", &options.hostname]);
        let process = Process::spawn(command, &dir.path().join("kube-proxy.log"), options.netns.as_deref())?;
        Ok(Self { process, healthz, metrics, _dir: dir })
    }

    /// The process: its id, its end, the end of its log.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Where `/healthz` answers, in its namespace.
    pub fn healthz(&self) -> SocketAddr {
        self.healthz
    }

    /// Where `/metrics` and `/proxyMode` answer, in its namespace.
    pub fn metrics(&self) -> SocketAddr {
        self.metrics
    }

    /// Removes what kube-proxy has programmed in `netns`, in every mode.
    ///
    /// # Errors
    /// When it has not been built, or does not succeed.
    pub fn cleanup(netns: Option<&Path>) -> Result<()> {
        let program = program("kube-proxy")?;
        crate::process::in_netns(netns, || {
            let mut cleanup = Command::new(&program);
            cleanup.arg("--cleanup");
            if is_of_1_30(&program)? {
                cleanup.arg(format!("--feature-gates={NFTABLES_GATE}=true"));
            }
            let output = cleanup.output()?;
            let error = String::from_utf8_lossy(&output.stderr);
            anyhow::ensure!(output.status.success(), "kube-proxy --cleanup: {}\n{error}", output.status);
            Ok(())
        })
    }
}

/// What allows mode nftables in Kubernetes 1.30; later releases allow it anyway.
const NFTABLES_GATE: &str = "NFTablesProxyMode";

fn is_of_1_30(kube_proxy: &Path) -> Result<bool> {
    let version = Command::new(kube_proxy).arg("--version").output()?;
    Ok(version.stdout.starts_with(b"Kubernetes v1.30."))
}

/// What the configuration file of kube-proxy says.
pub(crate) fn configuration(options: &Options, healthz: SocketAddr, metrics: SocketAddr) -> Value {
    let mut config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": options.mode.to_string(),
        "clientConnection": {"kubeconfig": options.kubeconfig},
        "hostnameOverride": options.hostname,
        "clusterCIDR": options.cluster_cidr.clone().unwrap_or_default(),
        "healthzBindAddress": healthz,
        "metricsBindAddress": metrics,
        // Zero leaves the sysctls alone: most are the machine's, not the namespace's.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    });
    merge(&mut config, &options.config);
    config
}

/// Lays `over` on `base`: objects field by field, all else as a whole; null changes nothing.
pub(crate) fn merge(base: &mut Value, over: &Value) {
    match (base, over) {
        (_, Value::Null) => {}
        (Value::Object(base), Value::Object(over)) => {
            for (name, value) in over {
                merge(base.entry(name).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over.clone(),
    }
}
