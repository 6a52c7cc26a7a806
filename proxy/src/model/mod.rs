//! What each Service should look like on this node: a pure function of Services, EndpointSlices and node facts.
//!
//! Owns the vocabulary ([`input`], [`plan`]) and every decision of policy. Never does I/O, never reads a clock,
//! never depends on hash order: the same objects give the same plans on every node and in every order of arrival.

mod claims;
mod endpoint;
mod frontend;
pub mod input;
mod networks;
mod node;
mod objects;
pub mod plan;
pub mod planner;
pub mod render;
mod service;
mod settings;
mod source_ranges;
mod topology;
mod traffic_policy;
