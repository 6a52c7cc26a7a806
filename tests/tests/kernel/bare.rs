//! A node without an agent, for tests that put eBPF programs on its cgroup themselves; and which programs are there.

use std::path::Path;
use std::process::Command;

use kube_lane_lab::{Echo, Lab, Node, Pod, Proto};

/// A client pod, and two pods that serve TCP and UDP on port 8080.
pub(super) struct Bare {
    pub(super) client: Pod,
    pub(super) a: Pod,
    pub(super) b: Pod,
    _echoes: Vec<Echo>,
    pub(super) lab: Lab,
}

impl Bare {
    pub(super) fn new() -> Self {
        let lab = Lab::builder().build().unwrap();
        let [client, a, b] = ["client", "a", "b"].map(|name| lab.node(0).add_pod(name).unwrap());
        let serve = |pod: &Pod| [Proto::Tcp, Proto::Udp].map(|proto| pod.serve(proto, 8080).unwrap());
        let echoes = [&a, &b].into_iter().flat_map(serve).collect();
        Self { client, a, b, _echoes: echoes, lab }
    }

    pub(super) fn node(&self) -> &Node {
        self.lab.node(0)
    }
}

/// The programs on a cgroup, as bpftool has them: id of the program, name.
pub(super) fn attached(cgroup: &Path) -> Vec<(String, String)> {
    let output = Command::new("bpftool").args(["cgroup", "show"]).arg(cgroup).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let words = lines.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    words.map(|words| (words[0].to_owned(), words[words.len() - 1].to_owned())).collect()
}
