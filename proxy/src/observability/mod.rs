//! What an operator sees of a running agent: logs and metrics.
//!
//! Read by nobody's decisions.

pub mod api_server;
pub mod changes;
pub mod commits;
pub mod configuration;
pub mod events;
pub mod flows;
pub mod local;
pub mod manifests;
pub mod metrics;
pub mod socket;
pub mod telemetry;
