//! `deploy/chart`: the same objects as kustomize renders, what its values change, which values it refuses, and Helm's
//! life of a release on a real API server.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kube_lane_lab::Lab;
use kube_lane_tests::cluster::Cluster;
use kube_lane_tests::controlplane::program;
use serde_json::{Value, json};

const NAMESPACE: &str = "kube-system";

/// Kind and name of an object, and the object.
type Objects = BTreeMap<(String, String), Value>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn helm() -> Command {
    Command::new(root().join("target/tools/bin/helm"))
}

/// Renders the chart with these values.
fn template(values: &[&str]) -> Output {
    let mut helm = helm();
    helm.args(["template", "kube-lane", "--namespace", NAMESPACE]).arg(root().join("deploy/chart"));
    helm.args(values.iter().flat_map(|value| ["--set-json", value])).output().unwrap()
}

fn rendered(values: &[&str]) -> Objects {
    objects(&template(values))
}

/// What `kubectl apply -k` would apply.
fn kustomized(folder: &str) -> Objects {
    let mut kubectl = Command::new(program("kubectl").unwrap());
    objects(&kubectl.arg("kustomize").arg(root().join(folder)).output().unwrap())
}

/// The objects that a command printed. The configuration in the ConfigMap is taken as an object, too: its comments are not
/// compared.
fn objects(output: &Output) -> Objects {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let all: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    let word = |value: &Value| value.as_str().unwrap().to_owned();
    let named = all.into_iter().filter(|object| !object.is_null()).map(|mut object| {
        if let Some(config) = object.pointer_mut("/data/config.conf") {
            *config = serde_saphyr::from_str(config.as_str().unwrap()).unwrap();
        }
        ((word(&object["kind"]), word(&object["metadata"]["name"])), object)
    });
    named.collect()
}

fn get<'a>(objects: &'a Objects, kind: &str, pointer: &str) -> &'a Value {
    let object = &objects[&(kind.to_owned(), "kube-lane".to_owned())];
    object.pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {object:#}"))
}

#[test]
fn the_chart_renders_what_kustomize_renders() {
    for (values, folder) in [(&[][..], "deploy"), (&["mode=\"ebpf\""], "deploy/ebpf")] {
        let (chart, base) = (rendered(values), kustomized(folder));
        assert_eq!(base.len(), 5, "{:?}", base.keys());
        assert_eq!(chart.keys().collect::<Vec<_>>(), base.keys().collect::<Vec<_>>());
        for (name, object) in &base {
            assert_eq!(&chart[name], object, "{folder}: {name:?}");
        }
    }
}

#[test]
fn values_of_the_chart_reach_the_pods() {
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    let image = json!({"repository": "registry.example/kube-lane", "digest": digest});
    let objects = rendered(&[
        "mode=\"ebpf\"",
        &format!("image={image}"),
        r#"config={"clusterCIDR": "10.42.0.0/16", "kubeLane": {"logLevel": "debug"}}"#,
        "socketLB.external=true",
        "cgroupRoot=\"/sys/fs/cgroup/unified\"",
        r#"apiServer={"host": "192.0.2.1", "port": 8443}"#,
        r#"podAnnotations={"example/a": "b"}"#,
        r#"podLabels={"example/c": "d"}"#,
        "maxUnavailable=\"10%\"",
        "resources=null",
    ]);
    let config = "/data/config.conf";
    assert_eq!(get(&objects, "ConfigMap", &format!("{config}/clusterCIDR")), "10.42.0.0/16");
    assert_eq!(get(&objects, "ConfigMap", &format!("{config}/kubeLane/logLevel")), "debug");
    assert_eq!(get(&objects, "ConfigMap", &format!("{config}/kubeLane/socketLB/external")), true);
    assert_eq!(get(&objects, "ConfigMap", &format!("{config}/kubeLane/stateDir")), "/var/lib/kube-lane");
    let container = "/spec/template/spec/containers/0";
    let expected = format!("registry.example/kube-lane@{digest}");
    assert_eq!(get(&objects, "DaemonSet", &format!("{container}/image")), &expected);
    let environment = get(&objects, "DaemonSet", &format!("{container}/env")).as_array().unwrap();
    for variable in [
        json!({"name": "KUBERNETES_SERVICE_HOST", "value": "192.0.2.1"}),
        json!({"name": "KUBERNETES_SERVICE_PORT", "value": "8443"}),
    ] {
        assert!(environment.contains(&variable), "no {variable} in {environment:?}");
    }
    assert_eq!(
        get(&objects, "DaemonSet", &format!("{container}/securityContext/capabilities/add")),
        &json!(["NET_ADMIN", "BPF", "PERFMON"])
    );
    let volumes = get(&objects, "DaemonSet", "/spec/template/spec/volumes").as_array().unwrap();
    let cgroup =
        json!({"name": "cgroup", "hostPath": {"path": "/sys/fs/cgroup/unified", "type": "Directory"}});
    assert!(volumes.contains(&cgroup), "{volumes:?}");
    assert_eq!(get(&objects, "DaemonSet", "/spec/template/metadata/annotations/example~1a"), "b");
    assert_eq!(get(&objects, "DaemonSet", "/spec/template/metadata/labels/example~1c"), "d");
    assert_eq!(get(&objects, "DaemonSet", "/spec/updateStrategy/rollingUpdate/maxUnavailable"), "10%");
    let daemon_set = &objects[&("DaemonSet".to_owned(), "kube-lane".to_owned())];
    assert_eq!(daemon_set.pointer(&format!("{container}/resources")), None);
}

#[test]
fn the_chart_refuses_values_that_do_not_exist() {
    // What is wrong, and a word of the message that leads there.
    for (value, named) in [
        (r#"imgae={"tag": "1"}"#, "imgae"),
        (r#"image={"tga": "1"}"#, "tga"),
        (r#"image={"digest": "sha256:1"}"#, "digest"),
        (r#"mode="iptables""#, "mode"),
        (r#"config={"mode": "ebpf"}"#, "config"),
        (r#"config={"kubeLane": {"socketLB": {"external": true}}}"#, "config"),
        (r#"socketLB={"extrenal": true}"#, "extrenal"),
        (r#"apiServer={"port": "6443"}"#, "port"),
        (r#"cgroupRoot="sys/fs/cgroup""#, "cgroupRoot"),
        (r#"maxUnavailable=0"#, "maxUnavailable"),
    ] {
        let output = template(&[value]);
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{value} is accepted");
        assert!(message.contains(named) && message.contains("schema"), "{value}: {message}");
    }
}

#[test]
fn a_release_of_the_chart_is_installed_upgraded_and_uninstalled() {
    let cluster = Cluster::start(Lab::builder().build().unwrap()).unwrap();
    let chart = root().join("deploy/chart");
    let chart = chart.to_str().unwrap();
    let release = ["kube-lane", "--namespace", NAMESPACE];
    let run = |command: &str, more: &[&str]| {
        let mut helm = helm();
        cluster.run(helm.arg(command).args(release).args(more)).unwrap()
    };
    let said = run("install", &[chart, "--create-namespace"]);
    assert!(said.contains("in mode nftables"), "{said}");
    let mode = || {
        let config_map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-lane", "namespace": NAMESPACE}});
        let text = cluster.get(&config_map).unwrap()["data"]["config.conf"].as_str().unwrap().to_owned();
        serde_saphyr::from_str::<Value>(&text).unwrap()["mode"].clone()
    };
    assert_eq!(mode(), "nftables");
    run("upgrade", &[chart, "--set", "mode=ebpf"]);
    assert_eq!(mode(), "ebpf");
    run("uninstall", &[]);
    let selector = ["--all-namespaces", "--selector=k8s-app=kube-lane", "--output=name"];
    let kinds = "daemonsets,configmaps,serviceaccounts,clusterroles,clusterrolebindings";
    let left = cluster.kubectl(&[&["get", kinds][..], &selector].concat()).unwrap();
    assert_eq!(left, "");
}
