//! What the kernel lane, the cluster lane, the demo and the benchmarks share.
