//! What the kernel lane, the cluster lane, the demo and the benchmarks share.

pub mod agent;
pub mod bench;
pub mod cluster;
pub mod controlplane;
pub mod kube_proxy;
pub mod nodes;
pub mod objects;
pub mod oracle;
pub mod process;
mod relay;
pub mod vm;
