//! The oracle itself: the real kube-proxy, with its API server in the network namespace of its node.

use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kube_lane_lab::{Host, Lab, Proto};
use kube_lane_tests::controlplane::{ControlPlane, Options};
use kube_lane_tests::kube_proxy::{self, KubeProxy, Mode};
use kube_lane_tests::process::in_netns;
use serde_json::{Value, json};

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Hands `objects` to `kubectl apply` on `host`.
fn apply(control_plane: &ControlPlane, netns: &Path, objects: &[Value]) {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    let mut kubectl = control_plane.kubectl().unwrap();
    let status = in_netns(Some(netns), || {
        let mut child =
            kubectl.args(["apply", "-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        child.stdin.take().unwrap().write_all(list.to_string().as_bytes())?;
        Ok(child.wait()?)
    });
    assert!(status.unwrap().success());
}

fn node(host: &Host) -> Value {
    let addresses = json!([{"type": "InternalIP", "address": host.v4()}]);
    let metadata = json!({"name": host.name()});
    json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "status": {"addresses": addresses}})
}

/// A Service at `cluster_ip`, port 80, and the slice that leads it to `pod`, port 8080.
fn service(name: &str, cluster_ip: &str, pod: &Host) -> [Value; 2] {
    let metadata = json!({"name": name, "namespace": "default"});
    let port = json!({"name": "http", "port": 80, "targetPort": 8080});
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {"clusterIP": cluster_ip, "ports": [port]},
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": [pod.v4()]}],
    });
    [service, slice]
}

async fn kube_proxy_leads_to_the_pod(mode: Mode) {
    let lab = Lab::builder().nodes(1).build().unwrap();
    let host = lab.node(0);
    let (server, client) = (host.add_pod("server").unwrap(), host.add_pod("client").unwrap());
    let _echo = server.serve(Proto::Tcp, 8080).unwrap();

    let netns = Path::new("/run/netns").join(host.netns());
    let options = Options { netns: Some(netns.clone()), ..Options::default() };
    let control_plane = ControlPlane::start_with(options).await.unwrap();
    apply(&control_plane, &netns, &[node(host)]);
    apply(&control_plane, &netns, &service("echo", "10.96.7.7", &server));

    let mut proxy = KubeProxy::start(&kube_proxy::Options {
        mode,
        netns: Some(netns.clone()),
        kubeconfig: control_plane.admin_kubeconfig(),
        hostname: host.name().to_owned(),
        cluster_cidr: Some("10.244.0.0/16".into()),
        config: Value::Null,
    })
    .unwrap();

    let deadline = Instant::now() + LIMIT;
    loop {
        let outcome = client.dial(Proto::Tcp, "10.96.7.7:80".parse().unwrap()).unwrap();
        if outcome.by() == Some("server") {
            break;
        }
        assert_eq!(proxy.process().try_wait().unwrap(), None, "{}", proxy.process().log_tail());
        assert!(Instant::now() < deadline, "{outcome:?}\n{}", proxy.process().log_tail());
        sleep(Duration::from_millis(100));
    }

    drop(proxy);
    KubeProxy::cleanup(Some(&netns)).unwrap();
    let outcome = client.dial(Proto::Tcp, "10.96.7.7:80".parse().unwrap()).unwrap();
    assert_eq!(outcome.by(), None);
}

#[tokio::test]
async fn with_nftables() {
    kube_proxy_leads_to_the_pod(Mode::Nftables).await;
}

#[tokio::test]
async fn with_iptables() {
    kube_proxy_leads_to_the_pod(Mode::Iptables).await;
}
