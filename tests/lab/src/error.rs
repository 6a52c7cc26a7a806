//! Why the lab could not do what it was asked.

use std::io;

use crate::client::Outcome;

/// A result of the lab.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the lab could not do what it was asked. What a client meets on the wire is an [`Outcome`], never an error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The lab makes network namespaces and cgroups, which only root may.
    #[error("needs root: the lab makes network namespaces and cgroups")]
    NeedsRoot,
    /// No cgroup v2 hierarchy is mounted.
    #[error("no cgroup v2 hierarchy is mounted (/proc/self/mounts names none)")]
    NoCgroup2,
    /// The kernel was started without IPv6.
    #[error("this kernel has no IPv6 (/proc/sys/net/ipv6 is missing): boot without ipv6.disable=1")]
    NoIpv6,
    /// More hosts than the lab's address plan has room for.
    #[error("no address left for {0}")]
    Full(String),
    /// A host of the other family or kind was needed.
    #[error("{0}")]
    Unsupported(String),
    /// The system refused an operation.
    #[error("{what}: {source}")]
    Io {
        /// The operation and its object.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel refused a change of links, addresses or routes.
    #[error("{what}: {source}")]
    Netlink {
        /// The operation and its object.
        what: String,
        /// What the kernel said.
        source: Box<rtnetlink::Error>,
    },
    /// The host's namespace thread has ended.
    #[error("{0} is gone")]
    Gone(String),
    /// A flow that a caller wanted open could not be opened.
    #[error("cannot open a flow to {to}: {outcome}")]
    Flow {
        /// Where to.
        to: std::net::SocketAddr,
        /// What the client met instead.
        outcome: Outcome,
    },
}

/// Says what was being done when an I/O error came.
pub(crate) trait Doing<T> {
    /// Wraps the error with the operation and its object.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source: source.into() })
    }
}
