//! What an agent of mode ebpf leaves to others: its mark to one that does without, and nothing to one beside it.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kube_lane_lab::{Echo, Host, Pod};
use kube_lane_tests::agent::{self, Agent};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::bare::attached;
use super::world::{Mode, SYNC, World, answered_in, at, endpoints, serving, until_met, vip, vips, web_ports};

/// What the agent says as long as it cannot take away what was left.
const LEFT: &str = "a socket layer of an earlier run may lead clients to endpoints that are gone";
const GONE: &str = "no socket layer of an earlier run is left";

/// Runs `nft` on a host: whether it succeeds, and what it prints.
pub(super) fn nft(host: &Host, arguments: &str) -> (bool, String) {
    let mut command = Command::new("nft");
    command.args(arguments.split(' '));
    let output = host.run(move || command.output()).unwrap().unwrap();
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

/// The mark on a host, as `nft` prints it.
pub(super) fn mark(host: &Host) -> Option<String> {
    let (success, listing) = nft(host, "list table ip kube-lane-socket");
    success.then_some(listing)
}

/// What the mark on a host names: the number of a BPF file system, and a folder in that.
pub(super) fn marked(host: &Host) -> (String, String) {
    let listing = mark(host).unwrap();
    let text = listing.split('"').nth(1).unwrap_or_else(|| panic!("{listing}"));
    let [bpf, device, folder] = text.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
    assert_eq!(bpf, "bpf");
    (device.to_owned(), folder.to_owned())
}

#[track_caller]
pub(super) fn wait(what: &str, is_so: impl Fn() -> bool, log: impl Fn() -> String) {
    let deadline = Instant::now() + SYNC;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}\n{}", log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A Service that is answered at the socket on the first node, and a client there.
pub(super) fn served(world: &World) -> (Pod, [Echo; 2], Pod) {
    let (pod, echoes) = serving(&world.lab, 1, "server");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let met = until_met(&client, vip(10), answered_in(Mode::Ebpf));
    assert!(answered_in(Mode::Ebpf)(&met), "{met:?}\n{}", world.agents[0].log());
    (client, echoes, pod)
}

/// The same agents, in mode ebpf by flags alone.
pub(super) fn by_flags() -> World {
    let mut world = World::new(&[]);
    world.agents.clear();
    let places = agent::places(world.lab.node(0));
    start(&mut world, &[&places[0], &places[1], "--proxy-mode=ebpf"]);
    world
}

/// Starts an agent on the first node, in place of the one there.
pub(super) fn start(world: &mut World, arguments: &[&str]) {
    world.agents.clear();
    let agent = world.start_agent(0, arguments);
    world.agents.push(agent);
    world.agents[0].wait_synced(SYNC).unwrap();
}

#[test]
fn an_agent_that_cannot_see_what_was_left_says_so_until_it_has_gone() {
    let mut world = by_flags();
    let _served = served(&world);
    let (node, root) = (world.lab.node(0).cgroup().to_owned(), world.lab.node(0).bpf_root().to_owned());
    let (device, folder) = marked(world.lab.node(0));
    assert!(root.ends_with(folder.trim_start_matches('/')), "{folder}");

    mount(Some("tmpfs"), &root, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    // As a pod that has no BPF file system, and with the usual place in mind.
    start(&mut world, &[]);
    let (log, told) = (|| world.agents[0].log(), || world.agents[0].status(&[]).unwrap().1);
    let warning = format!("{LEFT}: it is pinned at {folder} of the BPF file system {device}");
    wait("it warns", || log().contains(&warning) && told().contains(&warning), log);
    let left_over = || world.agents[0].metric("kubelane_socket_layer_left_over").unwrap();
    assert_eq!(left_over(), 1.0);
    assert!(!attached(&node).is_empty());
    let (success, said) = agent::clean_up(world.lab.node(0), "cleanup").unwrap();
    assert!(!success && said.contains("nothing is removed"), "{said}");

    umount2(&root, MntFlags::MNT_DETACH).unwrap();
    wait("it is over", || log().contains(GONE) && left_over() == 0.0, log);
    assert_eq!((attached(&node), mark(world.lab.node(0)), root.join("v1").exists()), (vec![], None, false));
    assert!(!told().contains(LEFT) && log().matches(LEFT).count() == 1, "{}", log());
}

#[test]
fn what_was_left_goes_without_a_right_to_bpf() {
    let mut world = by_flags();
    let _served = served(&world);
    world.agents.clear();
    let node = world.lab.node(0);
    let config = tempfile::NamedTempFile::new().unwrap();
    let fields = json!({"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"});
    std::fs::write(config.path(), fields.to_string()).unwrap();
    let binary = agent::binary().unwrap();
    let folder = world.folder.arg();
    let arguments = [
        ["--bounding-set=-all,+net_admin", "--inh-caps=-all", binary.to_str().unwrap(), "--config"],
        [config.path().to_str().unwrap(), "--manifests", &folder, "-v=4"],
    ];
    let log = config.path().with_extension("log");
    let mut agent = Agent::start_binary(Path::new("setpriv"), node, &arguments.concat(), &log).unwrap();
    agent.wait_synced(SYNC).unwrap();
    assert_eq!((attached(node.cgroup()), mark(node)), (vec![], None), "{}", agent.log());
    assert!(!agent.log().contains(LEFT), "{}", agent.log());
    std::fs::remove_file(log).unwrap();
}

#[test]
fn the_mark_reloads_comes_back_and_leads_cleanup() {
    let mut world = by_flags();
    let _served = served(&world);
    let node = world.lab.node(0);
    let listing = mark(node).unwrap();
    // Others may load a saved ruleset, or flush it.
    let saved = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(saved.path(), &listing).unwrap();
    assert!(nft(node, "delete table ip kube-lane-socket").0);
    assert!(nft(node, &format!("-f {}", saved.path().display())).0);
    assert_eq!(mark(node).as_ref(), Some(&listing));
    assert!(nft(node, "flush ruleset").0);
    wait("it is marked again", || mark(node).as_ref() == Some(&listing), || world.agents[0].log());

    world.agents.clear();
    let node = world.lab.node(0);
    let clean_up = |root: &[&str]| {
        let mut command = Command::new(agent::binary().unwrap());
        command.arg("cleanup").args(root);
        let output = node.run(move || command.output()).unwrap().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let (success, said) = clean_up(&["--bpf-root=/sys/fs/bpf/elsewhere"]);
    assert!(!success && said.contains(&format!("pinned at {}", node.bpf_root().display())), "{said}");
    assert!(!attached(node.cgroup()).is_empty() && mark(node).is_some());
    let (success, said) = clean_up(&[]);
    assert!(success && said.contains("removed the socket layer"), "{said}");
    assert_eq!((attached(node.cgroup()), mark(node)), (vec![], None));
    assert_eq!(nft(node, "list ruleset").1, "");
}

#[test]
fn a_mark_is_believed_only_where_nobody_can_look() {
    let mut world = by_flags();
    let _served = served(&world);
    world.agents.clear();
    let node = world.lab.node(0);
    let run = |arguments: &[&str]| {
        let mut command = Command::new(agent::binary().unwrap());
        command.args(arguments);
        let output = node.run(move || command.output()).unwrap().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let told = |part: &str, place: &str| {
        let (_, said) = run(&["status"]);
        assert!(said.contains(&format!("{part} {place}")), "{said}");
    };
    let (device, folder) = marked(node);
    let root = node.bpf_root().to_str().unwrap();
    told("its eBPF programs, pinned in", root);
    mount(Some("tmpfs"), node.bpf_root(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let elsewhere = format!("{folder} of the BPF file system {device}");
    told("perhaps its eBPF programs, which it pinned in", &elsewhere);
    umount2(node.bpf_root(), MntFlags::MNT_DETACH).unwrap();
    std::fs::remove_dir_all(node.bpf_root().join("v1")).unwrap();
    told("the mark of eBPF programs that were pinned in", root);
    let (success, said) = run(&["cleanup", "--bpf-root=/sys/fs/bpf/elsewhere"]);
    assert!(success, "{said}");
    assert_eq!((attached(node.cgroup()), mark(node)), (vec![], None));
    assert!(run(&["status"]).1.contains("nothing of it is in the kernel"));
}

#[test]
fn nobody_takes_the_layer_from_an_agent_that_runs() {
    let mut world = World::in_mode(Mode::Ebpf);
    let (client, _echoes, _pod) = served(&world);
    let (first, second) = (world.lab.node(0), world.lab.node(1));
    let programs = attached(first.cgroup());
    let pid = format!("(pid {})", world.agents[0].process().id());
    let root = format!("--bpf-root={}", first.bpf_root().display());

    // One with a cgroup and a network namespace of its own, but not a place for its pins.
    drop(world.agents.remove(1));
    let beside = world.start_agent(1, &[&root]);
    world.agents.push(beside);
    world.agents[1].wait_synced(SYNC).unwrap();
    let log = world.agents[1].log();
    let words = format!("another kube-lane {pid} has the socket layer that is pinned at");
    assert!(log.contains(&words) && log.contains("--cgroup-root of its own"), "{log}");
    let status: Value = serde_json::from_str(&world.agents[1].status(&["-o=json"]).unwrap().1).unwrap();
    assert!(status["agent"]["troubles"][0].as_str().unwrap().contains(&words), "{status}");
    assert_eq!(world.agents[1].metric("kubelane_socket_layer_in_place").unwrap(), 0.0);
    assert_eq!(world.agents[1].metric("kubelane_troubles").unwrap(), 1.0);
    let modes = || [0, 1].map(|index: usize| world.agents[index].get(10249, "/proxyMode").unwrap().1);
    assert_eq!(modes(), ["ebpf", "nftables"], "what runs");
    assert_eq!(mark(second), None);
    let met = until_met(second, at(vips(10)[0], 80), answered_in(Mode::Nftables));
    assert!(answered_in(Mode::Nftables)(&met), "{met:?}");

    let third = world.lab.outside();
    let mut command = Command::new(agent::binary().unwrap());
    command.args(["cleanup", &root]);
    let output = third.run(move || command.output()).unwrap().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("nothing is removed") && said.contains(&pid), "{said}");

    assert_eq!(attached(first.cgroup()), programs);
    assert!(until_met(&client, vip(10), answered_in(Mode::Ebpf)).at_socket);
    let log = world.agents[0].log();
    assert!(!log.contains("put in place again"), "{log}");

    // The other lets the first restart, however often it looks meanwhile.
    drop(world.agents.remove(0));
    let beside = &world.agents[0];
    wait("it sees that", || beside.log().contains("may only be restarting"), || beside.log());
    assert!(!attached(first.cgroup()).is_empty());
    let again = world.start_agent(0, &[]);
    world.agents.insert(0, again);
    world.agents[0].wait_synced(SYNC).unwrap();
    let in_place = |index: usize| world.agents[index].metric("kubelane_socket_layer_in_place").unwrap();
    wait("the first has it again", || in_place(0) == 1.0, || world.agents[0].log());
    assert_eq!((in_place(1), mark(second)), (0.0, None));

    // When the first has gone for good, the other has the place, and what both knew.
    drop(world.agents.remove(0));
    let beside = &world.agents[0];
    wait(
        "it takes the place",
        || beside.metric("kubelane_socket_layer_in_place").unwrap() == 1.0,
        || beside.log(),
    );
    assert!(mark(second).is_some() && attached(first.cgroup()).is_empty());
    let met = until_met(second, vip(10), answered_in(Mode::Ebpf));
    assert!(answered_in(Mode::Ebpf)(&met), "{met:?}");
    let status: Value = serde_json::from_str(&beside.status(&["-o=json"]).unwrap().1).unwrap();
    assert_eq!((&status["agent"]["mode"], &status["agent"]["troubles"]), (&json!("ebpf"), &json!([])));
}

#[test]
fn two_layers_at_one_cgroup_are_told_of_each_other() {
    let mut world = World::in_mode(Mode::Ebpf);
    let _served = served(&world);
    let (first, second) = (world.lab.node(0), world.lab.node(1));
    drop(world.agents.remove(1));
    let beside = world.start_agent(1, &[&format!("--cgroup-root={}", first.cgroup().display())]);
    world.agents.push(beside);
    world.agents[1].wait_synced(SYNC).unwrap();
    let shared = |index: usize| world.agents[index].metric("kubelane_socket_layer_shared").unwrap() == 1.0;
    for (index, other) in [(0, second), (1, first)] {
        let agent = &world.agents[index];
        wait("it is told", || shared(index), || agent.log());
        let words = format!(
            "the socket layer of another kube-lane, pinned at {}, is attached",
            other.bpf_root().display()
        );
        for told in [agent.log(), agent.status(&[]).unwrap().1] {
            assert_eq!(told.matches(&words).count(), 1, "{told}");
        }
    }
    let mut beside = world.agents.remove(1);
    beside.process().signal(Signal::SIGKILL).unwrap();
    beside.process().wait_timeout(SYNC).unwrap();
    drop(beside);
    let (success, said) = agent::clean_up(world.lab.node(1), "cleanup").unwrap();
    assert!(success, "{said}");
    let agent = &world.agents[0];
    let is_over = || agent.metric("kubelane_socket_layer_shared").unwrap() == 0.0;
    wait("it is over", || is_over() && agent.log().contains("no other socket layer"), || agent.log());
}

#[test]
fn a_layer_that_moves_leaves_nothing_where_it_was() {
    let mut world = by_flags();
    let _served = served(&world);
    let node = world.lab.node(0);
    let (programs, was) = (attached(node.cgroup()).len(), node.bpf_root().to_owned());
    let elsewhere = world.lab.node(1).bpf_root().to_owned();
    let arguments = [
        format!("--cgroup-root={}", node.cgroup().display()),
        format!("--bpf-root={}", elsewhere.display()),
        "--proxy-mode=ebpf".to_owned(),
    ];
    start(&mut world, &arguments.each_ref().map(String::as_str));
    let node = world.lab.node(0);
    assert_eq!(attached(node.cgroup()).len(), programs, "{}", world.agents[0].log());
    assert!(!was.join("v1").exists() && elsewhere.join("v1").exists());
    assert!(elsewhere.ends_with(marked(node).1.trim_start_matches('/')));
}
