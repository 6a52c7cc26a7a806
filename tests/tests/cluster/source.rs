//! The API source: what it says of objects, and what it does when the server is away, has forgotten, or refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube_lane::model::input::{Change, Event, Origin};
use kube_lane::source::kube::{ApiServers, KubeSourceConfig, ServerStatus, spawn};
use kube_lane_tests::controlplane::ControlPlane;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tracing_subscriber::filter::LevelFilter;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

fn service(name: &str, address: &str, port: u16) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
           "spec": {"clusterIP": address, "ports": [{"name": "http", "port": port}]}})
}

fn slice(name: &str, service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
           "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
           "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": 8080}]})
}

fn api(client: &Client, object: &Value) -> (Api<DynamicObject>, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let version = text(&object["apiVersion"]);
    let (group, version) = version.split_once('/').unwrap_or(("", &version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &text(&object["kind"])));
    let api = match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    (api, text(&object["metadata"]["name"]))
}

async fn apply(client: &Client, object: &Value) {
    let (api, name) = api(client, object);
    api.patch(&name, &PatchParams::apply("test").force(), &Patch::Apply(object)).await.unwrap();
}

/// Whether the server is of Kubernetes 1.33 or later: these have ServiceCIDRs, and hints for nodes.
async fn is_of_1_33(client: &Client) -> bool {
    let resources = client.list_api_group_resources("networking.k8s.io/v1").await.unwrap().resources;
    resources.iter().any(|resource| resource.name == "servicecidrs")
}

async fn delete(client: &Client, object: &Value) {
    let (api, name) = api(client, object);
    api.delete(&name, &DeleteParams::default()).await.unwrap();
}

/// A source and what it has said.
struct Source {
    events: mpsc::Receiver<Vec<Event>>,
    task: JoinHandle<()>,
}

impl Source {
    async fn spawn(kubeconfig: PathBuf, master: Option<SocketAddr>) -> Self {
        let master = master.map(|address| format!("https://{address}"));
        let config = KubeSourceConfig {
            kubeconfig: Some(kubeconfig),
            master,
            node: "node-a".into(),
            ..KubeSourceConfig::default()
        };
        let (sender, events) = mpsc::channel(64);
        let servers = ApiServers::open(&config);
        let task = spawn(config, servers, sender).await.unwrap();
        Self { events, task }
    }

    /// Takes in the next events: what was last said of each object.
    async fn hear(&mut self, said: &mut BTreeMap<String, Change>) {
        for event in self.events.recv().await.expect("a source never ends") {
            let Event::Source { change, .. } = event else { panic!("{event:?}") };
            let about = match &change {
                Change::Service(service) => service.key.to_string(),
                Change::Slice(slice) => slice.key.to_string(),
                Change::ServiceGone(key) | Change::SliceGone(key) => key.to_string(),
                Change::Node(_) => "node".to_owned(),
                Change::ServiceCidrs(_) => "cidrs".to_owned(),
                Change::Triggered(..) => continue,
                Change::Complete(_) => "complete".to_owned(),
                Change::Synced => "synced".to_owned(),
            };
            said.insert(about, change);
        }
    }

    /// Takes in events until all of `wanted` were said; hands over what else was.
    async fn until(&mut self, wanted: &[&str]) -> Vec<String> {
        let mut missing: BTreeSet<&str> = wanted.iter().copied().collect();
        let mut others = vec![];
        while !missing.is_empty() {
            let Ok(batch) = timeout(LIMIT, self.events.recv()).await else {
                panic!("never said: {missing:?}; but: {others:?}");
            };
            for event in batch.expect("a source never ends") {
                let said = words(&event);
                if !missing.remove(said.as_str()) {
                    others.push(said);
                }
            }
        }
        others
    }
}

fn words(event: &Event) -> String {
    let Event::Source { origin: Origin::Api, change } = event else { panic!("{event:?}") };
    match change {
        Change::Service(service) => format!("{} at {}", service.key, service.ports[0].port),
        Change::ServiceGone(key) => format!("{key} gone"),
        Change::Slice(slice) => format!("slice {} with {}", slice.key, slice.endpoints.len()),
        Change::SliceGone(key) => format!("slice {key} gone"),
        Change::Node(node) => format!("node {:?}", node.as_ref().map(|node| &node.addresses)),
        Change::ServiceCidrs(cidrs) => format!("cidrs {}", cidrs.len()),
        Change::Triggered(family, _) => format!("{family} triggered"),
        Change::Complete(complete) => format!("complete {complete}"),
        Change::Synced => "synced".to_owned(),
    }
}

/// A way to the API server that can be closed without stopping the server.
struct Way {
    address: SocketAddr,
    to: SocketAddr,
    open: Option<AbortHandle>,
}

impl Way {
    /// A way that is closed at first.
    async fn to(server: SocketAddr) -> Self {
        // Bound once to find a port that is free.
        let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        Self { address, to: server, open: None }
    }

    async fn open(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        let to = self.to;
        let task = tokio::spawn(async move {
            // Connections end with this task.
            let mut connections = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                connections.spawn(async move {
                    if let Ok(mut server) = TcpStream::connect(to).await {
                        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                    }
                });
            }
        });
        self.open = Some(task.abort_handle());
    }

    async fn close(&mut self) {
        if let Some(open) = self.open.take() {
            open.abort();
            while !open.is_finished() {
                sleep(Duration::from_millis(1)).await;
            }
        }
    }
}

/// What this thread logs at INFO and above.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn capture() -> (Self, impl Sized) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(LevelFilter::INFO)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing_subscriber::util::SubscriberInitExt::set_default(subscriber))
    }

    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned();
        // The test's own client logs too; the first line of all is which address is configured. Before 1.33, there are no
        // ServiceCIDRs.
        let is_ours = |line: &&str| {
            let of_every_start = ["the address of the API server server=", "has no such resource"];
            line.contains(" kube_lane::") && !of_every_start.iter().any(|part| line.contains(part))
        };
        text.lines().filter(is_ours).map(str::to_owned).collect()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[track_caller]
fn assert_lines(log: &Log, expected: &[&str]) {
    let lines = log.lines();
    let all =
        lines.len() == expected.len() && lines.iter().zip(expected).all(|(line, part)| line.contains(part));
    assert!(all, "not {expected:?}:\n{}", lines.join("\n"));
}

#[tokio::test]
async fn lists_then_follows_every_change() {
    let control_plane = ControlPlane::start().await.unwrap();
    let client = control_plane.client().await.unwrap();
    let web = service("web", "10.96.1.1", 80);
    apply(&client, &web).await;
    apply(&client, &slice("web-1", "web", &["10.1.0.1"])).await;
    apply(&client, &json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "headless", "namespace": "default"},
        "spec": {"clusterIP": "None", "ports": [{"port": 80}]}})).await;

    let mut source = Source::spawn(control_plane.admin_kubeconfig(), None).await;
    let has_cidrs = is_of_1_33(&client).await;
    let cidrs = if has_cidrs { "cidrs 2" } else { "cidrs 0" };
    // The server makes a Service for itself, before our list or after it.
    let own = "default/kubernetes at 443";
    let wanted = ["default/web at 80", "slice default/web-1 with 1", "node None", cidrs, "synced", own];
    let others = source.until(&wanted).await;
    assert_eq!(others, Vec::<String>::new());

    apply(&client, &service("web", "10.96.1.1", 81)).await;
    source.until(&["default/web at 81"]).await;
    // As the EndpointSlice controller says when what it follows changed.
    let mut changed = slice("web-1", "web", &["10.1.0.1", "10.1.0.2"]);
    let later = "2999-01-01T00:00:00Z";
    changed["metadata"]["annotations"] = json!({"endpoints.kubernetes.io/last-change-trigger-time": later});
    apply(&client, &changed).await;
    source.until(&["slice default/web-1 with 2", "IPv4 triggered"]).await;

    apply(&client, &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-b"}})).await;
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}});
    apply(&client, &node).await;
    source.until(&["node Some([])"]).await;
    let (nodes, name) = api(&client, &node);
    let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.1"}]}});
    nodes.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    source.until(&["node Some([192.168.0.1])"]).await;
    delete(&client, &node).await;
    source.until(&["node None"]).await;

    if has_cidrs {
        let more = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "more"},
            "spec": {"cidrs": ["10.200.0.0/16"]}});
        apply(&client, &more).await;
        source.until(&["cidrs 3"]).await;
    }

    // A label that hands the Service to another proxy takes it from us.
    let mut labelled = service("web", "10.96.1.1", 81);
    labelled["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "other"});
    apply(&client, &labelled).await;
    source.until(&["default/web gone"]).await;
    apply(&client, &service("web", "10.96.1.1", 81)).await;
    source.until(&["default/web at 81"]).await;
    delete(&client, &web).await;
    delete(&client, &slice("web-1", "web", &[])).await;
    source.until(&["default/web gone", "slice default/web-1 gone"]).await;

    let Source { events, task } = source;
    drop(events);
    timeout(LIMIT, task).await.expect("it ends with its receiver").unwrap();
}

#[tokio::test]
async fn an_outage_is_one_line_and_what_vanished_in_it_is_gone() {
    let mut control_plane = ControlPlane::start().await.unwrap();
    let client = control_plane.client().await.unwrap();
    for name in ["stays", "goes"] {
        apply(&client, &service(name, if name == "stays" { "10.96.1.1" } else { "10.96.1.2" }, 80)).await;
        apply(&client, &slice(&format!("{name}-1"), name, &["10.1.0.1"])).await;
    }
    let (log, _guard) = Log::capture();
    let mut way = Way::to(control_plane.address()).await;
    way.open().await;
    let mut source = Source::spawn(control_plane.admin_kubeconfig(), Some(way.address)).await;
    source.until(&["default/goes at 80", "slice default/goes-1 with 1", "synced"]).await;
    assert_lines(&log, &[]);

    way.close().await;
    delete(&client, &service("goes", "", 80)).await;
    delete(&client, &slice("goes-1", "goes", &[])).await;
    // A server that starts afresh has forgotten what was before: its answer is 410 Gone.
    control_plane.restart_apiserver().await.unwrap();
    sleep(Duration::from_secs(2)).await;
    way.open().await;
    let others = source.until(&["default/goes gone", "slice default/goes-1 gone"]).await;
    assert!(others.iter().all(|said| !said.contains("stays gone") && said != "synced"), "{others:?}");

    apply(&client, &service("stays", "10.96.1.1", 81)).await;
    apply(&client, &slice("stays-1", "stays", &[])).await;
    source.until(&["default/stays at 81", "slice default/stays-1 with 0"]).await;
    let patience = tokio::time::Instant::now() + LIMIT;
    while log.lines().len() < 2 && tokio::time::Instant::now() < patience {
        sleep(Duration::from_millis(50)).await;
    }
    assert_lines(&log, &["the API server cannot be watched", "the API server is watched again"]);
}

#[tokio::test]
async fn a_server_may_come_after_us() {
    let control_plane = ControlPlane::start().await.unwrap();
    let (log, _guard) = Log::capture();
    let mut way = Way::to(control_plane.address()).await;
    let mut source = Source::spawn(control_plane.admin_kubeconfig(), Some(way.address)).await;
    sleep(Duration::from_secs(2)).await;
    assert!(source.events.try_recv().is_err());
    assert_lines(&log, &["the API server cannot be watched"]);
    let line = &log.lines()[0];
    assert!(line.contains("Connection refused") && line.contains(&way.address.to_string()), "{line}");

    way.open().await;
    source.until(&["default/kubernetes at 443", "synced"]).await;
    assert_lines(&log, &["the API server cannot be watched", "the API server is watched again"]);
}

#[tokio::test]
async fn credentials_may_expire_and_be_renewed() {
    let control_plane = ControlPlane::start().await.unwrap();
    let (log, _guard) = Log::capture();
    let good = std::fs::read_to_string(control_plane.admin_kubeconfig()).unwrap();
    let token = good.split("token").nth(1).unwrap().trim_start_matches(['"', ':', ' ']);
    let token = token.split(['"', '\n', ',', '}']).next().unwrap();
    let path = control_plane.admin_kubeconfig().with_file_name("expired.kubeconfig");
    write_whole(&path, &good.replace(token, "expired"));
    let mut source = Source::spawn(path.clone(), None).await;
    sleep(Duration::from_secs(1)).await;
    assert_lines(&log, &["the API server cannot be watched"]);
    assert!(log.lines()[0].contains("credentials"), "{:?}", log.lines());

    write_whole(&path, &good);
    source.until(&["synced"]).await;
    assert_lines(&log, &["the API server cannot be watched", "the API server is watched again"]);
}

/// A source that is told to reach this control plane by `way`, and remembers that an API server answers at `endpoint`.
async fn remembering(
    control_plane: &ControlPlane,
    way: &Way,
    endpoint: SocketAddr,
) -> (Source, watch::Receiver<ServerStatus>) {
    let dir = control_plane.admin_kubeconfig().with_file_name("state");
    std::fs::create_dir(&dir).unwrap();
    let content = json!({"version": 1, "endpoints": [endpoint]});
    std::fs::write(dir.join("api-servers.json"), content.to_string()).unwrap();
    let config = KubeSourceConfig {
        kubeconfig: Some(control_plane.admin_kubeconfig()),
        master: Some(format!("https://{}", way.address)),
        node: "node-a".into(),
        state_dir: Some(dir),
        ..KubeSourceConfig::default()
    };
    let (sender, events) = mpsc::channel(64);
    let servers = ApiServers::open(&config);
    let status = servers.status();
    let task = spawn(config, servers, sender).await.unwrap();
    (Source { events, task }, status)
}

#[tokio::test]
async fn what_is_remembered_of_another_cluster_does_no_harm() {
    let (ours, other) = (ControlPlane::start().await.unwrap(), ControlPlane::start().await.unwrap());
    apply(&other.client().await.unwrap(), &service("other", "10.96.1.9", 80)).await;
    let mut way = Way::to(ours.address()).await;
    let (mut source, mut status) = remembering(&ours, &way, other.address()).await;
    // The other cluster's server answers, and its certificate is not ours.
    let refused = status.wait_for(|status| {
        status.failure.as_ref().is_some_and(|failure| {
            failure.contains(&other.address().to_string()) && failure.contains("certificate")
        })
    });
    drop(timeout(LIMIT, refused).await.expect("the certificate is verified").unwrap());
    assert!(source.events.try_recv().is_err(), "nothing comes from there");
    way.open().await;
    let others = source.until(&["default/kubernetes at 443", "synced"]).await;
    assert!(!others.iter().any(|said| said.contains("other")), "{others:?}");
    assert_eq!(status.borrow().in_use, Some(way.address));
}

#[tokio::test]
async fn a_fallback_ends_when_the_configured_address_answers_again() {
    let control_plane = ControlPlane::start().await.unwrap();
    let (log, _guard) = Log::capture();
    let mut way = Way::to(control_plane.address()).await;
    let (mut source, mut status) = remembering(&control_plane, &way, control_plane.address()).await;
    source.until(&["synced"]).await;
    assert_eq!(status.borrow().in_use, Some(control_plane.address()));
    assert!(status.borrow().fallback);

    way.open().await;
    let back = status.wait_for(|status| status.in_use == Some(way.address) && !status.fallback);
    drop(timeout(LIMIT, back).await.expect("watches go back").unwrap());
    // The watches go on where they were.
    apply(&control_plane.client().await.unwrap(), &service("web", "10.96.1.1", 80)).await;
    let others = source.until(&["default/web at 80"]).await;
    // The server makes its own Service a moment after its start, maybe after the list.
    assert!(others.iter().all(|said| said.contains("default/kubernetes")), "{others:?}");
    assert_lines(&log, &["does not answer: using another one", "answers again"]);
    way.close().await;
    let away = status.wait_for(|status| status.fallback);
    drop(timeout(LIMIT, away).await.expect("another address is used").unwrap());
    apply(&control_plane.client().await.unwrap(), &service("web", "10.96.1.1", 81)).await;
    source.until(&["default/web at 81"]).await;
}

fn write_whole(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

#[tokio::test]
async fn goes_on_without_what_it_may_not_read() {
    let control_plane = ControlPlane::start().await.unwrap();
    let client = control_plane.client().await.unwrap();
    apply(&client, &json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "agent", "namespace": "default"}}))
        .await;
    let verbs = ["list", "watch"];
    apply(&client, &json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "agent"},
        "rules": [{"apiGroups": [""], "resources": ["services", "nodes"], "verbs": verbs},
                  {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs}]})).await;
    apply(
        &client,
        &json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "agent"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "agent"},
        "subjects": [{"kind": "ServiceAccount", "name": "agent", "namespace": "default"}]}),
    )
    .await;
    let kubeconfig = control_plane.kubeconfig_for_service_account("default", "agent").await.unwrap();
    let (log, _guard) = Log::capture();
    let mut source = Source::spawn(kubeconfig, None).await;
    source.until(&["default/kubernetes at 443", "node None", "cidrs 0", "synced"]).await;
    let lines = log.lines();
    let refused =
        lines.iter().filter(|line| line.contains("servicecidrs") && line.contains("going on without"));
    assert_eq!(refused.count(), 1, "{}", lines.join("\n"));
}

/// Every field that is read, in lists (protobuf) and in watches (JSON).
#[tokio::test]
async fn a_list_says_what_a_watch_says() {
    let control_plane = ControlPlane::start().await.unwrap();
    let client = control_plane.client().await.unwrap();
    let mut watching = Source::spawn(control_plane.admin_kubeconfig(), None).await;
    let mut watched = BTreeMap::new();
    while !watched.contains_key("synced") {
        watching.hear(&mut watched).await;
    }

    let balanced = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
            "ipFamilyPolicy": "PreferDualStack", "externalIPs": ["192.0.2.1", "2001:db8::1"],
            "loadBalancerSourceRanges": ["10.0.0.0/8", "fd00::/8"],
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 77}},
            "ports": [{"name": "http", "port": 80}, {"name": "dns", "protocol": "UDP", "port": 53}],
        },
    });
    apply(&client, &balanced).await;
    let (services, name) = api(&client, &balanced);
    let ingress = json!([{"ip": "192.0.2.2"}, {"ip": "192.0.2.3", "ipMode": "Proxy"},
                         {"ip": "2001:db8::2", "ipMode": "VIP"}, {"hostname": "lb.example.com"}]);
    let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
    services.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    apply(&client, &service("plain", "10.96.1.1", 80)).await;

    let mut pods = slice("web-1", "web", &["10.1.0.1", "10.1.0.2", "10.1.0.3"]);
    pods["endpoints"][0]["hints"] = json!({"forZones": [{"name": "east"}]});
    if is_of_1_33(&client).await {
        pods["endpoints"][0]["hints"]["forNodes"] = json!([{"name": "node-a"}]);
    }
    pods["endpoints"][0]["nodeName"] = json!("node-a");
    pods["endpoints"][1]["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
    pods["ports"] = json!([{"name": "http", "port": 8080}, {"name": "dns", "protocol": "UDP", "port": 5353}]);
    apply(&client, &pods).await;
    let mut unnamed = slice("plain-1", "plain", &["fd00::1"]);
    unnamed["addressType"] = json!("IPv6");
    unnamed["ports"] = json!([{"port": 8080}]);
    apply(&client, &unnamed).await;

    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "node-a", "labels": {"topology.kubernetes.io/zone": "east"}},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00:1::/64"],
                 "taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]},
    });
    apply(&client, &node).await;
    let (nodes, name) = api(&client, &node);
    let addresses =
        json!([{"type": "ExternalIP", "address": "192.0.2.9"}, {"type": "InternalIP", "address": "fd00::9"}]);
    let status = json!({"status": {"addresses": addresses}});
    nodes.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();

    let mut listing = Source::spawn(control_plane.admin_kubeconfig(), None).await;
    let mut listed = BTreeMap::new();
    while !listed.contains_key("synced") {
        listing.hear(&mut listed).await;
    }
    for name in ["default/web", "default/plain", "default/web-1", "default/plain-1"] {
        assert!(listed.contains_key(name), "{name} is not in {listed:#?}");
    }
    while watched != listed {
        let heard = timeout(Duration::from_secs(5), watching.hear(&mut watched)).await;
        assert!(heard.is_ok(), "watched: {watched:#?}\nlisted: {listed:#?}");
    }
}
