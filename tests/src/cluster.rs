//! A whole cluster: a lab, and on its outside host a real API server that every node reaches.
//!
//! Owns joining the two, and requests to the server from where it is. EndpointSlices, Nodes and Pods are the
//! caller's to make, as with any [`ControlPlane`]. Blocking, as the lab is: not for async callers.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube_lane_lab::{Host, Lab, topology};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::{self, Runtime};

use crate::agent::Agent;
use crate::controlplane::{ControlPlane, Options, client};
use crate::process::in_netns;

/// A lab with an API server.
pub struct Cluster {
    // Dropped in this order: connections before their server, the server before the namespace that it is in.
    requests: Requests,
    control_plane: ControlPlane,
    lab: Lab,
    logs: TempDir,
}

impl Cluster {
    /// Starts an API server in this lab.
    ///
    /// # Errors
    /// As [`ControlPlane::start_with`].
    pub fn start(lab: Lab) -> Result<Self> {
        Self::start_with(lab, Options::default())
    }

    /// The same with options; where it runs and listens is the lab's outside host in any case.
    ///
    /// # Errors
    /// As [`ControlPlane::start_with`].
    pub fn start_with(lab: Lab, options: Options) -> Result<Self> {
        let netns = netns(lab.outside());
        let runtime = runtime_in(&netns)?;
        let options = Options { bind_address: lab.outside().v4(), netns: Some(netns), ..options };
        let control_plane = runtime.block_on(ControlPlane::start_with(options))?;
        let requests = Requests::new(runtime, &control_plane)?;
        let logs = tempfile::Builder::new().prefix("kube-lane-agents-").tempdir()?;
        Ok(Self { requests, control_plane, lab, logs })
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The control plane: its address, its kubeconfigs.
    pub fn control_plane(&self) -> &ControlPlane {
        &self.control_plane
    }

    /// Makes a request with a client that may do anything, and waits for it.
    ///
    /// # Errors
    /// Those of the request.
    pub fn call<T, F>(&self, request: impl FnOnce(Client) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.requests.run(request(self.requests.client.clone()))
    }

    /// Creates an object or changes it to what is given (server-side apply); sets its status, where it has one.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.apply_all(std::slice::from_ref(object))
    }

    /// The same with several objects, all at once.
    ///
    /// # Errors
    /// When the API server refuses one of them.
    pub fn apply_all(&self, objects: &[Value]) -> Result<()> {
        let objects = objects.to_vec();
        self.call(|client| async move {
            try_join_all(objects.iter().map(|object| apply(client.clone(), object))).await?;
            Ok(())
        })
    }

    /// Deletes an object.
    ///
    /// # Errors
    /// When the API server refuses, or has no such object.
    pub fn delete(&self, object: &Value) -> Result<()> {
        let object = object.clone();
        self.call(|client| async move {
            let (api, name) = api(client, &object);
            api.delete(&name, &DeleteParams::default()).await?;
            Ok(())
        })
    }

    /// Reads an object of which `apiVersion`, `kind` and the name are given.
    ///
    /// # Errors
    /// When the API server refuses, or has no such object.
    pub fn get(&self, object: &Value) -> Result<Value> {
        let object = object.clone();
        self.call(|client| async move {
            let (api, name) = api(client, &object);
            Ok(serde_json::to_value(api.get(&name).await?)?)
        })
    }

    /// Runs `kubectl` with these arguments, as one who may do anything.
    ///
    /// # Errors
    /// When it cannot be run, or with what it says when it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.run(self.control_plane.kubectl()?.args(arguments))
    }

    /// Runs another client of the API server, which finds its kubeconfig in `KUBECONFIG`.
    ///
    /// # Errors
    /// As [`Self::kubectl`].
    pub fn run(&self, client: &mut Command) -> Result<String> {
        client.env("KUBECONFIG", self.control_plane.admin_kubeconfig());
        let netns = netns(self.lab.outside());
        let Output { status, stdout, stderr } = in_netns(Some(&netns), || Ok(client.output()?))?;
        let stderr = String::from_utf8_lossy(&stderr);
        ensure!(status.success(), "{client:?}: {status}\n{stderr}");
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    }

    /// A kubeconfig with a fresh token of a ServiceAccount that exists.
    ///
    /// # Errors
    /// When the API server refuses the token.
    pub fn kubeconfig_for_service_account(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let request = || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(self.control_plane.kubeconfig_for_service_account(namespace, name))
        };
        in_netns(Some(&netns(self.lab.outside())), request)
    }

    /// Ends the API server as an outage would.
    pub fn stop_apiserver(&mut self) {
        self.control_plane.stop_apiserver();
    }

    /// Starts the API server again at the same address and waits until it answers.
    ///
    /// # Errors
    /// As [`ControlPlane::start_with`].
    pub fn restart_apiserver(&mut self) -> Result<()> {
        self.requests.runtime()?.block_on(self.control_plane.restart_apiserver())
    }

    /// Starts the agent on a node with the flags that lead it to the API server, its name and the pods' ranges.
    /// `arguments` come last, and so win.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&self, node: &Host, arguments: &[&str]) -> Result<Agent> {
        let kubeconfig = self.control_plane.admin_kubeconfig();
        let cidrs = topology::cluster_cidrs().map(|cidr| cidr.to_string()).join(",");
        let mut all = vec!["--kubeconfig", kubeconfig.to_str().context("a path that is no text")?];
        all.extend(["--hostname-override", node.name(), "--cluster-cidr", &cidrs]);
        all.extend(arguments);
        Agent::start(node, &all, &self.log(node))
    }

    /// Where the log of a node's agents goes.
    pub fn log(&self, node: &Host) -> PathBuf {
        self.logs.path().join(format!("{}.log", node.name()))
    }
}

/// A client of the API server, and the threads that it connects from.
struct Requests {
    client: Client,
    runtime: Option<Runtime>,
}

impl Requests {
    fn new(runtime: Runtime, control_plane: &ControlPlane) -> Result<Self> {
        let kubeconfig = control_plane.admin_kubeconfig();
        let client = runtime.block_on(runtime.spawn(async move { client(&kubeconfig).await }))??;
        Ok(Self { client, runtime: Some(runtime) })
    }

    fn runtime(&self) -> Result<&Runtime> {
        self.runtime.as_ref().context("shut down")
    }

    fn run<T: Send + 'static>(&self, request: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let runtime = self.runtime()?;
        runtime.block_on(runtime.spawn(request))?
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A runtime whose threads are in a network namespace: what is spawned on it connects from there.
fn runtime_in(netns: &Path) -> Result<Runtime> {
    let netns = File::open(netns).with_context(|| format!("no network namespace {}", netns.display()))?;
    let enter = move || {
        // Where this fails, no request reaches the server, and the first one says so.
        let _ = setns(&netns, CloneFlags::CLONE_NEWNET);
    };
    Ok(runtime::Builder::new_multi_thread().worker_threads(1).on_thread_start(enter).enable_all().build()?)
}

fn netns(host: &Host) -> PathBuf {
    Path::new("/run/netns").join(host.netns())
}

/// Creates an object or changes it to what is given; sets its status, where it has one.
pub(crate) async fn apply(client: Client, object: &Value) -> Result<()> {
    let (api, name) = api(client, object);
    let refused = || format!("cannot apply {object}");
    // Server-side apply allows one address of each type in a Node's status; a merge takes what kubelet writes.
    let mut desired = object.clone();
    let status = desired.as_object_mut().and_then(|fields| fields.remove("status"));
    let manager = PatchParams::apply("kube-lane-tests").force();
    api.patch(&name, &manager, &Patch::Apply(&desired)).await.with_context(refused)?;
    if let Some(status) = status {
        let status = Patch::Merge(json!({"status": status}));
        api.patch_status(&name, &PatchParams::default(), &status).await.with_context(refused)?;
    }
    Ok(())
}

/// Where an object lives in the API, and its name.
pub(crate) fn api(client: Client, object: &Value) -> (Api<DynamicObject>, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let version = text(&object["apiVersion"]);
    let (group, version) = version.split_once('/').unwrap_or(("", &version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &text(&object["kind"])));
    let api = match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client, namespace, &resource),
        None => Api::all_with(client, &resource),
    };
    (api, text(&object["metadata"]["name"]))
}
