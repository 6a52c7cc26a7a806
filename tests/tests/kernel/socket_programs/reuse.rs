//! Why an id waits for a grace period before it is used again: what clients meet where it does, and where it does not.
//!
//! The lowering says what is written, the test writes it, in the agent's place, as fast as it can: two Services have
//! turns in which they use the one id and the one range that there are. No turn of the agent's is that quick, but a
//! program may stop between two of its loads for as long as an interrupt takes.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aya::maps::Map;
use kube_lane::dataplane::Batch;
use kube_lane::dataplane::socket::answers::{Clients, Policy};
use kube_lane::dataplane::socket::lower::Lowering;
use kube_lane::dataplane::socket::write::{Found, Sizes, Write};
use kube_lane::model::plan::NodePlan;
use kube_lane_common::{Backend, PortWord, maps};
use kube_lane_lab::{Dial, Load, Pod, Proto, Report};
use nix::libc;

use super::super::socket_maps::plan;
use super::{Programs, Stage, TARGET, service};
use crate::world::at;

/// Room for what is there at a time: the backend of a Service that stays, and that of one of two which have turns.
const ROOM: Sizes = Sizes { frontends: 3, ports: 3, slots: 2, backends: 2 };

/// Where the agent would have the arrays that a change of endpoints writes: in memory.
struct Arrays {
    backends: &'static [AtomicU64],
    members: &'static [AtomicU64],
    slots: &'static [AtomicU64],
    sets: &'static [AtomicU64],
}

impl Arrays {
    fn of(programs: &Programs) -> Self {
        let [backends, members, slots, sets] =
            [maps::BACKENDS, maps::MEMBERS, maps::SLOTS, maps::SETS].map(|name| mapped(programs, name));
        Self { backends, members, slots, sets }
    }

    fn write(&self, programs: &mut Programs, write: Write) {
        match write {
            Write::Set(id, set) => store(self.sets, id, [set.0]),
            Write::Slot(index, slot) => store(self.slots, index, [slot.0]),
            Write::Member(id, member) => store(self.members, id, [member.0]),
            Write::Backend(id, backend) => store(self.backends, id, words(backend)),
            Write::Port(id, port) => programs.array::<PortWord>(maps::PORTS).set(id, port, 0).unwrap(),
            Write::Frontend(key, Some(to)) => programs.hash(maps::FRONTENDS).insert(key, to, 0).unwrap(),
            Write::NothingRefused(_) => {}
            Write::Frontend(_, None) | Write::NodeAddress(..) => panic!("{write:?}"),
        }
    }
}

/// The first page of an array.
fn mapped(programs: &Programs, name: &str) -> &'static [AtomicU64] {
    const PAGE: usize = 4096;
    let Some(Map::Array(array)) = programs.0.map(name) else { panic!("no array {name}") };
    let (access, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    let array = array.fd().as_fd().as_raw_fd();
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, access, shared, array, 0) };
    assert!(start != libc::MAP_FAILED, "{name}: {}", std::io::Error::last_os_error());
    // SAFETY: a page of integers, which is never unmapped.
    unsafe { std::slice::from_raw_parts(start.cast(), PAGE / size_of::<u64>()) }
}

/// Writes an entry as the agent does: a word at a time, from its end.
fn store<const N: usize>(array: &[AtomicU64], index: u32, words: [u64; N]) {
    let first = index as usize * N;
    for (at, word) in words.into_iter().enumerate().rev() {
        array[first + at].store(word, Ordering::Release);
    }
}

fn words(backend: Backend) -> [u64; 3] {
    // SAFETY: of the same size, integers only, no padding.
    unsafe { std::mem::transmute(backend) }
}

/// Until every program that runs has ended: they run in RCU's read-side critical sections.
fn grace_period() {
    const GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes and gives no memory.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Two Services have turns, with `wait` between the one's end and the other's begin, while a client dials the first,
/// which has turns of this length: until the client is led to the other, or the time is over. Tells whom the client met,
/// and how many turns there were.
fn turns(wait: impl Fn(), length: Duration, at_most: Duration) -> (Report, usize) {
    let Stage { mut programs, bare: stage } = Stage::new();
    let [stays, ours, theirs] = [1, 2, 3].map(|number| service(number)[0]);
    let arrays = Arrays::of(&programs);
    let policy = Policy { detector: Clients::Interface, ..Policy::default() };
    let (mut lowering, _) = Lowering::adopt(policy, Found::default(), ROOM);
    let lead = |pod: &Pod| at(pod.v4(), TARGET);
    let put = |name: &str, vip, pods: &[&Pod]| {
        plan(name, vip, &pods.iter().map(|pod| lead(pod)).collect::<Vec<_>>())
    };
    // What a change writes, while whatever it gives up is free at once.
    let mut change = |services| {
        let mut writes = Vec::new();
        let batch = Batch { node: Some(NodePlan::default()), services, sweep: false };
        let lowered = lowering.apply(&batch, &mut |write| writes.push(write));
        assert!(lowered.full.is_empty(), "{:?}", lowered.full);
        lowering.reclaim(lowered.retired);
        writes
    };
    let (a, b) = (&stage.a, &stage.b);
    let begin = [put("stays", stays, &[b]), put("ours", ours, &[a]), put("theirs", theirs, &[])];
    for write in change(begin.into()) {
        arrays.write(&mut programs, write);
    }
    let mut turn = || {
        [
            put("ours", ours, &[]),
            put("theirs", theirs, &[b]),
            put("theirs", theirs, &[]),
            put("ours", ours, &[a]),
        ]
        .map(|service| change(vec![service]))
    };
    let steps = turn();
    assert_eq!(steps, turn(), "each turn is the same");

    // In a turn of the other's the client is refused. Whoever notices that it is late is left alone, and hears nothing.
    let dial = Dial::new(Proto::Tcp, ours).timeout(Duration::from_millis(20));
    let load = Load::start(&stage.client, dial, 1, Duration::ZERO).unwrap();
    let mut count = 0;
    let mut report = load.report();
    while report.elapsed < at_most && !report.tally.answered.contains_key(b.name()) {
        for _ in 0..100 {
            let begun = Instant::now();
            while begun.elapsed() < length {
                std::hint::spin_loop();
            }
            for step in steps.chunks_exact(2) {
                step[0].iter().for_each(|write| arrays.write(&mut programs, *write));
                wait();
                step[1].iter().for_each(|write| arrays.write(&mut programs, *write));
            }
            count += 1;
        }
        report = load.report();
    }
    (load.stop(), count)
}

#[test]
fn an_id_that_is_used_again_at_once_leads_to_another_service() {
    let (report, turns) = turns(|| (), Duration::ZERO, Duration::from_secs(60));
    assert!(report.tally.answered.contains_key("b"), "{turns} turns: {report}");
}

#[test]
fn an_id_that_is_used_again_after_a_grace_period_does_not() {
    let (report, turns) = turns(grace_period, Duration::from_millis(5), Duration::from_secs(6));
    let answered: Vec<_> = report.tally.answered.keys().collect();
    assert!(turns > 100 && answered == ["a"], "{turns} turns: {report}");
}
