//! Where Services, EndpointSlices, the own Node and ServiceCIDRs come from: the API server, a manifest folder, both.
//!
//! Owns watching, decoding and relists. Never decides policy: a source hands over [`crate::model::input::Event`]s
//! and knows nothing of plans or of the kernel.

mod convert;
pub mod host;
mod intern;
pub mod kube;
pub mod manifest;
mod problem;
mod wire;

pub(crate) use convert::SOURCE_RANGES;
pub use problem::{Place, Problem};
