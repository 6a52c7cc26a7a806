//! The HTTP client: from `--kubeconfig`, `--master` or the Pod's service account to requests.
//!
//! Owns credentials and the connection's own timeouts. Never retries: the watches do, with one backoff each.

use std::path::PathBuf;
use std::time::Duration;

use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};

use super::KubeSourceConfig;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);
/// A connection that is silent for so long is asked whether it still lives.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Why the API source cannot start, or cannot renew its credentials.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The kubeconfig cannot be used.
    #[error("kubeconfig {}: {source}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<KubeconfigError>,
    },
    /// Neither `--kubeconfig` nor `--master`, and this is no Pod with a service account.
    #[error("no --kubeconfig and no --master, and not in a Pod: {0}")]
    InCluster(#[source] Box<InClusterError>),
    /// `--master` is no URL.
    #[error("--master {url}: {source}")]
    Master {
        /// What was given.
        url: String,
        /// What is wrong with it.
        #[source]
        source: http::uri::InvalidUri,
    },
    /// The credentials or the certificate authority cannot be used.
    #[error("credentials for {server}: {source}")]
    Client {
        /// The API server's URL.
        server: String,
        /// What is wrong with them.
        #[source]
        source: Box<kube::Error>,
    },
}

/// Reads the credentials afresh. Returns the client and the server's URL.
pub(super) async fn connect(source: &KubeSourceConfig) -> Result<(Client, String), SourceError> {
    let config = configure(source).await?;
    let server = config.cluster_url.to_string();
    match build(config) {
        Ok(client) => Ok((client, server)),
        Err(source) => Err(SourceError::Client { server, source: Box::new(source) }),
    }
}

async fn configure(source: &KubeSourceConfig) -> Result<Config, SourceError> {
    let master = match &source.master {
        None => None,
        Some(url) => match url.parse::<http::Uri>() {
            Ok(uri) => Some(uri),
            Err(source) => return Err(SourceError::Master { url: url.clone(), source }),
        },
    };
    let mut config = match (&source.kubeconfig, &master) {
        (Some(path), _) => {
            let failed = |source| SourceError::Kubeconfig { path: path.clone(), source: Box::new(source) };
            let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)?
        }
        (None, Some(master)) => Config::new(master.clone()),
        (None, None) => Config::incluster().map_err(|source| SourceError::InCluster(Box::new(source)))?,
    };
    if let Some(master) = master {
        config.cluster_url = master;
    }
    Ok(config)
}

/// kube's own stack, less its proxy, its retries and its tracing layer, which logs each failed request as an error;
/// with TCP keepalive, so that a connection whose other end is gone is noticed.
fn build(config: Config) -> Result<Client, kube::Error> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT));
    connector.set_keepalive(Some(KEEPALIVE));
    connector.set_keepalive_interval(Some(KEEPALIVE));
    connector.set_keepalive_retries(Some(3));
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(HyperClient::builder(TokioExecutor::new()).build::<_, Body>(connector));
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}
