//! The planner told by hand-made events: what it plans again, what it reports, and that history leaves no trace.

#[cfg(test)]
mod build;
mod claims;
#[cfg(test)]
mod endpoints;
#[cfg(test)]
mod history;
mod incremental;
mod json;
mod latches;
mod node;
#[cfg(test)]
mod random;
