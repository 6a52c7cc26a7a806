//! What passes between the pure half of the socket layer (`lower`) and the half that does system calls (`kernel`).
//!
//! Owns words only.

use kube_lane_common::{Address, Backend, Frontend, FrontendKey, Member, PortWord, Set, Slot};

/// One change of the maps. A list of them is carried out in its order: after each one, whatever a program picks is in
/// the set that was or in the one that will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// A frontend, or that there is none any more. A system call; everything else is a store or a few.
    Frontend(FrontendKey, Option<Frontend>),
    /// Whether NodePorts answer on an address. A system call.
    NodeAddress(Address, bool),
    /// The set with this id.
    Set(u32, Set),
    /// The slot at this index.
    Slot(u32, Slot),
    /// The backend with this id, which nothing names yet; its counter starts at 0.
    Backend(u32, Backend),
    /// Where the backend with this id may be used again.
    Member(u32, Member),
    /// The port with this id.
    Port(u32, PortWord),
    /// The counter of refusals of the port with this id starts at 0.
    NothingRefused(u32),
}

/// How much the maps have room for. Ids count from 1, so an array has one entry that is never used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Frontends, NodePorts counted once.
    pub frontends: u32,
    /// Ids of ports; there are twice as many of sets.
    pub ports: u32,
    /// Slots of all ranges.
    pub slots: u32,
    /// Ids of backends.
    pub backends: u32,
}

/// What the maps of an earlier run hold.
#[derive(Debug, Default)]
pub struct Found {
    /// What is answered, in no order.
    pub frontends: Vec<(FrontendKey, Frontend)>,
    /// Where NodePorts answer.
    pub node_addresses: Vec<Address>,
    /// By id; shorter than the map where the rest is zeros, as all that follow.
    pub sets: Vec<Set>,
    /// By index.
    pub slots: Vec<Slot>,
    /// By id.
    pub backends: Vec<Backend>,
    /// By id of the backend.
    pub members: Vec<Member>,
    /// By id.
    pub ports: Vec<PortWord>,
}
