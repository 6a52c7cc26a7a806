//! Which build of kube-lane this is. The build script finds out; nothing here asks git.

/// The version, such as `0.1.0`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The full hash of the commit, followed by `-dirty` where the sources differed from it; `unknown` where they came
/// without their repository.
pub const COMMIT: &str = env!("KUBE_LANE_COMMIT_HASH");
