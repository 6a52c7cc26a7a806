//! The socket layer when others take it away: a program detached, pins removed, their file system unmounted.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kube_lane_common::{LAYOUT, maps, programs};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::bare;
use super::world::{Mode, SYNC, World, answered_in, at, endpoints, serving, until_met, vips, web_ports};

/// How often the agent has said this.
fn said(world: &World, what: &str) -> usize {
    world.agents[0].log().matches(what).count()
}

/// Waits until the agent has said this so many times.
#[track_caller]
fn wait_said(world: &World, what: &str, times: usize) {
    let deadline = Instant::now() + SYNC;
    while said(world, what) < times {
        assert!(Instant::now() < deadline, "{}", world.agents[0].log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// How many programs are attached to the first node's cgroup.
fn attached(world: &World) -> usize {
    bare::attached(world.lab.node(0).cgroup()).len()
}

fn detach(link: &Path) {
    assert!(Command::new("bpftool").args(["link", "detach", "pinned"]).arg(link).status().unwrap().success());
}

#[test]
fn what_others_take_away_comes_back_by_itself() {
    let world = World::in_mode(Mode::Ebpf);
    let (pod, _echoes) = serving(&world.lab, 1, "server");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let works = |what: &str| {
        let met = until_met(&client, at(vips(10)[0], 80), answered_in(Mode::Ebpf));
        assert!(answered_in(Mode::Ebpf)(&met), "{what}: {met:?}\n{}", world.agents[0].log());
    };
    works("at first");
    let layout = world.lab.node(0).bpf_root().join(LAYOUT);
    let [links, pinned] = ["links", "maps"].map(|folder| layout.join(folder));
    let ways: [(&str, &dyn Fn()); 5] = [
        ("a program is detached", &|| detach(&links.join(programs::CONNECT4))),
        ("its pin is removed", &|| fs::remove_file(links.join(programs::CONNECT4)).unwrap()),
        ("a map's pin is removed", &|| fs::remove_file(pinned.join(maps::SETS)).unwrap()),
        ("all pins are removed", &|| fs::remove_dir_all(&layout).unwrap()),
        ("a program is detached again", &|| detach(&links.join(programs::GETPEERNAME6))),
    ];
    for (times, (what, take_away)) in (1..).zip(ways) {
        take_away();
        wait_said(&world, "the socket layer follows again", times);
        works(what);
        assert_eq!(attached(&world), programs::TCP.len(), "{what}");
        assert_eq!(fs::read_dir(&links).unwrap().count(), programs::TCP.len(), "{what}");
    }
    assert_eq!(said(&world, " ERROR "), 0, "{}", world.agents[0].log());
}

#[test]
fn without_a_place_for_pins_nftables_answers_and_the_status_says_so() {
    let world = World::in_mode(Mode::Ebpf);
    let (pod, _echoes) = serving(&world.lab, 1, "server");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let met = |mode| {
        let met = until_met(&client, at(vips(10)[0], 80), answered_in(mode));
        assert!(answered_in(mode)(&met), "{met:?}\n{}", world.agents[0].log());
    };
    let told = || world.agents[0].status(&["default/web"]).unwrap().1;
    let in_place = || world.agents[0].metric("kubelane_socket_layer_in_place").unwrap();
    met(Mode::Ebpf);
    assert_eq!(in_place(), 1.0);
    assert!(told().contains("[socket"), "{}", told());

    let root = world.lab.node(0).bpf_root();
    mount(Some("tmpfs"), root, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    wait_said(&world, "not in place", 1);
    met(Mode::Nftables);
    assert_eq!((in_place(), world.agents[0].healthz().unwrap().0), (0.0, 200));
    assert_eq!(attached(&world), 0);
    let text = told();
    for part in ["not in place, nftables alone answers", "no BPF file system"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("[socket"), "{text}");

    umount2(root, MntFlags::MNT_DETACH).unwrap();
    wait_said(&world, "the socket layer follows again", 1);
    met(Mode::Ebpf);
    assert_eq!(in_place(), 1.0);
    assert!(told().contains("[socket") && !told().contains("not in place"), "{}", told());
}
