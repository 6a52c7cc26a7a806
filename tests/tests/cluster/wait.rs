//! Waiting for what an agent brings about, patiently: the machine may be busy.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kube_lane_lab::{Dial, Host, Proto};
use kube_lane_tests::agent::Agent;

/// How long anything may take on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Waits until `probe` has nothing more to say; else fails with its words.
#[track_caller]
pub(crate) fn until(mut probe: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + LIMIT;
    while let Err(what) = probe() {
        assert!(Instant::now() < deadline, "still: {what}");
        sleep(Duration::from_millis(10));
    }
}

/// Waits until a new connection is answered by `by`, or by nobody.
#[track_caller]
pub(crate) fn answered(client: &Host, proto: Proto, to: SocketAddr, by: Option<&str>) {
    until(|| {
        let dial = Dial::new(proto, to).timeout(Duration::from_millis(300));
        let outcome = client.dial_with(dial).unwrap();
        let as_wanted = outcome.by() == by;
        as_wanted.then_some(()).ok_or_else(|| format!("{} to {proto} {to}: {outcome}", client.name()))
    });
}

/// Waits until the agent's log has a line with all of `words`.
#[track_caller]
pub(crate) fn logged(agent: &Agent, words: &[&str]) {
    until(|| {
        let log = agent.log();
        let found = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        found.then_some(()).ok_or_else(|| format!("no line with {words:?} in\n{log}"))
    });
}
