//! The socket layer through upgrades: agents of two builds, whose programs differ, replace each other.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::loaded_programs;
use kube_lane::dataplane::socket;
use kube_lane_common::{FrontendKey, LAYOUT, maps, programs};
use kube_lane_lab::{Dial, Echo, Host, Load, Outcome, Pod, Proto};
use kube_lane_tests::agent;
use kube_lane_tests::objects::Port;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::world::{
    Mode, SYNC, World, answered_in, endpoints, meet, serving, until, until_met, vip, web_ports,
};

/// The least pause that keeps the other processor for what is tested.
const PAUSE: Duration = Duration::from_micros(200);
/// The numbers of the Services: with endpoints, with endpoints and session affinity, without endpoints.
const WEB: u8 = 10;
const STICKY: u8 = 11;
const NOBODY: u8 = 12;

/// An agent, and how its programs are told from those of the other build.
struct Build {
    binary: PathBuf,
    /// What a client meets at a Service without endpoints.
    refuses: fn(&Outcome) -> bool,
}

/// This build.
fn ours() -> Build {
    Build { binary: agent::binary().unwrap(), refuses: |outcome| *outcome == Outcome::Refused }
}

/// The same, but for an error number in some of its programs: they refuse with EHOSTUNREACH.
fn another(folder: &Path) -> Build {
    /// `w1 = -error`, the argument of `bpf_set_retval`.
    fn set(error: i32) -> Vec<u8> {
        [[0xb4, 1, 0, 0], (-error).to_le_bytes()].concat()
    }
    const ECONNREFUSED: i32 = 111;
    const EHOSTUNREACH: i32 = 113;
    let object = socket::available().expect("`cargo xtask test --lane kernel` builds with it");
    let mut bytes = fs::read(agent::binary().unwrap()).unwrap();
    let starts = (0..bytes.len()).filter(|start| bytes[*start..].starts_with(object));
    let embedded = starts.collect::<Vec<_>>();
    let &[embedded] = &embedded[..] else {
        panic!("the agent has another object than this test: {embedded:?}")
    };
    let mut patched = 0;
    for instruction in bytes[embedded..][..object.len()].chunks_exact_mut(8) {
        if *instruction == set(ECONNREFUSED) {
            instruction.copy_from_slice(&set(EHOSTUNREACH));
            patched += 1;
        }
    }
    assert!(patched >= 2, "connect4 and connect6 refuse: {patched}");
    let binary = folder.join("kube-lane");
    fs::write(&binary, bytes).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    Build { binary, refuses: |outcome| *outcome == Outcome::Unreachable }
}

/// A node whose agent is upgraded, and clients.
struct Stage {
    client: Pod,
    /// Who answers the client at the Service with session affinity.
    remembered: String,
    _pods: [(Pod, [Echo; 2]); 2],
    world: World,
}

impl Stage {
    fn new() -> Self {
        let world = World::in_mode(Mode::Ebpf);
        let pods = [serving(&world.lab, 0, "a"), serving(&world.lab, 1, "b")];
        let client = world.lab.node(0).add_pod("client").unwrap();
        let hosts = [&pods[0].0, &pods[1].0];
        world.put("web", &web_ports(), WEB, &endpoints(&hosts));
        let affinity = json!({"type": "ClusterIP", "sessionAffinity": "ClientIP"});
        world.put_spec("sticky", &[Port::new("TCP", 80, 8080)], STICKY, &endpoints(&hosts), affinity);
        world.put("nobody", &[Port::new("TCP", 80, 8080)], NOBODY, &[]);
        for number in [WEB, STICKY] {
            let met = until_met(&client, vip(number), answered_in(Mode::Ebpf));
            assert!(answered_in(Mode::Ebpf)(&met), "{met:?}\n{}", world.agents[0].log());
        }
        assert_eq!(until(&client, Proto::Tcp, vip(NOBODY), ours().refuses), Outcome::Refused);
        let remembered = meet(&client, vip(STICKY)).outcome.by().unwrap().to_owned();
        Self { client, remembered, _pods: pods, world }
    }

    fn node(&self) -> &Host {
        self.world.lab.node(0)
    }

    fn pins(&self) -> PathBuf {
        self.node().bpf_root().join(LAYOUT)
    }

    fn load(&self) -> Load {
        Load::start(&self.client, Dial::new(Proto::Tcp, vip(WEB)), 2, PAUSE).unwrap()
    }

    /// Ends the agent.
    fn end(&mut self, signal: Signal) {
        let mut agent = self.world.agents.remove(0);
        agent.process().signal(signal).unwrap();
        assert!(agent.process().wait_timeout(SYNC).unwrap().is_some());
    }

    /// Starts an agent; it has begun when this returns.
    fn start(&mut self, build: &Build) {
        let agent = self.world.start_build(&build.binary, 0, &[]);
        self.world.agents.insert(0, agent);
    }

    /// The agent that there is has taken everything over.
    fn check(&mut self, build: &Build) {
        self.world.agents[0].wait_synced(SYNC).unwrap();
        let log = self.world.agents[0].log();
        let met = meet(&self.client, vip(NOBODY));
        assert!((build.refuses)(&met.outcome), "{met:?}\n{log}");
        let met = meet(&self.client, vip(STICKY));
        assert!(met.at_socket, "{met:?}\n{log}");
        assert_eq!(met.outcome.by(), Some(&*self.remembered), "{log}");
    }

    /// The ids of the links and of their programs.
    fn links(&self) -> [(u32, u32); programs::TCP.len()] {
        programs::TCP.map(|name| {
            let link = PinnedLink::from_pin(self.pins().join("links").join(name)).unwrap();
            let info = FdLink::from(link).info().unwrap();
            (info.id(), info.program_id())
        })
    }

    /// Where every frontend leads, by the ids in the maps.
    fn frontends(&self) -> BTreeMap<FrontendKey, u64> {
        let map = MapData::from_pin(self.pins().join("maps").join(maps::FRONTENDS)).unwrap();
        let map = HashMap::try_from(Map::HashMap(map)).unwrap();
        map.iter().collect::<Result<_, _>>().unwrap()
    }

    /// How many connections to the Service with endpoints the agent has counted.
    fn counted(&self) -> u64 {
        let (_, text) = self.world.agents[0].status(&["default/web", "-o=json"]).unwrap();
        let status: Value = serde_json::from_str(&text).unwrap();
        let ports = status["services"][0]["ports"].as_array().unwrap();
        let backends = ports.iter().flat_map(|port| port["backends"].as_array().unwrap());
        backends.filter_map(|backend| backend["connections"].as_u64()).sum()
    }
}

/// What the kernel makes of the instructions of a program.
fn tag(program: u32) -> u64 {
    let mut all = loaded_programs().filter_map(Result::ok);
    all.find(|info| info.id() == program).unwrap().tag()
}

#[test]
fn agents_with_other_programs_take_over_and_hand_back_while_clients_connect() {
    let mut stage = Stage::new();
    let folder = tempfile::tempdir().unwrap();
    let (ours, another) = (ours(), another(folder.path()));
    let (frontends, counted) = (stage.frontends(), stage.counted());
    let load = stage.load();
    let rounds = [(&another, Signal::SIGTERM), (&ours, Signal::SIGTERM), (&another, Signal::SIGKILL)];
    for (build, signal) in rounds {
        let before = stage.links().map(|(link, program)| (link, tag(program)));
        stage.end(signal);
        stage.start(build);
        stage.check(build);
        let now = stage.links().map(|(link, program)| (link, tag(program)));
        assert_eq!(before.map(|(link, _)| link), now.map(|(link, _)| link), "the links are the same");
        // connect4 and connect6; getpeername has no error number.
        let changed = [0, 1, 2, 3].map(|i| before[i].1 != now[i].1);
        assert_eq!(changed, [true, true, false, false], "{before:x?} {now:x?}");
        assert_eq!(stage.frontends(), frontends, "the ids are the same");
    }
    let report = load.stop();
    assert_eq!(report.tally.failures(), 0, "{report}");
    assert_eq!(report.tally.answered.len(), 2, "{report}");
    assert_eq!(stage.counted() - counted, report.tally.answers() as u64, "{report}");
}

#[test]
fn an_upgrade_that_is_killed_at_any_moment_fails_no_connect() {
    const ATTEMPTS: u32 = 40;
    let mut stage = Stage::new();
    let folder = tempfile::tempdir().unwrap();
    let builds = [another(folder.path()), ours()];
    let (frontends, counted, links) = (stage.frontends(), stage.counted(), stage.links());
    let load = stage.load();
    let begun = Instant::now();
    stage.end(Signal::SIGKILL);
    stage.start(&builds[1]);
    stage.check(&builds[1]);
    let whole = begun.elapsed();
    stage.end(Signal::SIGKILL);
    let mut halves = 0;
    for (attempt, build) in (0..ATTEMPTS).zip(builds.iter().cycle()) {
        let before = stage.links();
        stage.start(build);
        if attempt % 2 == 0 {
            thread::sleep(whole * attempt / ATTEMPTS);
        } else {
            // When the first program has been replaced.
            while stage.links()[0] == before[0] {
                assert!(begun.elapsed() < SYNC, "{}", stage.world.agents[0].log());
            }
        }
        stage.end(Signal::SIGKILL);
        let replaced = stage.links().iter().zip(before).filter(|(now, before)| **now != *before).count();
        halves += usize::from(![0, before.len()].contains(&replaced));
    }
    println!("{halves} of {ATTEMPTS} attempts ended between two programs");
    for build in &builds {
        stage.start(build);
        stage.check(build);
        stage.end(Signal::SIGKILL);
    }
    stage.start(&builds[0]);
    stage.check(&builds[0]);
    assert_eq!(stage.links().map(|(link, _)| link), links.map(|(link, _)| link), "the links are the same");
    assert_eq!(stage.frontends(), frontends, "the ids are the same");
    let report = load.stop();
    assert_eq!(report.tally.failures(), 0, "{report}");
    assert_eq!(stage.counted() - counted, report.tally.answers() as u64, "{report}");
}
