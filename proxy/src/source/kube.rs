//! The API server: Services, EndpointSlices, the own Node and the ServiceCIDRs, listed and watched.
//!
//! Owns the connection and everything that may happen to it. Never forgets what is known because a server is away:
//! an object is gone when a server says so, or no longer lists it.

mod client;
mod health;
mod keeper;
mod list;
mod protobuf;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

pub use self::client::SourceError;
use self::health::Health;
use self::keeper::{OwnNode, ServiceCidrs, Services, Slices};
use self::watch::{Shared, Watch};
use crate::model::input::{Change, Event, Origin};

/// How to reach the API server, and who asks.
#[derive(Clone, Debug)]
pub struct KubeSourceConfig {
    /// `--kubeconfig`. With neither this nor `master`, the Pod's own service account is used.
    pub kubeconfig: Option<PathBuf>,
    /// `--master`: the server's URL, instead of the kubeconfig's.
    pub master: Option<String>,
    /// The own node's name.
    pub node: String,
}

/// A client with the source's credentials, for what is written to the API server.
///
/// # Errors
/// When the credentials cannot be read, or are no credentials.
pub async fn client(config: &KubeSourceConfig) -> Result<kube::Client, SourceError> {
    client::connect(config).await.map(|(client, _)| client)
}

/// Follows the API server until the receiver is dropped. The server need not be up; the kubeconfig must be good.
///
/// # Errors
/// When the credentials cannot be read, or are no credentials.
pub async fn spawn(
    config: KubeSourceConfig,
    events: mpsc::Sender<Vec<Event>>,
) -> Result<JoinHandle<()>, SourceError> {
    let (client, server) = client::connect(&config).await?;
    let node = OwnNode::new(config.node.clone());
    let shared =
        Arc::new(Shared { config, health: Health::new(server), events, unlisted: AtomicUsize::new(4) });
    let services = tokio::spawn(Watch::new(Arc::clone(&shared), client.clone(), Services::new()).run());
    let slices = tokio::spawn(Watch::new(Arc::clone(&shared), client.clone(), Slices::new()).run());
    let node = tokio::spawn(Watch::new(Arc::clone(&shared), client.clone(), node).run());
    let cidrs = tokio::spawn(Watch::new(shared, client, ServiceCidrs::new()).run());
    Ok(tokio::spawn(async move {
        for ended in [services.await, slices.await, node.await, cidrs.await] {
            if let Err(error) = ended {
                tracing::error!(%error, "a watch ended by a defect of its own");
            }
        }
    }))
}

fn api_event(change: Change) -> Event {
    Event::Source { origin: Origin::Api, change }
}
