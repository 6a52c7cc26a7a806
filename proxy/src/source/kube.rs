//! The API server: Services, EndpointSlices, the own Node and the ServiceCIDRs, listed and watched.
//!
//! Owns the connection and everything that may happen to it. Never forgets what is known because a server is away:
//! an object is gone when a server says so, or no longer lists it.

mod client;
mod credentials;
mod dial;
mod health;
mod keeper;
mod list;
mod memory;
mod protobuf;
mod proxy;
mod servers;
#[cfg(test)]
mod tests;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use self::client::Connected;
pub use self::client::SourceError;
pub use self::credentials::{CredentialError, Plugin};
use self::health::Health;
use self::keeper::{OwnNode, ServiceCidrs, Services, Slices};
pub use self::proxy::ProxyError;
pub use self::servers::{ApiServers, Environment, ServerStatus};
use self::watch::{Shared, Watch};
use super::problem::Problem;
use crate::model::input::{Change, Event, Origin, ServiceKey};

/// How often addresses of the API server that did not answer are tried again.
const RECHECK: Duration = Duration::from_secs(15);

/// How to reach the API server, and who asks.
#[derive(Clone, Debug, Default)]
pub struct KubeSourceConfig {
    /// `--kubeconfig`. With neither this nor `master`, the Pod's own service account is used.
    pub kubeconfig: Option<PathBuf>,
    /// The kubeconfig that `--config-base` names, which is used where neither is given and the environment names no
    /// real address.
    pub base_kubeconfig: Option<PathBuf>,
    /// What the environment says of the API server.
    pub environment: Environment,
    /// Where the real endpoints of the API server are remembered; `None`: nowhere.
    pub state_dir: Option<PathBuf>,
    /// `--master`: the server's URL, instead of the kubeconfig's.
    pub master: Option<String>,
    /// The own node's name.
    pub node: String,
    /// The credential plugin of the kubeconfig, where it has one: all clients use the same answer.
    pub plugin: Plugin,
    /// Who hears of what is wrong with a Service, beside the log.
    pub complaints: Option<mpsc::UnboundedSender<Complaint>>,
}

/// What is wrong with a Service of the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// The Service.
    pub service: ServiceKey,
    /// What is wrong with it.
    pub problem: Problem,
}

/// A client with the source's credentials, for what is written to the API server.
///
/// # Errors
/// When the credentials cannot be read, or are no credentials.
pub async fn client(config: &KubeSourceConfig, servers: &ApiServers) -> Result<kube::Client, SourceError> {
    client::connect(config, servers).await.map(|connected| connected.client)
}

/// Whether [`spawn`] would take this: nothing is connected.
///
/// # Errors
/// When the kubeconfig, or what it names, cannot be used.
pub async fn check(config: &KubeSourceConfig) -> Result<(), SourceError> {
    client::check(config).await
}

/// Follows the API server until the receiver is dropped. The server need not be up; the kubeconfig must be good.
///
/// # Errors
/// When the credentials cannot be read, or are no credentials.
pub async fn spawn(
    config: KubeSourceConfig,
    servers: ApiServers,
    events: mpsc::Sender<Vec<Event>>,
) -> Result<JoinHandle<()>, SourceError> {
    let Connected { client, server, fingerprint } = client::connect(&config, &servers).await?;
    let node = OwnNode::new(config.node.clone());
    let recheck = tokio::spawn(recheck(config.clone(), servers.clone()));
    let unlisted = AtomicUsize::new(4);
    let complaints = config.complaints.clone();
    let health = Health::new(server, servers.clone());
    let shared = Arc::new(Shared { config, servers, health, events, unlisted });
    let first = (client, fingerprint);
    let services =
        tokio::spawn(Watch::new(Arc::clone(&shared), first.clone(), Services::new(complaints)).run());
    let slices = tokio::spawn(Watch::new(Arc::clone(&shared), first.clone(), Slices::new(None)).run());
    let node = tokio::spawn(Watch::new(Arc::clone(&shared), first.clone(), node).run());
    let cidrs = tokio::spawn(Watch::new(shared, first, ServiceCidrs::new()).run());
    Ok(tokio::spawn(async move {
        for ended in [services.await, slices.await, node.await, cidrs.await] {
            if let Err(error) = ended {
                tracing::error!(%error, "a watch ended by a defect of its own");
            }
        }
        recheck.abort();
    }))
}

/// Tries the addresses again that did not answer, so that no watch has to wait for one that still does not.
async fn recheck(config: KubeSourceConfig, servers: ApiServers) {
    loop {
        sleep(RECHECK).await;
        for candidate in servers.silent() {
            // Certificates may be others now.
            let Ok((dialer, url)) = client::dialer(&config, &servers).await else { break };
            if dialer.dial_quickly(candidate, &url).await.is_ok() {
                servers.answers_again(candidate);
            }
        }
    }
}

fn api_event(change: Change) -> Event {
    Event::Source { origin: Origin::Api, change }
}
