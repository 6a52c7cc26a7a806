//! The objects of the benchmarks, in a real API server: many Services of five endpoints, and one with a single
//! endpoint that is replaced again and again.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use http::header::CONTENT_TYPE;
use kube::Client;
use kube_lane_lab::Pod;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::objects::{self, Endpoint, Port};

/// What pods serve on.
pub(super) const TARGET: u16 = 8080;
/// What clients dial.
const PORT: u16 = 80;
/// The Service whose endpoint changes.
const CHANGING: &str = "changing";
const CHANGING_VIP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// The first of the many Services; the others follow, within the range of ClusterIPs.
const FIRST_VIP: Ipv4Addr = Ipv4Addr::new(10, 100, 0, 0);

const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
const NODES: &str = "/api/v1/nodes";

/// Requests under way at once while objects are created.
const CONCURRENCY: usize = 64;
/// How often a request is tried.
const ATTEMPTS: u32 = 8;

/// Where Service `index` answers.
pub(super) fn vip(index: usize) -> SocketAddr {
    let vip = FIRST_VIP.to_bits() + u32::try_from(index).unwrap_or(u32::MAX / 2);
    (Ipv4Addr::from_bits(vip), PORT).into()
}

/// Where the Service answers whose endpoint changes.
pub(super) fn changing_vip() -> SocketAddr {
    (CHANGING_VIP, PORT).into()
}

/// The Node that the proxies run on, and the Service that leads to `pod` at first.
pub(super) async fn create_node_and_changing(
    client: &Client,
    node: &kube_lane_lab::Node,
    pod: &Pod,
) -> Result<()> {
    create(client.clone(), NODES, objects::node(node.name(), &[node.v4()])).await?;
    let (ports, vip) = (ports(), CHANGING_VIP.into());
    create(client.clone(), SERVICES, objects::service(CHANGING, &[vip], &ports)).await?;
    let endpoint = Endpoint::ready(pod.v4(), node.name());
    create(client.clone(), SLICES, objects::slice(CHANGING, "v4", false, &ports, &[endpoint])).await
}

/// Creates the Services numbered `range`, each with all of `endpoints`; tells how it goes.
pub(super) async fn create_services(
    client: &Client,
    range: std::ops::Range<usize>,
    endpoints: &[Endpoint],
) -> Result<()> {
    let (begun, total) = (Instant::now(), range.len());
    let mut objects = range.flat_map(|index| {
        let (name, ports) = (format!("bench-{index:05}"), ports());
        [
            (SERVICES, objects::service(&name, &[vip(index).ip()], &ports)),
            (SLICES, objects::slice(&name, "v4", false, &ports, endpoints)),
        ]
    });
    let (mut tasks, mut done, mut told) = (JoinSet::new(), 0, begun);
    loop {
        while tasks.len() < CONCURRENCY
            && let Some((path, object)) = objects.next()
        {
            tasks.spawn(create(client.clone(), path, object));
        }
        let Some(created) = tasks.join_next().await else { break };
        created??;
        done += 1;
        if told.elapsed() > Duration::from_secs(5) {
            told = Instant::now();
            println!("  created {} of {total} Services", done / 2);
        }
    }
    println!("  created {total} Services and their slices in {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Replaces the endpoint of the changing Service; when the request was sent, and when its response had come.
pub(super) async fn lead_to(client: Client, endpoint: Endpoint) -> Result<(Instant, Instant)> {
    let slice = objects::slice(CHANGING, "v4", false, &ports(), &[endpoint]);
    let body = serde_json::to_vec(&json!({"endpoints": slice["endpoints"]}))?;
    let request = http::Request::patch(format!("{SLICES}/{CHANGING}-v4"))
        .header(CONTENT_TYPE, "application/merge-patch+json")
        .body(body)?;
    let sent = Instant::now();
    client.request_text(request).await.context("the slice cannot be changed")?;
    Ok((sent, Instant::now()))
}

fn ports() -> [Port; 1] {
    [Port::new("TCP", PORT, TARGET)]
}

async fn create(client: Client, path: &'static str, object: Value) -> Result<()> {
    let body = serde_json::to_vec(&object)?;
    let mut attempt = 0;
    loop {
        attempt += 1;
        let request =
            http::Request::post(path).header(CONTENT_TYPE, "application/json").body(body.clone())?;
        match client.request_text(request).await {
            Ok(_) => return Ok(()),
            // An earlier attempt whose answer was lost.
            Err(kube::Error::Api(status)) if attempt > 1 && status.reason == "AlreadyExists" => return Ok(()),
            Err(error) if attempt == ATTEMPTS => {
                bail!("{} cannot be created: {error}", object["metadata"]["name"])
            }
            // A busy server asks to come again.
            Err(_) => tokio::time::sleep(Duration::from_millis(100) * attempt).await,
        }
    }
}
