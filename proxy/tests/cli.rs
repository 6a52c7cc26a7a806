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
        assert_eq!(text(&output.stdout), concat!("kube-lane v", env!("CARGO_PKG_VERSION"), "\n"), "{args:?}");
    }
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
    let flags =
        ["--init-only", "--manifests=/tmp", "--proxy-mode=iptables", "--conntrack-min=5", "--profiling"];
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
        warnings[1].ends_with("without effect in kube-lane so far: --conntrack-min, --profiling"),
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
