//! Connecting to the API server at whichever of its addresses answers.
//!
//! Owns TCP and TLS up to the handshake, and the time that each address has for both. Whatever is dialed, TLS verifies
//! the configured name: a remembered address at which now somebody else answers is one that does not answer. Never
//! chooses the order of the addresses: `servers` does.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_rustls::{
    DefaultServerNameResolver, FixedServerNameResolver, HttpsConnector, MaybeHttpsStream, ResolveServerName,
};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use kube::Config;
use kube::client::ConfigExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tower::{BoxError, Service, ServiceExt};

use super::servers::{ApiServers, Candidate};
use crate::causes::with_causes;

/// How long a TCP connection may take where there is no other address.
const CONNECT: Duration = Duration::from_secs(10);
/// How long it may take where another address is tried after it: time for two more SYNs.
const CONNECT_QUICKLY: Duration = Duration::from_secs(3);
/// How long TCP and TLS together may take there.
const ANSWER_QUICKLY: Duration = Duration::from_secs(6);
/// A connection that is silent for so long is asked whether it still lives.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// A connection to the API server.
pub(super) type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// No address answers.
#[derive(Debug, thiserror::Error)]
#[error("no address of the API server answers: {0}")]
struct Unreachable(String);

/// The connector of an HTTP client. A clone shares what is known about the addresses.
#[derive(Clone)]
pub(super) struct Dialer {
    servers: ApiServers,
    tls: Arc<rustls::ClientConfig>,
    name: Arc<dyn ResolveServerName + Send + Sync>,
}

impl Dialer {
    /// A connector with the certificates of this configuration.
    pub(super) fn new(config: &Config, servers: ApiServers) -> Result<Self, kube::Error> {
        let tls = Arc::new(config.rustls_client_config()?);
        let name: Arc<dyn ResolveServerName + Send + Sync> = match &config.tls_server_name {
            Some(name) => {
                let name = name.clone().try_into().map_err(|error| kube::Error::Service(Box::new(error)))?;
                Arc::new(FixedServerNameResolver::new(name))
            }
            None => Arc::new(DefaultServerNameResolver::default()),
        };
        Ok(Self { servers, tls, name })
    }

    /// Connects to the first address that answers.
    async fn dial(&self, url: Uri) -> Result<Stream, BoxError> {
        let candidates = self.servers.candidates();
        if let [candidate] = candidates[..] {
            let connected = self.dial_one(candidate, &url, CONNECT).await;
            match &connected {
                Ok(stream) => self.connected(candidate, stream, ""),
                Err(error) => self.servers.all_failed(with_causes(error.as_ref())),
            }
            return connected;
        }
        let mut failures = Vec::new();
        for candidate in candidates {
            match self.dial_quickly(candidate, &url).await {
                Ok(stream) => {
                    self.connected(candidate, &stream, &failures.join("; "));
                    return Ok(stream);
                }
                Err(failure) => failures.push(failure),
            }
            self.servers.failed(candidate);
        }
        let failures = failures.join("; ");
        self.servers.all_failed(failures.clone());
        Err(Unreachable(failures).into())
    }

    /// Connects to one address, or says why it cannot in so many seconds that another can be tried.
    pub(super) async fn dial_quickly(&self, candidate: Candidate, url: &Uri) -> Result<Stream, String> {
        let at = match candidate {
            Candidate::Configured => url.authority().map(ToString::to_string).unwrap_or_default(),
            Candidate::Endpoint(address) => address.to_string(),
        };
        match timeout(ANSWER_QUICKLY, self.dial_one(candidate, url, CONNECT_QUICKLY)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(format!("{at}: {}", with_causes(error.as_ref()))),
            Err(_) => Err(format!("{at}: no answer for {} s", ANSWER_QUICKLY.as_secs())),
        }
    }

    async fn dial_one(
        &self,
        candidate: Candidate,
        url: &Uri,
        patience: Duration,
    ) -> Result<Stream, BoxError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(patience));
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE));
        tcp.set_keepalive_retries(Some(3));
        let (tls, name) = (Arc::clone(&self.tls), Arc::clone(&self.name));
        match candidate {
            Candidate::Configured => HttpsConnector::new(tcp, tls, false, name).oneshot(url.clone()).await,
            Candidate::Endpoint(address) => {
                let place: Uri = format!("https://{address}").parse()?;
                // The URL names the server in TLS alone.
                let tcp = tcp.map_request(move |_: Uri| place.clone());
                HttpsConnector::new(tcp, tls, false, name).oneshot(url.clone()).await
            }
        }
    }

    fn connected(&self, candidate: Candidate, stream: &Stream, failures: &str) {
        if let Some(address) = peer(stream) {
            self.servers.connected(candidate, address, failures);
        }
    }
}

fn peer(stream: &Stream) -> Option<SocketAddr> {
    let tcp = match stream {
        MaybeHttpsStream::Http(tcp) => tcp.inner(),
        MaybeHttpsStream::Https(tls) => tls.inner().get_ref().0.inner().inner(),
    };
    tcp.peer_addr().ok()
}

impl Service<Uri> for Dialer {
    type Response = Stream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, url: Uri) -> Self::Future {
        let dialer = self.clone();
        Box::pin(async move { dialer.dial(url).await })
    }
}
