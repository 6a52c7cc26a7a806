//! Connecting to the API server at whichever of its addresses answers.
//!
//! Owns TCP and TLS up to the handshake, the proxy in between where there is one, and the time that each address has for all
//! of it. Whatever is dialed, TLS verifies the configured name: a remembered address at which now somebody else answers is one that does not answer. Never
//! chooses the order of the addresses: `servers` does.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
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

use super::proxy::{Proxy, Way};
use super::servers::{ApiServers, Candidate};
use crate::causes::with_causes;

/// How long a TCP connection may take where there is no other address.
const CONNECT: Duration = Duration::from_secs(10);
/// How long it may take where another address is tried after it: time for two more SYNs.
const CONNECT_QUICKLY: Duration = Duration::from_secs(3);
/// How long TCP and TLS together may take there.
const ANSWER_QUICKLY: Duration = Duration::from_secs(6);
/// The next address is dialed beside those before it, once they have not answered for so long.
const HEAD_START: Duration = Duration::from_millis(500);
/// A connection that is silent for so long is asked whether it still lives.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// A connection to the API server.
pub(super) type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// No address answers.
#[derive(Debug, thiserror::Error)]
#[error("no address of the API server answers: {failures}")]
struct Unreachable {
    failures: String,
    /// Why the first one does not, which is the one that is meant.
    #[source]
    first: Option<BoxError>,
}

/// The proxy, or what is behind it, does not answer.
#[derive(Debug, thiserror::Error)]
#[error("by way of proxy {proxy}: {source}")]
struct ByProxy {
    proxy: Proxy,
    source: BoxError,
}

/// Why an address does not answer, and the same in words with the address.
pub(super) struct Silent {
    error: Option<BoxError>,
    text: String,
}

/// The connector of an HTTP client. A clone shares what is known about the addresses.
#[derive(Clone)]
pub(super) struct Dialer {
    servers: ApiServers,
    tls: Arc<rustls::ClientConfig>,
    name: Arc<dyn ResolveServerName + Send + Sync>,
    proxy: Option<Proxy>,
}

impl Dialer {
    /// A connector with the certificates of this configuration.
    pub(super) fn new(
        config: &Config,
        proxy: Option<Proxy>,
        servers: ApiServers,
    ) -> Result<Self, kube::Error> {
        let tls = Arc::new(config.rustls_client_config()?);
        let name: Arc<dyn ResolveServerName + Send + Sync> = match &config.tls_server_name {
            Some(name) => {
                let name = name.clone().try_into().map_err(|error| kube::Error::Service(Box::new(error)))?;
                Arc::new(FixedServerNameResolver::new(name))
            }
            None => Arc::new(DefaultServerNameResolver::default()),
        };
        Ok(Self { servers, tls, name, proxy })
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
        let mut waiting = candidates.into_iter();
        let (mut begun, mut failures, mut first) = (Vec::new(), Vec::new(), None);
        let mut dialing = FuturesUnordered::new();
        // Addresses that are all dead take as long as the last of them, not as long as all together.
        loop {
            let next = waiting.next();
            if let Some(candidate) = next {
                begun.push(candidate);
                let url = &url;
                dialing.push(async move { (candidate, self.dial_quickly(candidate, url).await) });
            }
            let patience = if next.is_some() { HEAD_START } else { ANSWER_QUICKLY };
            match timeout(patience, dialing.next()).await {
                Ok(Some((candidate, Ok(stream)))) => {
                    // Those before it that have said nothing yet are worse than it is.
                    for slow in begun.iter().take_while(|other| **other != candidate) {
                        self.servers.failed(*slow);
                    }
                    if failures.is_empty() && begun.first() != Some(&candidate) {
                        failures.push(format!("no answer for {} ms", HEAD_START.as_millis()));
                    }
                    self.connected(candidate, &stream, &failures.join("; "));
                    return Ok(stream);
                }
                Ok(Some((candidate, Err(silent)))) => {
                    self.servers.failed(candidate);
                    failures.push(silent.text);
                    if begun.first() == Some(&candidate) {
                        first = silent.error;
                    }
                }
                Ok(None) => break,
                Err(_) => {}
            }
        }
        let failures = failures.join("; ");
        self.servers.all_failed(failures.clone());
        Err(Unreachable { failures, first }.into())
    }

    /// Connects to one address, or says why it cannot in so many seconds that another can be tried.
    pub(super) async fn dial_quickly(&self, candidate: Candidate, url: &Uri) -> Result<Stream, Silent> {
        let at = match candidate {
            Candidate::Configured => url.authority().map(ToString::to_string).unwrap_or_default(),
            Candidate::Endpoint(address) => address.to_string(),
        };
        match timeout(ANSWER_QUICKLY, self.dial_one(candidate, url, CONNECT_QUICKLY)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => {
                let text = format!("{at}: {}", with_causes(error.as_ref()));
                Err(Silent { error: Some(error), text })
            }
            Err(_) => {
                let text = format!("{at}: no answer for {} s", ANSWER_QUICKLY.as_secs());
                Err(Silent { error: None, text })
            }
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
        if let Some(proxy) = &self.proxy {
            let connected = match proxy.way(tcp) {
                Way::Tunnel(way) => HttpsConnector::new(way, tls, false, name).oneshot(url.clone()).await,
                Way::Socks(way) => HttpsConnector::new(way, tls, false, name).oneshot(url.clone()).await,
            };
            return connected.map_err(|source| ByProxy { proxy: proxy.clone(), source }.into());
        }
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
