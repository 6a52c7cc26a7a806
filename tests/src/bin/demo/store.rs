//! Where the demo puts its objects: a manifest folder, or a real API server on the host outside.
//!
//! Owns the writing and the moment it began. Never knows what the objects are for.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube_lane_lab::{Lab, topology};
use kube_lane_tests::controlplane::{ControlPlane, Options};
use kube_lane_tests::objects::Folder;
use kube_lane_tests::process::in_netns;
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

/// Where the agents get their objects from.
#[derive(Debug)]
pub(crate) enum Store {
    Folder(Folder),
    Api(Box<ApiServer>),
}

/// A write, and when it was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    /// When it began.
    pub(crate) begun: Instant,
    /// When the last object was in the store: for an API server, when it had answered.
    pub(crate) ended: Instant,
}

/// A control plane in the outside host's namespace.
#[derive(Debug)]
pub(crate) struct ApiServer {
    control_plane: ControlPlane,
    netns: PathBuf,
    runtime: Runtime,
    client: Connection,
    /// `kind/name` of what has been created.
    created: BTreeSet<String>,
}

/// [`Client`], which says nothing of itself.
struct Connection(Client);

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection")
    }
}

impl Store {
    /// What makes an agent read this store.
    pub(crate) fn agent_arguments(&self) -> Vec<String> {
        match self {
            Self::Folder(folder) => vec!["--manifests".into(), folder.arg()],
            Self::Api(api) => vec!["--kubeconfig".into(), api.kubeconfig()],
        }
    }

    /// Writes objects, in place of what they were. A folder has them in one file of this name, which a rename
    /// puts in place.
    pub(crate) fn put(&mut self, name: &str, objects: &[Value]) -> Result<Written> {
        match self {
            Self::Folder(folder) => {
                let begun = Instant::now();
                folder.put(name, objects)?;
                Ok(Written { begun, ended: Instant::now() })
            }
            Self::Api(api) => api.put(objects),
        }
    }
}

impl ApiServer {
    /// Starts etcd and kube-apiserver and waits until they answer.
    pub(crate) fn start(lab: &Lab) -> Result<Self> {
        let netns = Path::new("/run/netns").join(lab.outside().netns());
        let options = Options {
            bind_address: lab.outside().v4(),
            netns: Some(netns.clone()),
            service_cidrs: topology::service_cidrs().map(|cidr| cidr.to_string()).into(),
            ..Options::default()
        };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let control_plane = runtime.block_on(ControlPlane::start_with(options))?;
        let client = Connection(runtime.block_on(control_plane.client())?);
        Ok(Self { control_plane, netns, runtime, client, created: BTreeSet::new() })
    }

    /// The path of a kubeconfig that may do anything.
    pub(crate) fn kubeconfig(&self) -> String {
        self.control_plane.admin_kubeconfig().to_string_lossy().into_owned()
    }

    /// The path of `kubectl`.
    pub(crate) fn kubectl_program(&self) -> Result<String> {
        Ok(self.control_plane.kubectl()?.get_program().to_string_lossy().into_owned())
    }

    /// What `kubectl` prints.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut kubectl = self.control_plane.kubectl()?;
        in_netns(Some(&self.netns), || {
            let output = kubectl.args(arguments).output().context("cannot start kubectl")?;
            let error = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "kubectl {}: {error}", arguments.join(" "));
            Ok(String::from_utf8(output.stdout)?)
        })
    }

    /// Creates what is new and patches what is not, all at once, from the outside host.
    fn put(&mut self, objects: &[Value]) -> Result<Written> {
        let mut requests = Vec::new();
        for object in objects {
            let object: DynamicObject = serde_json::from_value(object.clone())?;
            let types = object.types.as_ref().context("an object without apiVersion and kind")?;
            let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(types)?);
            let name = object.metadata.name.clone().context("an object without a name")?;
            let api: Api<DynamicObject> = match object.metadata.namespace.as_deref() {
                Some(namespace) => Api::namespaced_with(self.client.0.clone(), namespace, &resource),
                None => Api::all_with(self.client.0.clone(), &resource),
            };
            let is_new = self.created.insert(format!("{}/{name}", types.kind));
            requests.push(async move {
                if is_new {
                    api.create(&PostParams::default(), &object).await
                } else {
                    api.patch(&name, &PatchParams::default(), &Patch::Merge(&object)).await
                }
            });
        }
        in_netns(Some(&self.netns), || {
            let begun = Instant::now();
            self.runtime.block_on(try_join_all(requests))?;
            Ok(Written { begun, ended: Instant::now() })
        })
    }
}
