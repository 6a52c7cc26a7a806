//! The cluster lane: tests with a real API server. One module a topic; `cargo xtask test --lane cluster`.

// Named test modules for clippy, which else forbids `unwrap` in the helpers.
#[cfg(test)]
mod agent;
#[cfg(test)]
mod api_server;
#[cfg(test)]
mod chart;
#[cfg(test)]
mod container;
#[cfg(test)]
mod controlplane;
#[cfg(test)]
mod credentials;
#[cfg(test)]
mod deploy;
#[cfg(test)]
mod health;
#[cfg(test)]
mod kube_proxy;
#[cfg(test)]
mod source;
#[cfg(test)]
mod static_pod;
#[cfg(test)]
mod wait;
