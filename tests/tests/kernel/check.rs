//! `kube-lane check` and `--init-only`, with the rights that an agent has and no others.

use std::fs;
use std::process::Command;

use kube_lane_lab::{Host, Lab};
use kube_lane_tests::agent::{self, Agent, places};
use kube_lane_tests::objects::Folder;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::world::{Mode, SYNC, World, answered_in, endpoints, serving, until_met, vip, web_ports};

/// What the DaemonSets of `deploy/` have.
const NFTABLES: &str = "-all,+net_admin";
const EBPF: &str = "-all,+net_admin,+bpf,+perfmon";

/// Runs kube-lane with these capabilities alone: whether it succeeds, standard output, and what it logs.
fn run(host: &Host, capabilities: &str, arguments: &[&str]) -> (bool, String, String) {
    let mut command = Command::new("setpriv");
    command.args(["--no-new-privs", "--bounding-set", capabilities, "--inh-caps", capabilities]);
    command.arg(agent::binary().unwrap()).args(arguments).env_remove("KUBERNETES_SERVICE_HOST");
    let output = host.run(move || command.output()).unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

/// `check` as JSON: whether it succeeds, and what it says.
fn check(host: &Host, capabilities: &str, arguments: &[&str]) -> (bool, Value) {
    let (success, told, log) = run(host, capabilities, &[&["check", "-o=json"], arguments].concat());
    (success, serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}{log}")))
}

/// What a mode's row of this name says.
fn row(told: &Value, mode: &str, name: &str) -> Value {
    let rows = told[mode]["checks"].as_array().unwrap();
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no {name}: {rows:#?}")).clone()
}

fn ruleset(host: &Host) -> String {
    let output = host.run(|| Command::new("nft").args(["list", "ruleset"]).output()).unwrap().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn config(host: &Host, mode: &str) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": mode,
        "kubeLane": {
            "cgroupRoot": host.cgroup(), "bpfRoot": host.bpf_root(), "countConnections": true,
            "socketLB": {"podCgroups": ["/", "absent"]},
        },
    });
    fs::write(file.path(), config.to_string()).unwrap();
    file
}

#[test]
fn a_bridge_of_pods_that_no_rule_sees_is_named() {
    const ROW: &str = "Services within a bridge of pods";
    let words = |lab: Lab| row(&check(lab.node(0), NFTABLES, &[]).1, "nftables", ROW);
    let none = words(Lab::builder().build().unwrap());
    assert_eq!((&none["works"], &none["found"]), (&json!(true), &json!("no bridge of pods")));
    assert_eq!(words(Lab::builder().switch(true).build().unwrap())["works"], true);
    let passed_by = words(Lab::builder().switch(false).build().unwrap());
    assert_eq!((&passed_by["works"], &passed_by["required"]), (&json!(false), &json!(false)));
    let found = passed_by["found"].as_str().unwrap();
    assert!(found.contains("cni0") && found.contains("net.bridge.bridge-nf-call-iptables=1"), "{found}");
}

#[test]
fn the_rights_of_an_agent_are_enough_and_nothing_is_left_behind() {
    let lab = Lab::builder().build().unwrap();
    let node = lab.node(0);
    let (success, told) = check(node, NFTABLES, &["--proxy-mode=nftables"]);
    assert!(success && told["works"] == true, "{told:#}");
    let (success, told) = check(node, NFTABLES, &[]);
    assert!(!success && told["nftables"]["works"] == true, "nobody says which mode it is for: {told:#}");
    for name in ["capabilities", "the ruleset", "the ruleset for IPv6", "the ruleset with counters"] {
        assert_eq!(row(&told, "nftables", name)["works"], true, "{told:#}");
    }
    let places = places(node);
    let ebpf = [&["--proxy-mode=ebpf"], &places.each_ref().map(String::as_str)[..]].concat();
    let (success, told) = check(node, EBPF, &ebpf);
    assert!(success && told["ebpf"]["works"] == true, "{told:#}");
    let (success, told) = check(node, EBPF, &ebpf[1..]);
    assert!(success && told["works"] == true, "both modes work: {told:#}");
    assert_eq!(ruleset(node), "");
    let (_, text, _) = run(node, EBPF, &[&["check"], &ebpf[..]].concat());
    let [required, optional] = ["the ruleset  ", "connection tracking"].map(|row| text.find(row).unwrap());
    let divided = text.find("  not required:\n").unwrap();
    assert!(required < divided && divided < optional, "{text}");

    let (success, told) = check(node, NFTABLES, &ebpf);
    assert!(!success && told["nftables"]["works"] == true, "{told:#}");
    let words = row(&told, "ebpf", "capabilities")["found"].as_str().unwrap().to_owned();
    assert!(words.contains("missing: CAP_BPF, CAP_PERFMON (in a pod"), "{words}");
    let (success, told) = check(node, "-all", &[]);
    assert!(!success && told["works"] == false, "{told:#}");
    let words = row(&told, "nftables", "capabilities")["found"].as_str().unwrap().to_owned();
    assert!(words.contains("missing: CAP_NET_ADMIN"), "{words}");
}

#[test]
fn the_configuration_says_what_has_to_work_and_flags_go_before_it() {
    let lab = Lab::builder().build().unwrap();
    let node = lab.node(0);
    let file = config(node, "ebpf");
    let file = ["--config", file.path().to_str().unwrap()];
    let (success, told) = check(node, EBPF, &file);
    assert!(success, "{told:#}");
    assert_eq!(row(&told, "nftables", "the ruleset with counters")["required"], true, "{told:#}");
    assert_eq!(row(&told, "ebpf", "cgroup v2")["found"], node.cgroup().to_str().unwrap(), "{told:#}");
    assert_eq!(row(&told, "ebpf", "cgroups of pods")["found"], "/; not there: /absent", "{told:#}");
    assert!(!check(node, NFTABLES, &file).0, "its mode");
    assert!(check(node, NFTABLES, &[&file[..], &["--proxy-mode=nftables"]].concat()).0);
    let elsewhere = "--bpf-root=/tmp/kube-lane";
    let (success, told) = check(node, EBPF, &[&file[..], &[elsewhere, "--count-connections=false"]].concat());
    assert!(!success, "{told:#}");
    assert_eq!(row(&told, "ebpf", "BPF file system")["works"], false, "{told:#}");
    assert_eq!(row(&told, "nftables", "the ruleset with counters")["required"], false, "{told:#}");
    let (success, _, log) = run(node, EBPF, &["check", "--config=/nowhere"]);
    assert!(!success && log.contains("/nowhere"), "{log}");
}

#[test]
fn an_agent_and_its_services_do_not_notice() {
    let world = World::in_mode(Mode::Ebpf);
    let (pod, _echoes) = serving(&world.lab, 0, "server");
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    assert!(answered_in(Mode::Ebpf)(&until_met(&pod, vip(10), answered_in(Mode::Ebpf))));
    let node = world.lab.node(0);
    let before = ruleset(node);
    let file = config(node, "ebpf");
    for _ in 0..3 {
        let (success, told) = check(node, EBPF, &["--config", file.path().to_str().unwrap()]);
        assert!(success, "{told:#}");
    }
    assert_eq!(ruleset(node), before);
    assert!(answered_in(Mode::Ebpf)(&until_met(&pod, vip(10), answered_in(Mode::Ebpf))));
    let log = world.agents[0].log();
    assert!(!log.contains("somebody else") && !log.contains("put in place again"), "{log}");
}

#[test]
fn an_agent_without_its_capabilities_says_which_and_serves_with_nftables() {
    let lab = Lab::builder().build().unwrap();
    let (node, folder, logs) = (lab.node(0), Folder::new().unwrap(), tempfile::tempdir().unwrap());
    let [cgroup, pins] = places(node);
    let limits = ["--no-new-privs", "--bounding-set", NFTABLES, "--inh-caps", NFTABLES];
    let (binary, folder) = (agent::binary().unwrap(), folder.arg());
    let agent = [binary.to_str().unwrap(), "--manifests", &folder, "--proxy-mode=ebpf", &cgroup, &pins];
    let arguments = [&limits[..], &agent].concat();
    let mut agent =
        Agent::start_binary("setpriv".as_ref(), node, &arguments, &logs.path().join("log")).unwrap();
    agent.wait_synced(SYNC).unwrap();
    let missing = "capabilities missing: CAP_BPF, CAP_PERFMON (in a pod: add [BPF, PERFMON]";
    for words in [agent.log(), agent.status(&[]).unwrap().1] {
        assert!(words.contains(missing), "{words}");
    }
    assert_eq!(agent.metric("kubelane_socket_layer_in_place").unwrap(), 0.0);
}

#[test]
fn init_only_prepares_the_node_without_a_source() {
    let lab = Lab::builder().build().unwrap();
    let node = lab.node(0);
    let timeout = || fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait");
    let (success, _, log) = run(node, NFTABLES, &["--init-only", "--conntrack-tcp-timeout-close-wait=77m"]);
    assert!(success && log.contains("the node is prepared") && !log.contains("WARN"), "{log}");
    assert_eq!(node.run(timeout).unwrap().unwrap().trim(), "4620");
    assert_eq!(ruleset(node), "");
    let (success, _, log) = run(node, "-all", &["--init-only"]);
    assert!(!success && log.contains("CAP_NET_ADMIN"), "{log}");
}
