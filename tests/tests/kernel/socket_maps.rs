//! The socket layer's maps, pins and links: what outlives an agent, and what does not.
//!
//! Nothing of nftables is here: what the layer leaves alone is not answered at all.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU32;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use aya::Pod as Plain;
use aya::maps::{HashMap, Map, MapData};
use kube_lane::dataplane::Batch;
use kube_lane::dataplane::socket::answers::{Clients, Limit, Policy};
use kube_lane::dataplane::socket::write::Sizes;
use kube_lane::dataplane::socket::{Options, Owner, Removal, Room, Socket, SocketError, cleanup, probe};
use kube_lane::model::input::{Family, Protocol, ServiceKey};
use kube_lane::model::plan::{Backend, Frontend, NodePlan, Plan, PortPlan, Verdict};
use kube_lane_common::{AffinityKey, Frontend as Leads, FrontendKey, LAYOUT, Remembered, maps, programs};
use kube_lane_lab::{Dial, Load, Outcome, Pod, Proto};

use super::bare::{Bare, attached};
use super::world::{at, vips};

/// Nobody answers after so long.
const QUIET: Duration = Duration::from_millis(250);
const SMALL: Room = Room { services: Sizes { frontends: 16, ports: 8, slots: 64, backends: 16 }, clients: 8 };

/// A node whose sockets are answered.
struct Stage(Bare);

impl Deref for Stage {
    type Target = Bare;

    fn deref(&self) -> &Bare {
        &self.0
    }
}

impl Stage {
    fn new() -> Self {
        Self(Bare::new())
    }

    fn root(&self) -> PathBuf {
        self.node().bpf_root().to_owned()
    }

    fn options(&self) -> Options {
        Options {
            cgroup_root: Some(self.node().cgroup().to_owned()),
            left_alone: Vec::new(),
            pod_cgroups: vec!["kubepods".into()],
            policy: Policy { detector: Clients::Interface, ..Policy::default() },
            room: SMALL,
        }
    }

    fn try_open(&self, options: Options) -> Result<Socket, SocketError> {
        self.try_open_at(&self.root(), options)
    }

    fn try_open_at(&self, root: &Path, options: Options) -> Result<Socket, SocketError> {
        let owner = Owner::claim(root)?;
        self.node().run(|| Socket::open(options, owner)).unwrap()
    }

    fn open(&self) -> Socket {
        self.try_open(self.options()).unwrap()
    }

    /// Opens it, and applies a Service with these endpoints, as if the sources had synced.
    fn serve(&self, pods: &[&Pod]) -> Socket {
        self.serve_in(SMALL, pods)
    }

    fn serve_in(&self, room: Room, pods: &[&Pod]) -> Socket {
        let mut socket = self.try_open(Options { room, ..self.options() }).unwrap();
        let node = Some(NodePlan::default());
        socket.apply(&Batch { node, services: vec![service(1, pods)], sweep: true }).unwrap();
        socket
    }

    /// Who answers the client at the Service.
    fn meets(&self) -> Option<String> {
        let dial = Dial::new(Proto::Tcp, vip(1)).timeout(QUIET);
        self.client.dial_with(dial).unwrap().by().map(str::to_owned)
    }

    /// Clients that dial the Service without a pause.
    fn load(&self) -> Load {
        Load::start(&self.client, Dial::new(Proto::Tcp, vip(1)), 2, Duration::ZERO).unwrap()
    }

    /// What is pinned of this build's layout, below `folder`, and the object that it is.
    fn pinned(&self, folder: &str) -> Vec<String> {
        names(&self.root().join(LAYOUT).join(folder))
    }

    /// A pinned hash map.
    fn map<K: Plain, V: Plain>(&self, name: &str) -> HashMap<MapData, K, V> {
        let map = MapData::from_pin(self.root().join(LAYOUT).join("maps").join(name)).unwrap();
        HashMap::try_from(Map::HashMap(map)).unwrap()
    }

    /// The programs on the node's cgroup, as bpftool has them: id of the program, name.
    fn attached(&self) -> Vec<(String, String)> {
        attached(self.node().cgroup())
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn vip(number: u8) -> SocketAddr {
    at(vips(number)[0], 80)
}

/// A Service with one cluster IP that these pods serve.
fn service(number: u8, pods: &[&Pod]) -> (ServiceKey, Option<Arc<Plan>>) {
    let backends: Vec<_> = pods.iter().map(|pod| at(pod.v4(), 8080)).collect();
    plan(&format!("svc-{number}"), vip(number), &backends)
}

/// A Service that nobody dials.
fn numbered(number: u32, backends: &[SocketAddr]) -> (ServiceKey, Option<Arc<Plan>>) {
    let [_, high, middle, low] = number.to_be_bytes();
    plan(&format!("numbered-{number}"), ([100, 64 + high, middle, low], 80).into(), backends)
}

pub(super) fn plan(name: &str, vip: SocketAddr, backends: &[SocketAddr]) -> (ServiceKey, Option<Arc<Plan>>) {
    let mut backends: Vec<_> =
        backends.iter().map(|address| Backend { address: (*address).into(), local: true }).collect();
    backends.sort();
    let verdict = if backends.is_empty() { Verdict::Reject } else { Verdict::Cluster };
    let port = PortPlan {
        backends: backends.into(),
        frontends: [Frontend::cluster_ip(vip, verdict)].into(),
        ..PortPlan::new(Family::V4, Protocol::Tcp, "http")
    };
    let key = ServiceKey::new("default", name);
    let plan = Plan::new(key.clone(), [port]);
    (key, Some(Arc::new(plan)))
}

#[test]
fn an_agent_that_starts_again_takes_over_and_no_connect_fails() {
    let stage = Stage::new();
    let socket = stage.serve(&[&stage.a]);
    let programs = stage.attached();
    assert_eq!(programs.len(), programs::TCP.len());
    assert_eq!(stage.meets().as_deref(), Some("a"));
    drop(socket);
    // With no agent it goes on.
    assert_eq!(stage.meets().as_deref(), Some("a"));

    let load = stage.load();
    for _ in 0..20 {
        drop(stage.serve(&[&stage.a]));
    }
    let report = load.stop();
    assert!(report.tally.answers() > 0 && report.tally.failures() == 0, "{report}");
    // In the place of those that were, not beside them.
    let now = stage.attached();
    assert_eq!(now.len(), programs.len());
    assert!(now.iter().all(|program| !programs.contains(program)), "{programs:?} {now:?}");
    // What was counted before still is.
    let socket = stage.serve(&[&stage.a]);
    let counts = socket.inspect(&ServiceKey::new("default", "svc-1")).at_socket;
    assert_eq!(counts[0].connections.values().sum::<u64>(), report.tally.answers() as u64 + 2);
}

#[test]
fn an_agent_that_was_killed_at_any_moment_leaves_what_the_next_one_mends() {
    let stage = Stage::new();
    drop(stage.serve(&[&stage.a]));
    let layout = stage.root().join(LAYOUT);
    let remove = |path: &str| fs::remove_file(layout.join(path)).unwrap();
    let halves: [&dyn Fn(); 5] = [
        // New maps were begun.
        &|| fs::create_dir(layout.join("maps-new")).unwrap(),
        // The old ones were about to go.
        &|| remove("maps/SETS"),
        // They had gone.
        &|| fs::rename(layout.join("maps"), layout.join("maps-new")).unwrap(),
        // Not all programs were attached.
        &|| remove("links/connect6"),
        &|| ["links/connect4", "links/getpeername4"].into_iter().for_each(remove),
    ];
    for half in halves {
        half();
        drop(stage.serve(&[&stage.a]));
        assert_eq!(stage.meets().as_deref(), Some("a"));
        assert_eq!(stage.attached().len(), programs::TCP.len());
        assert_eq!(names(&layout), ["links", "maps"]);
        assert_eq!(stage.pinned("links").len(), programs::TCP.len());
    }
}

#[test]
fn another_layout_is_succeeded_and_swept() {
    let stage = Stage::new();
    drop(stage.serve(&[&stage.a]));
    let older = stage.root().join("v0");
    fs::rename(stage.root().join(LAYOUT), &older).unwrap();
    // What an older agent's maps looked like nobody knows: only what sockets remember is the same.
    let stream = stage.client.run(|| TcpStream::connect(vip(1)).unwrap()).unwrap();
    drop(stage.serve(&[&stage.b]));
    assert_eq!(names(&stage.root()), [LAYOUT]);
    assert_eq!(stage.attached().len(), programs::TCP.len());
    assert_eq!(stage.meets().as_deref(), Some("b"));
    assert_eq!(stream.peer_addr().unwrap(), vip(1));
}

#[test]
fn maps_of_another_build_are_replaced() {
    let stage = Stage::new();
    drop(stage.serve(&[&stage.a]));
    let folder = stage.root().join(LAYOUT).join("maps");
    fs::remove_file(folder.join(maps::BACKENDS)).unwrap();
    let other = [folder.join(maps::MEMBERS), folder.join(maps::BACKENDS)];
    let pin = Command::new("bpftool").args(["map", "pin", "pinned"]).args(&other).status().unwrap();
    assert!(pin.success());
    drop(stage.open());
    assert_eq!(stage.meets(), None, "nothing is answered of what nobody understands");
    drop(stage.serve(&[&stage.b]));
    assert_eq!(stage.meets().as_deref(), Some("b"));
}

#[test]
fn maps_grow_at_a_start_and_keep_what_they_hold() {
    let stage = Stage::new();
    drop(stage.serve(&[&stage.a]));
    let load = stage.load();
    let larger =
        Room { services: Sizes { frontends: 4096, ports: 100, slots: 5000, backends: 500 }, clients: 99 };
    let socket = stage.try_open(Options { room: larger, ..stage.options() }).unwrap();
    assert_eq!(socket.room(), larger);
    drop(socket);
    // Nothing was applied: it is what was there.
    assert_eq!(stage.meets().as_deref(), Some("a"));
    let report = load.stop();
    assert!(report.tally.answers() > 0 && report.tally.failures() == 0, "{report}");
    // Smaller ones are not made.
    assert_eq!(stage.open().room(), larger);
}

#[test]
fn maps_grow_with_the_services_under_connects() {
    let stage = Stage::new();
    let most = Room {
        services: Sizes { frontends: 1 << 20, ports: 1 << 20, slots: 1 << 20, backends: 1 << 20 },
        ..SMALL
    };
    let mut socket = stage.try_open(Options { room: most, ..stage.options() }).unwrap();
    let few = socket.room();
    let first =
        Batch { node: Some(NodePlan::default()), services: vec![service(1, &[&stage.a])], sweep: true };
    socket.apply(&first).unwrap();
    let load = stage.load();
    let many: u32 = few.services.ports + 1000;
    for from in [0, many / 2] {
        let services = (from..from + many / 2).map(|number| numbered(number, &[at(stage.b.v4(), 8080)]));
        let applied = socket.apply(&Batch { services: services.collect(), ..Batch::default() }).unwrap();
        assert!(applied.full.is_empty(), "{:?}", applied.full.first());
    }
    let report = load.stop();
    assert!(report.tally.answers() > 0 && report.tally.failures() == 0, "{report}");
    assert!(socket.room().services.ports > many, "{:?}", socket.room());
    assert_eq!(stage.meets().as_deref(), Some("a"));
    let frontends = stage.map::<FrontendKey, Leads>(maps::FRONTENDS);
    assert_eq!(frontends.keys().count(), many as usize + 1);
    // Also what programs counted while the maps were copied; and the dial just now.
    let counts = socket.inspect(&ServiceKey::new("default", "svc-1")).at_socket;
    assert_eq!(counts[0].connections.values().sum::<u64>(), report.tally.answers() as u64 + 1);
}

#[test]
fn maps_that_cannot_grow_are_told_and_grow_once_they_can() {
    let stage = Stage::new();
    let most = Room {
        services: Sizes { frontends: 1 << 20, ports: 1 << 20, slots: 1 << 20, backends: 1 << 20 },
        ..SMALL
    };
    let mut socket = stage.serve_in(most, &[&stage.a]);
    let few = socket.room();
    // New maps are begun in a folder that nothing else may be in.
    let obstacle = stage.root().join(LAYOUT).join("maps-new").join("obstacle");
    fs::create_dir_all(&obstacle).unwrap();
    let many = few.services.ports + 1000;
    let services = (0..many).map(|number| numbered(number, &[at(stage.b.v4(), 8080)])).collect();
    let batch = Batch { services, ..Batch::default() };
    assert!(socket.is_too_small_for(&batch));
    socket.grow_for(&batch);
    // It is not tried again for the same batch.
    fs::remove_dir(&obstacle).unwrap();
    let error = socket.apply(&batch).unwrap_err();
    assert!(matches!(error, SocketError::Pin { .. }), "{error:?}");
    assert_eq!((socket.room(), socket.is_in_place()), (few, true));
    assert_eq!(stage.meets().as_deref(), Some("a"));
    let applied = socket.apply(&Batch::default()).unwrap();
    assert!(applied.full.is_empty() && socket.room().services.ports > many, "{:?}", socket.room());
    assert_eq!(stage.meets().as_deref(), Some("a"));
}

#[test]
fn what_there_is_no_room_for_is_named_and_answered_once_there_is() {
    let stage = Stage::new();
    let mut socket = stage.serve(&[&stage.a]);
    let backend = at(stage.b.v4(), 8080);
    let services = (0..SMALL.services.ports).map(|number| numbered(number, &[backend])).collect();
    let applied = socket.apply(&Batch { services, ..Batch::default() }).unwrap();
    let [(full, limit)] = &applied.full[..] else { panic!("{:?}", applied.full) };
    assert_eq!(*limit, Limit::Ports);
    assert_eq!(stage.meets().as_deref(), Some("a"));
    // Another goes: there is room.
    let gone = Batch { services: vec![(service(1, &[]).0, None)], ..Batch::default() };
    socket.apply(&gone).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while socket.inspect(full).answers[0][0].layer() != "socket" {
        assert!(Instant::now() < deadline, "{:?}", socket.inspect(full));
        thread::sleep(Duration::from_millis(1));
        socket.apply(&Batch::default()).unwrap();
    }
}

#[test]
fn programs_of_others_stay_where_they_are() {
    let stage = Stage::new();
    let theirs = stage.root().join("theirs");
    drop(stage.try_open_at(&theirs, stage.options()).unwrap());
    let before: BTreeSet<_> = stage.attached().into_iter().collect();
    let ours = stage.root().join("ours");
    drop(stage.try_open_at(&ours, stage.options()).unwrap());
    assert_eq!(stage.attached().len(), 2 * before.len());
    drop(stage.try_open_at(&ours, stage.options()).unwrap());
    cleanup(&ours).unwrap();
    assert_eq!(stage.attached().into_iter().collect::<BTreeSet<_>>(), before);
    cleanup(&theirs).unwrap();
    assert_eq!(stage.attached(), []);
}

#[test]
fn cleanup_leaves_nothing() {
    let stage = Stage::new();
    drop(stage.serve(&[&stage.a]));
    fs::create_dir_all(stage.root().join("v0/links")).unwrap();
    fs::create_dir(stage.root().join("another")).unwrap();
    assert_eq!(cleanup(&stage.root()).unwrap(), Removal::Done);
    assert_eq!(stage.attached(), []);
    assert_eq!(names(&stage.root()), ["another"], "what is not ours stays");
    assert_eq!(stage.meets(), None);
    fs::remove_dir(stage.root().join("another")).unwrap();
    assert_eq!(cleanup(&stage.root()).unwrap(), Removal::Nothing, "nothing is left");
    assert!(!stage.root().exists());
    assert_eq!(cleanup(Path::new("/nonexistent/kube-lane")).unwrap(), Removal::Unseen);
    // A folder elsewhere that happens to have such a name.
    let elsewhere = tempfile::tempdir().unwrap();
    fs::create_dir_all(elsewhere.path().join("v1/maps")).unwrap();
    fs::write(elsewhere.path().join("v1/maps/SETS"), "theirs").unwrap();
    assert_eq!(cleanup(elsewhere.path()).unwrap(), Removal::Unseen);
    assert!(elsewhere.path().join("v1/maps/SETS").exists());
}

#[test]
fn programs_move_to_the_cgroup_that_is_named_and_come_and_go_with_the_options() {
    let stage = Stage::new();
    drop(stage.open());
    let outside = stage.lab.outside().cgroup().to_owned();
    let moved = Options { cgroup_root: Some(outside.clone()), ..stage.options() };
    let udp = Policy { udp: true, ..moved.policy };
    drop(stage.try_open(Options { policy: udp, ..moved.clone() }).unwrap());
    assert_eq!(stage.attached(), []);
    assert_eq!(attached(&outside).len(), programs::TCP.len() + programs::UDP.len());
    drop(stage.try_open(moved).unwrap());
    assert_eq!(attached(&outside).len(), programs::TCP.len());
    // Where it cannot be opened, an earlier run's programs do not go on with what nobody keeps up to date.
    let nowhere = Options { cgroup_root: Some("/proc".into()), ..stage.options() };
    let error = stage.try_open(nowhere).unwrap_err();
    assert!(matches!(error, SocketError::NoCgroup2(_)), "{error:?}");
    assert_eq!(attached(&outside), []);
}

#[test]
fn what_is_missing_is_named() {
    let stage = Stage::new();
    let folder = tempfile::tempdir().unwrap();
    let error = stage.try_open_at(&folder.path().join("x"), stage.options()).unwrap_err();
    assert!(matches!(error, SocketError::NoBpfFileSystem(_)), "{error:?}");
    let missing = stage.try_open(Options { cgroup_root: Some("/nonexistent".into()), ..stage.options() });
    assert!(matches!(missing, Err(SocketError::Cgroup { .. })), "{missing:?}");
}

#[test]
fn the_kernel_is_asked_what_it_can() {
    let stage = Stage::new();
    let (cgroup, root) = (stage.node().cgroup().to_owned(), stage.root());
    let features = stage.node().run(move || probe(Some(&cgroup), &root, &["kubepods".into()])).unwrap();
    let missing: Vec<_> = features.iter().filter(|feature| feature.found.is_err()).collect();
    assert!(features.len() > 8 && missing.is_empty(), "{missing:#?}");
    assert_eq!(stage.attached(), []);
    assert_eq!(names(&stage.root()), [""; 0]);
    let features = probe(Some(Path::new("/proc")), Path::new("/proc"), &[]);
    let missing: Vec<_> = features.iter().filter(|feature| feature.found.is_err()).map(|f| f.name).collect();
    assert_eq!(missing, ["cgroup v2", "BPF file system", "attaching", "cgroups of pods"]);
}

#[test]
fn cgroups_that_come_and_go_are_left_alone() {
    let stage = Stage::new();
    let mesh = stage.client.cgroup().join("mesh");
    let options = Options { left_alone: vec!["kubepods/mesh".into()], ..stage.options() };
    let mut socket = stage.try_open(options).unwrap();
    let mut follow = || {
        assert_eq!(socket.look(), None);
        socket.apply(&Batch::default()).unwrap();
        let left_alone = stage.map::<u64, u64>(maps::LEFT_ALONE);
        left_alone.keys().collect::<Result<BTreeSet<_>, _>>().unwrap()
    };
    let ino = || fs::metadata(&mesh).unwrap().ino();
    assert_eq!(follow(), [].into());
    fs::create_dir(&mesh).unwrap();
    assert_eq!(follow(), [ino()].into());
    fs::remove_dir(&mesh).unwrap();
    fs::create_dir(&mesh).unwrap();
    assert_eq!(follow(), [ino()].into());
    fs::remove_dir(&mesh).unwrap();
    assert_eq!(follow(), [].into());
}

/// A Service with session affinity.
fn sticky(number: u8, timeout: u32, pods: &[&Pod]) -> (ServiceKey, Option<Arc<Plan>>) {
    let (key, mut plan) = service(number, pods);
    for port in &mut Arc::make_mut(plan.as_mut().unwrap()).ports {
        port.affinity = NonZeroU32::new(timeout);
    }
    (key, plan)
}

#[test]
fn what_clients_no_longer_come_back_for_is_swept() {
    let stage = Stage::new();
    let apply = |services| {
        let mut socket = stage.open();
        let node = Some(NodePlan::default());
        socket.apply(&Batch { node, services, ..Batch::default() }).unwrap();
    };
    // An agent sweeps as it starts.
    let swept_to = |expected| {
        let _socket = stage.open();
        let deadline = Instant::now() + Duration::from_secs(5);
        let memories = || stage.map::<AffinityKey, Remembered>(maps::AFFINITY).keys().count();
        while memories() != expected && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(memories(), expected);
    };
    apply(vec![sticky(1, 1, &[&stage.a]), sticky(2, 10_800, &[&stage.a])]);
    for number in [1, 2] {
        assert!(stage.client.dial(Proto::Tcp, vip(number)).unwrap().by().is_some());
    }
    swept_to(2);
    thread::sleep(Duration::from_millis(3100));
    // One has expired.
    swept_to(1);
    apply(vec![sticky(2, 10_800, &[&stage.b])]);
    // The endpoint of the other has gone.
    swept_to(0);
}

#[test]
fn the_memory_of_clients_grows_and_says_when_it_cannot() {
    let stage = Stage::new();
    let room = Room { clients: 1 << 13, ..SMALL };
    let mut socket = stage.try_open(Options { room, ..stage.options() }).unwrap();
    let services = vec![sticky(1, 10_800, &[&stage.a, &stage.b])];
    let node = Some(NodePlan::default());
    socket.apply(&Batch { node, services, ..Batch::default() }).unwrap();
    let by = stage.meets().unwrap();
    let memories = || {
        let map = stage.map::<AffinityKey, Remembered>(maps::AFFINITY);
        map.iter().collect::<Result<Vec<_>, _>>().unwrap()
    };
    let (client, memory) = memories()[0];
    let fill = |up_to: u32| {
        let mut map = stage.map(maps::AFFINITY);
        // Clients that are nowhere.
        let mut other = (0..).map(|i| AffinityKey::new(u64::MAX - i, client.port));
        while map.keys().count() < up_to as usize {
            other.by_ref().take(1000).for_each(|other| drop(map.insert(other, memory, 0)));
        }
    };
    let newcomer = stage.lab.node(0).add_pod("newcomer").unwrap();
    let dial = || newcomer.dial_with(Dial::new(Proto::Tcp, vip(1)).timeout(QUIET)).unwrap();
    let mut look = || {
        assert_eq!(socket.look(), None);
        socket.apply(&Batch::default()).unwrap();
        (socket.room().clients, socket.is_forgetful())
    };
    let begin = look().0;
    assert!(begin < room.clients);
    fill(begin);
    assert_eq!(look(), (begin, false), "it is full, but nobody found it so");
    assert_eq!(dial(), Outcome::TimedOut, "left alone");
    assert_eq!(look(), (2 * begin, false));
    assert!(dial().by().is_some());
    assert_eq!(memories().len(), begin as usize + 1);
    assert_eq!(stage.meets().as_deref(), Some(&*by), "who was remembered still is");

    fill(room.clients);
    let latecomer = stage.lab.node(0).add_pod("latecomer").unwrap();
    let dial = Dial::new(Proto::Tcp, vip(1)).timeout(QUIET);
    assert_eq!(latecomer.dial_with(dial).unwrap(), Outcome::TimedOut);
    assert_eq!(look(), (room.clients, true));
    assert_eq!(stage.meets().as_deref(), Some(&*by));
}

/// Whoever is met is an endpoint, and nobody fails, while two processors dial, the endpoints change all the time, and
/// the other Service finds no room but what was given up just before: it has to wait for it, and uses it at once. What
/// that wait is good for `socket_programs::reuse` shows.
#[test]
fn a_set_that_changes_all_the_time_leads_to_its_endpoints_alone() {
    // One id more than are in use at a time, so that the Service which is dialled always has one.
    const TIGHT: Room =
        Room { services: Sizes { frontends: 2, ports: 2, slots: 8, backends: 7 }, clients: 1 };
    let stage = Stage::new();
    let (a, b) = (&stage.a, &stage.b);
    let mut socket = stage.serve_in(TIGHT, &[a]);
    let mut apply = |services| {
        let applied = socket.apply(&Batch { services, ..Batch::default() }).unwrap();
        assert!(applied.full.is_empty(), "{:?}", applied.full);
    };
    let load = stage.load();
    let sets: [&[&Pod]; 4] = [&[a, b], &[b], &[a, b], &[a]];
    // Nobody is there.
    let others = |n: u8| (1..=n).map(|n| at([192, 0, 2, n].into(), 8080)).collect::<Vec<_>>();
    let mut changes = 0;
    while load.report().elapsed < Duration::from_secs(5) {
        for (set, others) in sets.into_iter().zip([others(3), others(1), others(4), others(0)]) {
            apply(vec![service(1, set), numbered(2, &others)]);
            changes += 1;
        }
        apply(vec![(numbered(2, &[]).0, None)]);
    }
    let report = load.stop();
    assert!(changes > 100 && report.tally.answers() > 1000, "{changes} changes, {report}");
    assert_eq!(report.tally.failures(), 0, "{changes} changes, {report}");
}
