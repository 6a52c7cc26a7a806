//! Network namespaces: one thread lives in each, and everything that happens there starts from that thread.
//!
//! Owns the namespace's thread and its name under `/run/netns`. A thread or process started from the
//! namespace's thread inherits namespace and cgroup, so entering either costs nothing later.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{Doing, Error, Result};
use crate::leftovers::{self, NETNS_DIR};
use crate::netlink::Netlink;
use crate::{cgroup, leftovers::unmount, sysctls};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
    /// Whether its sysctls are those of a router.
    router: bool,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    fd: OwnedFd,
    /// The name under `/run/netns` that goes with it; none where another program made the namespace.
    file: Option<PathBuf>,
}

impl Namespace {
    /// Makes a namespace with `lo` up, whose threads and processes are in a cgroup, and names it for `ip netns`.
    pub(crate) fn create(name: String, cgroup: PathBuf, router: bool) -> Result<Self> {
        let file = Path::new(NETNS_DIR).join(&name);
        let set_up = {
            let file = file.clone();
            move || set_up(&cgroup, &file, router)
        };
        Self::start(name, router, Some(file.clone()), set_up).inspect_err(|_| unmount(&file))
    }

    /// Enters a namespace that another program made, changes nothing there, and leaves it as it is.
    pub(crate) fn adopt(name: String, netns: PathBuf, cgroup: PathBuf) -> Result<Self> {
        Self::start(name, false, None, move || {
            cgroup::enter_thread(&cgroup)?;
            let doing = || format!("enter the network namespace {}", netns.display());
            let fd = File::open(&netns).doing(doing)?;
            setns(&fd, CloneFlags::CLONE_NEWNET).doing(doing)?;
            Ok(fd.into())
        })
    }

    /// Starts the namespace's thread, which enters it first.
    fn start(
        name: String,
        router: bool,
        file: Option<PathBuf>,
        enter: impl FnOnce() -> Result<OwnedFd> + Send + 'static,
    ) -> Result<Self> {
        let (jobs, queue) = channel();
        let (ready, outcome) = channel();
        let body = move || {
            let entered = enter();
            let proceed = entered.is_ok();
            // The receiver waits for exactly this.
            let _ = ready.send(entered);
            if proceed {
                live(&queue);
            }
        };
        let builder = thread::Builder::new().name("lab-netns".into());
        let thread = builder.spawn(body).doing(|| format!("start a thread for {name}"))?;
        let fd = outcome.recv().map_err(|_| Error::Gone(name.clone())).flatten()?;
        Ok(Self { name, router, jobs: Some(jobs), thread: Some(thread), fd, file })
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

    /// The sysctls that are not as the lab set them, and how many were read.
    pub(crate) fn deviating_sysctls(&self) -> Result<(Vec<String>, usize)> {
        let router = self.router;
        self.enter(move || sysctls::deviations(router))?
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
        if let Some(file) = &self.file {
            leftovers::unmount(file);
        }
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
    sysctls::set_up(router)?;
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
