//! Types that both the agent and the eBPF programs read: layouts only, no behaviour of either side.
//!
//! Every type here is `#[repr(C)]` or `#[repr(transparent)]` with its padding spelled out and its size and offsets
//! asserted, and holds integers only: no `bool`, `enum`, `Option` or `usize`, since neither side checks what the other
//! wrote. All bytes zero means "nothing here" in every map: a word that was never written makes a program leave the
//! socket alone.
//!
//! | file | owns |
//! |---|---|
//! | `net` | addresses, ports, the key of a frontend |
//! | `words` | what a program decides on: one `u64` each, read by one load and written by one store |
//! | `records` | what is no decision: backends, and what a socket remembers |
//! | `settings` | what holds for all Services |
//!
//! [`LAYOUT`] names all of it together, for the maps that outlive an agent.
#![no_std]

mod net;
mod records;
mod settings;
mod words;

pub use net::{Address, FrontendKey, Port, TCP, UDP};
pub use records::{AffinityKey, Backend, PEERS, Peer, Peers, Reverse};
pub use settings::{Answered, Client, Network4, Network6, POD_CGROUPS, PodCgroups, Settings};
pub use words::{Frontend, Member, PortWord, Remembered, Set, Slot};

/// The version of everything in this crate, in the path of the pins. It changes with every layout, so that an agent
/// never reads the maps of another layout as its own.
pub const LAYOUT: &str = "v1";

/// What the maps of the eBPF object are called.
pub mod maps {
    /// Hash, [`FrontendKey`](crate::FrontendKey) → [`Frontend`](crate::Frontend). A NodePort has the unspecified
    /// address of its family, and counts for destinations in [`NODE_ADDRESSES`].
    pub const FRONTENDS: &str = "FRONTENDS";
    /// Array by set id, [`Set`](crate::Set): the endpoint sets.
    pub const SETS: &str = "SETS";
    /// Array, [`Slot`](crate::Slot): the ranges that the sets name.
    pub const SLOTS: &str = "SLOTS";
    /// Array by backend id, [`Backend`](crate::Backend). An entry is immutable while anything names it.
    pub const BACKENDS: &str = "BACKENDS";
    /// Array by backend id, [`Member`](crate::Member): which sets a backend is in.
    pub const MEMBERS: &str = "MEMBERS";
    /// Array by port id, [`PortWord`](crate::PortWord).
    pub const PORTS: &str = "PORTS";
    /// Array by backend id, `u64`: new connections (for UDP: first datagrams of a client) that were sent there.
    pub const CONNECTIONS: &str = "CONNECTIONS";
    /// Array by port id, `u64`: connections that were refused, since there is no endpoint.
    pub const REFUSED: &str = "REFUSED";
    /// Hash, [`Address`](crate::Address) → `u64`, not 0: where NodePorts answer.
    pub const NODE_ADDRESSES: &str = "NODE_ADDRESSES";
    /// Hash, [`AffinityKey`](crate::AffinityKey) → [`Remembered`](crate::Remembered).
    pub const AFFINITY: &str = "AFFINITY";
    /// Hash, id of a cgroup → `u64`, not 0: what runs there and below is left alone.
    pub const LEFT_ALONE: &str = "LEFT_ALONE";
    /// Socket storage, [`Reverse`](crate::Reverse): what a TCP socket dialled and where that led.
    pub const REVERSE: &str = "REVERSE";
    /// Socket storage, [`Peers`](crate::Peers): what a UDP socket sent to and where that led.
    pub const UDP_PEERS: &str = "UDP_PEERS";
    /// Array of one, `u64`: connections that were left to nftables, since [`AFFINITY`] had no room for the client.
    pub const UNREMEMBERED: &str = "UNREMEMBERED";
    /// Array of one, [`Settings`](crate::Settings).
    pub const SETTINGS: &str = "SETTINGS";
}

/// What the programs of the eBPF object are called.
pub mod programs {
    /// Runs at every IPv4 `connect()` of the cgroup and those below it.
    pub const CONNECT4: &str = "connect4";
    /// Runs at every IPv6 `connect()`, also to v4-mapped addresses.
    pub const CONNECT6: &str = "connect6";
    /// Runs at every `getpeername()` of an IPv4 socket.
    pub const GETPEERNAME4: &str = "getpeername4";
    /// Runs at every `getpeername()` of an IPv6 socket, also one that is connected to a v4-mapped address.
    pub const GETPEERNAME6: &str = "getpeername6";
    /// Runs at every datagram that names an IPv4 destination, also from an IPv6 socket to a v4-mapped address.
    pub const SENDMSG4: &str = "sendmsg4";
    /// Runs at every datagram that names an IPv6 destination.
    pub const SENDMSG6: &str = "sendmsg6";
    /// Runs where an IPv4 socket is told the source of a datagram.
    pub const RECVMSG4: &str = "recvmsg4";
    /// Runs where an IPv6 socket is told the source of a datagram, also a v4-mapped one.
    pub const RECVMSG6: &str = "recvmsg6";

    /// Those that answer TCP: always attached.
    pub const TCP: [&str; 4] = [CONNECT4, CONNECT6, GETPEERNAME4, GETPEERNAME6];
    /// Those that answer UDP: attached where `socketLB.udp` asks for it.
    pub const UDP: [&str; 4] = [SENDMSG4, SENDMSG6, RECVMSG4, RECVMSG6];
}
