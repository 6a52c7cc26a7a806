//! The HTTP client: from `--kubeconfig`, `--master` or the Pod's service account to requests.
//!
//! Owns credentials, and where the configured address comes from. Never retries: the watches do, with one backoff each.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

use http::header::LOCATION;
use http::{Response, StatusCode};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tower::filter::AsyncFilterLayer;
use tower::{BoxError, ServiceBuilder};

use super::KubeSourceConfig;
use super::credentials::{Bearer, CredentialError};
use super::dial::Dialer;
use super::proxy::{Proxy, ProxyError};
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
    /// A token or a credential plugin cannot be used.
    #[error("credentials for {server}: {source}")]
    Credentials {
        /// The API server's URL.
        server: String,
        /// What is wrong with them.
        #[source]
        source: CredentialError,
    },
    /// The proxy of the kubeconfig cannot be used.
    #[error("kubeconfig {}: {source}", path.display())]
    Proxy {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ProxyError,
    },
}

/// The server answers that something is elsewhere, which no API server does.
#[derive(Debug, thiserror::Error)]
#[error("the answer is {status}, to {to}")]
pub(super) struct Redirected {
    status: StatusCode,
    to: String,
}

/// A client, and what it was made of.
pub(super) struct Connected {
    pub(super) client: Client,
    /// The server's URL.
    pub(super) server: String,
    /// See [`fingerprint()`].
    pub(super) fingerprint: u64,
}

/// Reads the credentials afresh.
pub(super) async fn connect(
    source: &KubeSourceConfig,
    servers: &ApiServers,
) -> Result<Connected, SourceError> {
    let Prepared { config, bearer, dialer, fingerprint } = prepare(source, servers).await?;
    let server = config.cluster_url.to_string();
    match build(config, bearer, dialer) {
        Ok(client) => Ok(Connected { client, server, fingerprint }),
        Err(source) => Err(SourceError::Client { server, source: Box::new(source) }),
    }
}

/// Stands for all that a client is made of, but for tokens that it renews itself: where this has changed, another client is
/// due. The files of certificates are replaced while the agent runs.
///
/// # Errors
/// When it cannot be read.
pub(super) async fn fingerprint(source: &KubeSourceConfig) -> Result<u64, SourceError> {
    let mut configured = configure(source).await?;
    configured.bearer(source).await?;
    Ok(configured.fingerprint())
}

/// Reads the credentials afresh, and tells `servers` which address they are for. Returns what connects there, and the URL.
pub(super) async fn dialer(
    source: &KubeSourceConfig,
    servers: &ApiServers,
) -> Result<(Dialer, http::Uri), SourceError> {
    prepare(source, servers).await.map(|prepared| (prepared.dialer, prepared.config.cluster_url))
}

struct Prepared {
    config: Config,
    bearer: Option<Bearer>,
    dialer: Dialer,
    fingerprint: u64,
}

async fn prepare(source: &KubeSourceConfig, servers: &ApiServers) -> Result<Prepared, SourceError> {
    let mut configured = configure(source).await?;
    let bearer = configured.bearer(source).await?;
    let fingerprint = configured.fingerprint();
    let Configured { config, origin, proxy, unusable_base, ignored_proxy } = configured;
    servers.configured(Target {
        url: config.cluster_url.clone(),
        source: origin,
        // The agent's token must not go to whoever has another server's address now. Where a proxy is meant to be in
        // between, the endpoints' own addresses mean nothing.
        may_fall_back: proxy.is_none()
            && config.cluster_url.scheme_str() == Some("https")
            && !config.accept_invalid_certs,
        proxy: proxy.as_ref().map(ToString::to_string),
        ignored_proxy,
        unusable_base: unusable_base.as_ref().map(|error| with_causes(error)),
    });
    let server = config.cluster_url.to_string();
    let dialer = Dialer::new(&config, proxy, servers.clone());
    let dialer = dialer.map_err(|source| SourceError::Client { server, source: Box::new(source) })?;
    Ok(Prepared { config, bearer, dialer, fingerprint })
}

/// What the user wrote, or what the kubelet gave.
struct Configured {
    config: Config,
    origin: Source,
    proxy: Option<Proxy>,
    /// Why the proxy that the environment names is not used.
    ignored_proxy: Option<String>,
    /// Why the kubeconfig of the base is not used.
    unusable_base: Option<SourceError>,
}

impl Configured {
    fn new(config: Config, origin: Source) -> Self {
        Self { config, origin, proxy: None, ignored_proxy: None, unusable_base: None }
    }

    /// What gives requests their token, where kube does not.
    async fn bearer(&mut self, source: &KubeSourceConfig) -> Result<Option<Bearer>, SourceError> {
        let bearer = Bearer::of(&mut self.config.auth_info, &source.plugin).await;
        bearer.map_err(|source| SourceError::Credentials {
            server: self.config.cluster_url.to_string(),
            source,
        })
    }

    fn fingerprint(&self) -> u64 {
        let Config { cluster_url, root_cert, tls_server_name, accept_invalid_certs, auth_info, .. } =
            &self.config;
        let mut hasher = DefaultHasher::new();
        (cluster_url, root_cert, tls_server_name, accept_invalid_certs).hash(&mut hasher);
        self.proxy.as_ref().map(ToString::to_string).hash(&mut hasher);
        // By way of a value, whose fields have an order.
        serde_json::to_value(auth_info).ok().map(|auth| auth.to_string()).hash(&mut hasher);
        for file in [&auth_info.client_certificate, &auth_info.client_key].into_iter().flatten() {
            std::fs::read(file).ok().hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// Whether the agent could start with this as it is meant: the kubeconfig can be read, and so can the certificates and keys
/// that it names.
///
/// # Errors
/// When one of them cannot.
pub(super) async fn check(source: &KubeSourceConfig) -> Result<(), SourceError> {
    let mut configured = configure(source).await?;
    if let Some(error) = configured.unusable_base {
        return Err(error);
    }
    configured.bearer(source).await?;
    let config = configured.config;
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
        (None, None, Some(master)) => Configured::new(Config::new(master.clone()), Source::Master),
        (None, None, None) => in_cluster(source)?,
    };
    if let Some(master) = master {
        configured.config.cluster_url = master;
        configured.origin = Source::Master;
    }
    if configured.proxy.is_none() {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        match Proxy::of_environment(&configured.config.cluster_url, variable) {
            Some(Ok(proxy)) => configured.proxy = Some(proxy),
            Some(Err(error)) => configured.ignored_proxy = Some(error.to_string()),
            None => {}
        }
    }
    Ok(configured)
}

fn in_cluster(source: &KubeSourceConfig) -> Result<Configured, SourceError> {
    let config = Config::incluster().map_err(|source| SourceError::InCluster(Box::new(source)))?;
    let named = source.environment.names_a_server();
    let origin = if named { Source::Environment } else { Source::Service };
    Ok(Configured::new(config, origin))
}

async fn read(path: &Path, origin: Source) -> Result<Configured, SourceError> {
    let failed = |source| SourceError::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
    let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
    let proxy = proxy(&kubeconfig).map(|url| Proxy::configured(&url)).transpose();
    let proxy = proxy.map_err(|source| SourceError::Proxy { path: path.to_owned(), source })?;
    let config =
        Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)?;
    Ok(Configured { proxy, ..Configured::new(config, origin) })
}

/// `proxy-url` of the current context's cluster.
fn proxy(kubeconfig: &Kubeconfig) -> Option<String> {
    let current = kubeconfig.current_context.as_ref()?;
    let context = kubeconfig.contexts.iter().find(|context| context.name == *current)?.context.as_ref()?;
    let cluster = kubeconfig.clusters.iter().find(|cluster| cluster.name == context.cluster)?;
    cluster.cluster.as_ref()?.proxy_url.clone().filter(|url| !url.is_empty())
}

/// kube's own stack, less its connector, its retries and its tracing layer, which logs each failed request as an error.
fn build(config: Config, bearer: Option<Bearer>, dialer: Dialer) -> Result<Client, kube::Error> {
    let bearer = bearer.map(|bearer| {
        let authorize = move |request| bearer.clone().authorize(request);
        AsyncFilterLayer::new(authorize)
    });
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .option_layer(bearer)
        .layer(config.extra_headers_layer()?)
        // kube takes it for a success.
        .and_then(not_redirected)
        .service(HyperClient::builder(TokioExecutor::new()).build::<_, Body>(dialer));
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}

async fn not_redirected<B>(answer: Response<B>) -> Result<Response<B>, BoxError> {
    if !answer.status().is_redirection() {
        return Ok(answer);
    }
    let to = answer.headers().get(LOCATION).and_then(|to| to.to_str().ok()).unwrap_or("nowhere").to_owned();
    Err(Redirected { status: answer.status(), to }.into())
}
