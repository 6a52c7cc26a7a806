//! The kernel lane: what the kernel does with what we program, in network namespaces. Needs root.

// Named a test module for clippy, which else forbids `unwrap` in the helpers.
#[cfg(test)]
mod lab;
