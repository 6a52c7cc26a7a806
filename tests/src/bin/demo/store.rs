//! Where the demo's objects are, and the agents that read them there: a manifest folder, or a real API server on the
//! outside host.
//!
//! Owns the lab, the writing and the moment it began. Never knows what the objects are for.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use kube_lane_lab::{Host, Lab, topology};
use kube_lane_tests::agent::{self, Agent};
use kube_lane_tests::cluster::Cluster;
use kube_lane_tests::objects::Folder;
use serde_json::Value;
use tempfile::TempDir;

/// A lab and what its agents read.
pub(crate) enum Store {
    Folder { lab: Box<Lab>, folder: Folder, logs: TempDir },
    Api(Box<Cluster>),
}

/// A write, and when it was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    /// When it began.
    pub(crate) begun: Instant,
    /// When the last object was in the store: for an API server, when it had answered.
    pub(crate) ended: Instant,
}

impl Store {
    /// An empty folder.
    pub(crate) fn folder(lab: Lab) -> Result<Self> {
        let logs = tempfile::Builder::new().prefix("kube-lane-agents-").tempdir()?;
        Ok(Self::Folder { lab: Box::new(lab), folder: Folder::new()?, logs })
    }

    /// An API server, which takes some seconds to start.
    pub(crate) fn api(lab: Lab) -> Result<Self> {
        Ok(Self::Api(Box::new(Cluster::start(lab)?)))
    }

    pub(crate) fn lab(&self) -> &Lab {
        match self {
            Self::Folder { lab, .. } => lab,
            Self::Api(cluster) => cluster.lab(),
        }
    }

    /// Starts an agent on a node.
    pub(crate) fn start_agent(&self, node: &Host, ebpf: bool) -> Result<Agent> {
        let places = agent::places(node);
        let mut arguments = vec![];
        if ebpf {
            arguments.extend(["--proxy-mode", "ebpf"]);
            arguments.extend(places.iter().map(String::as_str));
        }
        match self {
            Self::Folder { folder, logs, .. } => {
                let cidrs = topology::cluster_cidrs().map(|cidr| cidr.to_string()).join(",");
                let folder = folder.arg();
                arguments.extend(["--manifests", &folder, "--hostname-override", node.name()]);
                arguments.extend(["--cluster-cidr", &cidrs]);
                Agent::start(node, &arguments, &log(logs.path(), node))
            }
            Self::Api(cluster) => cluster.start_agent(node, &arguments),
        }
    }

    /// The log of a node's agent.
    pub(crate) fn log(&self, node: &Host) -> String {
        let path = match self {
            Self::Folder { logs, .. } => log(logs.path(), node),
            Self::Api(cluster) => cluster.log(node),
        };
        path.display().to_string()
    }

    /// Writes objects, in place of what they were. A folder has them in one file of this name, which a rename puts in
    /// place.
    pub(crate) fn put(&self, name: &str, objects: &[Value]) -> Result<Written> {
        let begun = Instant::now();
        match self {
            Self::Folder { folder, .. } => folder.put(name, objects)?,
            Self::Api(cluster) => cluster.apply_all(objects)?,
        }
        Ok(Written { begun, ended: Instant::now() })
    }
}

fn log(dir: &Path, node: &Host) -> PathBuf {
    dir.join(format!("{}.log", node.name()))
}
