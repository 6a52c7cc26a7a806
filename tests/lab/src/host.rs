//! A host: one network namespace with addresses and, through its node, a cgroup and a place for eBPF pins.
//!
//! Owns the namespace and the list of addresses. What runs on a host lives in the modules that add methods to it:
//! `echo`, `client`, `load`, `sniff`, `process`.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ipnetwork::IpNetwork;

use crate::error::Result;
use crate::netlink::Via;
use crate::netns::Namespace;
use crate::topology::UPLINK_INDEX;

/// A node, a pod or an outside host. A clone is the same host, which lives until its last clone and its owner
/// ([`Pod`](crate::Pod) or [`Lab`](crate::Lab)) are gone.
#[derive(Clone, Debug)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: Arc<str>,
    primary: [IpAddr; 2],
    addresses: Mutex<Vec<IpAddr>>,
    namespace: Namespace,
    cgroup: PathBuf,
    bpf_root: PathBuf,
    servers: tokio::runtime::Handle,
}

impl Host {
    pub(crate) fn new(
        name: &str,
        primary: [IpAddr; 2],
        namespace: Namespace,
        (cgroup, bpf_root): (PathBuf, PathBuf),
        servers: tokio::runtime::Handle,
    ) -> Self {
        let addresses = Mutex::new(primary.to_vec());
        Self(Arc::new(Inner { name: name.into(), primary, addresses, namespace, cgroup, bpf_root, servers }))
    }

    /// The name, which its echo servers answer with.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub(crate) fn shared_name(&self) -> Arc<str> {
        Arc::clone(&self.0.name)
    }

    /// The name for `ip netns exec`.
    pub fn netns(&self) -> &str {
        self.0.namespace.name()
    }

    /// The cgroup v2 directory that its processes and clients are in; that of pods is `kubepods` below their node's.
    pub fn cgroup(&self) -> &Path {
        &self.0.cgroup
    }

    /// A folder in a BPF file system that is its own, or its node's, and goes with the lab; it may have to be made.
    pub fn bpf_root(&self) -> &Path {
        &self.0.bpf_root
    }

    /// Its first IPv4 address.
    pub fn v4(&self) -> IpAddr {
        self.0.primary[0]
    }

    /// Its first IPv6 address.
    pub fn v6(&self) -> IpAddr {
        self.0.primary[1]
    }

    /// All its addresses but loopback and link-local ones.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.0.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives the host one more address, on its uplink.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add_address(&self, address: IpAddr) -> Result<()> {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        self.namespace().netlink(move |netlink| netlink.address(UPLINK_INDEX, address, prefix))?;
        self.0.addresses.lock().unwrap_or_else(PoisonError::into_inner).push(address);
        Ok(())
    }

    /// Sends what goes to a network through a gateway beyond the uplink, in place of where it went.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn route(&self, to: IpNetwork, gateway: IpAddr) -> Result<()> {
        self.namespace().netlink(move |netlink| netlink.route(to, Via::Gateway(gateway, UPLINK_INDEX)))
    }

    /// Runs a closure on a thread of its own in the host's namespace and cgroup, and waits for it. The sockets it
    /// makes stay there wherever they are used later. A panic of the closure goes on in the caller.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn run<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        match self.namespace().thread(body)?.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// The sysctls of its namespace that are not as the lab sets them, each with both values, and how many the lab
    /// sets there. The lab makes none deviate; an agent does, which sets conntrack's.
    ///
    /// # Errors
    /// When a sysctl cannot be read.
    pub fn deviating_sysctls(&self) -> Result<(Vec<String>, usize)> {
        self.namespace().deviating_sysctls()
    }

    pub(crate) fn namespace(&self) -> &Namespace {
        &self.0.namespace
    }

    /// The runtime of the lab's servers.
    pub(crate) fn servers(&self) -> &tokio::runtime::Handle {
        &self.0.servers
    }
}
