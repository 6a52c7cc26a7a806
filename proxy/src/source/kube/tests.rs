//! The source against servers that refuse what the newest ones take, or are no API servers. All other servers are real ones,
//! in the lane `cluster`.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::header::LOCATION;
use axum::http::{HeaderName, StatusCode, Uri};
use axum::response::AppendHeaders;
use axum::routing::get;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{ApiServers, Complaint, KubeSourceConfig, spawn};
use crate::model::input::{Change, Event};

type Answer = (StatusCode, String);

/// As Kubernetes 1.30 answers: a Service is not selected by its address.
async fn services(uri: Uri) -> Answer {
    if asks(&uri, "fieldSelector=") {
        return refusal(StatusCode::BAD_REQUEST, "field label not supported: spec.clusterIP");
    }
    let service = |name: &str, address: &str| {
        json!({
            "metadata": {"name": name, "namespace": "default", "resourceVersion": "1"},
            "spec": {"clusterIP": address, "ports": [{"port": 80}]},
        })
    };
    list(&uri, &[service("web", "10.0.0.1"), service("headless", "None")]).await
}

async fn nothing(uri: Uri) -> Answer {
    list(&uri, &[]).await
}

async fn unknown() -> Answer {
    refusal(StatusCode::NOT_FOUND, "the server could not find the requested resource")
}

fn asks(uri: &Uri, what: &str) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|part| part.starts_with(what)))
}

fn refusal(code: StatusCode, message: &str) -> Answer {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "message": message, "code": code.as_u16(),
    });
    (code, status.to_string())
}

/// A list in JSON; a watch in which nothing happens.
async fn list(uri: &Uri, items: &[Value]) -> Answer {
    if asks(uri, "watch=") {
        return std::future::pending().await;
    }
    (StatusCode::OK, json!({"metadata": {"resourceVersion": "1"}, "items": items}).to_string())
}

/// Follows the server of these routes, besides which it has no objects.
async fn follow(routes: Router) -> mpsc::Receiver<Vec<Event>> {
    follow_with(routes, None).await
}

async fn follow_with(
    routes: Router,
    complaints: Option<mpsc::UnboundedSender<Complaint>>,
) -> mpsc::Receiver<Vec<Event>> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = KubeSourceConfig {
        master: Some(format!("http://{}", listener.local_addr().unwrap())),
        node: "node-a".into(),
        complaints,
        ..KubeSourceConfig::default()
    };
    let server = routes
        .route("/api/v1/nodes", get(nothing))
        .route("/apis/discovery.k8s.io/v1/endpointslices", get(nothing))
        .fallback(unknown);
    tokio::spawn(async move { axum::serve(listener, server).await });
    let (sender, events) = mpsc::channel(64);
    let servers = ApiServers::open(&config);
    spawn(config, servers, sender).await.unwrap();
    events
}

#[tokio::test]
async fn a_server_may_know_neither_the_field_selector_nor_service_cidrs() {
    let mut events = follow(Router::new().route("/api/v1/services", get(services))).await;
    let mut services = BTreeSet::new();
    let synced = async {
        loop {
            for event in events.recv().await.unwrap() {
                match event {
                    Event::Source { change: Change::Service(service), .. } => {
                        services.insert(service.key.to_string());
                    }
                    Event::Source { change: Change::Synced, .. } => return,
                    _ => {}
                }
            }
        }
    };
    timeout(Duration::from_secs(60), synced).await.expect("the Services are listed");
    assert_eq!(services, BTreeSet::from(["default/web".to_owned()]));
}

/// Answers lists until a watch is asked for. It forgets that watch's version at once, and from then on says in the form of a success that it has none.
async fn fails_with_success(uri: Uri, refusals: mpsc::Sender<()>, watched: &AtomicBool) -> Answer {
    let web = json!({
        "metadata": {"name": "web", "namespace": "default", "resourceVersion": "1"},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]},
    });
    if asks(&uri, "watch=") {
        watched.store(true, Ordering::Relaxed);
        let (_, status) = refusal(StatusCode::GONE, "too old");
        return (StatusCode::OK, format!("{{\"type\":\"ERROR\",\"object\":{status}}}\n"));
    }
    if !watched.load(Ordering::Relaxed) {
        return list(&uri, &[web]).await;
    }
    let _ = refusals.send(()).await;
    let (_, status) = refusal(StatusCode::INTERNAL_SERVER_ERROR, "etcd is down");
    (StatusCode::OK, status)
}

#[tokio::test]
async fn what_is_no_list_removes_nothing() {
    let (refuse, mut refusals) = mpsc::channel(1);
    let watched = Arc::new(AtomicBool::new(false));
    let services = move |uri: Uri| {
        let (refuse, watched) = (refuse.clone(), Arc::clone(&watched));
        async move { fails_with_success(uri, refuse, &watched).await }
    };
    let mut events = follow(Router::new().route("/api/v1/services", get(services))).await;
    // The channel holds one: at the third, the first two have been read and acted on.
    for _ in 0..3 {
        timeout(Duration::from_secs(60), refusals.recv()).await.expect("a list is asked for again").unwrap();
    }
    let mut seen = 0;
    while let Ok(batch) = events.try_recv() {
        for event in batch {
            match event {
                Event::Source { change: Change::Service(_), .. } => seen += 1,
                Event::Source { change: Change::ServiceGone(key), .. } => panic!("{key} is gone"),
                _ => {}
            }
        }
    }
    assert_eq!(seen, 1);
}

/// What the source says of a server that answers everything like this.
async fn trouble_with(status: StatusCode, headers: &[(HeaderName, &str)], body: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let headers: Vec<_> = headers.iter().map(|(name, value)| (name.clone(), (*value).to_owned())).collect();
    let answer = (status, AppendHeaders(headers), body.to_owned());
    let server = Router::new().fallback(move || std::future::ready(answer));
    tokio::spawn(async move { axum::serve(listener, server).await });
    trouble(KubeSourceConfig { master: Some(format!("http://{address}")), ..KubeSourceConfig::default() })
        .await
}

/// Why the source cannot watch, in the words of `status`.
async fn trouble(config: KubeSourceConfig) -> String {
    let servers = ApiServers::open(&config);
    let mut status = servers.status();
    let (sender, _events) = mpsc::channel(64);
    let source = spawn(config, servers, sender).await.unwrap();
    let status = timeout(Duration::from_secs(60), status.wait_for(|status| status.trouble.is_some()));
    let trouble = status.await.expect("it says why").unwrap().trouble.clone().unwrap();
    source.abort();
    trouble
}

#[tokio::test]
async fn the_hint_fits_the_trouble() {
    let status = |code| refusal(code, "words");
    let html = "<html><title>Log in</title></html>";
    let up = "is the API server up";
    for ((code, body), parts) in [
        (status(StatusCode::UNAUTHORIZED), ["words (401)", "are the credentials of the kubeconfig"]),
        (status(StatusCode::FORBIDDEN), ["words (403)", "ClusterRole"]),
        (status(StatusCode::TOO_MANY_REQUESTS), ["words (429)", "the API server's own log"]),
        ((StatusCode::OK, html.into()), ["Log in", "is what answers there an API server"]),
        ((StatusCode::BAD_GATEWAY, html.into()), ["(502)", "a load balancer's page"]),
        ((StatusCode::NOT_FOUND, html.into()), ["(404)", "is what answers there an API server"]),
        ((StatusCode::OK, "ok".into()), ["\"ok\"", "is what answers there an API server"]),
        ((StatusCode::OK, String::new()), ["the answer is no object", "is what answers there an API server"]),
        ((StatusCode::OK, "{\"a\": 1}".into()), ["cannot be read", "is what answers there an API server"]),
    ] {
        let trouble = trouble_with(code, &[], &body).await;
        let fits = parts.iter().all(|part| trouble.contains(part)) && !trouble.contains(up);
        assert!(fits, "{code} {body}: {trouble}");
    }
    let location = [(LOCATION, "https://login.example/")];
    let redirected = trouble_with(StatusCode::FOUND, &location, "").await;
    let parts = ["302 Found", "https://login.example/", "a login in front of it"];
    assert!(parts.iter().all(|part| redirected.contains(part)), "{redirected}");

    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let config = KubeSourceConfig { master: Some(format!("http://{nobody}")), ..KubeSourceConfig::default() };
    let refused = trouble(config).await;
    assert!(refused.contains(up), "{refused}");
}

/// A watch in which one object cannot be read, and the next one can.
async fn odd_service(uri: Uri) -> Answer {
    if !asks(&uri, "watch=") {
        return list(&uri, &[]).await;
    }
    let odd = json!({"metadata": {"name": "odd", "namespace": "default", "resourceVersion": "2"}, "spec": {"ports": 7}});
    let web = json!({
        "metadata": {"name": "web", "namespace": "default", "resourceVersion": "3"},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]},
    });
    let event = |object: &Value| json!({"type": "ADDED", "object": object}).to_string() + "\n";
    (StatusCode::OK, event(&odd) + &event(&web))
}

#[tokio::test]
async fn an_object_that_cannot_be_read_holds_up_no_other() {
    let mut events = follow(Router::new().route("/api/v1/services", get(odd_service))).await;
    let web = async {
        loop {
            for event in events.recv().await.unwrap() {
                if let Event::Source { change: Change::Service(service), .. } = event {
                    return service.key.to_string();
                }
            }
        }
    };
    assert_eq!(timeout(Duration::from_secs(60), web).await.expect("a Service comes"), "default/web");
}

#[tokio::test]
async fn another_client_is_due_where_what_it_was_made_of_has_changed() {
    let folder = std::env::temp_dir().join(format!("kube-lane-fingerprint-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    let user = json!({
        "client-certificate": "client.crt", "client-key": "client.key",
        "auth-provider": {"name": "none", "config": {"a": "1", "b": "2", "c": "3", "d": "4", "e": "5"}},
    });
    let kubeconfig = |server: &str| {
        json!({
            "clusters": [{"name": "c", "cluster": {"server": server}}], "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}], "current-context": "x",
        })
    };
    write("kubeconfig", &kubeconfig("https://192.0.2.1").to_string());
    write("client.crt", "one");
    let config =
        KubeSourceConfig { kubeconfig: Some(folder.join("kubeconfig")), ..KubeSourceConfig::default() };
    let now = async || super::client::fingerprint(&config).await.unwrap();
    let first = now().await;
    assert_eq!(now().await, first);
    write("client.crt", "two");
    let second = now().await;
    assert_ne!(second, first);
    write("kubeconfig", &kubeconfig("https://192.0.2.2").to_string());
    assert_ne!(now().await, second);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[tokio::test]
async fn addresses_that_do_not_answer_are_dialed_beside_each_other() {
    let [first, second] = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let [first_at, second_at] = [&first, &second].map(|listener| listener.local_addr().unwrap());
    let folder = std::env::temp_dir().join(format!("kube-lane-silent-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let content = json!({"version": 1, "endpoints": [second_at]});
    std::fs::write(folder.join("api-servers.json"), content.to_string()).unwrap();
    let config = KubeSourceConfig {
        master: Some(format!("https://{first_at}")),
        state_dir: Some(folder.clone()),
        ..KubeSourceConfig::default()
    };
    let servers = ApiServers::open(&config);
    let (sender, _events) = mpsc::channel(64);
    let source = spawn(config, servers, sender).await.unwrap();
    let given_up = tokio::task::spawn_blocking(move || {
        // Both take connections, and say nothing.
        let (mut waiting, _) = first.accept().unwrap();
        let _other = second.accept().unwrap();
        waiting.set_nonblocking(true).unwrap();
        // What it has sent, then nothing yet, or the end where it was given up before the other was dialed.
        let mut hello = Vec::new();
        waiting.read_to_end(&mut hello).is_ok()
    });
    let given_up = timeout(Duration::from_secs(60), given_up).await.expect("both are dialed").unwrap();
    assert!(!given_up);
    source.abort();
    std::fs::remove_dir_all(&folder).unwrap();
}

#[tokio::test]
async fn what_is_wrong_with_a_service_is_told() {
    let services = async |uri: Uri| {
        let ranged = json!({
            "metadata": {"name": "web", "namespace": "default", "resourceVersion": "1"},
            "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}], "loadBalancerSourceRanges": ["all"]},
        });
        list(&uri, &[ranged]).await
    };
    let (told, mut complaints) = mpsc::unbounded_channel();
    let _events = follow_with(Router::new().route("/api/v1/services", get(services)), Some(told)).await;
    let mut next =
        async || timeout(Duration::from_secs(60), complaints.recv()).await.expect("in time").unwrap();
    assert_eq!(next().await.problem.field, "spec.loadBalancerSourceRanges[0]");
    let Complaint { service, problem } = next().await;
    assert_eq!((service.as_str(), problem.field.as_str()), ("default/web", "spec.loadBalancerSourceRanges"));
    assert_eq!(problem.remedy, "no range is left: everybody is let through");
}
