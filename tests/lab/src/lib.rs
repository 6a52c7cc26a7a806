//! Nodes, pods and outside hosts in network namespaces, with echo servers and clients that report what they met.
//!
//! Owns namespaces, links, routes, cgroups and the traffic in them. Never translates an address, never loads a rule:
//! whatever NAT happens here is the work of the proxy under test. Needs root.
//!
//! ```no_run
//! use kube_lane_lab::{Lab, Proto};
//!
//! let lab = Lab::builder().nodes(2).build()?;
//! let pod = lab.node(0).add_pod("pod-a")?;
//! let echo = pod.serve(Proto::Tcp, 8080)?;
//! let outcome = lab.outside().dial(Proto::Tcp, echo.v4())?;
//! assert_eq!(outcome.by(), Some("pod-a"));
//! # Ok::<(), kube_lane_lab::Error>(())
//! ```
//!
//! A lab lives as long as its [`Lab`]; what a killed process leaves behind, the next lab sweeps. Conntrack follows
//! connections in a namespace as soon as some rule there asks for it, as on any host.

mod agnhost;
mod bpf;
mod cgroup;
mod client;
mod connect;
mod echo;
mod error;
mod host;
mod interrupt;
mod lab;
mod leftovers;
mod load;
mod netlink;
mod netns;
mod process;
mod sctp;
mod sniff;
mod sysctls;
pub mod topology;

pub use client::{Dial, Flow, Met, Outcome, Proto, Server, Tally};
pub use connect::peer_in_kernel;
pub use echo::Echo;
pub use error::{Error, Result};
pub use host::Host;
pub use interrupt::{OnInterrupt, on_interrupt};
pub use lab::{Builder, Fabric, Lab, Node, Outside, Pod};
pub use leftovers::is_left_over;
pub use load::{Load, Report};
pub use process::Process;
pub use sniff::{Filter, Packet, Sniff};
pub use sysctls::CONTRARY;
