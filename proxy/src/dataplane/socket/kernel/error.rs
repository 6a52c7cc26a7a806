//! What can go wrong in the socket layer.
//!
//! Owns the words. None of it stops nftables.

use std::path::PathBuf;

use thiserror::Error;

/// What went wrong in the socket layer.
#[derive(Debug, Error)]
pub enum SocketError {
    /// This agent was built without eBPF programs.
    #[error(
        "this kube-lane was built without its eBPF programs (`cargo xtask build` makes one that has them)"
    )]
    NotBuiltIn,
    /// The object is malformed, or the kernel refuses one of its maps.
    #[error("cannot load the eBPF object")]
    Object(#[source] Box<aya::EbpfError>),
    /// The object does not have what this agent asks for: they are of different builds.
    #[error("the eBPF object has no {0}")]
    Missing(&'static str),
    /// The kernel refuses a program.
    #[error("the kernel refuses the program {name} ({reason})")]
    Refused {
        /// The program.
        name: &'static str,
        /// What its verifier says.
        reason: String,
        /// What the kernel says.
        #[source]
        source: std::io::Error,
    },
    /// A program cannot be loaded.
    #[error("cannot load the program {name}")]
    Load {
        /// The program.
        name: &'static str,
        /// What the kernel says.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// The cgroup cannot be opened.
    #[error("cannot open the cgroup {}", path.display())]
    Cgroup {
        /// The cgroup.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: std::io::Error,
    },
    /// The program cannot be attached: not a cgroup v2, no permission, or a program there that allows no other.
    #[error("cannot attach the program {name} to the cgroup {}", path.display())]
    Attach {
        /// The program.
        name: &'static str,
        /// The cgroup.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: std::io::Error,
    },
    /// The cgroup is none of cgroup v2.
    #[error("{} is no cgroup of cgroup v2", .0.display())]
    NoCgroup2(PathBuf),
    /// What looks like the root of the hierarchy is a cgroup of a container's.
    #[error(
        "{} is not the root of the host's cgroups but a container's own: mount the host's there, \
         or elsewhere and name it with --cgroup-root",
        .0.display()
    )]
    NotTheHosts(PathBuf),
    /// There is nothing to pin maps in.
    #[error(
        "{} is on no BPF file system: `mount -t bpf bpf /sys/fs/bpf`, in a container mount the host's /sys/fs/bpf, \
         or name another place with --bpf-root",
        .0.display()
    )]
    NoBpfFileSystem(PathBuf),
    /// Another agent has this place for pins.
    #[error(
        "another kube-lane ({}) has the socket layer that is pinned at {}: stop it first, or name another place with \
         --bpf-root (each agent wants a --bpf-root and a --cgroup-root of its own)",
        process(*.pid),
        .root.display()
    )]
    Owned {
        /// The folder of the pins.
        root: PathBuf,
        /// The agent; `None`: its process namespace is another.
        pid: Option<i32>,
    },
    /// The agent of another network namespace had this place for pins a moment ago.
    #[error(
        "the kube-lane of another network namespace had the socket layer that is pinned at {} and may only be \
         restarting: this one takes it over if that stays away for {} s",
        .root.display(),
        .patience.as_secs()
    )]
    Left {
        /// The folder of the pins.
        root: PathBuf,
        /// For how long the other may be away.
        patience: std::time::Duration,
    },
    /// A pin cannot be made, moved or removed.
    #[error("pin {}", path.display())]
    Pin {
        /// The pin, or its folder.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: std::io::Error,
    },
    /// A map cannot be had in memory.
    #[error("cannot map the array {name} into memory")]
    Memory {
        /// The map.
        name: &'static str,
        /// What the kernel says.
        #[source]
        source: std::io::Error,
    },
    /// The cookie of the network namespace cannot be read (Linux 5.14).
    #[error("cannot tell the host's network namespace from others")]
    Cookie(#[source] std::io::Error),
    /// A grace period cannot be waited for.
    #[error("cannot wait until no eBPF program runs")]
    Grace(#[source] std::io::Error),
    /// The clock of the programs cannot be read.
    #[error("cannot read CLOCK_MONOTONIC")]
    Clock(#[source] std::io::Error),
    /// An array has no such entry: it was asked for beyond its end.
    #[error("the array {name} has no entry {index}")]
    NoEntry {
        /// The map.
        name: &'static str,
        /// The entry.
        index: u32,
    },
    /// A map cannot be read or written.
    #[error("map {name}")]
    Map {
        /// The map.
        name: &'static str,
        /// What the kernel says.
        #[source]
        source: Box<aya::maps::MapError>,
    },
}

fn process(pid: Option<i32>) -> String {
    pid.map_or_else(|| "in another process namespace".into(), |pid| format!("pid {pid}"))
}
