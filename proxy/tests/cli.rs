//! The command line through the real binary. Nothing here starts an agent: that would program the host's kernel.
#![allow(clippy::unwrap_used, reason = "clippy knows #[test] functions, not what they call")]

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn kube_lane(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-lane"));
    command.args(args).env_remove("KUBERNETES_SERVICE_HOST").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    kube_lane(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A folder that is gone with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kube-lane-cli-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, file: &str) -> String {
        self.0.join(file).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn version_is_a_subcommand_and_a_flag() {
    for args in [&["version"][..], &["--version"], &["--version=raw"], &["run", "--version"]] {
        let output = run(args);
        assert!(output.status.success(), "{args:?}");
        let start = concat!("kube-lane v", env!("CARGO_PKG_VERSION"), " (commit ");
        let text = text(&output.stdout);
        assert!(
            text.starts_with(start) && text.ends_with(")\n") && text.lines().count() == 1,
            "{args:?}: {text}"
        );
    }
}

#[test]
fn version_names_the_commit() {
    let output = run(&["version", "-o", "json"]);
    let version: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    let commit = version["commit"].as_str().unwrap();
    assert!(text(&run(&["version"]).stdout).contains(&format!("(commit {commit}, linux/")), "{commit}");

    let head =
        Command::new("git").args(["rev-parse", "HEAD"]).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let head = head.ok().filter(|git| git.status.success()).map_or("unknown".into(), |git| text(&git.stdout));
    assert_eq!(commit.trim_end_matches("-dirty"), head.trim_end());
}

#[test]
fn mistakes_end_the_process_and_say_what_to_do() {
    for (args, part) in [
        (&["--proxy-mode=ipfw", "--manifests=/tmp"][..], "use nftables"),
        (&["--log-level=loud", "--manifests=/tmp"], "write error, warn, info"),
        (&["--config=/nowhere/config.conf"], "/nowhere/config.conf"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["frobnicate"], "frobnicate"),
        (&[], "--kubeconfig"),
    ] {
        let output = run(args);
        assert!(!output.status.success(), "{args:?}");
        assert!(text(&output.stderr).contains(part), "{args:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "", "{args:?}");
    }
}

#[test]
fn write_config_to_is_read_back() {
    let folder = Folder::new("write");
    let (first, second) = (folder.path("first.yaml"), folder.path("second.yaml"));
    let write = |args: &[&str], to: &str| {
        let output = run(&[args, &["--write-config-to", to]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        std::fs::read_to_string(to).unwrap()
    };
    let written =
        write(&["--kubeconfig=/k", "--hostname_override=Node-A", "--masquerade-all", "-v", "2"], &first);
    assert!(
        written.contains("hostnameOverride: node-a\n") && written.contains("masqueradeAll: true"),
        "{written}"
    );
    assert_eq!(write(&["--config", &first], &second), written);
}

#[test]
fn warnings_are_logged_for_people_and_for_machines() {
    let flags = [
        "--write-config-to=/dev/null",
        "--manifests=/tmp",
        "--proxy-mode=iptables",
        "--oom-score-adj=5",
        "--profiling",
        "--cluster-cidr=10.0.0.0/8",
    ];
    let output = run(&flags);
    let log = text(&output.stderr);
    assert!(output.status.success(), "{log}");
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
    assert_eq!(warnings.len(), 2, "{log}");
    assert!(
        warnings[0].ends_with("mode iptables: kube-lane serves with its nftables dataplane instead"),
        "{log}"
    );
    assert!(
        warnings[1].ends_with(
            "kube-lane does not support these settings and ignores them: --profiling, --oom-score-adj"
        ),
        "{log}"
    );

    let output = run(&[&flags[..], &["--logging-format=json"]].concat());
    for line in text(&output.stderr).lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(event["message"].is_string() && event["level"].is_string(), "{line}");
    }
    let quiet = run(&[&flags[..], &["--log-level=error"]].concat());
    assert_eq!(text(&quiet.stderr), "");
}

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10]
  type: NodePort
  ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.0.5], nodeName: here}, {addresses: [10.244.1.6], nodeName: there}]
";

#[test]
fn render_prints_the_plan_as_text_and_as_json() {
    let folder = Folder::new("render");
    std::fs::write(folder.path("web.yaml"), SERVICE).unwrap();
    let output = run(&["render", &folder.path(""), "--node-name=here"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let plan = text(&output.stdout);
    for line in [
        "service default/web",
        "ClusterIP 10.96.0.10:80",
        "to 10.244.0.5:8080 on this node",
        "to 10.244.1.6:8080",
    ] {
        assert!(plan.lines().any(|printed| printed.trim() == line), "{line:?} is not in\n{plan}");
    }

    let output = run(&["render", &folder.path(""), "--proxy-mode=ebpf"]);
    let plan = text(&output.stdout);
    for line in [
        "ClusterIP 10.96.0.10:80 [socket for pods and other containers; \
         nftables for host processes (no detectLocalMode tells them apart)]",
        "NodePort *:30080 [nftables (socketLB.external is off)]",
    ] {
        assert!(plan.lines().any(|printed| printed.trim() == line), "{line:?} is not in\n{plan}");
    }
    let flags = ["--proxy-mode=ebpf", "--cluster-cidr=10.0.0.0/8", "--socket-lb-external", "-o=json"];
    let output = run(&[&["render", &folder.path("")][..], &flags].concat());
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for frontend in plan["services"][0]["ports"][0]["frontends"].as_array().unwrap() {
        assert_eq!(
            [&frontend["layer"], &frontend["answeredBy"]],
            ["socket", "socket for pods and host processes"]
        );
    }

    let output = run(&["render", &folder.path(""), "-o", "json"]);
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["services"][0]["service"], "default/web");
    assert_eq!(plan["problems"], serde_json::json!([]));

    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: here}\nspec: {podCIDRs: [10.244.0.0/24]}\n\
        status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: ExternalIP, address: 198.51.100.1}]}\n";
    std::fs::write(folder.path("node.yaml"), node).unwrap();
    for (flags, cidrs, addresses) in [
        (&["--cluster-cidr=10.0.0.0/8"][..], "10.0.0.0/8", "192.0.2.1"),
        (&["--detect-local-mode=NodeCIDR", "--bind-address=192.0.2.9"], "10.244.0.0/24", "192.0.2.9"),
        (&["--cluster-cidr=fd00::/48", "--nodeport-addresses=198.51.100.0/24"], "fd00::/48", "198.51.100.1"),
    ] {
        let output = run(&[&["render", &folder.path(""), "--node-name=here", "-o", "json"], flags].concat());
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let found = [&plan["node"]["podCIDRs"], &plan["node"]["nodePortAddresses"]];
        assert_eq!(found, [&serde_json::json!([cidrs]), &serde_json::json!([addresses])], "{flags:?}");
    }
    let output = run(&["render", &folder.path(""), "--nodeport-addresses=eth0"]);
    assert!(text(&output.stderr).contains("--nodeport-addresses"), "{}", text(&output.stderr));
}

#[test]
fn render_reads_the_configuration_and_flags_go_before_it() {
    let folder = Folder::new("render-config");
    let config = folder.path("config.conf");
    let fields = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ebpf\n\
        hostnameOverride: there\nclusterCIDR: 10.0.0.0/8\nodd: 1\nkubeLane: {socketLB: {external: true}}\n";
    std::fs::write(&config, fields).unwrap();
    std::fs::write(folder.path("web.yaml"), SERVICE).unwrap();
    let render = |flags: &[&str]| run(&[&["render", &folder.path(""), "--config", &config], flags].concat());
    let output = render(&[]);
    assert!(
        output.status.success() && text(&output.stderr).contains("unknown field odd"),
        "{}",
        text(&output.stderr)
    );
    for line in [
        "ClusterIP 10.96.0.10:80 [socket for pods and host processes]",
        "NodePort *:30080 [socket for pods and host processes]",
        "to 10.244.1.6:8080 on this node",
    ] {
        let plan = text(&output.stdout);
        assert!(plan.lines().any(|printed| printed.trim() == line), "{line:?} is not in\n{plan}");
    }
    let output = render(&["--socket-lb-external=false", "--node-name=here"]);
    let plan = text(&output.stdout);
    assert!(plan.contains("[nftables (socketLB.external is off)]"), "{plan}");
    assert!(plan.contains("to 10.244.0.5:8080 on this node"), "{plan}");
    assert!(!text(&render(&["--proxy-mode=nftables"]).stdout).contains("socket for pods"));
    assert!(text(&render(&["--cluster-cidr=x"]).stderr).contains("--cluster-cidr"));
}

#[test]
fn render_says_why_nothing_is_programmed() {
    let folder = Folder::new("render-ignored");
    let services = SERVICE.split("---").next().unwrap();
    let headless = services.replace("name: web", "name: db").replace("10.96.0.10", "None");
    let external = "apiVersion: v1\nkind: Service\nmetadata: {name: cdn}\nspec: {type: ExternalName, externalName: cdn.test}\n";
    std::fs::write(folder.path("web.yaml"), format!("{headless}---\n{external}")).unwrap();
    let output = run(&["render", &folder.path("")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let plan = text(&output.stdout);
    for words in [
        "service default/db\n  nothing to program: headless: ",
        "service default/cdn\n  nothing to program: ExternalName: ",
    ] {
        assert!(plan.contains(words), "{plan}");
    }
    let output = run(&["render", &folder.path(""), "-o=json"]);
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["notServed"][0]["service"], "default/cdn");
}

#[test]
fn a_reader_that_has_had_enough_is_no_error() {
    let folder = Folder::new("render-head");
    std::fs::write(folder.path("web.yaml"), SERVICE).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = kube_lane(&["render", &folder.path("")]).stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(141), String::new()));
}

#[test]
fn render_names_what_is_wrong_and_plans_the_rest() {
    let folder = Folder::new("render-bad");
    std::fs::write(folder.path("web.yaml"), SERVICE).unwrap();
    std::fs::write(folder.path("bad.yaml"), "apiVersion: v1\nkind: Service\nmetadata: {name: [1]}\n")
        .unwrap();
    let output = run(&["render", &folder.path("")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("bad.yaml:"), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("service default/web"));
    assert!(!run(&["render", &folder.path("nowhere")]).status.success());
}
