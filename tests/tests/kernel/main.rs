//! The kernel lane: what the kernel does with what we program, in network namespaces. Needs root.

mod lab;
