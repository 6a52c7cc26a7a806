//! What a program reads after it has decided, and what it leaves with a socket.

use core::mem::{align_of, offset_of};

use crate::{Address, FrontendKey, Port};

/// A value of [`maps::BACKENDS`](crate::maps::BACKENDS): where to connect to. Written before anything names its id, and
/// not again before no program can hold that.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The address; for IPv4 v4-mapped.
    pub address: Address,
    /// The port.
    pub port: Port,
    padding: [u8; 2],
    /// The id of the port that it belongs to; 0: it is free.
    pub owner: u32,
}

impl Backend {
    /// The backend at an address and port, of the port with the id `owner`.
    #[inline]
    pub const fn new(address: Address, port: Port, owner: u32) -> Self {
        Self { address, port, padding: [0; 2], owner }
    }
}

/// A key of [`maps::AFFINITY`](crate::maps::AFFINITY): a client of a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    /// The cookie of the client's network namespace: a pod has one client address of a family.
    pub client: u64,
    /// The id of the port.
    pub port: u32,
    padding: u32,
}

impl AffinityKey {
    /// A client of a port.
    #[inline]
    pub const fn new(client: u64, port: u32) -> Self {
        Self { client, port, padding: 0 }
    }
}

/// What a TCP socket dialled, and where that led. `getpeername()` tells the first where the kernel says the second.
/// Adjacent builds keep this layout, for the sockets that live on.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reverse {
    /// What was dialled.
    pub frontend: FrontendKey,
    /// The backend's address.
    pub address: Address,
    /// The backend's port.
    pub port: Port,
    padding: [u8; 2],
}

impl Reverse {
    /// `frontend` led to an address and port.
    #[inline]
    pub const fn new(frontend: FrontendKey, address: Address, port: Port) -> Self {
        Self { frontend, address, port, padding: [0; 2] }
    }
}

/// How many destinations a UDP socket can have sent to and still know where each led; frontends that it sends to
/// afterwards are left to nftables.
pub const PEERS: usize = 8;

/// What a UDP socket sent to, and where that led. The kernel holds the socket's lock while a program reads or writes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// What was sent to, and where that led.
    pub reverse: Reverse,
    /// The id of the backend; 0: the entry is free; [`Peer::LEFT`].
    pub backend: u32,
}

impl Peer {
    /// What is sent to this destination is left alone. It is no frontend; or it is one that nftables answers, since its
    /// backend is also another destination of the socket's, and what that backend answers could come from either.
    pub const LEFT: u32 = u32::MAX;
}

/// All that a UDP socket remembers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peers(pub [Peer; PEERS]);

const _: () = {
    assert!(size_of::<Backend>() == 24 && align_of::<Backend>() == 4);
    assert!(offset_of!(Backend, address) == 0);
    assert!(offset_of!(Backend, port) == 16);
    assert!(offset_of!(Backend, padding) == 18);
    assert!(offset_of!(Backend, owner) == 20);
    assert!(size_of::<AffinityKey>() == 16 && align_of::<AffinityKey>() == 8);
    assert!(offset_of!(AffinityKey, client) == 0);
    assert!(offset_of!(AffinityKey, port) == 8);
    assert!(offset_of!(AffinityKey, padding) == 12);
    assert!(size_of::<Reverse>() == 40 && align_of::<Reverse>() == 4);
    assert!(offset_of!(Reverse, frontend) == 0);
    assert!(offset_of!(Reverse, address) == 20);
    assert!(offset_of!(Reverse, port) == 36);
    assert!(offset_of!(Reverse, padding) == 38);
    assert!(size_of::<Peer>() == 44 && align_of::<Peer>() == 4);
    assert!(offset_of!(Peer, reverse) == 0);
    assert!(offset_of!(Peer, backend) == 40);
    assert!(size_of::<Peers>() == PEERS * size_of::<Peer>());
};

#[cfg(feature = "user")]
mod pod {
    use super::{AffinityKey, Backend};

    // SAFETY: `repr(C)`, integers only, no padding but the named fields (see the asserts above): every byte is
    // initialised, every value valid.
    unsafe impl aya::Pod for Backend {}
    // SAFETY: as above.
    unsafe impl aya::Pod for AffinityKey {}
}
