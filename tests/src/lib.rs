//! What the kernel lane, the cluster lane, the demo and the benchmarks share.

pub mod controlplane;
pub mod kube_proxy;
pub mod process;
