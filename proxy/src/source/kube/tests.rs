//! The source against a server of an older release, which refuses what the newest ones take. All other servers are real
//! ones, in the lane `cluster`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, Uri};
use axum::routing::get;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{ApiServers, KubeSourceConfig, spawn};
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
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = KubeSourceConfig {
        master: Some(format!("http://{}", listener.local_addr().unwrap())),
        node: "node-a".into(),
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
