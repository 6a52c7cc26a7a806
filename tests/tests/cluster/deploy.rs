//! `deploy/`: applied as users apply it, and run as the DaemonSet would run it: its arguments, its ConfigMap, its
//! account's token, its capabilities.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::authorization::v1::{SelfSubjectRulesReview, SelfSubjectRulesReviewSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret, Service};
use kube::Api;
use kube::api::{ListParams, PostParams};
use kube_lane_lab::{Host, Lab, Proto};
use kube_lane_tests::agent::{self, Agent};
use kube_lane_tests::cluster::Cluster;
use kube_lane_tests::controlplane::client;
use kube_lane_tests::objects::{Endpoint, Port, node, service, slices};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::wait::{LIMIT, answered, logged, until};

const NAMESPACE: &str = "kube-system";
const NAME: &str = "kube-lane";

/// A container as a runtime makes it: `$1` is seen at `$2`, `$3` says whether it is read-only (`ro`) there, and so on for
/// each volume; the root is read-only, the capabilities are those of the next argument alone; the rest is the command,
/// environment first.
const CONTAINER: &str = r#"
set -eu
mount --rbind /run /mnt
mount -t tmpfs none /run
mount -t tmpfs none /var/lib
while [ "${1#/}" != "$1" ]; do
    mkdir -p "$2"
    case "$1" in
    /run/*) mount --bind "/mnt/${1#/run/}" "$2" ;;
    *) mount --bind "$1" "$2" ;;
    esac
    mount -o "remount,bind,$3" "$2"
    shift 3
done
mount -o remount,ro /var/lib
mount -o remount,ro /run
mount -o remount,bind,ro /
capabilities=$1
shift
exec setpriv --no-new-privs --reuid 0 --clear-groups --bounding-set "$capabilities" --inh-caps "$capabilities" \
    env -i "$@"
"#;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// The folders of manifests that a user applies.
#[derive(Clone, Copy, PartialEq)]
enum Overlay {
    Nftables,
    Ebpf,
    Cleanup,
}

/// Applies `deploy/` or one of its overlays, strictly: a field that the API does not know is an error.
fn apply(cluster: &Cluster, overlay: Overlay) -> String {
    // The server makes it a moment after its start.
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    until(|| cluster.get(&namespace).map(drop).map_err(|error| error.to_string()));
    let folder = match overlay {
        Overlay::Nftables => folder(),
        Overlay::Ebpf => folder().join("ebpf"),
        Overlay::Cleanup => folder().join("cleanup"),
    };
    let folder = folder.to_str().unwrap();
    cluster.kubectl(&["apply", "--server-side", "--validate=strict", "-k", folder]).unwrap()
}

fn daemon_set(cluster: &Cluster, name: &'static str) -> DaemonSet {
    cluster
        .call(
            move |client| async move { Ok(Api::<DaemonSet>::namespaced(client, NAMESPACE).get(name).await?) },
        )
        .unwrap()
}

fn config_map(cluster: &Cluster, name: &'static str) -> ConfigMap {
    cluster
        .call(
            move |client| async move { Ok(Api::<ConfigMap>::namespaced(client, NAMESPACE).get(name).await?) },
        )
        .unwrap()
}

/// The container of kube-lane in a DaemonSet's pods: the first that runs.
fn container(cluster: &Cluster, name: &'static str) -> Container {
    let pod = daemon_set(cluster, name).spec.unwrap().template.spec.unwrap();
    pod.init_containers.into_iter().flatten().chain(pod.containers).next().unwrap()
}

/// A DaemonSet's container on a node of the lab, with what the kubelet would put into it. `arguments`: in place of its own.
fn run_container(
    cluster: &Cluster,
    container: Container,
    arguments: Option<&[&str]>,
    node: &Host,
    volumes: &TempDir,
) -> Agent {
    let path = |name: &str| volumes.path().join(name);
    let write = |dir: &str, name: &str, content: &[u8]| {
        fs::create_dir_all(path(dir)).unwrap();
        fs::write(path(dir).join(name), content).unwrap();
    };
    for (name, content) in config_map(cluster, NAME).data.unwrap() {
        write("config", &name, content.as_bytes());
    }
    let kubeconfig = cluster.kubeconfig_for_service_account(NAMESPACE, NAME).unwrap();
    let kubeconfig: Value = serde_json::from_slice(&fs::read(kubeconfig).unwrap()).unwrap();
    let authority = kubeconfig["clusters"][0]["cluster"]["certificate-authority"].as_str().unwrap();
    write("account", "token", kubeconfig["users"][0]["user"]["token"].as_str().unwrap().as_bytes());
    write("account", "ca.crt", &fs::read(authority).unwrap());
    write("account", "namespace", NAMESPACE.as_bytes());

    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let mut words = Vec::new();
    for mount in container.volume_mounts.unwrap() {
        let volume = match (mount.name.as_str(), mount.mount_path.as_str()) {
            ("config", _) => path("config"),
            // What a node's root would be.
            ("cgroup", _) => node.cgroup().to_owned(),
            ("bpf", "/sys/fs/bpf") => {
                fs::create_dir_all(node.bpf_root()).unwrap();
                node.bpf_root().to_owned()
            }
            // The node's sysctls need no second place here: nothing makes those at their own place read-only.
            ("sysctls", "/host/proc/sys/net") => continue,
            other => panic!("a mount that this test does not know: {other:?}"),
        };
        let mode = if mount.read_only == Some(true) { "ro" } else { "rw" };
        words.extend([text(&volume), mount.mount_path, mode.to_owned()]);
    }
    words.extend([
        text(&path("account")),
        "/var/run/secrets/kubernetes.io/serviceaccount".into(),
        "ro".into(),
    ]);

    let capabilities = container.security_context.unwrap().capabilities.unwrap();
    assert_eq!(capabilities.drop.unwrap(), ["ALL"]);
    let added =
        capabilities.add.unwrap().into_iter().map(|capability| format!("+{}", capability.to_lowercase()));
    words.push(std::iter::once("-all".to_owned()).chain(added).collect::<Vec<_>>().join(","));

    let environment = container.env_from.into_iter().flatten().filter_map(|from| from.config_map_ref);
    for from in environment {
        assert_eq!(from.name, "kubernetes-services-endpoint");
        for (name, value) in config_map(cluster, "kubernetes-services-endpoint").data.unwrap() {
            words.push(format!("{name}={value}"));
        }
    }
    words.push(text(&agent::binary().unwrap()));
    match arguments {
        Some(arguments) => words.extend(arguments.iter().map(|argument| (*argument).to_owned())),
        None => words.extend(
            container.args.unwrap().iter().map(|argument| argument.replace("$(NODE_NAME)", node.name())),
        ),
    }

    let mut arguments = vec!["--mount", "--propagation", "private", "sh", "-c", CONTAINER, "sh"];
    arguments.extend(words.iter().map(String::as_str));
    Agent::start_binary(Path::new("unshare"), node, &arguments, &cluster.log(node)).unwrap()
}

/// A field of `/proc/<id>/status`.
fn status(agent: &mut Agent, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.process().id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap().trim_start_matches(':').trim().to_owned()
}

#[test]
fn the_daemon_set_serves_as_it_is_written() {
    // NET_ADMIN is capability 12.
    serves_as_it_is_written(Overlay::Nftables, 1 << 12);
}

#[test]
fn the_daemon_set_of_mode_ebpf_serves_as_it_is_written() {
    // And PERFMON and BPF are 38 and 39.
    serves_as_it_is_written(Overlay::Ebpf, 1 << 12 | 1 << 38 | 1 << 39);
}

fn serves_as_it_is_written(overlay: Overlay, capabilities: u64) {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    let applied = apply(&cluster, overlay);
    for object in [
        "serviceaccount/kube-lane",
        "clusterrole.rbac.authorization.k8s.io/kube-lane",
        "clusterrolebinding.rbac.authorization.k8s.io/kube-lane",
        "configmap/kube-lane",
        "daemonset.apps/kube-lane",
    ] {
        assert!(applied.contains(object), "no {object} in\n{applied}");
    }
    assert_eq!(apply(&cluster, overlay).lines().count(), applied.lines().count());

    makes_pods(&cluster, NAME);

    let address = cluster.control_plane().address();
    cluster
        .kubectl(&[
            "--namespace",
            NAMESPACE,
            "create",
            "configmap",
            "kubernetes-services-endpoint",
            &format!("--from-literal=KUBERNETES_SERVICE_HOST={}", address.ip()),
            &format!("--from-literal=KUBERNETES_SERVICE_PORT={}", address.port()),
        ])
        .unwrap();

    let node0 = cluster.lab().node(0);
    let (server, dialler) = (node0.add_pod("server").unwrap(), node0.add_pod("client").unwrap());
    let _echo = server.serve(Proto::Tcp, 8080).unwrap();
    let ports = [Port::new("TCP", 80, 8080).node_port(30080)];
    cluster.apply(&node("node0", &[node0.v4(), node0.v6()])).unwrap();
    cluster.apply(&service("echo", &["10.96.1.1".parse().unwrap()], &ports)).unwrap();
    for slice in slices("echo", &ports, &[Endpoint::ready(server.v4(), "node0")]) {
        cluster.apply(&slice).unwrap();
    }

    let volumes = tempfile::tempdir().unwrap();
    let check = ["check", "--config=/var/lib/kube-lane/config.conf"];
    let mut check = run_container(&cluster, container(&cluster, NAME), Some(&check), node0, &volumes);
    assert!(check.process().wait_timeout(LIMIT).unwrap().unwrap().success(), "{}", check.log());
    let mut agent = run_container(&cluster, container(&cluster, NAME), None, node0, &volumes);
    agent.wait_synced(LIMIT).unwrap();
    answered(&dialler, Proto::Tcp, "10.96.1.1:80".parse().unwrap(), Some("server"));
    answered(cluster.lab().outside(), Proto::Tcp, (node0.v4(), 30080).into(), Some("server"));

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
    let complaints: Vec<_> =
        log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect();
    // The ConfigMap cannot know a cluster's range.
    assert!(complaints.iter().all(|line| line.contains("clusterCIDR")), "{complaints:#?}");
    cleans_up(&cluster, node0, agent);
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

/// `deploy/cleanup` refuses beside the agent, and leaves nothing behind it.
fn cleans_up(cluster: &Cluster, node: &Host, agent: Agent) {
    const CLEANUP: &str = "kube-lane-cleanup";
    apply(cluster, Overlay::Cleanup);
    makes_pods(cluster, CLEANUP);
    let volumes = tempfile::tempdir().unwrap();
    let clean_up = || {
        let mut cleanup = run_container(cluster, container(cluster, CLEANUP), None, node, &volumes);
        (cleanup.process().wait_timeout(LIMIT).unwrap().unwrap().success(), cleanup.log())
    };
    let (success, log) = clean_up();
    assert!(!success && log.contains("another kube-lane runs on this node"), "{log}");
    drop(agent);
    let (success, log) = clean_up();
    assert!(success, "{log}");
    let ruleset = node.run(|| Command::new("nft").args(["list", "ruleset"]).output()).unwrap().unwrap();
    assert_eq!(String::from_utf8(ruleset.stdout).unwrap(), "");
    assert!(fs::read_dir(node.bpf_root()).is_ok_and(|mut pins| pins.next().is_none()), "{log}");
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
    apply(&cluster, Overlay::Nftables);
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
