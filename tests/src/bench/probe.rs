//! Clients that dial until they are answered as expected, and the time that takes.
//!
//! Owns the pace of dialling: a client that never rests would take the processor from the proxy that it waits for.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kube_lane_lab::{Dial, Proto};

/// How long one connection may take, at least and at most. Where nothing is lost it takes a fraction of that, but on
/// their way up proxies drop what goes to ClusterIPs that they do not know yet.
const DIAL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// Answers in a row that show that only the expected pod answers.
const IN_A_ROW: usize = 5;
/// The longest pause between two dials.
const PAUSE: Duration = Duration::from_millis(10);

/// A new connection to `to`. It is given up after a twentieth of the time that has been waited already.
pub(super) fn dial(to: SocketAddr, begun: Instant) -> Dial {
    Dial::new(Proto::Tcp, to).timeout((begun.elapsed() / 20).clamp(DIAL.0, DIAL.1))
}

/// Dials each of `pending` until somebody has answered; forgets those that were answered. The moment when the last
/// was, unless `until` comes first.
pub(super) fn await_answers(
    pending: &mut Vec<SocketAddr>,
    begun: Instant,
    until: Instant,
) -> Option<Instant> {
    while let Some(to) = pending.last() {
        if dial(*to, begun).ask().by().is_some() {
            pending.pop();
        } else if Instant::now() < until {
            pause(begun, Duration::from_millis(1));
        } else {
            return None;
        }
    }
    Some(Instant::now())
}

/// Dials `to` until nobody but `expected` answers: the moment of the first of [`IN_A_ROW`] of its answers, unless
/// `until` comes first.
pub(super) fn await_only(to: SocketAddr, expected: &str, begun: Instant, until: Instant) -> Option<Instant> {
    let mut since = None;
    let mut in_a_row = 0;
    while in_a_row < IN_A_ROW {
        if dial(to, begun).ask().by() == Some(expected) {
            since.get_or_insert_with(Instant::now);
            in_a_row += 1;
        } else if Instant::now() < until {
            (since, in_a_row) = (None, 0);
            pause(begun, Duration::from_micros(50));
        } else {
            return None;
        }
    }
    since
}

/// Rests for a hundredth of the time that has been waited already.
fn pause(begun: Instant, least: Duration) {
    std::thread::sleep((begun.elapsed() / 100).clamp(least, PAUSE));
}
