//! What a kubeconfig may say of the way to the API server and of who asks: each as client-go takes it, against a real server.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kube_lane::model::input::{Change, Event};
use kube_lane::source::kube::{ApiServers, KubeSourceConfig, ServerStatus, spawn};
use kube_lane_tests::controlplane::{ControlPlane, Options};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A control plane that takes certificates of clients, too, and a folder for kubeconfigs.
struct Setup {
    control_plane: ControlPlane,
    folder: TempDir,
    clients: CertifiedIssuer<'static, KeyPair>,
    token: String,
}

impl Setup {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut authority = CertificateParams::new(vec![]).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "clients");
        let clients = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let file = folder.path().join("clients.crt");
        fs::write(&file, clients.pem()).unwrap();
        let options = Options {
            apiserver_args: vec![format!("--client-ca-file={}", file.display())],
            ..Options::default()
        };
        let control_plane = ControlPlane::start_with(options).await.unwrap();
        let admin: Value =
            serde_json::from_slice(&fs::read(control_plane.admin_kubeconfig()).unwrap()).unwrap();
        let token = admin["users"][0]["user"]["token"].as_str().unwrap().to_owned();
        Self { control_plane, folder, clients, token }
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Writes a certificate of this group and its key to `client.crt` and `client.key`.
    fn certify(&self, group: &str) {
        let mut certificate = CertificateParams::new(vec![]).unwrap();
        certificate.distinguished_name.push(DnType::CommonName, "agent");
        certificate.distinguished_name.push(DnType::OrganizationName, group);
        let key = KeyPair::generate().unwrap();
        let certificate = certificate.signed_by(&key, &self.clients).unwrap();
        self.write("client.crt", &certificate.pem());
        self.write("client.key", &key.serialize_pem());
    }

    /// A plugin that gives the token for an hour, and says in the file `asked` what it was asked.
    fn plugin(&self, version: &str) -> Value {
        let version = format!("client.authentication.k8s.io/{version}");
        let answer = json!({
            "kind": "ExecCredential", "apiVersion": version,
            "status": {"token": self.token, "expirationTimestamp": "2999-01-01T00:00:00Z"},
        });
        let script = format!(
            "#!/bin/sh\necho \"$KUBERNETES_EXEC_INFO $GREETING $1\" >>{}/asked\ncat <<'END'\n{answer}\nEND\n",
            self.folder.path().display()
        );
        let path = self.write("plugin", &script);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        json!({"exec": {
            // Relative to the kubeconfig.
            "apiVersion": version, "command": "./plugin", "args": ["argument"], "interactiveMode": "IfAvailable",
            "env": [{"name": "GREETING", "value": "hello"}], "provideClusterInfo": true,
        }})
    }

    /// A kubeconfig whose current context is the second of two, with these fields of its cluster besides the usual, and this
    /// user. Null takes a field away.
    fn kubeconfig(&self, cluster: &Value, user: &Value) -> PathBuf {
        let mut fields = json!({
            "server": format!("https://{}", self.control_plane.address()),
            "certificate-authority": self.control_plane.authority(),
        });
        let fields = fields.as_object_mut().unwrap();
        fields.extend(cluster.as_object().unwrap().clone());
        fields.retain(|_, value| !value.is_null());
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config",
            "clusters": [{"name": "other", "cluster": {"server": "https://127.0.0.1:1"}}, {"name": "c", "cluster": fields}],
            "users": [{"name": "other", "user": {"token": "other"}}, {"name": "u", "user": user}],
            "contexts": [{"name": "other", "context": {"cluster": "other", "user": "other"}},
                         {"name": "current", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "current",
        });
        self.write("kubeconfig", &kubeconfig.to_string())
    }

    fn user(&self) -> Value {
        json!({"token": self.token})
    }
}

/// A source that runs until it is dropped.
struct Source {
    events: mpsc::Receiver<Vec<Event>>,
    status: watch::Receiver<ServerStatus>,
    task: JoinHandle<()>,
}

impl Drop for Source {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Source {
    async fn spawn(kubeconfig: &Path) -> Self {
        let config = KubeSourceConfig {
            kubeconfig: Some(kubeconfig.to_owned()),
            node: "node-a".into(),
            ..KubeSourceConfig::default()
        };
        let servers = ApiServers::open(&config);
        let status = servers.status();
        let (sender, events) = mpsc::channel(64);
        let task = spawn(config, servers, sender).await.unwrap();
        Self { events, status, task }
    }

    async fn synced(&mut self) {
        let synced = |event: &Event| matches!(event, Event::Source { change: Change::Synced, .. });
        let wait =
            async { while !self.events.recv().await.expect("a source never ends").iter().any(synced) {} };
        if timeout(LIMIT, wait).await.is_err() {
            panic!("never synced: {:?}", self.status.borrow());
        }
    }

    /// Why it cannot watch, once all of these words are in it.
    async fn trouble(&mut self, words: &[&str]) {
        let fits = |status: &ServerStatus| {
            status.trouble.as_ref().is_some_and(|trouble| words.iter().all(|word| trouble.contains(word)))
        };
        if timeout(LIMIT, self.status.wait_for(fits)).await.is_err() {
            panic!("{words:?} are not in {:?}", self.status.borrow());
        }
    }
}

#[tokio::test]
async fn tokens_come_from_files_and_plugins() {
    let setup = Setup::new().await;
    let file = setup.write("token", &format!("{}\n", setup.token));
    Source::spawn(&setup.kubeconfig(&json!({}), &json!({"tokenFile": file}))).await.synced().await;

    for version in ["v1", "v1beta1"] {
        let _ = fs::remove_file(setup.folder.path().join("asked"));
        let kubeconfig = setup.kubeconfig(&json!({}), &setup.plugin(version));
        Source::spawn(&kubeconfig).await.synced().await;
        let asked = fs::read_to_string(setup.folder.path().join("asked")).unwrap();
        assert_eq!(asked.lines().count(), 1, "one answer is enough for all watches: {asked}");
        let address = setup.control_plane.address().to_string();
        for part in [version, "\"interactive\":false", &address, "hello argument"] {
            assert!(asked.contains(part), "{part}: {asked}");
        }
    }

    // A token that is refused is read again.
    let file = setup.write("token", "old");
    let mut source = Source::spawn(&setup.kubeconfig(&json!({}), &json!({"tokenFile": file}))).await;
    source.trouble(&["(401)", "are the credentials of the kubeconfig"]).await;
    setup.write("token", &setup.token);
    source.synced().await;
    let well = source.status.wait_for(|status| status.trouble.is_none());
    assert!(timeout(LIMIT, well).await.is_ok(), "trouble is over");
    // Whoever shows nothing is nobody, and may read nothing.
    Source::spawn(&setup.kubeconfig(&json!({}), &json!({}))).await.trouble(&["(403)", "ClusterRole"]).await;
}

#[tokio::test]
async fn certificates_of_clients_are_read_again() {
    let setup = Setup::new().await;
    setup.certify("nobodies");
    let user = json!({"client-certificate": "client.crt", "client-key": "client.key"});
    let mut source = Source::spawn(&setup.kubeconfig(&json!({}), &user)).await;
    source.trouble(&["\"agent\"", "(403)"]).await;
    setup.certify("system:masters");
    source.synced().await;
}

#[tokio::test]
async fn the_server_is_verified_as_the_kubeconfig_says() {
    let setup = Setup::new().await;
    for (cluster, trouble) in [
        (json!({"tls-server-name": "kubernetes.default.svc"}), None),
        (json!({"tls-server-name": "other.example"}), Some("not valid for name")),
        (json!({"certificate-authority": null, "insecure-skip-tls-verify": true}), None),
        (json!({"certificate-authority": setup.folder.path().join("clients.crt")}), Some("UnknownIssuer")),
    ] {
        let mut source = Source::spawn(&setup.kubeconfig(&cluster, &setup.user())).await;
        match trouble {
            None => source.synced().await,
            Some(words) => source.trouble(&[words, "tls-server-name"]).await,
        }
    }
}

/// A proxy that counts the connections that it made.
async fn proxy(socks: bool, made: Arc<AtomicUsize>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let made = Arc::clone(&made);
            tokio::spawn(async move {
                let mut client = BufReader::new(client);
                let to = if socks {
                    asked_by_socks(&mut client).await
                } else {
                    asked_by_connect(&mut client).await
                };
                let mut server = TcpStream::connect(to.unwrap()).await.unwrap();
                made.fetch_add(1, Ordering::Relaxed);
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    address
}

/// Where an HTTP `CONNECT` with a password leads.
async fn asked_by_connect(client: &mut BufReader<TcpStream>) -> std::io::Result<String> {
    let (mut request, mut line) = (String::new(), String::new());
    while client.read_line(&mut line).await? > 2 {
        request += &std::mem::take(&mut line);
    }
    assert!(request.to_lowercase().contains("proxy-authorization: basic dtpw"), "{request}");
    client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await?;
    Ok(request.split(' ').nth(1).unwrap().to_owned())
}

/// Where SOCKS 5 leads: without a password, to an IPv4 address.
async fn asked_by_socks(client: &mut BufReader<TcpStream>) -> std::io::Result<String> {
    let methods = [client.read_u8().await?, client.read_u8().await?][1];
    client.read_exact(&mut vec![0; methods.into()]).await?;
    client.write_all(&[5, 0]).await?;
    let mut request = [0; 4];
    client.read_exact(&mut request).await?;
    assert_eq!(request, [5, 1, 0, 1]);
    let address = std::net::Ipv4Addr::from(client.read_u32().await?);
    let port = client.read_u16().await?;
    client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
    Ok(format!("{address}:{port}"))
}

#[tokio::test]
async fn a_proxy_is_in_between_where_the_kubeconfig_names_one() {
    let setup = Setup::new().await;
    for (scheme, socks) in [("http://u:p@", false), ("socks5://", true)] {
        let made = Arc::<AtomicUsize>::default();
        let address = proxy(socks, Arc::clone(&made)).await;
        let cluster = json!({"proxy-url": format!("{scheme}{address}")});
        let mut source = Source::spawn(&setup.kubeconfig(&cluster, &setup.user())).await;
        source.synced().await;
        let status = source.status.borrow().clone();
        assert!(made.load(Ordering::Relaxed) > 0);
        assert!(status.proxy.is_some_and(|proxy| proxy.ends_with(&format!("//{address}"))));
        assert_eq!(status.in_use, Some(address));
    }
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let cluster = json!({"proxy-url": format!("http://{nobody}")});
    let mut source = Source::spawn(&setup.kubeconfig(&cluster, &setup.user())).await;
    source.trouble(&[&format!("by way of proxy http://{nobody}"), "is the API server up"]).await;
}
