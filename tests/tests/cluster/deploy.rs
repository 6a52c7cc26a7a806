//! `deploy/`: applied as users apply it, and run as the DaemonSet would run it: its arguments, its volumes, its account's
//! token, its capabilities, its probes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::authorization::v1::{SelfSubjectRulesReview, SelfSubjectRulesReviewSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodSpec, Secret, Service};
use kube::Api;
use kube::api::{ListParams, PostParams};
use kube_lane_lab::{Host, Lab, Proto};
use kube_lane_tests::agent::Agent;
use kube_lane_tests::cluster::Cluster;
use kube_lane_tests::controlplane::client;
use kube_lane_tests::objects::{Endpoint, Port, node, service, slices};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::container::{Kubelet, end, first_process, probes_succeed};
use crate::wait::{LIMIT, answered, logged, until};

const NAMESPACE: &str = "kube-system";
const NAME: &str = "kube-lane";

/// The ConfigMap with an address of the API server.
const ENDPOINT: &str = "kubernetes-services-endpoint";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// The folders of manifests that a user applies.
#[derive(Clone, Copy, PartialEq)]
enum Overlay {
    Nftables,
    Ebpf,
    Uninstall,
}

/// Applies `deploy/` or one of its overlays, strictly: a field that the API does not know is an error.
fn apply(cluster: &Cluster, overlay: Overlay) -> String {
    let folder = match overlay {
        Overlay::Nftables => folder(),
        Overlay::Ebpf => folder().join("ebpf"),
        Overlay::Uninstall => folder().join("uninstall"),
    };
    apply_with(cluster, "-k", &folder)
}

fn apply_with(cluster: &Cluster, flag: &str, path: &Path) -> String {
    // The server makes it a moment after its start.
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    until(|| cluster.get(&namespace).map(drop).map_err(|error| error.to_string()));
    let path = path.to_str().unwrap();
    cluster.kubectl(&["apply", "--server-side", "--validate=strict", flag, path]).unwrap()
}

fn daemon_set(cluster: &Cluster, name: &'static str) -> DaemonSet {
    let get =
        move |client| async move { Ok(Api::<DaemonSet>::namespaced(client, NAMESPACE).get(name).await?) };
    cluster.call(get).unwrap()
}

/// The pods of a DaemonSet.
fn pod_spec(cluster: &Cluster, name: &'static str) -> PodSpec {
    daemon_set(cluster, name).spec.unwrap().template.spec.unwrap()
}

fn config_map(cluster: &Cluster, name: &'static str) -> Option<BTreeMap<String, String>> {
    let get =
        move |client| async move { Ok(Api::<ConfigMap>::namespaced(client, NAMESPACE).get_opt(name).await?) };
    cluster.call(get).unwrap().map(|config_map| config_map.data.unwrap())
}

/// A kubelet with what the API server has for the pods of `deploy/` on this node.
fn kubelet(cluster: &Cluster, node: &Host) -> Kubelet {
    let mut kubelet = Kubelet::new(node);
    for name in [NAME, "kube-proxy", ENDPOINT] {
        if let Some(data) = config_map(cluster, name) {
            kubelet.config_map(name, data);
        }
    }
    let kubernetes = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kubernetes", "namespace": "default"}});
    kubelet.service_environment(cluster.get(&kubernetes).unwrap()["spec"]["clusterIP"].as_str().unwrap());
    let kubeconfig = cluster.kubeconfig_for_service_account(NAMESPACE, NAME).unwrap();
    let kubeconfig: Value = serde_json::from_slice(&fs::read(kubeconfig).unwrap()).unwrap();
    let authority = kubeconfig["clusters"][0]["cluster"]["certificate-authority"].as_str().unwrap();
    let token = kubeconfig["users"][0]["user"]["token"].as_str().unwrap();
    kubelet.write("account", "token", token.as_bytes());
    kubelet.write("account", "ca.crt", &fs::read(authority).unwrap());
    kubelet.write("account", "namespace", NAMESPACE.as_bytes());
    kubelet
}

/// The objects of kubeadm's add-on kube-proxy that matter here: its ConfigMap, with this API server's address.
fn install_kubeadms_config_map(cluster: &Cluster) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/kubeadm/kube-proxy.yaml");
    let text = fs::read_to_string(file).unwrap();
    let here = text.replace("192.0.2.1:6443", &cluster.control_plane().address().to_string());
    assert_ne!(here, text);
    let objects: Vec<Value> = serde_saphyr::from_multiple(&here).unwrap();
    let config_map = objects.iter().find(|object| object["kind"] == "ConfigMap").unwrap();
    cluster.apply(config_map).unwrap();
}

/// A field of `/proc/<id>/status` of a container's first process.
fn status(agent: &mut Agent, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", first_process(agent))).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap().trim_start_matches(':').trim().to_owned()
}

/// On kubeadm: its ConfigMap tells the API server's address and the pods' range.
#[test]
fn the_daemon_set_serves_as_it_is_written() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    install_kubeadms_config_map(&cluster);
    // NET_ADMIN is capability 12.
    let complaints = serves_as_it_is_written(&cluster, Overlay::Nftables, 1 << 12);
    assert!(complaints.is_empty(), "{complaints:#?}");
}

/// On a cluster that never had kube-proxy: the user names the API server.
#[test]
fn the_daemon_set_of_mode_ebpf_serves_as_it_is_written() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    apply(&cluster, Overlay::Ebpf);
    let address = cluster.control_plane().address();
    let host = format!("--from-literal=KUBERNETES_SERVICE_HOST={}", address.ip());
    let port = format!("--from-literal=KUBERNETES_SERVICE_PORT={}", address.port());
    cluster.kubectl(&["--namespace", NAMESPACE, "create", "configmap", ENDPOINT, &host, &port]).unwrap();
    // PERFMON and BPF are 38 and 39.
    let complaints = serves_as_it_is_written(&cluster, Overlay::Ebpf, 1 << 12 | 1 << 38 | 1 << 39);
    // No ConfigMap knows the pods' range.
    assert!(complaints.iter().all(|line| line.contains("clusterCIDR")), "{complaints:#?}");
    assert_eq!(complaints.len(), 1, "{complaints:#?}");
}

/// The agent's warnings and errors.
fn serves_as_it_is_written(cluster: &Cluster, overlay: Overlay, capabilities: u64) -> Vec<String> {
    let applied = apply(cluster, overlay);
    for object in [
        "serviceaccount/kube-lane",
        "clusterrole.rbac.authorization.k8s.io/kube-lane",
        "clusterrolebinding.rbac.authorization.k8s.io/kube-lane",
        "configmap/kube-lane",
        "daemonset.apps/kube-lane",
    ] {
        assert!(applied.contains(object), "no {object} in\n{applied}");
    }
    makes_pods(cluster, NAME);

    let node0 = cluster.lab().node(0);
    let (server, dialler) = (node0.add_pod("server").unwrap(), node0.add_pod("client").unwrap());
    let _echo = server.serve(Proto::Tcp, 8080).unwrap();
    let ports = [Port::new("TCP", 80, 8080).node_port(30080)];
    cluster.apply(&node("node0", &[node0.v4(), node0.v6()])).unwrap();
    cluster.apply(&service("echo", &["10.96.1.1".parse().unwrap()], &ports)).unwrap();
    for slice in slices("echo", &ports, &[Endpoint::ready(server.v4(), "node0")]) {
        cluster.apply(&slice).unwrap();
    }

    let kubelet = kubelet(cluster, node0);
    let pod = pod_spec(cluster, NAME);
    let container = &pod.containers[0];
    // The command that docs/operations.md gives.
    let check = ["check", "--config=/etc/kube-lane/config.conf"];
    let mut check = kubelet.start(&pod, container, Some(&check), &cluster.log(node0));
    assert!(check.process().wait_timeout(LIMIT).unwrap().unwrap().success(), "{}", check.log());
    let mut agent = kubelet.start(&pod, container, None, &cluster.log(node0));
    agent.wait_synced(LIMIT).unwrap();
    answered(&dialler, Proto::Tcp, "10.96.1.1:80".parse().unwrap(), Some("server"));
    answered(cluster.lab().outside(), Proto::Tcp, (node0.v4(), 30080).into(), Some("server"));
    probes_succeed(&kubelet, container, &mut agent);

    // It was as confined as the test says.
    let confined = format!("{capabilities:016x}");
    for (field, value) in
        [("CapEff", &*confined), ("CapPrm", &confined), ("CapBnd", &confined), ("NoNewPrivs", "1")]
    {
        assert_eq!(status(&mut agent, field), value, "{field}");
    }
    let mode = if overlay == Overlay::Ebpf { "ebpf" } else { "nftables" };
    assert_eq!(agent.get(10249, "/proxyMode").unwrap().1, mode);
    let (_, told) = agent.status(&["default/echo"]).unwrap();
    let by = format!("ClusterIP 10.96.1.1:80{}", if overlay == Overlay::Ebpf { " [socket" } else { "" });
    assert!(told.contains(&by), "{told}");
    let log = agent.log();
    let complaints = log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR "));
    let complaints = complaints.map(str::to_owned).collect();
    uninstalls(cluster, &kubelet, node0, agent);
    complaints
}

/// A DaemonSet's template is checked in full only when a pod is made of it.
fn makes_pods(cluster: &Cluster, name: &'static str) {
    let template = daemon_set(cluster, name).spec.unwrap().template;
    let mut pod = Pod { metadata: template.metadata.unwrap(), spec: template.spec, status: None };
    pod.metadata.name = Some(name.into());
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let pod = cluster.call(move |client| async move {
        Ok(Api::<Pod>::namespaced(client, NAMESPACE).create(&dry_run, &pod).await?)
    });
    assert_eq!(pod.unwrap().spec.unwrap().priority, Some(2_000_001_000));
}

/// `deploy/uninstall` refuses beside the agent, leaves nothing behind it, and then waits.
fn uninstalls(cluster: &Cluster, kubelet: &Kubelet, node: &Host, agent: Agent) {
    const UNINSTALL: &str = "kube-lane-uninstall";
    apply(cluster, Overlay::Uninstall);
    makes_pods(cluster, UNINSTALL);
    let pod = pod_spec(cluster, UNINSTALL);
    let cleanup = &pod.init_containers.as_ref().unwrap()[0];
    let clean_up = || {
        let mut cleanup = kubelet.start(&pod, cleanup, None, &cluster.log(node));
        (cleanup.process().wait_timeout(LIMIT).unwrap().unwrap().success(), cleanup.log())
    };
    let (success, log) = clean_up();
    assert!(!success && log.contains("another kube-lane runs on this node"), "{log}");
    end(agent);
    let (success, log) = clean_up();
    assert!(success, "{log}");
    let ruleset = node.run(|| Command::new("nft").args(["list", "ruleset"]).output()).unwrap().unwrap();
    assert_eq!(String::from_utf8(ruleset.stdout).unwrap(), "");
    assert!(fs::read_dir(node.bpf_root()).is_ok_and(|mut pins| pins.next().is_none()), "{log}");

    let mut done = kubelet.start(&pod, &pod.containers[0], None, &cluster.log(node));
    logged(&done, &["waiting for SIGTERM"]);
    assert!(done.process().try_wait().unwrap().is_none(), "{}", done.log());
    kill(Pid::from_raw(first_process(&mut done)), Signal::SIGTERM).unwrap();
    assert!(done.process().wait_timeout(LIMIT).unwrap().unwrap().success(), "{}", done.log());
}

/// What an account may do, one line a permission.
async fn permissions(kubeconfig: PathBuf) -> Result<BTreeSet<String>> {
    let review = SelfSubjectRulesReview {
        spec: SelfSubjectRulesReviewSpec { namespace: Some(NAMESPACE.into()) },
        ..SelfSubjectRulesReview::default()
    };
    let reviews: Api<SelfSubjectRulesReview> = Api::all(client(&kubeconfig).await?);
    let status = reviews.create(&PostParams::default(), &review).await?.status.context("no status")?;
    assert!(!status.incomplete, "{:?}", status.evaluation_error);
    let mut permissions = BTreeSet::new();
    for rule in status.resource_rules {
        for verb in rule.verbs {
            for resource in rule.resources.iter().flatten() {
                let groups = rule.api_groups.iter().flatten();
                permissions.extend(groups.map(|group| format!("{verb} {resource} of {group:?}")));
            }
        }
    }
    for rule in status.non_resource_rules {
        permissions.insert(format!("{:?} {:?}", rule.verbs, rule.non_resource_urls));
    }
    Ok(permissions)
}

#[test]
fn the_account_may_watch_what_it_needs_and_nothing_else() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    // The single file and the folder are the same; `-f` passes over what is for `-k` alone.
    let by_file = apply_with(&cluster, "-f", &folder());
    let mut by_folder: Vec<_> = apply(&cluster, Overlay::Nftables).lines().map(str::to_owned).collect();
    let mut by_file: Vec<_> = by_file.lines().map(str::to_owned).collect();
    by_folder.sort();
    by_file.sort();
    assert_eq!(by_folder, by_file);
    let nobody = json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "nobody", "namespace": NAMESPACE},
    });
    cluster.apply(&nobody).unwrap();

    // What every account may do is no doing of ours.
    let [ours, nobodys] = [NAME, "nobody"].map(|name| {
        let kubeconfig = cluster.kubeconfig_for_service_account(NAMESPACE, name).unwrap();
        let mut permissions_of = BTreeSet::new();
        // Grants take effect a moment after they are made.
        until(|| {
            let kubeconfig = kubeconfig.clone();
            permissions_of = cluster.call(|_| permissions(kubeconfig)).unwrap();
            let granted = name == "nobody" || permissions_of.iter().any(|line| line.contains("services"));
            granted.then_some(()).ok_or_else(|| format!("{permissions_of:?}"))
        });
        permissions_of
    });
    let ours: Vec<_> = ours.difference(&nobodys).map(String::as_str).collect();
    assert_eq!(
        ours,
        [
            "create events of \"events.k8s.io\"",
            "list endpointslices of \"discovery.k8s.io\"",
            "list nodes of \"\"",
            "list servicecidrs of \"networking.k8s.io\"",
            "list services of \"\"",
            "patch events of \"events.k8s.io\"",
            "watch endpointslices of \"discovery.k8s.io\"",
            "watch nodes of \"\"",
            "watch servicecidrs of \"networking.k8s.io\"",
            "watch services of \"\"",
        ]
    );

    // The words of the review, put to the test.
    let kubeconfig = cluster.kubeconfig_for_service_account(NAMESPACE, NAME).unwrap();
    let refused = cluster.call(|_| async move {
        let client = client(&kubeconfig).await?;
        let secrets = Api::<Secret>::namespaced(client.clone(), NAMESPACE).list(&ListParams::default()).await;
        let services: Api<Service> = Api::default_namespaced(client);
        let deleted = services.delete("kubernetes", &Default::default()).await;
        Ok([secrets.err(), deleted.err()].map(|error| error.map(|error| error.to_string())))
    });
    for error in refused.unwrap() {
        assert!(error.as_ref().is_some_and(|error| error.contains("forbidden")), "{error:?}");
    }
}

#[test]
fn a_missing_permission_is_named_and_waited_for() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    apply(&cluster, Overlay::Nftables);
    cluster.kubectl(&["delete", "clusterrolebinding", NAME]).unwrap();
    let kubeconfig = cluster.kubeconfig_for_service_account(NAMESPACE, NAME).unwrap();
    let arguments = ["--kubeconfig", kubeconfig.to_str().unwrap()];
    let mut agent = cluster.start_agent(cluster.lab().node(0), &arguments).unwrap();

    let account = format!("system:serviceaccount:{NAMESPACE}:{NAME}");
    logged(&agent, &["the API server cannot be watched", "forbidden", &account, "deploy/"]);
    for optional in ["nodes", "servicecidrs"] {
        logged(&agent, &["going on without", optional, "forbidden"]);
    }
    assert_eq!(agent.healthz().unwrap().0, 503);

    apply(&cluster, Overlay::Nftables);
    agent.wait_synced(LIMIT).unwrap();
    logged(&agent, &["the API server is watched again"]);
}
