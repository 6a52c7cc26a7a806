//! A real control plane for one test: etcd and kube-apiserver with RBAC, ready in a few seconds, gone
//! with its value. No controller-manager, no scheduler: EndpointSlices, Nodes and Pods are the test's to make.

mod credentials;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tempfile::TempDir;

use self::credentials::Credentials;
use crate::process::{Process, free_ports, in_netns};

/// How long a start may take: ten times what it does on an idle machine.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Where and how a control plane runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the API server listens, and what kubeconfigs name. All addresses (`0.0.0.0`, `::`) are named by
    /// the loopback address.
    pub bind_address: IpAddr,
    /// Names and addresses besides `bind_address` that the server's certificate is good for.
    pub extra_sans: Vec<String>,
    /// The network namespace that it runs in (a path such as `/run/netns/a`), or the caller's. Its loopback
    /// interface must be up.
    pub netns: Option<PathBuf>,
    /// The ranges of ClusterIPs, at most one of each family; the first is that of single-stack Services.
    pub service_cidrs: Vec<String>,
    /// Whether kubelets and kube-controller-manager belong to the cluster: pods need a ServiceAccount, which a
    /// controller makes, and `default/kubernetes` gets the server's address as its endpoint.
    pub for_kubelets: bool,
    /// Further flags of kube-apiserver; the last of several wins.
    pub apiserver_args: Vec<String>,
}

impl Default for Options {
    /// On 127.0.0.1, dual stack, with room for 50,000 Services.
    fn default() -> Self {
        Self {
            bind_address: Ipv4Addr::LOCALHOST.into(),
            extra_sans: vec![],
            netns: None,
            service_cidrs: vec!["10.96.0.0/12".into(), "fd00:10:96::/108".into()],
            for_kubelets: false,
            apiserver_args: vec![],
        }
    }
}

/// etcd and kube-apiserver; both end, and their folder goes, when it is dropped. The folder stays, and is
/// named, when a test panics.
#[derive(Debug)]
pub struct ControlPlane {
    // Dropped in this order: the server before its store, the folder last.
    apiserver: Option<Process>,
    etcd: Process,
    etcd_port: u16,
    address: SocketAddr,
    options: Options,
    credentials: Credentials,
    dir: Option<TempDir>,
    path: PathBuf,
}

impl ControlPlane {
    /// Starts one with [`Options::default`].
    ///
    /// # Errors
    /// As [`Self::start_with`].
    pub async fn start() -> Result<Self> {
        Self::start_with(Options::default()).await
    }

    /// Starts one and waits until it answers.
    ///
    /// # Errors
    /// When a program is missing, ends, or is not ready in time; the message shows the end of its log.
    pub async fn start_with(options: Options) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("kube-lane-controlplane-").tempdir()?;
        let path = dir.path().to_owned();
        let credentials = Credentials::create(&path, options.bind_address, &options.extra_sans)?;
        let netns = options.netns.as_deref();
        let [etcd_port, peer_port, port] = free_ports(netns, options.bind_address)?;
        let address = SocketAddr::new(reachable(options.bind_address), port);
        credentials.write_kubeconfig(&path.join("admin.kubeconfig"), address, &credentials.admin_token)?;

        let etcd = start_etcd(&path, netns, etcd_port, peer_port)?;
        let mut this =
            Self { apiserver: None, etcd, etcd_port, address, options, credentials, dir: Some(dir), path };
        this.start_apiserver().await?;
        Ok(this)
    }

    /// Where the API server answers.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where etcd answers, in the control plane's namespace: without TLS, to anybody.
    pub fn etcd(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.etcd_port).into()
    }

    /// A kubeconfig that may do anything.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.path.join("admin.kubeconfig")
    }

    /// The certificate of the authority that signed the API server's.
    pub fn authority(&self) -> PathBuf {
        self.path.join(credentials::AUTHORITY)
    }

    /// The key that signs the tokens of ServiceAccounts.
    pub fn service_account_key(&self) -> PathBuf {
        self.path.join(credentials::SERVICE_ACCOUNT_KEY)
    }

    /// The folder of its files and logs.
    pub fn folder(&self) -> &Path {
        &self.path
    }

    /// A kubeconfig with a fresh token of a ServiceAccount that exists, good for an hour.
    ///
    /// # Errors
    /// When the API server refuses the token.
    pub async fn kubeconfig_for_service_account(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client().await?, namespace);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec { expiration_seconds: Some(3600), ..TokenRequestSpec::default() }),
            ..TokenRequest::default()
        };
        let granted = accounts
            .create_token_request(name, &PostParams::default(), &request)
            .await
            .with_context(|| format!("no token for ServiceAccount {namespace}/{name}"))?;
        let token =
            granted.status.and_then(|status| status.token).context("a granted request without a token")?;
        let path = self.path.join(format!("{namespace}-{name}.kubeconfig"));
        self.credentials.write_kubeconfig(&path, self.address, &token)?;
        Ok(path)
    }

    /// A client that may do anything. It connects from the network namespace of the threads that use it.
    ///
    /// # Errors
    /// When the kubeconfig cannot be read back.
    pub async fn client(&self) -> Result<Client> {
        client(&self.admin_kubeconfig()).await
    }

    /// `kubectl` of the same release with [`Self::admin_kubeconfig`]. It runs in the caller's namespace.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn kubectl(&self) -> Result<Command> {
        let mut kubectl = Command::new(program("kubectl")?);
        kubectl.env("KUBECONFIG", self.admin_kubeconfig());
        Ok(kubectl)
    }

    /// Ends the API server as an outage would (SIGKILL): connections break, the address refuses.
    pub fn stop_apiserver(&mut self) {
        self.apiserver = None;
    }

    /// Ends the API server if it runs, starts it at the same address and waits until it answers.
    ///
    /// # Errors
    /// As [`Self::start_with`].
    pub async fn restart_apiserver(&mut self) -> Result<()> {
        self.stop_apiserver();
        self.start_apiserver().await
    }

    /// Ends both and removes their folder, as dropping does.
    pub fn stop(self) {}

    async fn start_apiserver(&mut self) -> Result<()> {
        let mut command = Command::new(program("kube-apiserver")?);
        let flag = |name: &str, value: &dyn std::fmt::Display| format!("--{name}={value}");
        let file = |name: &str| self.path.join(name).display().to_string();
        command.args([
            flag("etcd-servers", &format_args!("http://127.0.0.1:{}", self.etcd_port)),
            flag("bind-address", &self.options.bind_address),
            flag("secure-port", &self.address.port()),
            flag("advertise-address", &self.address.ip()),
            flag("tls-cert-file", &file(credentials::SERVER_CERTIFICATE)),
            flag("tls-private-key-file", &file(credentials::SERVER_KEY)),
            flag("token-auth-file", &file(credentials::TOKENS)),
            flag("authorization-mode", &"RBAC"),
            flag("service-account-issuer", &"https://kubernetes.default.svc"),
            flag("service-account-key-file", &file(credentials::SERVICE_ACCOUNT_PUBLIC_KEY)),
            flag("service-account-signing-key-file", &file(credentials::SERVICE_ACCOUNT_KEY)),
            flag("service-cluster-ip-range", &self.options.service_cidrs.join(",")),
            flag("allow-privileged", &true),
            flag("profiling", &false),
            // Tests create tens of thousands of objects at once.
            flag("enable-priority-and-fairness", &false),
            flag("max-requests-inflight", &4000),
            flag("max-mutating-requests-inflight", &2000),
        ]);
        if self.options.for_kubelets {
            // For `kubectl exec`: no DNS server knows the nodes' names.
            command.arg("--kubelet-preferred-address-types=InternalIP");
        } else {
            command.args([
                // Pods are made by hand, and no controller makes the account that this plugin asks for.
                flag("disable-admission-plugins", &"ServiceAccount"),
                // Its own address need not be one that an EndpointSlice may hold.
                flag("endpoint-reconciler-type", &"none"),
            ]);
        }
        command.args(&self.options.apiserver_args);
        let log = self.path.join("kube-apiserver.log");
        self.apiserver = Some(Process::spawn(command, &log, self.options.netns.as_deref())?);
        self.wait_ready().await
    }

    async fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let error = match self.is_ready().await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let mut processes = [("etcd", Some(&mut self.etcd)), ("kube-apiserver", self.apiserver.as_mut())];
            for (name, process) in &mut processes {
                if let Some(process) = process
                    && let Some(status) = process.try_wait()?
                {
                    bail!("{name} ended: {status}\n{}", process.log_tail());
                }
            }
            if Instant::now() > deadline {
                let logs = processes.map(|(_, process)| process.map(|p| p.log_tail()).unwrap_or_default());
                bail!("kube-apiserver is not ready: {error:#}\n{}", logs.join("\n"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks `/readyz` from the namespace that the server runs in.
    async fn is_ready(&self) -> Result<()> {
        let (kubeconfig, netns) = (self.admin_kubeconfig(), self.options.netns.clone());
        let ask = async move {
            let request = http::Request::get("/readyz").body(vec![])?;
            client(&kubeconfig).await?.request_text(request).await?;
            anyhow::Ok(())
        };
        let ask = tokio::time::timeout(Duration::from_secs(2), ask);
        match netns {
            None => ask.await?,
            Some(netns) => {
                let on_thread = move || {
                    in_netns(Some(&netns), || {
                        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                        runtime.block_on(ask)?
                    })
                };
                tokio::task::spawn_blocking(on_thread).await?
            }
        }
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.stop_apiserver();
        self.etcd.kill();
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            // The test's own output, beside its panic message.
            #[expect(clippy::print_stderr)]
            {
                eprintln!("logs of the control plane: {}", dir.keep().display());
            }
        }
    }
}

/// A client with a kubeconfig of the test's own, never the user's.
///
/// # Errors
/// When the kubeconfig cannot be read.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// The upstream program `name`: from the folder that `KUBE_LANE_CONTROLPLANE` names, and from nowhere else, if the
/// variable is set (`cargo xtask test --kubernetes` sets it); from `KUBEBUILDER_ASSETS` if it is there; else as
/// `cargo xtask setup` built it.
///
/// # Errors
/// When the program is in none of these places.
pub fn program(name: &str) -> Result<PathBuf> {
    let folder = |variable| std::env::var_os(variable).map(PathBuf::from);
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/controlplane/bin");
    let folders = match folder("KUBE_LANE_CONTROLPLANE") {
        Some(release) => vec![release],
        None => folder("KUBEBUILDER_ASSETS").into_iter().chain([built]).collect(),
    };
    let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| anyhow!("{name} is missing in {folders:?}: `cargo xtask setup` builds it"))
}

fn start_etcd(dir: &Path, netns: Option<&Path>, port: u16, peer_port: u16) -> Result<Process> {
    let mut command = Command::new(program("etcd")?);
    let (url, peer_url) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
    command.arg("--data-dir").arg(dir.join("etcd"));
    command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
    command.args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url]);
    command.args(["--initial-cluster", &format!("default={peer_url}")]);
    // What it holds need not survive the machine.
    command.args(["--unsafe-no-fsync", "--log-level", "warn"]);
    Process::spawn(command, &dir.join("etcd.log"), netns)
}

fn reachable(bind_address: IpAddr) -> IpAddr {
    match bind_address {
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        address => address,
    }
}
