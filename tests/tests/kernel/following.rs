//! The agent follows its configuration files: it executes itself anew, and nobody's connection notices.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kube_lane_lab::{Dial, Flow, Proto, topology};
use kube_lane_tests::agent::{self, Agent};
use serde_json::{Value, json};

use super::world::{Mode, QUIET, SYNC, World, answered_in, endpoints, serving, until_met, vip, web_ports};

/// A folder as kubelet mounts a ConfigMap: its files lead through `..data`, which is swapped for another.
struct Mounted {
    folder: tempfile::TempDir,
    version: u32,
}

impl Mounted {
    fn new(config: &str) -> Self {
        let mut mounted = Self { folder: tempfile::tempdir().unwrap(), version: 0 };
        mounted.put(config);
        symlink("..data/config.conf", mounted.file()).unwrap();
        mounted
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("config.conf")
    }

    fn put(&mut self, config: &str) {
        let at = |name: &str| self.folder.path().join(name);
        let (old, new) = (format!("..v{}", self.version), format!("..v{}", self.version + 1));
        fs::create_dir(at(&new)).unwrap();
        fs::write(at(&new).join("config.conf"), config).unwrap();
        symlink(&new, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        let _ = fs::remove_dir_all(at(&old));
        self.version += 1;
    }
}

fn config(fields: Value) -> String {
    let mut config =
        json!({"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"});
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    config.to_string()
}

fn cidrs() -> String {
    topology::cluster_cidrs().map(|cidr| cidr.to_string()).join(",")
}

/// How often this process has started kube-lane.
fn starts(agent: &Agent) -> usize {
    agent.log().lines().filter(|line| line.contains("kube-lane starts version=")).count()
}

#[track_caller]
fn wait(agent: &Agent, what: &str, holds: impl Fn(&Agent) -> bool) {
    let deadline = Instant::now() + SYNC;
    while !holds(agent) {
        assert!(Instant::now() < deadline, "never: {what}\n{}", agent.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for the start with this number, and until that has programmed everything.
#[track_caller]
fn wait_started(agent: &mut Agent, number: usize) {
    wait(agent, &format!("start {number}"), |agent| starts(agent) >= number);
    agent.wait_synced(SYNC).unwrap();
    assert_eq!(starts(agent), number, "{}", agent.log());
}

fn status(agent: &Agent) -> Value {
    let (succeeds, text) = agent.status(&["-o", "json"]).unwrap();
    assert!(succeeds, "{text}");
    serde_json::from_str::<Value>(&text).unwrap()["agent"].clone()
}

/// The value of a setting, and where it comes from.
fn setting(agent: &Agent, field: &str) -> (Value, PathBuf) {
    let status = status(agent);
    let settings = status["settings"].as_array().unwrap().clone();
    let setting = settings.into_iter().find(|setting| setting["field"] == field);
    let setting = setting.unwrap_or_else(|| panic!("no {field} in {status}"));
    (setting["value"].clone(), setting["source"].as_str().unwrap().into())
}

/// An exec hands no descriptor on but for the standard ones, and those that the agent was started with: the shell that runs
/// the tests may have left some open.
fn assert_all_close_on_exec(pid: u32) {
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap() {
        let path = entry.unwrap().path();
        let number: u32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        // One that was closed meanwhile.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim().to_owned();
        let flags = i32::from_str_radix(&flags, 8).unwrap();
        let leads = fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap_or_default();
        let given = fs::read_link(format!("/proc/self/fd/{number}")).is_ok_and(|ours| ours == leads);
        let closes = flags & nix::libc::O_CLOEXEC != 0;
        assert!(number < 3 || given || closes, "{number} to {}", leads.display());
    }
}

fn ask(flow: &mut Flow, expected: &str) {
    assert_eq!(flow.ask().by(), Some(expected));
}

#[test]
fn a_change_of_the_files_is_taken_over_in_place() {
    let world = World::prepared();
    let (pod, _echoes) = serving(&world.lab, 0, "web");
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let client = world.lab.node(0).add_pod("client").unwrap();

    let mut own = Mounted::new(&config(json!({"mode": "nftables"})));
    let mut base =
        Mounted::new(&config(json!({"mode": "", "clusterCIDR": cidrs(), "nodePortAddresses": null})));
    let (own_file, base_file) = (own.file(), base.file());
    let flags =
        [format!("--config={}", own_file.display()), format!("--config-base={}", base_file.display())];
    // The rights of a pod, none of which an exec may lose.
    let binary = agent::binary().unwrap();
    let confined =
        ["--no-new-privs", "--bounding-set=-all,+net_admin,+bpf,+perfmon", binary.to_str().unwrap()];
    let mut flags: Vec<_> = confined.into_iter().chain(flags.iter().map(String::as_str)).collect();
    let (folder, places) = (world.folder.arg(), agent::places(world.lab.node(0)));
    flags.extend(["--manifests", &folder, "--hostname-override", world.lab.node(0).name()]);
    flags.extend(places.iter().map(String::as_str));
    let mut agent =
        Agent::start_binary(Path::new("setpriv"), world.lab.node(0), &flags, &world.log(0)).unwrap();
    wait_started(&mut agent, 1);
    let pid = agent.process().id();
    assert_eq!(setting(&agent, "clusterCIDR"), (cidrs().into(), base_file.clone()));
    assert_eq!(setting(&agent, "mode"), ("nftables".into(), own_file.clone()));
    let mut kept = client.flow(Dial::new(Proto::Tcp, vip(10)).timeout(QUIET)).unwrap();
    let by = kept.ask().by().unwrap().to_owned();
    assert_all_close_on_exec(pid);

    // The base changes, then the file over it.
    base.put(&config(json!({"mode": "", "clusterCIDR": cidrs(), "nodePortAddresses": ["0.0.0.0/0"]})));
    wait_started(&mut agent, 2);
    assert_eq!(setting(&agent, "nodePortAddresses"), (json!(["0.0.0.0/0"]), base_file.clone()));
    assert!(agent.log().contains("nodePortAddresses: not set -> [\"0.0.0.0/0\"]"), "{}", agent.log());
    ask(&mut kept, &by);
    own.put(&config(json!({"mode": "nftables", "nodePortAddresses": [], "clusterCIDR": "192.0.2.0/24"})));
    wait_started(&mut agent, 3);
    assert_eq!(setting(&agent, "clusterCIDR"), ("192.0.2.0/24".into(), own_file.clone()));
    assert_eq!(status(&agent)["node"]["podCIDRs"], json!(["192.0.2.0/24"]), "{}", status(&agent));
    ask(&mut kept, &by);

    // One that cannot be used, or that says the same by other words, or that is gone.
    let stale = |value: f64| {
        move |agent: &Agent| agent.metric("kubelane_configuration_stale").is_ok_and(|stale| stale == value)
    };
    own.put(&config(json!({"mode": "nftables", "clusterCIDR": "here"})));
    wait(&agent, "a bad file is told", stale(1.0));
    let (_, text) = agent.status(&[]).unwrap();
    assert!(text.contains("the configuration on disk is not in force"), "{text}");
    assert!(
        text.contains(own_file.to_str().unwrap()) && text.contains("write it like 10.244.0.0/16"),
        "{text}"
    );
    own.put(&config(
        json!({"clusterCIDR": "192.0.2.1/24", "nodePortAddresses": ["primary"], "oomScoreAdj": 5}),
    ));
    wait(&agent, "a good file is told", stale(0.0));
    assert_eq!(status(&agent)["configuration"]["filesNotInForce"], Value::Null);
    fs::remove_file(&base_file).unwrap();
    wait(&agent, "a base that is gone is told", stale(1.0));
    symlink("..data/config.conf", &base_file).unwrap();
    wait(&agent, "a base that is back is told", stale(0.0));
    // Its own values are good, but an agent that starts with it would end.
    let gone = "/no/such/kubeconfig";
    own.put(&config(json!({"clusterCIDR": "192.0.2.1/24", "clientConnection": {"kubeconfig": gone}})));
    wait(&agent, "a kubeconfig that is not there is told", stale(1.0));
    let (_, text) = agent.status(&[]).unwrap();
    assert!(text.contains(gone), "{text}");
    own.put(&config(json!({"clusterCIDR": "192.0.2.1/24", "nodePortAddresses": ["primary"]})));
    wait(&agent, "a good file is told", stale(0.0));
    assert_eq!(starts(&agent), 3, "{}", agent.log());
    let errors: Vec<_> =
        agent.log().lines().filter(|line| line.contains("ERROR")).map(str::to_owned).collect();
    assert_eq!(errors.len(), 3, "{errors:#?}");
    ask(&mut kept, &by);

    // To the other mode and back.
    for (number, mode) in [(4, Mode::Ebpf), (5, Mode::Nftables)] {
        let name = if mode == Mode::Ebpf { "ebpf" } else { "nftables" };
        own.put(&config(json!({"mode": name, "clusterCIDR": cidrs()})));
        wait_started(&mut agent, number);
        assert_eq!(status(&agent)["mode"], name, "{}", agent.log());
        let met = until_met(&client, vip(10), answered_in(mode));
        assert!(answered_in(mode)(&met), "{met:?}\n{}", agent.log());
        assert_all_close_on_exec(pid);
        ask(&mut kept, &by);
    }
    assert!(agent.process().try_wait().unwrap().is_none());
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    assert_eq!(name.trim(), "kube-lane", "tools find the process by its name");
}

#[test]
fn a_burst_of_changes_is_one_or_a_few() {
    let world = World::prepared();
    let mut own = Mounted::new(&config(json!({"clusterCIDR": "10.0.0.0/16"})));
    let file = format!("--config={}", own.file().display());
    let folder = world.folder.arg();
    let flags = [&file, "--manifests", &folder, "--hostname-override", world.lab.node(0).name()];
    let mut agent = Agent::start(world.lab.node(0), &flags, &world.log(0)).unwrap();
    agent.wait_synced(SYNC).unwrap();
    const CHANGES: usize = 100;
    for number in 1..=CHANGES {
        own.put(&config(json!({"clusterCIDR": format!("10.{number}.0.0/16")})));
    }
    let last = format!("10.{CHANGES}.0.0/16");
    wait(&agent, "the last is in force", |agent| {
        let status = agent.status(&[]);
        status.is_ok_and(|(succeeds, text)| succeeds && text.contains(&format!("clusterCIDR: {last} ")))
    });
    agent.wait_synced(SYNC).unwrap();
    assert!((2..CHANGES / 10).contains(&starts(&agent)), "{}", agent.log());
}
