//! kube-lane, the library behind the `kube-lane` binary.
//!
//! ```text
//! source (API server | manifest folder) → model (pure) → dataplane → kernel
//! ```
//!
//! `ARCHITECTURE.md` at the top of the repository is the map of these modules and of what each never does.

// The random histories of `tests/planner` know the crate by its name.
#[cfg(test)]
extern crate self as kube_lane;

pub mod address;
pub mod backoff;
pub mod causes;
pub mod cli;
pub mod config;
pub mod controller;
pub mod dataplane;
pub mod health;
pub mod memory;
pub mod model;
pub mod observability;
pub mod ready;
pub mod source;
pub mod status;
pub mod version;
mod watch;
