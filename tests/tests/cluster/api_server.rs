//! The address of the API server: which one the agent dials, and what it does when that does not answer.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use kube_lane_lab::{Host, Lab};
use kube_lane_tests::agent::{Agent, binary};
use kube_lane_tests::cluster::Cluster;
use kube_lane_tests::controlplane::Options;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::wait::{LIMIT, logged, until};

/// The address of Service `default/kubernetes`.
const SERVICE: &str = "10.96.0.1";

/// A pod's environment: `$1` is the ServiceAccount's folder, the rest is the command.
const POD: &str = r#"
set -eu
mount -t tmpfs none /run
mkdir -p /var/run/secrets/kubernetes.io
ln -s "$1" /var/run/secrets/kubernetes.io/serviceaccount
shift
exec env KUBERNETES_SERVICE_PORT=443 "$@"
"#;

/// A cluster whose API server's certificate names the Service, as a real one does.
struct World {
    cluster: Cluster,
    files: TempDir,
}

impl World {
    fn new() -> Self {
        let options = Options { extra_sans: vec![SERVICE.into()], ..Options::default() };
        let cluster = Cluster::start_with(Lab::builder().build().unwrap(), options).unwrap();
        let this = Self { cluster, files: tempfile::tempdir().unwrap() };
        let kubeconfig: Value =
            serde_json::from_slice(&fs::read(this.cluster.control_plane().admin_kubeconfig()).unwrap())
                .unwrap();
        let account = this.path("account");
        fs::create_dir(&account).unwrap();
        let authority = kubeconfig["clusters"][0]["cluster"]["certificate-authority"].as_str().unwrap();
        fs::copy(authority, account.join("ca.crt")).unwrap();
        fs::write(account.join("token"), kubeconfig["users"][0]["user"]["token"].as_str().unwrap()).unwrap();
        fs::write(account.join("namespace"), "kube-system").unwrap();
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn server(&self) -> SocketAddr {
        self.cluster.control_plane().address()
    }

    fn node(&self) -> &Host {
        self.cluster.lab().node(0)
    }

    /// Has the cluster say where its API servers are.
    fn publish(&self, addresses: &[&str]) {
        let endpoints: Vec<_> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
        let labels = json!({"kubernetes.io/service-name": "kubernetes"});
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "kubernetes", "namespace": "default", "labels": labels},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "https", "protocol": "TCP", "port": self.server().port()}],
        });
        self.cluster.apply(&slice).unwrap();
    }

    /// The agent as a pod runs it: all that it is told of the API server is the Service's address.
    fn start_in_pod(&self, environment: &[&str], arguments: &[&str]) -> Agent {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (account, state, kube_lane) =
            (text(&self.path("account")), text(&self.path("state")), text(&binary().unwrap()));
        let mut all = vec!["--mount", "--propagation", "private", "sh", "-c", POD, "sh", &account];
        all.extend(environment);
        all.extend([&kube_lane, "--hostname-override", "node0", "--state-dir", &state]);
        all.extend(arguments);
        Agent::start_binary(Path::new("unshare"), self.node(), &all, &self.cluster.log(self.node())).unwrap()
    }

    fn remembered(&self) -> Option<Vec<String>> {
        let content: Value =
            serde_json::from_slice(&fs::read(self.path("state/api-servers.json")).ok()?).unwrap();
        assert_eq!(content["version"], 1);
        let endpoints = content["endpoints"].as_array().unwrap();
        Some(endpoints.iter().map(|endpoint| endpoint.as_str().unwrap().to_owned()).collect())
    }

    fn remember(&self, endpoints: &[&SocketAddr]) {
        fs::create_dir_all(self.path("state")).unwrap();
        let content = json!({"version": 1, "endpoints": endpoints});
        fs::write(self.path("state/api-servers.json"), content.to_string()).unwrap();
    }
}

/// What `status` says of the API server.
fn server(agent: &Agent) -> Value {
    let (_, text) = agent.status(&["-o=json"]).unwrap();
    serde_json::from_str::<Value>(&text).unwrap_or_default()["agent"]["apiServer"].clone()
}

fn through_service(agent: &Agent) -> f64 {
    agent.metric("kubelane_api_server_through_service").unwrap()
}

const ENVIRONMENT: [&str; 2] =
    ["KUBERNETES_SERVICE_HOST=10.96.0.1", "KUBERNETES_PORT_443_TCP_ADDR=10.96.0.1"];

#[test]
fn a_reboot_without_any_proxy_comes_up_by_what_is_remembered() {
    let world = World::new();
    let address = world.server().ip().to_string();
    // Nothing serves Services on this node, and nothing is remembered: the agent can do no more than say so.
    let agent = world.start_in_pod(&ENVIRONMENT, &[]);
    logged(&agent, &["the address of the API server is a Service's", "--state-dir"]);
    until(|| {
        let failure = server(&agent)["failure"].clone();
        failure.is_string().then_some(()).ok_or_else(|| format!("{failure}\n{}", agent.log()))
    });
    assert_eq!(through_service(&agent), 1.0);
    drop(agent);

    // The agent of an earlier run learned the endpoints by way of ConfigMap kubernetes-services-endpoint.
    world.publish(&[&address]);
    let host = format!("KUBERNETES_SERVICE_HOST={address}");
    let port = format!("KUBERNETES_SERVICE_PORT={}", world.server().port());
    let mut agent = world.start_in_pod(&[&host, &port, ENVIRONMENT[1]], &[]);
    agent.wait_synced(LIMIT).unwrap();
    assert_eq!(server(&agent)["source"], "environment variable KUBERNETES_SERVICE_HOST");
    until(|| {
        let remembered = world.remembered();
        (remembered == Some(vec![world.server().to_string()]))
            .then_some(())
            .ok_or_else(|| format!("{remembered:?}"))
    });
    assert_eq!(through_service(&agent), 0.0);
    // No endpoint is no news.
    world.publish(&[]);
    world.publish(&[&address, "192.0.2.77"]);
    until(|| {
        let remembered = world.remembered().unwrap();
        (remembered.len() == 2).then_some(()).ok_or_else(|| format!("{remembered:?}"))
    });
    drop(agent);
    world.publish(&[&address]);

    // The node reboots: its tables are gone.
    assert!(kube_lane_tests::agent::clean_up(world.node(), "cleanup").unwrap().0);
    let mut agent = world.start_in_pod(&ENVIRONMENT, &[]);
    agent.wait_synced(LIMIT).unwrap();
    let server = server(&agent);
    assert_eq!(
        (&server["inUse"], &server["throughService"]),
        (&json!(world.server()), &json!(false)),
        "{server}"
    );
    assert_eq!(server["source"], "Service default/kubernetes");
    assert_eq!(through_service(&agent), 0.0);
}

#[test]
fn an_agent_that_came_up_through_the_service_leaves_it_for_the_endpoints() {
    let world = World::new();
    world.publish(&[&world.server().ip().to_string()]);
    let kubeconfig = world.cluster.control_plane().admin_kubeconfig();
    // The tables that an earlier run left still serve.
    let mut first = world.cluster.start_agent(world.node(), &[]).unwrap();
    first.wait_synced(LIMIT).unwrap();
    assert!(server(&first)["source"].as_str().unwrap().contains(kubeconfig.to_str().unwrap()));
    drop(first);
    let mut agent = world.start_in_pod(&ENVIRONMENT, &[]);
    agent.wait_synced(LIMIT).unwrap();
    logged(&agent, &["the address of the API server is a Service's"]);
    until(|| {
        let server = server(&agent);
        (server["inUse"] == json!(world.server())).then_some(()).ok_or_else(|| server.to_string())
    });
    logged(&agent, &["not through a Service"]);
    assert_eq!(through_service(&agent), 0.0);
    assert_eq!(world.remembered(), Some(vec![world.server().to_string()]));
}

#[test]
fn a_control_plane_node_that_goes_away_does_not_matter_where_another_exists() {
    let world = World::new();
    // What the kubeconfig names is a name of the same certificate at which nobody answers.
    world.remember(&[&world.server()]);
    let state = world.path("state");
    let master = format!("https://{SERVICE}:6443");
    let arguments = ["--master", &master, "--state-dir", state.to_str().unwrap()];
    let mut agent = world.cluster.start_agent(world.node(), &arguments).unwrap();
    agent.wait_synced(LIMIT).unwrap();
    let server = server(&agent);
    assert_eq!((&server["inUse"], &server["fallback"]), (&json!(world.server()), &json!(true)), "{server}");
    assert_eq!(agent.metric("kubelane_api_server_fallback").unwrap(), 1.0);
    let said = "the preferred address of the API server does not answer";
    assert_eq!(agent.log().lines().filter(|line| line.contains(said)).count(), 1, "{}", agent.log());
}

#[test]
fn a_file_that_cannot_be_used_is_warned_of_once_and_replaced() {
    let world = World::new();
    world.publish(&[&world.server().ip().to_string()]);
    let state = world.path("state");
    fs::create_dir(&state).unwrap();
    fs::write(state.join("api-servers.json"), "{]").unwrap();
    let start = |dir: &Path| {
        let mut agent =
            world.cluster.start_agent(world.node(), &["--state-dir", dir.to_str().unwrap()]).unwrap();
        agent.wait_synced(LIMIT).unwrap();
        agent
    };
    let agent = start(&state);
    logged(&agent, &["the remembered API servers cannot be used", "malformed", "api-servers.json"]);
    until(|| {
        let text = fs::read_to_string(state.join("api-servers.json")).unwrap();
        (text.contains(&world.server().to_string())).then_some(()).ok_or(text)
    });
    drop(agent);
    // No folder: a file is in its place.
    let agent = start(&state.join("api-servers.json"));
    logged(&agent, &["cannot be remembered", "--state-dir"]);
}
