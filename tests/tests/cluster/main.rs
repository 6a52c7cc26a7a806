//! The cluster lane: tests with a real API server. One module a topic; `cargo xtask test --lane cluster`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "what fails here fails its test")]

mod controlplane;
