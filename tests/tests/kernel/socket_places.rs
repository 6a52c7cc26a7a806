//! One folder of pins under several paths: a container mounts the node's BPF file system at another place than the node
//! does, or before the node has mounted it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use kube_lane_lab::Host;
use kube_lane_tests::agent::{self, Agent};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use super::bare::attached;
use super::socket_leftovers::{by_flags, mark, marked, nft, served, start, wait};
use super::world::{Mode, SYNC, World, answered_in, at, until_met, vip, vips};

/// A mount namespace as a container has it: `$1` is seen at `$2` and nowhere else, and what is mounted below `$1` later
/// is seen there, too. The rest is the command.
const CONTAINER: &str = r#"
set -eu
mount --rbind "$1" "$2"
mount -t tmpfs none "$3"
shift 3
exec "$@"
"#;

/// Where a container sees the BPF file system of a lab's node.
struct Container {
    /// The mount point on the node.
    from: PathBuf,
    /// What the container does not see, since it has its own.
    hidden: PathBuf,
    dir: TempDir,
}

impl Container {
    fn of(node: &Host) -> Self {
        let from = node.bpf_root().parent().unwrap().to_owned();
        let container = Self { hidden: from.clone(), from, dir: tempfile::tempdir().unwrap() };
        fs::create_dir(container.mounted()).unwrap();
        container
    }

    fn mounted(&self) -> PathBuf {
        self.dir.path().join("bpf")
    }

    /// The node's folder of pins, as the container sees it.
    fn bpf_root(&self, node: &Host) -> PathBuf {
        self.mounted().join(node.bpf_root().strip_prefix(&self.from).unwrap())
    }

    /// The words that run `command` inside, for `unshare`.
    fn words<'a>(&'a self, mounted: &'a Path, command: &[&'a str]) -> Vec<&'a str> {
        let text = |path: &'a Path| path.to_str().unwrap();
        let mut words = vec!["--mount", "--propagation", "slave", "sh", "-c", CONTAINER, "sh"];
        words.extend([text(&self.from), text(mounted), text(&self.hidden)]);
        words.extend(command);
        words
    }

    /// Starts an agent inside, in place of the one on the first node.
    fn start(&self, world: &mut World, arguments: &[&str]) {
        world.agents.clear();
        let (binary, folder, mounted) = (agent::binary().unwrap(), world.folder.arg(), self.mounted());
        let mut command = vec![binary.to_str().unwrap(), "--manifests", &folder];
        command.extend(["--hostname-override", world.lab.node(0).name(), "-v=4"]);
        command.extend(arguments);
        let log = self.dir.path().join("log");
        let words = self.words(&mounted, &command);
        let agent = Agent::start_binary("unshare".as_ref(), world.lab.node(0), &words, &log).unwrap();
        world.agents.push(agent);
        world.agents[0].wait_synced(SYNC).unwrap();
    }

    /// Runs kube-lane inside: whether it succeeds, and what it says.
    fn run(&self, node: &Host, arguments: &[&str]) -> (bool, String) {
        let (binary, mounted) = (agent::binary().unwrap(), self.mounted());
        let mut command = Command::new("unshare");
        command.args(self.words(&mounted, &[&[binary.to_str().unwrap()], arguments].concat()));
        let output = node.run(move || command.output()).unwrap().unwrap();
        (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    }
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).ino()
}

/// Puts a mark with this comment, as an agent of before did.
fn put_mark(node: &Host, comment: &str) {
    let rules = tempfile::NamedTempFile::new().unwrap();
    let table = "table ip kube-lane-socket";
    fs::write(rules.path(), format!("delete {table}\n{table} {{ comment \"{comment}\"\n}}\n")).unwrap();
    assert!(nft(node, &format!("-f {}", rules.path().display())).0);
    assert!(mark(node).unwrap().contains(&format!("\"{comment}\"")));
}

/// An agent whose container sees the pins elsewhere takes them over. `comment`: the mark that it finds, where that is not
/// the one of today.
fn is_taken_over(comment: Option<&str>) {
    let mut world = by_flags();
    let (client, _echoes, _pod) = served(&world);
    let container = Container::of(world.lab.node(0));
    let node = Host::clone(world.lab.node(0));
    let named = marked(&node);
    let links = node.bpf_root().join("v1/links");
    let link = || (inode(&links), inode(&links.join("connect4")));
    let (before, programs) = (link(), attached(node.cgroup()).len());
    if let Some(comment) = comment {
        world.agents.clear();
        put_mark(&node, comment);
    }

    let inside = container.bpf_root(&node);
    let arguments =
        [format!("--cgroup-root={}", node.cgroup().display()), format!("--bpf-root={}", inside.display())];
    container.start(&mut world, &[&arguments[0], &arguments[1], "--proxy-mode=ebpf"]);
    let log = world.agents[0].log();
    // The links are the ones that were: at no moment was nothing attached.
    assert_eq!((link(), attached(node.cgroup()).len()), (before, programs), "{log}");
    assert!(!log.contains("removed the socket layer") && !log.contains("may be left"), "{log}");
    assert_eq!(marked(&node), named, "one folder has one name");
    assert!(until_met(&client, vip(10), answered_in(Mode::Ebpf)).at_socket, "{log}");

    // And back to the path of the node.
    let places = agent::places(&node);
    start(&mut world, &[&places[0], &places[1], "--proxy-mode=ebpf"]);
    let log = world.agents[0].log();
    assert_eq!((link(), attached(node.cgroup()).len()), (before, programs), "{log}");
    assert!(!log.contains("removed the socket layer") && !log.contains("may be left"), "{log}");
}

#[test]
fn a_container_that_sees_the_pins_elsewhere_takes_them_over() {
    is_taken_over(None);
}

#[test]
fn a_mark_of_an_agent_of_before_names_the_usual_place() {
    // In the lab, this is the name of the folder on the file system.
    is_taken_over(Some("/sys/fs/bpf/node0"));
}

#[test]
fn an_agent_without_the_layer_takes_it_away_from_another_place() {
    let mut world = by_flags();
    let _served = served(&world);
    let container = Container::of(world.lab.node(0));
    let node = Host::clone(world.lab.node(0));
    assert!(!attached(node.cgroup()).is_empty());
    container.start(&mut world, &[]);
    let log = world.agents[0].log();
    assert_eq!((attached(node.cgroup()), mark(&node)), (vec![], None), "{log}");
    assert!(log.contains("removed the socket layer of an earlier run"), "{log}");
}

#[test]
fn status_and_cleanup_look_where_the_file_system_is_mounted() {
    let mut world = by_flags();
    let _served = served(&world);
    let container = Container::of(world.lab.node(0));
    world.agents.clear();
    let node = Host::clone(world.lab.node(0));
    let inside = container.bpf_root(&node);
    let (_, said) = container.run(&node, &["status"]);
    assert!(said.contains(&format!("its eBPF programs, pinned in {}", inside.display())), "{said}");
    let (success, said) = container.run(&node, &["cleanup", "--bpf-root=/sys/fs/bpf/elsewhere"]);
    assert!(!success && said.contains(&format!("run this with --bpf-root={}", inside.display())), "{said}");
    assert!(!attached(node.cgroup()).is_empty() && mark(&node).is_some());
    let (success, said) = container.run(&node, &["cleanup"]);
    assert!(success && said.contains("removed the socket layer"), "{said}");
    assert_eq!((attached(node.cgroup()), mark(&node)), (vec![], None));
}

/// A folder of the node where a BPF file system can be mounted, and nothing is yet.
struct Unmounted(TempDir);

impl Unmounted {
    fn new() -> Self {
        let dir = Self(tempfile::tempdir().unwrap());
        // As `/sys` is on a node: what is mounted below it reaches the mount namespaces of containers.
        mount(Some("tmpfs"), dir.0.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        mount(None::<&str>, dir.0.path(), None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        fs::create_dir(dir.at()).unwrap();
        dir
    }

    fn at(&self) -> PathBuf {
        self.0.path().join("bpf")
    }

    fn mount(&self) {
        mount(Some("bpf"), &self.at(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
    }
}

impl Drop for Unmounted {
    fn drop(&mut self) {
        let _ = umount2(&self.at(), MntFlags::MNT_DETACH);
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_file_system_that_is_mounted_later_is_seen() {
    let mut world = by_flags();
    let (client, _echoes, _pod) = served(&world);
    let node = Host::clone(world.lab.node(0));
    world.agents.clear();
    let (success, said) = agent::clean_up(&node, "cleanup").unwrap();
    assert!(success, "{said}");

    let late = Unmounted::new();
    let own = Container::of(&node);
    let container = Container { from: late.at(), hidden: own.hidden.clone(), dir: own.dir };
    let root = container.mounted().join("kube-lane");
    let arguments =
        [format!("--cgroup-root={}", node.cgroup().display()), format!("--bpf-root={}", root.display())];
    container.start(&mut world, &[&arguments[0], &arguments[1], "--proxy-mode=ebpf"]);
    let agent = &world.agents[0];
    let in_place = || agent.metric("kubelane_socket_layer_in_place").unwrap();
    assert_eq!((in_place(), attached(node.cgroup())), (0.0, vec![]), "{}", agent.log());
    let told = agent.status(&[]).unwrap().1;
    assert!(told.contains("nftables alone answers") && told.contains("is on no BPF file system"), "{told}");
    let met = until_met(&client, at(vips(10)[0], 80), answered_in(Mode::Nftables));
    assert!(answered_in(Mode::Nftables)(&met), "{met:?}\n{}", agent.log());

    late.mount();
    wait("it is seen", || in_place() == 1.0, || agent.log());
    assert!(until_met(&client, vip(10), answered_in(Mode::Ebpf)).at_socket, "{}", agent.log());
    assert_eq!(marked(&node).1, "/kube-lane");
    assert!(late.at().join("kube-lane/v1").exists());
    assert!(!agent.status(&[]).unwrap().1.contains("nftables alone answers"));
    world.agents.clear();
    let (success, said) = container.run(&node, &["cleanup"]);
    assert!(success && said.contains("removed the socket layer"), "{said}");
    assert_eq!((attached(node.cgroup()), mark(&node)), (vec![], None));
}

#[test]
fn check_does_what_an_agent_does_in_the_folder() {
    let world = World::new(&[]);
    let node = Host::clone(world.lab.node(0));
    let root = node.bpf_root().to_owned();
    let check = |root: &Path| {
        let mut command = Command::new(agent::binary().unwrap());
        command.args(["check", "--proxy-mode=ebpf"]).args(&agent::places(&node)[..1]);
        command.arg(format!("--bpf-root={}", root.display()));
        let output = node.run(move || command.output()).unwrap().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let names = || fs::read_dir(root.parent().unwrap()).unwrap().count();
    let before = names();
    let (success, said) = check(&root);
    assert!(success && names() == before, "{said}");

    // A mount that looks like the right one, and allows nothing.
    let read_only = tempfile::tempdir().unwrap();
    let bind = |flags| mount(root.parent(), read_only.path(), None::<&str>, flags, None::<&str>).unwrap();
    bind(MsFlags::MS_BIND);
    bind(MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
    let (success, said) = check(&read_only.path().join("kube-lane"));
    umount2(read_only.path(), MntFlags::MNT_DETACH).unwrap();
    let row = said.lines().find(|line| line.contains("BPF file system")).unwrap();
    assert!(!success && row.contains("  NO ") && row.contains("Read-only file system"), "{said}");
}
