//! The benchmarks' program. `cargo xtask bench` builds what it measures and starts it.

use anyhow::Result;

fn main() -> Result<()> {
    kube_lane_tests::bench::run()
}
