//! One line when trouble with the API server starts, one when it is over.
//!
//! Owns what is said about the connection. Four watches fail together when a server goes: they speak as one.

use std::collections::BTreeSet;
use std::error::Error;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kube::core::Status;
use tracing::{debug, info, warn};

use super::client::Redirected;
use super::credentials::CredentialError;
use super::servers::ApiServers;
use crate::causes::with_causes;

/// Trouble of another kind is named too, once it has lasted so long: right after its start, a server refuses for a
/// moment what it allows later.
const SETTLE: Duration = Duration::from_secs(10);

/// The kinds of trouble, each with a remedy of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// No connection, or one that broke.
    Unreachable,
    /// 401, or credentials that cannot be read.
    Unauthorized,
    /// 403.
    Forbidden,
    /// The server has another certificate than one that is trusted here, or does not trust ours.
    Untrusted,
    /// What answers is no API server.
    Foreign,
    /// 404: the server does not know the resource.
    NotFound,
    /// 410: what is asked for is too old; not trouble, list again.
    Expired,
    /// 400, 422: the server does not take such a request.
    Refused,
    /// Everything else that it answers: too many requests, internal errors.
    Failing,
}

impl Kind {
    fn remedy(self) -> &'static str {
        match self {
            Self::Unreachable => {
                "is the API server up, and its address right? `kube-lane status` names the address and where it comes from"
            }
            Self::Unauthorized => {
                "are the credentials of the kubeconfig, or the service account's token, still valid?"
            }
            Self::Untrusted => {
                "do certificate-authority and server (or tls-server-name) of the kubeconfig belong to this API server?"
            }
            Self::Foreign => {
                "is what answers there an API server, without a proxy, a load balancer's page or a login in front of it?"
            }
            Self::Forbidden => "apply deploy/ again: its ClusterRole grants what is read",
            Self::NotFound | Self::Refused => "does this API server serve the resource?",
            Self::Expired | Self::Failing => "see the API server's own log",
        }
    }
}

/// Why a list or a watch failed.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) kind: Kind,
    pub(super) message: String,
}

impl Trouble {
    pub(super) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub(super) fn of_status(status: &Status) -> Self {
        // kube hands over what is no Status with these words. A server of HTML is none of Kubernetes, whatever the code.
        if status.reason == "Failed to parse error data" && status.message.starts_with('<') {
            return Self::foreign(status.code, &status.message);
        }
        let kind = match status.code {
            400 | 422 => Kind::Refused,
            401 => Kind::Unauthorized,
            403 => Kind::Forbidden,
            404 => Kind::NotFound,
            410 => Kind::Expired,
            _ => Kind::Failing,
        };
        Self::new(kind, format!("{} ({})", status.message, status.code))
    }

    /// An answer that no API server gives.
    pub(super) fn foreign(code: u16, body: &str) -> Self {
        let beginning: String = body.chars().take(SHOWN).collect();
        let dots = if beginning.len() < body.len() { "…" } else { "" };
        Self::new(Kind::Foreign, format!("the answer is no object of the API: {beginning:?}{dots} ({code})"))
    }

    /// An answer that cannot be read.
    pub(super) fn undecodable(error: &dyn Error) -> Self {
        Self::new(Kind::Foreign, format!("an answer that cannot be read: {error}"))
    }
}

/// How many characters are shown of an answer that is none.
const SHOWN: usize = 80;

/// What an error that kube wraps is about.
fn kind_of(error: &(dyn Error + 'static)) -> Kind {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<CredentialError>() || error.is::<kube::client::AuthError>() {
            return Kind::Unauthorized;
        }
        if error.is::<Redirected>() {
            return Kind::Foreign;
        }
        // An I/O error is transparent: its source is the source of what it holds.
        let held = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if error.is::<rustls::Error>() || held.is_some_and(|held| held.is::<rustls::Error>()) {
            return Kind::Untrusted;
        }
        cause = match held {
            Some(held) => Some(held),
            None => error.source(),
        };
    }
    Kind::Unreachable
}

impl From<kube::Error> for Trouble {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) => Self::of_status(status),
            _ => Self::new(kind_of(&error), with_causes(&error)),
        }
    }
}

/// What the watches of one API server report.
pub(super) struct Health {
    server: String,
    servers: ApiServers,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The resources whose watch failed and has not succeeded since.
    troubled: BTreeSet<&'static str>,
    since: Option<Instant>,
    said: Vec<Kind>,
}

impl Health {
    pub(super) fn new(server: String, servers: ApiServers) -> Self {
        Self { server, servers, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A list or watch of `resource` failed.
    pub(super) fn failed(&self, resource: &'static str, trouble: &Trouble) {
        let mut state = self.state();
        state.troubled.insert(resource);
        let Trouble { kind, message } = trouble;
        self.servers.troubled(Some(format!("{resource}: {message} ({})", kind.remedy())));
        let since = *state.since.get_or_insert_with(Instant::now);
        let is_new =
            state.said.is_empty() || (!state.said.contains(&trouble.kind) && since.elapsed() > SETTLE);
        if !is_new {
            debug!(
                server = self.server,
                resource,
                error = trouble.message,
                "the API server still cannot be watched"
            );
            return;
        }
        state.said.push(trouble.kind);
        warn!(
            server = self.server,
            resource,
            error = trouble.message,
            hint = trouble.kind.remedy(),
            "the API server cannot be watched: what is known stays in force, retrying",
        );
    }

    /// The server no longer knows what `resource` was when its watch was cut off: it is listed again.
    pub(super) fn relisting(&self, resource: &'static str) {
        // After an outage that is to be expected.
        if self.state().troubled.is_empty() {
            info!(
                server = self.server,
                resource, "the API server has forgotten this watch's version: listing again"
            );
        } else {
            debug!(server = self.server, resource, "listing again after the outage");
        }
    }

    /// A list or watch of `resource` is established.
    pub(super) fn well(&self, resource: &'static str) {
        let mut state = self.state();
        if !state.troubled.remove(resource) || !state.troubled.is_empty() {
            return;
        }
        let seconds = state.since.take().map_or(0, |since| since.elapsed().as_secs());
        state.said.clear();
        self.servers.troubled(None);
        info!(server = self.server, seconds, "the API server is watched again");
    }
}
