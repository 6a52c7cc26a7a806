//! The objects of the benchmarks, in a real API server: many Services of five endpoints, and one with a single
//! endpoint that is replaced again and again.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use http::header::CONTENT_TYPE;
use k8s_openapi::ByteString;
use kube::{Client, Config};
use kube_lane_lab::Pod;
use serde_json::{Value, json};

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

/// Objects written in one transaction: as many as etcd takes.
const PUTS: usize = 128;
/// How long the API server may take to see what was written.
const SERVED: Duration = Duration::from_secs(120);

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
    create(client, NODES, objects::node(node.name(), &[node.v4()])).await?;
    let (ports, vip) = (ports(), CHANGING_VIP.into());
    create(client, SERVICES, objects::service(CHANGING, &[vip], &ports)).await?;
    let endpoint = Endpoint::ready(pod.v4(), node.name());
    create(client, SLICES, objects::slice(CHANGING, "v4", false, &ports, &[endpoint])).await
}

/// Lets there be the Services numbered `range`, each with all of `endpoints`.
///
/// The first is created through the API server; the others are written to its etcd as it stored that one, because it
/// counts all ClusterIPs anew for every Service that it creates, which at 50,000 takes hours. It serves them as its own.
pub(super) async fn create_services(
    client: &Client,
    etcd: SocketAddr,
    range: Range<usize>,
    endpoints: &[Endpoint],
) -> Result<()> {
    let (begun, total) = (Instant::now(), range.len());
    let first = Paths::of(0);
    if range.start == 0 {
        let (name, ports) = (name(0), ports());
        create(client, SERVICES, objects::service(&name, &[vip(0).ip()], &ports)).await?;
        create(client, SLICES, objects::slice(&name, "v4", false, &ports, endpoints)).await?;
    }
    let [address, service, slice] = [
        get(client, &first.address).await?,
        get(client, &first.service).await?,
        get(client, &first.slice).await?,
    ];
    let etcd = Client::try_from(Config::new(format!("http://{etcd}").parse()?))?;
    let written = range.start.max(1)..range.end;
    // Each Service finds its address allocated when it comes.
    let addresses = written.clone().map(|index| {
        let mut copy = copy(&address, &vip(index).ip().to_string(), index);
        copy["spec"]["parentRef"]["name"] = name(index).into();
        (format!("/registry/ipaddresses/{}", vip(index).ip()), copy)
    });
    put(&etcd, addresses).await?;
    let Some(last) = written.clone().last() else { return Ok(()) };
    let last = Paths::of(last);
    served(client, &last.address).await?;
    let services = written.flat_map(|index| {
        let (name, vip) = (name(index), vip(index).ip().to_string());
        let mut service = copy(&service, &name, index);
        service["spec"]["clusterIPs"] = json!([vip]);
        service["spec"]["clusterIP"] = vip.into();
        let mut slice = copy(&slice, &format!("{name}-v4"), index);
        slice["metadata"]["labels"]["kubernetes.io/service-name"] = name.as_str().into();
        [
            (format!("/registry/endpointslices/default/{name}-v4"), slice),
            (format!("/registry/services/specs/default/{name}"), service),
        ]
    });
    put(&etcd, services).await?;
    served(client, &last.slice).await?;
    served(client, &last.service).await?;
    println!("  {total} more Services and their slices in {:.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Where the API server has the objects of a Service.
struct Paths {
    address: String,
    service: String,
    slice: String,
}

impl Paths {
    fn of(index: usize) -> Self {
        let name = name(index);
        Self {
            address: format!("/apis/networking.k8s.io/v1/ipaddresses/{}", vip(index).ip()),
            service: format!("{SERVICES}/{name}"),
            slice: format!("{SLICES}/{name}-v4"),
        }
    }
}

fn name(index: usize) -> String {
    format!("bench-{index:05}")
}

/// An object like `object`, but for its identity.
fn copy(object: &Value, name: &str, index: usize) -> Value {
    let mut copy = object.clone();
    copy["metadata"]["name"] = name.into();
    copy["metadata"]["uid"] = format!("00000000-0000-4000-8000-{index:012x}").into();
    copy
}

/// An object as etcd holds it.
async fn get(client: &Client, path: &str) -> Result<Value> {
    let text = client.request_text(http::Request::get(path).body(vec![])?).await?;
    let mut object: Value = serde_json::from_str(&text)?;
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("resourceVersion");
    }
    Ok(object)
}

/// Waits until the API server's cache, which lists come from, has an object.
async fn served(client: &Client, path: &str) -> Result<()> {
    let deadline = Instant::now() + SERVED;
    loop {
        let request = http::Request::get(format!("{path}?resourceVersion=0")).body(vec![])?;
        match client.request_text(request).await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => bail!("{path} is not served: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Writes objects to etcd, through its gateway for HTTP.
async fn put(etcd: &Client, objects: impl Iterator<Item = (String, Value)>) -> Result<()> {
    let mut objects = objects.peekable();
    while objects.peek().is_some() {
        let mut puts = Vec::with_capacity(PUTS);
        for (key, object) in objects.by_ref().take(PUTS) {
            let (key, value) = (ByteString(key.into_bytes()), ByteString(serde_json::to_vec(&object)?));
            puts.push(json!({"requestPut": {"key": key, "value": value}}));
        }
        let body = serde_json::to_vec(&json!({"success": puts}))?;
        let request =
            http::Request::post("/v3/kv/txn").header(CONTENT_TYPE, "application/json").body(body)?;
        etcd.request_text(request).await.context("etcd")?;
    }
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

async fn create(client: &Client, path: &'static str, object: Value) -> Result<()> {
    let body = serde_json::to_vec(&object)?;
    let request = http::Request::post(path).header(CONTENT_TYPE, "application/json").body(body)?;
    let created = client.request_text(request).await;
    created.map(drop).with_context(|| format!("{} cannot be created", object["metadata"]["name"]))
}
