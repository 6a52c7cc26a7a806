//! The source against a server of an older release, which refuses what the newest ones take. All other servers are real
//! ones, in the lane `cluster`.

use std::collections::BTreeSet;
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
        return refusal(StatusCode::BAD_REQUEST, "\"spec.clusterIP\" is not a known field selector");
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

#[tokio::test]
async fn a_server_may_know_neither_the_field_selector_nor_service_cidrs() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = KubeSourceConfig {
        master: Some(format!("http://{}", listener.local_addr().unwrap())),
        node: "node-a".into(),
        ..KubeSourceConfig::default()
    };
    let server = Router::new()
        .route("/api/v1/services", get(services))
        .route("/api/v1/nodes", get(nothing))
        .route("/apis/discovery.k8s.io/v1/endpointslices", get(nothing))
        .fallback(unknown);
    tokio::spawn(async move { axum::serve(listener, server).await });

    let (sender, mut events) = mpsc::channel(64);
    let servers = ApiServers::open(&config);
    spawn(config, servers, sender).await.unwrap();
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
