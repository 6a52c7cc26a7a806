//! The HTTP client: from `--kubeconfig`, `--master` or the Pod's service account to requests.
//!
//! Owns credentials, and where the configured address comes from. Never retries: the watches do, with one backoff each.

use std::path::{Path, PathBuf};

use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};

use super::KubeSourceConfig;
use super::dial::Dialer;
use super::servers::{ApiServers, Source, Target};
use crate::causes::with_causes;

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
pub(super) async fn connect(
    source: &KubeSourceConfig,
    servers: &ApiServers,
) -> Result<(Client, String), SourceError> {
    let (config, dialer) = prepare(source, servers).await?;
    let server = config.cluster_url.to_string();
    match build(config, dialer) {
        Ok(client) => Ok((client, server)),
        Err(source) => Err(SourceError::Client { server, source: Box::new(source) }),
    }
}

/// Reads the credentials afresh, and tells `servers` which address they are for. Returns what connects there, and the URL.
pub(super) async fn dialer(
    source: &KubeSourceConfig,
    servers: &ApiServers,
) -> Result<(Dialer, http::Uri), SourceError> {
    prepare(source, servers).await.map(|(config, dialer)| (dialer, config.cluster_url))
}

async fn prepare(source: &KubeSourceConfig, servers: &ApiServers) -> Result<(Config, Dialer), SourceError> {
    let Configured { config, origin, proxy, unusable_base } = configure(source).await?;
    servers.configured(Target {
        url: config.cluster_url.clone(),
        source: origin,
        // The agent's token must not go to whoever has another server's address now. Where a proxy is meant to be in
        // between, the endpoints' own addresses mean nothing.
        may_fall_back: proxy.is_none()
            && config.cluster_url.scheme_str() == Some("https")
            && !config.accept_invalid_certs,
        ignored_proxy: proxy,
        unusable_base: unusable_base.as_ref().map(|error| with_causes(error)),
    });
    let server = config.cluster_url.to_string();
    let dialer = Dialer::new(&config, servers.clone());
    let dialer = dialer.map_err(|source| SourceError::Client { server, source: Box::new(source) })?;
    Ok((config, dialer))
}

/// What the user wrote, or what the kubelet gave.
struct Configured {
    config: Config,
    origin: Source,
    proxy: Option<String>,
    /// Why the kubeconfig of the base is not used.
    unusable_base: Option<SourceError>,
}

/// Whether the agent could start with this as it is meant: the kubeconfig can be read, and so can the certificates and keys
/// that it names.
///
/// # Errors
/// When one of them cannot.
pub(super) async fn check(source: &KubeSourceConfig) -> Result<(), SourceError> {
    let Configured { config, unusable_base, .. } = configure(source).await?;
    if let Some(error) = unusable_base {
        return Err(error);
    }
    let server = config.cluster_url.to_string();
    let usable = config.rustls_client_config().and_then(|_| config.auth_layer()).map(drop);
    usable.map_err(|source| SourceError::Client { server, source: Box::new(source) })
}

async fn configure(source: &KubeSourceConfig) -> Result<Configured, SourceError> {
    let master = match &source.master {
        None => None,
        Some(url) => match url.parse::<http::Uri>() {
            Ok(uri) => Some(uri),
            Err(source) => return Err(SourceError::Master { url: url.clone(), source }),
        },
    };
    // The base is kube-proxy's configuration: what the pod's environment names goes before it, unless --master asks for
    // nothing but credentials.
    let base = source.base_kubeconfig.as_ref();
    let base = base.filter(|_| master.is_some() || !source.environment.names_a_server());
    let mut configured = match (source.kubeconfig.as_ref(), base, &master) {
        (Some(path), _, _) => read(path, Source::Kubeconfig(path.clone())).await?,
        // An unusable base does not keep the agent from starting where there is another way to the server.
        (None, Some(path), _) => match read(path, Source::Base(path.clone())).await {
            Ok(configured) => configured,
            Err(error) => match in_cluster(source) {
                Ok(configured) => Configured { unusable_base: Some(error), ..configured },
                Err(_) => return Err(error),
            },
        },
        (None, None, Some(master)) => {
            let config = Config::new(master.clone());
            Configured { config, origin: Source::Master, proxy: None, unusable_base: None }
        }
        (None, None, None) => in_cluster(source)?,
    };
    if let Some(master) = master {
        configured.config.cluster_url = master;
        configured.origin = Source::Master;
    }
    Ok(configured)
}

fn in_cluster(source: &KubeSourceConfig) -> Result<Configured, SourceError> {
    let config = Config::incluster().map_err(|source| SourceError::InCluster(Box::new(source)))?;
    let named = source.environment.names_a_server();
    let origin = if named { Source::Environment } else { Source::Service };
    Ok(Configured { config, origin, proxy: None, unusable_base: None })
}

async fn read(path: &Path, origin: Source) -> Result<Configured, SourceError> {
    let failed = |source| SourceError::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
    let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
    let proxy = proxy(&kubeconfig);
    let config =
        Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)?;
    Ok(Configured { config, origin, proxy, unusable_base: None })
}

/// `proxy-url` of the current context's cluster.
fn proxy(kubeconfig: &Kubeconfig) -> Option<String> {
    let current = kubeconfig.current_context.as_ref()?;
    let context = kubeconfig.contexts.iter().find(|context| context.name == *current)?.context.as_ref()?;
    let cluster = kubeconfig.clusters.iter().find(|cluster| cluster.name == context.cluster)?;
    cluster.cluster.as_ref()?.proxy_url.clone().filter(|url| !url.is_empty())
}

/// kube's own stack, less its connector, its retries and its tracing layer, which logs each failed request as an error.
fn build(config: Config, dialer: Dialer) -> Result<Client, kube::Error> {
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(HyperClient::builder(TokioExecutor::new()).build::<_, Body>(dialer));
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}
