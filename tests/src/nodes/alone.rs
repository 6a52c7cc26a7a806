//! One node whose kubelet knows no API server: it runs the pods of its manifests folder, and nothing else.
//!
//! Owns the node and what it leaves behind. Installs no proxy: the tests do that as users do.

use std::path::PathBuf;

use anyhow::{Context, Result};
use kube_lane_lab::{Host, Lab};
use serde_json::Value;

use super::machine::Machine;
use super::{Folder, adopt, archives, keep_node_logs, kubelet, start_node, sweep};

/// A node without a cluster.
pub struct LoneNode {
    // Dropped in this order: the node before its network, the folder of its disk last.
    machine: Machine,
    lab: Lab,
    folder: Folder,
}

impl LoneNode {
    /// Starts containerd and kubelet on it.
    ///
    /// # Errors
    /// When a program is missing or does not come up; the message names the folder of the logs.
    pub fn start() -> Result<Self> {
        sweep();
        let lab = Lab::builder().bridge(true).build()?;
        let folder = Folder::new(&lab)?;
        let machine = Machine::new(lab.node(0), folder.path())?;
        let mut this = Self { machine, lab, folder };
        this.start_programs().with_context(|| format!("logs: {}", this.keep_logs().display()))?;
        Ok(this)
    }

    fn start_programs(&mut self) -> Result<()> {
        let archives = archives::basic(self.folder.path())?;
        start_node(&mut self.machine, self.lab.node(0), &archives, None)
    }

    /// The node as a machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Its network, and a host outside.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The pod of this name, as kubelet reports it. To the name in the manifest, kubelet adds that of the node.
    ///
    /// # Errors
    /// When kubelet does not answer, or has no such pod.
    pub fn pod(&self, name: &str) -> Result<Value> {
        let url = format!("http://127.0.0.1:{}/pods", kubelet::READ_ONLY_PORT);
        let list = self.machine.run(&["curl", "--silent", "--show-error", "--fail", &url])?;
        let mut list: Value = serde_json::from_str(&list).context("kubelet's list of pods")?;
        let name = format!("{name}-{}", self.machine.name());
        let items = list["items"].as_array_mut().map(std::mem::take).unwrap_or_default();
        let pod = items.into_iter().find(|pod| pod["metadata"]["name"] == *name);
        pod.with_context(|| format!("kubelet has no pod {name}"))
    }

    /// A running pod as a host of the lab, to dial from.
    ///
    /// # Errors
    /// When it has no container that runs.
    pub fn host_of(&self, pod: &Value) -> Result<Host> {
        adopt(self.lab.node(0), &self.machine, pod)
    }

    /// Keeps the logs of all programs and pods beyond the end of the node, and says where they are.
    pub fn keep_logs(&mut self) -> PathBuf {
        keep_node_logs(&self.machine);
        self.folder.keep()
    }
}
