//! The values that programs decide on. Each is one `u64`, since a reader may meet a hash element that was freed and
//! taken for another key meanwhile: what one load gives is whole, and says to whom it belongs.
//!
//! Ids count from 1 in every array: 0, and so a word of zeros, names nothing.

/// A value of [`maps::FRONTENDS`](crate::maps::FRONTENDS): where a frontend leads. Immutable while the frontend lives.
///
/// Bits 0–27: the id of its set. Bit 28: [`Frontend::EXTERNAL`]. Bits 32–63: the fingerprint of its key.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend(pub u64);

impl Frontend {
    /// The frontend is no cluster IP: see [`Answered`](crate::Answered).
    pub const EXTERNAL: u64 = 1 << 28;
    const SET: u64 = (1 << 28) - 1;

    /// Leads to `set`; `flags`: none, or [`Frontend::EXTERNAL`].
    #[inline]
    pub const fn new(set: u32, flags: u64, fingerprint: u32) -> Self {
        Self(set as u64 & Self::SET | flags & Self::EXTERNAL | (fingerprint as u64) << 32)
    }

    /// The id of its set.
    #[inline]
    pub const fn set(self) -> u32 {
        (self.0 & Self::SET) as u32
    }

    /// Whether it is no cluster IP.
    #[inline]
    pub const fn is_external(self) -> bool {
        self.0 & Self::EXTERNAL != 0
    }

    /// The fingerprint of its key: that of another key means that the element was freed under the reader.
    #[inline]
    pub const fn fingerprint(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// A value of [`maps::SETS`](crate::maps::SETS): an endpoint set. The port with id `p` has the sets `2p` (Cluster) and
/// `2p + 1` (Local).
///
/// Bits 0–31: its first slot. Bits 32–55: how many slots it has. Bit 63: [`Set::REFUSED`].
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set(pub u64);

impl Set {
    /// There is no endpoint on any node: connections are refused. An empty set without this is left to nftables.
    pub const REFUSED: Self = Self(1 << 63);
    /// Nothing is known: left to nftables.
    pub const NONE: Self = Self(0);
    /// The most slots that a set can have.
    pub const MAX: u32 = (1 << 24) - 1;

    /// The slots `first .. first + count`.
    #[inline]
    pub const fn new(first: u32, count: u32) -> Self {
        Self(first as u64 | ((count & Self::MAX) as u64) << 32)
    }

    /// The id of a port's Cluster set.
    #[inline]
    pub const fn cluster_of(port: u32) -> u32 {
        port << 1
    }

    /// The id of a port's Local set.
    #[inline]
    pub const fn local_of(port: u32) -> u32 {
        (port << 1) | 1
    }

    /// The port that a set belongs to.
    #[inline]
    pub const fn port_of(set: u32) -> u32 {
        set >> 1
    }

    /// Its first slot.
    #[inline]
    pub const fn first(self) -> u32 {
        self.0 as u32
    }

    /// How many slots it has.
    #[inline]
    pub const fn count(self) -> u32 {
        (self.0 >> 32) as u32 & Self::MAX
    }

    /// The slot that a random number, of all that there are, falls on. Meaningless where there are no slots.
    #[inline]
    pub const fn pick(self, random: u32) -> u32 {
        self.first().wrapping_add(((random as u64 * self.count() as u64) >> 32) as u32)
    }

    /// Whether connections are refused.
    #[inline]
    pub const fn is_refused(self) -> bool {
        self.0 & Self::REFUSED.0 != 0
    }
}

/// A value of [`maps::SLOTS`](crate::maps::SLOTS). Bits 0–31: the id of a backend. Bits 32–63: the id of the set that
/// the slot belongs to; another one means that the reader is late, and leaves the socket alone.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub u64);

impl Slot {
    /// `backend`, in `set`.
    #[inline]
    pub const fn new(backend: u32, set: u32) -> Self {
        Self(backend as u64 | (set as u64) << 32)
    }

    /// The id of the backend.
    #[inline]
    pub const fn backend(self) -> u32 {
        self.0 as u32
    }

    /// The id of the set.
    #[inline]
    pub const fn set(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// A value of [`maps::MEMBERS`](crate::maps::MEMBERS): where a backend may be used that a client was led to before.
///
/// Bits 0–31: the id of its port. Bit 32: it is in the Cluster set. Bit 33: in the Local set.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member(pub u64);

impl Member {
    /// In no set: nobody is led there again.
    pub const NONE: Self = Self(0);

    /// Of `port`, and in these of its sets.
    #[inline]
    pub const fn new(port: u32, cluster: bool, local: bool) -> Self {
        Self(port as u64 | (cluster as u64) << 32 | (local as u64) << 33)
    }

    /// Whether the backend is in `set`.
    #[inline]
    pub const fn is_in(self, set: u32) -> bool {
        self.0 as u32 == Set::port_of(set) && self.0 >> (32 + (set & 1)) & 1 != 0
    }
}

/// A value of [`maps::PORTS`](crate::maps::PORTS): what a port's sets share. Bits 0–31: for how many seconds a client
/// comes back to the backend that it had; 0: it does not.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortWord(pub u64);

impl PortWord {
    /// A port whose clients come back for so many seconds; 0: never.
    #[inline]
    pub const fn new(affinity: u32) -> Self {
        Self(affinity as u64)
    }

    /// In seconds; 0: no affinity.
    #[inline]
    pub const fn affinity(self) -> u32 {
        self.0 as u32
    }
}

/// A value of [`maps::AFFINITY`](crate::maps::AFFINITY). Bits 0–31: the id of the backend that the client had. Bits
/// 32–63: when it last came, in seconds of `CLOCK_MONOTONIC`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remembered(pub u64);

impl Remembered {
    /// `backend`, at `seconds`.
    #[inline]
    pub const fn new(backend: u32, seconds: u32) -> Self {
        Self(backend as u64 | (seconds as u64) << 32)
    }

    /// The id of the backend.
    #[inline]
    pub const fn backend(self) -> u32 {
        self.0 as u32
    }

    /// When the client last came, in seconds.
    #[inline]
    pub const fn seconds(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether a port with this affinity has forgotten the client by `now`, in seconds. As both times are rounded down,
    /// a memory lasts as long as it has to, or up to a second more.
    #[inline]
    pub const fn has_expired(self, affinity: u32, now: u32) -> bool {
        now.wrapping_sub(self.seconds()) > affinity
    }
}

#[cfg(feature = "user")]
mod pod {
    use super::{Frontend, Member, PortWord, Remembered, Set, Slot};

    // SAFETY: `repr(transparent)` over `u64`: every byte is initialised, every value valid.
    unsafe impl aya::Pod for Frontend {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Set {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Slot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Member {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PortWord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Remembered {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frontend_gives_back_what_it_was_made_of() {
        for (set, flags, fingerprint) in [(2, 0, 0), ((1 << 28) - 1, Frontend::EXTERNAL, u32::MAX), (5, 0, 7)]
        {
            let word = Frontend::new(set, flags, fingerprint);
            assert_eq!((word.set(), word.is_external(), word.fingerprint()), (set, flags != 0, fingerprint));
        }
    }

    #[test]
    fn a_set_gives_back_what_it_was_made_of() {
        let set = Set::new(u32::MAX, Set::MAX);
        assert_eq!((set.first(), set.count(), set.is_refused()), (u32::MAX, Set::MAX, false));
        assert!(Set::REFUSED.is_refused() && Set::REFUSED.count() == 0 && !Set::NONE.is_refused());
        assert_eq!([Set::cluster_of(9), Set::local_of(9)].map(Set::port_of), [9, 9]);
    }

    #[test]
    fn a_pick_is_a_slot_of_the_set_and_each_is_as_likely() {
        let set = Set::new(16, 3);
        assert_eq!(
            [0, u32::MAX / 3, u32::MAX / 3 + 1, u32::MAX].map(|random| set.pick(random)),
            [16, 16, 17, 18]
        );
        assert_eq!(Set::new(0, Set::MAX).pick(u32::MAX), Set::MAX - 1);
    }

    #[test]
    fn a_member_is_in_the_sets_of_its_port_alone() {
        let member = Member::new(3, false, true);
        assert!(member.is_in(Set::local_of(3)));
        assert!(!member.is_in(Set::cluster_of(3)) && !member.is_in(Set::local_of(4)));
        assert!(!Member::NONE.is_in(0) && !Member::NONE.is_in(1));
    }

    #[test]
    fn slots_and_memories_keep_their_halves() {
        let slot = Slot::new(u32::MAX, 8);
        assert_eq!((slot.backend(), slot.set()), (u32::MAX, 8));
        let remembered = Remembered::new(8, u32::MAX);
        assert_eq!((remembered.backend(), remembered.seconds()), (8, u32::MAX));
    }

    #[test]
    fn a_memory_lasts_as_long_as_the_affinity() {
        let remembered = Remembered::new(1, 100);
        assert!(!remembered.has_expired(10, 100) && !remembered.has_expired(10, 110));
        assert!(remembered.has_expired(10, 111));
        // The seconds wrap after 136 years of uptime.
        assert!(!Remembered::new(1, u32::MAX).has_expired(10, 3));
    }
}
