//! etcd, kube-apiserver, kube-proxy and kubectl, built from the Go module in `tests/controlplane`.
//! Built again only when go.mod, go.sum or the command line below change.

use std::fs;

use anyhow::{Context, Result};

use super::{Step, go};
use crate::process;

/// The programs in `target/controlplane/bin` and the packages that they are.
const PROGRAMS: [(&str, &str); 4] = [
    ("etcd", "go.etcd.io/etcd/server/v3"),
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
    ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
];

/// Where users of `setup-envtest` have the first two already.
const ASSETS: &str = "KUBEBUILDER_ASSETS";

pub(super) struct Programs;

impl Step for Programs {
    fn name(&self) -> String {
        let names = programs().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
        format!("{names} in target/controlplane/bin (built once, some minutes)")
    }

    fn is_done(&self) -> Result<bool> {
        let built = programs().all(|(name, _)| process::target("controlplane/bin").join(name).is_file());
        Ok(built && fs::read_to_string(process::target("controlplane/stamp")).is_ok_and(|is| is == stamp()))
    }

    fn run(&self) -> Result<()> {
        let bin = process::target("controlplane/bin");
        fs::create_dir_all(&bin)?;
        process::run_long("go mod download", go::command().args(["mod", "download"]))?;
        let version = kubernetes_version()?;
        for (name, package) in programs() {
            let mut build = go::command();
            build.args(["build", "-trimpath", "-ldflags", &ldflags(&version), "-o"]).arg(bin.join(name));
            process::run_long(&format!("go build {name}"), build.arg(package))?;
        }
        fs::write(process::target("controlplane/stamp"), stamp())?;
        Ok(())
    }
}

/// What is not given by [`ASSETS`].
fn programs() -> impl Iterator<Item = (&'static str, &'static str)> {
    let given = if std::env::var_os(ASSETS).is_some() { 2 } else { 0 };
    PROGRAMS.into_iter().skip(given)
}

/// What decides whether a build is still good.
fn stamp() -> String {
    let read = |file| fs::read_to_string(go::module().join(file)).unwrap_or_default();
    let programs = programs().map(|(_, package)| package).collect::<Vec<_>>().join("\n");
    [programs, ldflags(""), read("go.mod"), read("go.sum")].join("\n")
}

fn kubernetes_version() -> Result<String> {
    let go_mod = fs::read_to_string(go::module().join("go.mod"))?;
    let version = go_mod.lines().find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes v"));
    let version = version.and_then(|version| version.split_whitespace().next());
    Ok(version.context("tests/controlplane/go.mod requires no k8s.io/kubernetes")?.to_owned())
}

/// Without them the programs would call themselves v0.0.0 and refuse to emulate any release.
fn ldflags(version: &str) -> String {
    let mut parts = version.split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let package = "k8s.io/component-base/version";
    format!(
        "-s -w -X {package}.gitVersion=v{version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
    )
}
