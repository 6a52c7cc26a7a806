//! The control plane that the other tests of this lane stand on.

use std::pin::pin;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use kube::api::{Api, DeleteParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube_lane_tests::controlplane::{ControlPlane, client};
use serde_json::json;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

fn service(name: &str, cluster_ip: &str) -> Service {
    let port = json!({"name": "http", "port": 80});
    let spec = json!({"clusterIP": cluster_ip, "ports": [port]});
    serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap()
}

/// Waits until the watch shows the Service `name`.
async fn see<E>(watch: &mut (impl Stream<Item = Result<Service, E>> + Unpin), name: &str) -> Service {
    let seen = async {
        loop {
            // An error is what a watch says during an outage; it goes on by itself.
            match watch.next().await.expect("a watch never ends") {
                Ok(service) if service.metadata.name.as_deref() == Some(name) => return service,
                _ => {}
            }
        }
    };
    tokio::time::timeout(LIMIT, seen).await.expect("seen in time")
}

#[tokio::test]
async fn a_watch_shows_services_before_and_after_an_outage() {
    let mut control_plane = ControlPlane::start().await.unwrap();
    let services: Api<Service> = Api::default_namespaced(control_plane.client().await.unwrap());
    let mut watch =
        pin!(watcher(services.clone(), watcher::Config::default()).default_backoff().applied_objects());

    services.create(&PostParams::default(), &service("before", "10.100.0.1")).await.unwrap();
    let seen = see(&mut watch, "before").await;
    assert_eq!(seen.spec.unwrap().cluster_ip.as_deref(), Some("10.100.0.1"));

    control_plane.stop_apiserver();
    assert!(services.list(&Default::default()).await.is_err());
    control_plane.restart_apiserver().await.unwrap();

    services.create(&PostParams::default(), &service("after", "10.100.0.2")).await.unwrap();
    see(&mut watch, "after").await;
    services.delete("before", &DeleteParams::default()).await.unwrap();
}

#[tokio::test]
async fn a_service_account_may_do_only_what_rbac_grants() {
    let control_plane = ControlPlane::start().await.unwrap();
    let accounts: Api<ServiceAccount> = Api::default_namespaced(control_plane.client().await.unwrap());
    let account = serde_json::from_value(json!({"metadata": {"name": "nobody"}})).unwrap();
    accounts.create(&PostParams::default(), &account).await.unwrap();

    let kubeconfig = control_plane.kubeconfig_for_service_account("default", "nobody").await.unwrap();
    let services: Api<Service> = Api::all(client(&kubeconfig).await.unwrap());
    match services.list(&Default::default()).await.unwrap_err() {
        kube::Error::Api(status) => assert_eq!(status.code, 403, "{status:?}"),
        other => panic!("{other}"),
    }
}
