//! What is in the kernel: programs at their hooks, maps, pins; and the layer that keeps them as it is told.
//!
//! Owns all system calls of the socket layer. Never decides what is answered (`answers`), or how the maps say it (`lower`).

mod affinity;
mod cgroup;
mod cgroup_watch;
mod error;
mod grace;
mod hash;
mod install;
mod installed;
mod layer;
mod left_alone;
mod maps;
mod object;
mod others;
mod owner;
mod pins;
mod pod_cgroups;
mod probe;
mod removal;
mod room;
mod settings;
mod sys;
mod trial;

pub use self::error::SocketError;
pub use self::layer::{Applied, Options, Socket};
pub use self::object::{OBJECT, available};
pub use self::owner::Owner;
pub use self::probe::{Failure, Feature, probe};
pub use self::removal::{Presence, Removal, cleanup, presence, withdraw};
pub use self::room::Room;
