//! Flows in the labs: making the connections of a step, over all proxies at once, and comparing what they meet.
//!
//! Owns the dials and how often they are made. Changes no object.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use kube_lane_lab::{Dial, Flow as Connection, Met, Outcome, Proto};

use super::format::{Family, Flow, Gets, Layer, Proxy, Scenario, Seen, Step};
use super::names::Names;
use super::stage::{Caller, Callers};

/// Nothing takes as long in a lab, so that it is a drop.
const DROPPED: Duration = Duration::from_millis(700);
/// The pauses before a flow that does not meet what it should is tried again: proxies also work after the marker is
/// in place, on conntrack for one.
const PAUSES: [u64; 3] = [100, 400, 1200];
/// How many flows are under way at once.
const WORKERS: usize = 32;

/// A label of a scenario, over one proxy and family.
type Label = (Proxy, Family, String);

/// What earlier flows of a scenario left behind for later ones.
#[derive(Default)]
pub(super) struct Memory {
    /// Connections that are held, and who dialled.
    held: Mutex<BTreeMap<Label, (Connection, String)>>,
    /// Who answered a client's dials with this label; the client comes second.
    stuck: Mutex<BTreeMap<(Label, String), String>>,
}

/// One flow over one proxy.
struct Job<'a> {
    scenario: &'a Scenario,
    rig: &'a Callers,
    family: Family,
    line: u64,
    flow: &'a Flow,
    from: &'a str,
    to: &'a str,
    address: Option<SocketAddr>,
    proto: Proto,
}

/// What came of a flow.
pub(super) struct Done {
    line: u64,
    pub(super) proxy: Proxy,
    pub(super) family: Family,
    /// The reason that the scenario gives, where the proxy differs.
    pub(super) why: Option<String>,
    /// The flow was met at the socket.
    pub(super) at_socket: bool,
    /// What was wrong.
    pub(super) wrong: Option<String>,
}

/// Runs a step's flows over these rigs.
///
/// # Errors
/// When the scenario names what is not there; what flows meet is in the result.
pub(super) fn run(
    scenario: &Scenario,
    step: &Step,
    rigs: &[&Callers],
    names: &[Names<'_>],
    memory: &Memory,
    fresh_only: bool,
) -> Result<Vec<Done>> {
    let mut groups: BTreeMap<_, Vec<Job<'_>>> = BTreeMap::new();
    for (number, job) in jobs(scenario, step, rigs, names, fresh_only)?.into_iter().enumerate() {
        // What sticks together goes one after the other: the first decides.
        let key = match &job.flow.sticks {
            Some(label) => (0, Some((job.rig.proxy, job.family, label.clone(), job.from))),
            None => (number + 1, None),
        };
        groups.entry(key).or_default().push(job);
    }
    let queue: Mutex<VecDeque<_>> = Mutex::new(groups.into_values().collect());
    let done = Mutex::new(Vec::new());
    let lock = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(group) = lock() {
                    for job in group {
                        let result = job.run(memory);
                        done.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                    }
                }
            });
        }
    });
    let mut done: Vec<Done> = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|done| (done.line, done.proxy, done.family));
    Ok(done)
}

fn jobs<'a>(
    scenario: &'a Scenario,
    step: &'a Step,
    rigs: &[&'a Callers],
    names: &[Names<'_>],
    fresh_only: bool,
) -> Result<Vec<Job<'a>>> {
    let mut jobs = Vec::new();
    for spanned in &step.flows {
        let (flow, line) = (&spanned.value, spanned.referenced.line());
        if fresh_only && (flow.hold.is_some() || flow.held.is_some()) {
            continue;
        }
        let of_family = names.iter().filter(|names| flow.family.is_none_or(|family| family == names.family));
        for names in of_family {
            for rig in rigs {
                let job = |from, to, address, proto| Job {
                    scenario,
                    rig,
                    family: names.family,
                    line,
                    flow,
                    from,
                    to,
                    address,
                    proto,
                };
                if flow.held.is_some() {
                    jobs.push(job("", "", None, Proto::Tcp));
                }
                for from in &flow.from {
                    rig.get(from).with_context(|| format!("line {line}"))?;
                    for to in &flow.to {
                        let address = names.destination(to).with_context(|| format!("line {line}"))?;
                        jobs.extend(flow.proto.iter().map(|proto| job(from, to, Some(address), *proto)));
                    }
                }
            }
        }
    }
    Ok(jobs)
}

impl Job<'_> {
    fn run(&self, memory: &Memory) -> Done {
        let (gets, seen, why) = self.flow.expected(self.rig.proxy);
        let mut met = Ok(());
        for pause in [0].into_iter().chain(PAUSES) {
            sleep(Duration::from_millis(pause));
            met = self.try_once(gets, seen, memory);
            if met.is_ok() {
                break;
            }
        }
        let (proxy, family) = (self.rig.proxy, self.family);
        let wrong = met.err().map(|met| {
            let what = match &self.flow.held {
                Some(label) => format!("the connection held as {label}"),
                None => format!("{} to {} ({})", self.from, self.to, self.proto),
            };
            let as_said = if why.is_some() { ", said to differ," } else { "" };
            format!("line {}: {proxy}{as_said} {family}: {what} is to get {gets}, but {met}", self.line)
        });
        let at_socket = self.layer() == Some(Layer::Socket) && wrong.is_none();
        Done { line: self.line, proxy, family, why: why.map(str::to_owned), at_socket, wrong }
    }

    /// Which layer has to answer; `None` where there is one only, or none can be told.
    fn layer(&self) -> Option<Layer> {
        let told = matches!(self.flow.expected(self.rig.proxy).0, Gets::Answers(_) | Gets::Refused);
        let plain = self.flow.bytes == 0 && self.flow.hold.is_none() && self.flow.held.is_none();
        if self.rig.proxy != Proxy::Ebpf || self.proto != Proto::Tcp || !told || !plain {
            return None;
        }
        // The programs answer what the node's own processes and pods do; those that have not bound an address. Other
        // containers they answer where that is stated.
        let stated_container = self.from == "container0" && self.flow.layer.is_some();
        let on_node =
            self.from.starts_with("pod") || matches!(self.from, "node0" | "node1") || stated_container;
        let stated = self.flow.layer.or(self.scenario.layer);
        let refused = *self.flow.expected(self.rig.proxy).0 == Gets::Refused;
        match stated {
            _ if !on_node => Some(Layer::Nftables),
            Some(stated) => Some(stated),
            None if !self.to.starts_with("$vip") => Some(Layer::Nftables),
            // Both refuse: the one what has no endpoint, the other ports that nobody has.
            None => (!refused).then_some(Layer::Socket),
        }
    }

    /// Asks, and holds the answer to the layer that it has to come from.
    fn ask(&self, caller: &Caller, dial: Dial) -> Result<Outcome, String> {
        let Some(layer) = self.layer() else { return Ok(ask(caller, dial, self.flow.bytes)) };
        let met = caller.host.run(move || dial.meet()).map_err(|error| error.to_string())?;
        let Met { outcome, at_socket } = met;
        let by = if at_socket { Layer::Socket } else { Layer::Nftables };
        let decided = matches!(outcome, Outcome::Answered { .. } | Outcome::Refused);
        if decided && by != layer {
            return Err(format!("{outcome} by {by}, not by {layer}"));
        }
        Ok(outcome)
    }

    fn try_once(&self, gets: &Gets, seen: &Seen, memory: &Memory) -> Result<(), String> {
        if *gets == Gets::Anything {
            return Ok(());
        }
        if let Some(label) = &self.flow.held {
            return self.ask_held(label, gets, seen, memory);
        }
        let caller = self.rig.get(self.from).map_err(|error| error.to_string())?;
        let to = self.address.ok_or("nowhere to dial")?;
        let dial = caller.dial(self.proto, to);
        match gets {
            Gets::Status(status) => http_status(caller, to, *status),
            Gets::Answers(hosts) => match &self.flow.hold {
                Some(label) => self.hold(label, caller, dial, hosts, seen, memory),
                None => self.collect(caller, dial, hosts, seen, memory),
            },
            _ => {
                let times = if *gets == Gets::Dropped { 1 } else { 2 };
                for _ in 0..times {
                    let outcome = self.ask(caller, dial.timeout(DROPPED))?;
                    if !is_met(gets, &outcome) {
                        return Err(outcome.to_string());
                    }
                }
                Ok(())
            }
        }
    }

    /// Dials until all `hosts` have answered, and long enough for any other to show.
    fn collect(
        &self,
        caller: &Caller,
        dial: Dial,
        hosts: &[String],
        seen: &Seen,
        memory: &Memory,
    ) -> Result<(), String> {
        let mut missing: BTreeSet<_> = hosts.iter().map(String::as_str).collect();
        let sticks = self.flow.sticks.as_ref();
        let key = sticks.map(|label| ((self.rig.proxy, self.family, label.clone()), self.from.to_owned()));
        let mut stuck = key.as_ref().and_then(|key| lock(&memory.stuck).get(key).cloned());
        let (least, most) = match self.flow.every {
            Some(_) => (3, 16),
            None if self.proto == Proto::Sctp => (4 * hosts.len(), 24 * hosts.len()),
            None => (4 + 4 * hosts.len(), 24 * hosts.len()),
        };
        for number in 0..most {
            let outcome = self.ask(caller, dial)?;
            let by = self.check(&outcome, caller, hosts, seen)?;
            missing.remove(by.as_str());
            if sticks.is_some() {
                let first = stuck.get_or_insert_with(|| by.clone());
                if *first != by {
                    return Err(format!("does not stick to {first}: {outcome}"));
                }
            }
            if number + 1 >= least && (missing.is_empty() || sticks.is_some()) {
                if let (Some(key), Some(stuck)) = (key, stuck) {
                    lock(&memory.stuck).insert(key, stuck);
                }
                return Ok(());
            }
            sleep(self.flow.every.unwrap_or_default());
        }
        Err(format!("{most} dials never reached {}", missing.into_iter().collect::<Vec<_>>().join(", ")))
    }

    fn hold(
        &self,
        label: &str,
        caller: &Caller,
        dial: Dial,
        hosts: &[String],
        seen: &Seen,
        memory: &Memory,
    ) -> Result<(), String> {
        let mut connection = caller.host.flow(dial).map_err(|error| error.to_string())?;
        self.check(&connection.ask(), caller, hosts, seen)?;
        let key = (self.rig.proxy, self.family, label.to_owned());
        lock(&memory.held).insert(key, (connection, self.from.to_owned()));
        Ok(())
    }

    fn ask_held(&self, label: &str, gets: &Gets, seen: &Seen, memory: &Memory) -> Result<(), String> {
        let key = (self.rig.proxy, self.family, label.to_owned());
        let held = lock(&memory.held).remove(&key);
        let (mut connection, from) = held.ok_or("no connection is held under this label")?;
        let outcome = connection.fetch(self.flow.bytes);
        lock(&memory.held).insert(key, (connection, from.clone()));
        match gets {
            Gets::Answers(hosts) => {
                let caller = self.rig.get(&from).map_err(|error| error.to_string())?;
                self.check(&outcome, caller, hosts, seen).map(drop)
            }
            _ if is_met(gets, &outcome) => Ok(()),
            _ => Err(outcome.to_string()),
        }
    }

    /// Whether this is an answer of one of `hosts`, which saw whom it should.
    fn check(
        &self,
        outcome: &Outcome,
        caller: &Caller,
        hosts: &[String],
        seen: &Seen,
    ) -> Result<String, String> {
        let Outcome::Answered { by, seen: source } = outcome else { return Err(outcome.to_string()) };
        if !hosts.contains(by) {
            return Err(outcome.to_string());
        }
        let whom = seen.by(by);
        let addresses: Vec<IpAddr> = if whom == "client" {
            caller.addresses()
        } else {
            self.rig.get(whom).map_err(|error| error.to_string())?.addresses()
        };
        if addresses.contains(&source.ip()) {
            Ok(by.clone())
        } else {
            Err(format!("{outcome} and not {whom}"))
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this is how an unanswered flow ought to end.
fn is_met(gets: &Gets, outcome: &Outcome) -> bool {
    match gets {
        Gets::Refused => *outcome == Outcome::Refused,
        Gets::Unreachable => *outcome == Outcome::Unreachable,
        // A sender whose own host drops the datagram may be told so by the system call.
        Gets::Dropped => {
            let not_permitted =
                std::io::Error::from_raw_os_error(nix::errno::Errno::EPERM as i32).to_string();
            *outcome == Outcome::TimedOut || *outcome == Outcome::Failed(not_permitted)
        }
        Gets::Answers(_) | Gets::Status(_) | Gets::Anything => false,
    }
}

fn ask(caller: &Caller, dial: Dial, bytes: usize) -> Outcome {
    if bytes == 0 {
        return caller.host.dial_with(dial).unwrap_or_else(|error| Outcome::Failed(error.to_string()));
    }
    match caller.host.flow(dial) {
        Ok(mut connection) => connection.fetch(bytes),
        Err(kube_lane_lab::Error::Flow { outcome, .. }) => outcome,
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

fn http_status(caller: &Caller, to: SocketAddr, wanted: u16) -> Result<(), String> {
    let answer = caller.host.run(move || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"GET / HTTP/1.0\r\nHost: node\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    let answer = answer.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
    if status == Some(wanted) { Ok(()) } else { Err(format!("the answer is {answer:?}")) }
}
