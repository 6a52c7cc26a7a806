//! How the agent proves to the API server who it is, where the proof changes while the agent runs: tokens in files, and the
//! answers of credential plugins (`exec` of a kubeconfig). Both are taken as client-go takes them.
//!
//! Owns when these are read again. Never logs a token. kube does what else a kubeconfig may say.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use http::header::AUTHORIZATION;
use http::{HeaderValue, Request};
use k8s_openapi::ByteString;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::client::Body;
use kube::config::{AuthInfo, ExecConfig, ExecInteractiveMode};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tower::BoxError;

#[cfg(test)]
mod tests;

/// A token in a file is read again after so long: whoever replaces it does that minutes before the former one expires.
const RELOAD: Duration = Duration::from_secs(50);
/// A plugin is asked again so long before its answer expires.
const EARLY: SignedDuration = SignedDuration::from_secs(60);
/// How long a plugin may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// An answer of a plugin that the server refuses is kept for so long, so that the watches do not each ask for another.
const FRESH: Duration = Duration::from_secs(5);
/// The versions in which a plugin may answer.
const VERSIONS: [&str; 2] = ["client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"];

/// Credentials that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The file that holds the token cannot be read.
    #[error("cannot read the token file {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is nothing in it.
    #[error("the token file {} is empty", .0.display())]
    Empty(PathBuf),
    /// The token is none that a request can carry.
    #[error("the token of {0} holds characters that no token has, such as a space or a line break")]
    Malformed(String),
    /// A plugin gives no credentials.
    #[error("credential plugin {command:?}: {problem}")]
    Plugin {
        /// The program.
        command: String,
        /// What it did, or what is wrong with its configuration.
        problem: String,
    },
}

/// What gives requests their token.
#[derive(Clone)]
pub(super) enum Bearer {
    /// A file, which others replace.
    File(Arc<Mutex<TokenFile>>),
    /// A plugin, which is asked again before its answer expires.
    Plugin(Plugin, Arc<ExecConfig>),
}

impl Bearer {
    /// Takes what changes out of a kubeconfig's user, so that kube handles the rest. A plugin is asked at once.
    pub(super) async fn of(auth: &mut AuthInfo, plugin: &Plugin) -> Result<Option<Self>, CredentialError> {
        // A line break at the end is nobody's wish, in a kubeconfig neither.
        auth.token = auth.token.take().map(|token| SecretString::from(token.expose_secret().trim()));
        if let Some(path) = auth.token_file.take() {
            let file = TokenFile::open(path.into(), auth.token.take())?;
            return Ok(Some(Self::File(Arc::new(Mutex::new(file)))));
        }
        let Some(exec) = auth.exec.take() else { return Ok(None) };
        let exec = Arc::new(exec);
        let credential = plugin.credential(&exec).await?;
        if let Some((certificate, key)) = credential.identity {
            auth.client_certificate_data = Some(base64(&certificate));
            auth.client_key_data = Some(SecretString::from(base64(key.expose_secret())));
        }
        Ok(credential.token.map(|_| Self::Plugin(plugin.clone(), exec)))
    }

    /// Gives a request its token.
    pub(super) async fn authorize(self, mut request: Request<Body>) -> Result<Request<Body>, BoxError> {
        request.headers_mut().insert(AUTHORIZATION, self.header().await?);
        Ok(request)
    }

    async fn header(&self) -> Result<HeaderValue, CredentialError> {
        match self {
            Self::File(file) => {
                let mut file = file.lock().await;
                let from = file.path.display().to_string();
                header(file.token(), || from)
            }
            Self::Plugin(plugin, exec) => {
                let credential = plugin.credential(exec).await?;
                let token = credential.token.unwrap_or_default();
                header(&token, || format!("credential plugin {:?}", command(exec)))
            }
        }
    }
}

/// As a kubeconfig has its certificates and keys.
fn base64(text: &str) -> String {
    let encoded = serde_json::to_value(ByteString(text.as_bytes().to_vec()));
    encoded.ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn header(token: &SecretString, from: impl FnOnce() -> String) -> Result<HeaderValue, CredentialError> {
    let value = HeaderValue::try_from(format!("Bearer {}", token.expose_secret()));
    let mut value = value.map_err(|_| CredentialError::Malformed(from()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// A token in a file.
pub(super) struct TokenFile {
    path: PathBuf,
    token: SecretString,
    read: Instant,
}

impl TokenFile {
    /// Reads the file; `otherwise` is the token where it cannot be read yet.
    fn open(path: PathBuf, otherwise: Option<SecretString>) -> Result<Self, CredentialError> {
        let token = match (read_token(&path), otherwise) {
            (Ok(token), _) | (Err(_), Some(token)) => token,
            (Err(error), None) => return Err(error),
        };
        Ok(Self { path, token, read: Instant::now() })
    }

    /// The token. What cannot be read again is used as it was: some take the file away once it has been read.
    fn token(&mut self) -> &SecretString {
        if self.read.elapsed() > RELOAD {
            if let Ok(token) = read_token(&self.path) {
                self.token = token;
            }
            self.read = Instant::now();
        }
        &self.token
    }
}

fn read_token(path: &PathBuf) -> Result<SecretString, CredentialError> {
    let text = fs::read_to_string(path)
        .map_err(|source| CredentialError::Unreadable { path: path.clone(), source })?;
    match text.trim() {
        "" => Err(CredentialError::Empty(path.clone())),
        token => Ok(SecretString::from(token)),
    }
}

/// What a plugin gave.
#[derive(Clone, Debug)]
struct Credential {
    token: Option<SecretString>,
    /// A certificate and its key, in PEM.
    identity: Option<(String, SecretString)>,
}

/// The last answer of the credential plugin, for all clients. A clone shares it.
#[derive(Clone, Debug, Default)]
pub struct Plugin(Arc<Mutex<Option<Answer>>>);

#[derive(Debug)]
struct Answer {
    /// The configuration that it was asked with.
    asked: Value,
    at: Instant,
    expires: Option<Timestamp>,
    credential: Credential,
}

impl Plugin {
    /// The plugin's credentials; it is asked for new ones where there are none, or they expire soon.
    async fn credential(&self, exec: &Arc<ExecConfig>) -> Result<Credential, CredentialError> {
        // A value, whose fields have an order, which a map of the configuration has not.
        let asked = json!(**exec);
        let mut known = self.0.lock().await;
        if let Some(answer) = &*known
            && answer.asked == asked
            && answer.expires.is_none_or(|expires| Timestamp::now() + EARLY < expires)
        {
            return Ok(answer.credential.clone());
        }
        let blocking = Arc::clone(exec);
        let run = tokio::task::spawn_blocking(move || run(&blocking));
        let (credential, expires) = match timeout(PATIENCE, run).await {
            Ok(Ok(answer)) => answer?,
            Ok(Err(error)) => return Err(failed(exec, error.to_string())),
            Err(_) => return Err(failed(exec, format!("no answer for {} s", PATIENCE.as_secs()))),
        };
        *known = Some(Answer { asked, at: Instant::now(), expires, credential: credential.clone() });
        Ok(credential)
    }

    /// The server refuses the credentials: the plugin is asked for new ones.
    pub(super) async fn refused(&self) {
        let mut known = self.0.lock().await;
        if known.as_ref().is_some_and(|answer| answer.at.elapsed() > FRESH) {
            *known = None;
        }
    }
}

fn command(exec: &ExecConfig) -> &str {
    exec.command.as_deref().unwrap_or_default()
}

fn failed(exec: &ExecConfig, problem: impl Into<String>) -> CredentialError {
    CredentialError::Plugin { command: command(exec).to_owned(), problem: problem.into() }
}

/// An answer, as far as it is read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ExecCredential {
    kind: String,
    api_version: String,
    #[serde(default)]
    status: Option<ExecCredentialStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct ExecCredentialStatus {
    expiration_timestamp: Option<Timestamp>,
    token: Option<SecretString>,
    client_certificate_data: Option<String>,
    client_key_data: Option<SecretString>,
}

/// Asks a plugin. Blocks until it answers.
fn run(exec: &ExecConfig) -> Result<(Credential, Option<Timestamp>), CredentialError> {
    let version = exec.api_version.as_deref().unwrap_or_default();
    if !VERSIONS.contains(&version) {
        let problem = format!("apiVersion is {version:?} in the kubeconfig: write {}", VERSIONS.join(" or "));
        return Err(failed(exec, problem));
    }
    if exec.interactive_mode == Some(ExecInteractiveMode::Always) {
        return Err(failed(
            exec,
            "interactiveMode is Always, and the agent has no terminal: write IfAvailable",
        ));
    }
    let mut spec = json!({"interactive": false});
    if exec.provide_cluster_info {
        spec["cluster"] = json!(exec.cluster);
    }
    let info = json!({"kind": "ExecCredential", "apiVersion": version, "spec": spec});
    let mut program = Command::new(command(exec));
    program.args(exec.args.iter().flatten()).stdin(Stdio::null());
    program.env("KUBERNETES_EXEC_INFO", info.to_string());
    for variable in exec.env.iter().flatten() {
        if let (Some(name), Some(value)) = (variable.get("name"), variable.get("value")) {
            program.env(name, value);
        }
    }
    let output = program.output().map_err(|error| {
        let hint = exec.install_hint.as_deref().map(|hint| format!(". {}", hint.trim())).unwrap_or_default();
        failed(exec, format!("cannot be run: {error}{hint}"))
    })?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        return Err(failed(exec, format!("{}: {}", output.status, words.trim())));
    }
    // Some plugins answer in YAML, which client-go takes; JSON is YAML.
    let answer: ExecCredential = serde_saphyr::from_slice(&output.stdout)
        .map_err(|error| failed(exec, format!("its answer is no ExecCredential: {error}")))?;
    if answer.kind != "ExecCredential" || answer.api_version != version {
        let problem =
            format!("it answers with {} {}, and {version} is configured", answer.api_version, answer.kind);
        return Err(failed(exec, problem));
    }
    let status = answer.status.ok_or_else(|| failed(exec, "its answer has no status"))?;
    let identity = match (status.client_certificate_data, status.client_key_data) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => return Err(failed(exec, "clientCertificateData and clientKeyData come together or not at all")),
    };
    let token = status.token.map(|token| SecretString::from(token.expose_secret().trim()));
    let token = token.filter(|token| !token.expose_secret().is_empty());
    if token.is_none() && identity.is_none() {
        return Err(failed(exec, "its answer has neither a token nor a certificate"));
    }
    Ok((Credential { token, identity }, status.expiration_timestamp))
}
