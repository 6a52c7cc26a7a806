//! Network namespaces: one thread lives in each, and everything that happens there starts from that thread.
//!
//! Owns the namespace's thread, its name under `/run/netns` and its sysctls. A thread or process started from the
//! namespace's thread inherits namespace and cgroup, so entering either costs nothing later.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::error::{Doing, Error, Result};
use crate::leftovers::{self, NETNS_DIR};
use crate::netlink::Netlink;
use crate::{cgroup, leftovers::unmount};

type Job = Box<dyn FnOnce() + Send>;

/// Settings of every namespace: both stacks forward nothing, answer at once and never limit ICMP errors.
const SYSCTLS: &[(&str, &str)] = &[
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/default/accept_redirects", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv6/conf/all/accept_redirects", "0"),
    ("ipv6/conf/default/accept_redirects", "0"),
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv4/icmp_ratelimit", "0"),
    ("ipv4/icmp_ratemask", "0"),
    ("ipv6/icmp/ratelimit", "0"),
];

/// Settings that not every kernel has for each namespace: the limits of all ICMP errors together, and whether bridged
/// packets meet IP rules (`br_netfilter`). The lab routes between pods in any case, so that they do without it.
const OPTIONAL_SYSCTLS: &[(&str, &str)] = &[
    ("ipv4/icmp_msgs_per_sec", "1000000"),
    ("ipv4/icmp_msgs_burst", "1000000"),
    ("bridge/bridge-nf-call-iptables", "0"),
    ("bridge/bridge-nf-call-ip6tables", "0"),
];

/// What a router needs beyond [`SYSCTLS`].
const ROUTER_SYSCTLS: &[(&str, &str)] = &[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")];

/// A network namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    fd: OwnedFd,
}

impl Namespace {
    /// Makes a namespace with `lo` up, whose threads and processes are in a cgroup, and names it for `ip netns`.
    pub(crate) fn create(name: String, cgroup: PathBuf, router: bool) -> Result<Self> {
        let (jobs, queue) = channel();
        let (ready, outcome) = channel();
        let file = Path::new(NETNS_DIR).join(&name);
        let body = {
            let file = file.clone();
            move || {
                let entered = set_up(&cgroup, &file, router);
                let proceed = entered.is_ok();
                // The receiver waits for exactly this.
                let _ = ready.send(entered);
                if proceed {
                    live(&queue);
                }
            }
        };
        let builder = thread::Builder::new().name("lab-netns".into());
        let thread = builder.spawn(body).doing(|| format!("start a thread for {name}"))?;
        match outcome.recv().map_err(|_| Error::Gone(name.clone())).flatten() {
            Ok(fd) => Ok(Self { name, jobs: Some(jobs), thread: Some(thread), fd }),
            Err(error) => {
                unmount(&file);
                Err(error)
            }
        }
    }

    /// The name for `ip netns exec`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A descriptor of the namespace, for netlink; open while `self` lives.
    pub(crate) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Runs a short job on the namespace's own thread. Jobs of one namespace run one after the other.
    pub(crate) fn enter<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (sender, result) = channel();
        let gone = || Error::Gone(self.name.clone());
        let job: Job = Box::new(move || {
            // Nobody waits any more: nothing to tell.
            let _ = sender.send(job());
        });
        self.jobs.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())
    }

    /// Starts a thread in the namespace.
    pub(crate) fn thread<T: Send + 'static>(
        &self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>> {
        self.enter(move || thread::Builder::new().name("lab-run".into()).spawn(body))?
            .doing(|| format!("start a thread in {}", self.name))
    }

    /// Changes links, addresses or routes.
    pub(crate) fn netlink<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Netlink) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.enter(move || change(&Netlink::open()?))?
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        leftovers::unmount(&Path::new(NETNS_DIR).join(&self.name));
    }
}

fn live(queue: &Receiver<Job>) {
    for job in queue {
        job();
    }
}

fn set_up(cgroup: &Path, file: &Path, router: bool) -> Result<OwnedFd> {
    cgroup::enter_thread(cgroup)?;
    unshare(CloneFlags::CLONE_NEWNET).doing(|| "make a network namespace".into())?;
    for setting in SYSCTLS.iter().chain(if router { ROUTER_SYSCTLS } else { &[] }) {
        set(setting)?;
    }
    for setting in OPTIONAL_SYSCTLS.iter().filter(|(name, _)| sysctl(name).exists()) {
        set(setting)?;
    }
    Netlink::open()?.up(crate::netlink::LOOPBACK)?;
    let own = "/proc/thread-self/ns/net";
    fs::create_dir_all(NETNS_DIR)
        .and_then(|()| File::create_new(file))
        .and_then(|_| {
            mount(Some(own), file, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(Into::into)
        })
        .doing(|| format!("name the namespace {}", file.display()))?;
    File::open(own).map(Into::into).doing(|| format!("open {own}"))
}

fn sysctl(name: &str) -> PathBuf {
    Path::new("/proc/sys/net").join(name)
}

fn set((name, value): &(&str, &str)) -> Result<()> {
    fs::write(sysctl(name), value).doing(|| format!("set net/{name} to {value}"))
}
