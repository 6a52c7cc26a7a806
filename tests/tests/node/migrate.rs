//! Moving a cluster from kubeadm's kube-proxy to kube-lane and back, under load, by the commands of `docs/migrate.md`.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use kube_lane_lab::topology;
use kube_lane_tests::kube_proxy::Mode;
use kube_lane_tests::nodes::{self, NodeCluster, kubeadm};

use crate::guide::{self, administrator, administrator_in};
use crate::remove;
use crate::traffic::{Connections, Traffic};
use crate::world::{self, Web, until};

const GUIDE: &str = "migrate.md";

/// From kube-proxy in kubeadm's default mode, and back.
pub(crate) fn from_iptables(nodes: &mut NodeCluster) -> Result<()> {
    there_and_back(nodes, None)
}

/// From kube-proxy in mode nftables, and back.
pub(crate) fn from_nftables(nodes: &mut NodeCluster) -> Result<()> {
    there_and_back(nodes, Some(Mode::Nftables))
}

fn there_and_back(nodes: &NodeCluster, mode: Option<Mode>) -> Result<()> {
    nodes.import(&kubeadm::kube_proxy_image(nodes.folder())?)?;
    nodes.import(&nodes::kube_lane()?)?;
    let api_server = nodes.cluster().control_plane().address();
    let configuration = kubeadm::configuration(nodes.folder(), api_server, &topology::cluster_cidrs(), mode)?;
    kubeadm::install(nodes, &configuration)?;
    world::rolled_out(nodes, "kube-system", "daemonset/kube-proxy")?;
    let web = Web::new(nodes)?;
    web.answers()?;
    let mode = mode.unwrap_or(Mode::Iptables);

    let canary = guide::file(GUIDE, "# canary/kustomization.yaml", &[])?;
    let folder = guide::beside_the_clone(nodes, "canary", &canary)?;
    administrator_in(nodes, &folder, &guide::commands(GUIDE, "> kube-proxy.yaml", &[])?)?;
    let traffic = Traffic::start(&web, Connections::NewAndKept)?;
    one_node_first(nodes, &folder)?;
    traffic.goes_on()?;
    one_node_back(nodes, &folder)?;
    traffic.goes_on()?;
    one_node_first(nodes, &folder)?;
    all_nodes(nodes)?;
    traffic.goes_on()?;
    web.answers()?;
    world::report(&format!("from kube-proxy in mode {mode} to kube-lane:\n{}", traffic.stop()?));

    let traffic = Traffic::start(&web, Connections::NewAndKept)?;
    administrator_in(nodes, &folder, &guide::commands(GUIDE, "apply -f kube-proxy.yaml", &[])?)?;
    until(|| kube_proxy_has_rules(nodes))?;
    remove::uninstall(nodes)?;
    traffic.goes_on()?;
    web.answers()?;
    world::report(&format!("from kube-lane back to kube-proxy in mode {mode}:\n{}", traffic.stop()?));
    remove::nothing_is_left(nodes)
}

/// Other tests read kubeadm's manifests from a file: it is what kubeadm prints, with the configuration in its first lines.
pub(crate) fn manifests_are_current() -> Result<()> {
    let file = guide::repository().join("tests/fixtures/kubeadm/kube-proxy.yaml");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let (head, manifests) = text.split_once("\n---\n").context("the file has no manifests")?;
    let configuration: String =
        head.lines().filter_map(|line| line.strip_prefix("#   ")).flat_map(|line| [line, "\n"]).collect();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("kubeadm.yaml");
    fs::write(&path, configuration)?;
    let printed = kubeadm::manifests(&path)?;
    let printed = printed.trim_start_matches("---\n");
    ensure!(manifests == printed, "{} differs from what kubeadm prints:\n{printed}", file.display());
    Ok(())
}

/// Section "One node first".
fn one_node_first(nodes: &NodeCluster, folder: &Path) -> Result<()> {
    let name = nodes.machine(0).name();
    let labelled = guide::commands(GUIDE, "kubectl apply -k canary/", &[("NODE", name)])?;
    administrator_in(nodes, folder, &labelled)?;
    world::rolled_out(nodes, "kube-system", "daemonset/kube-lane")?;
    is_ready_on(nodes, &[name])?;
    administrator(nodes, &guide::commands(GUIDE, "patch ds kube-proxy", &[])?)?;
    world::rolled_out(nodes, "kube-system", "daemonset/kube-proxy")?;
    until(|| {
        let pods = nodes.list(&["--namespace=kube-system", "pods", "--selector=k8s-app=kube-proxy"])?;
        ensure!(pods.len() == 1, "{} pods of kube-proxy", pods.len());
        Ok(())
    })?;
    remove_rules_of_kube_proxy(nodes, 0)
}

/// The last part of section "Back to kube-proxy".
fn one_node_back(nodes: &NodeCluster, folder: &Path) -> Result<()> {
    let name = nodes.machine(0).name();
    administrator(nodes, &guide::commands(GUIDE, "kube-lane.io/canary-", &[("NODE", name)])?)?;
    until(|| kube_proxy_has_rules(nodes))?;
    let one = guide::file(GUIDE, "# uninstall-one/kustomization.yaml", &[("NODE", name)])?;
    guide::beside_the_clone(nodes, "uninstall-one", &one)?;
    let uninstall = guide::commands(GUIDE, "kubectl apply -k uninstall-one/", &[])?;
    administrator_in(nodes, folder, &uninstall)?;
    remove::nothing_is_left_on(nodes, 0)
}

/// Section "All nodes".
fn all_nodes(nodes: &NodeCluster) -> Result<()> {
    world::apply(nodes, "-k", "")?;
    world::rolled_out(nodes, "kube-system", "daemonset/kube-lane")?;
    the_single_file_says_the_same(nodes)?;
    is_ready_on(nodes, &[nodes.machine(0).name(), nodes.machine(1).name()])?;
    does_not_depend_on_itself(nodes)?;
    administrator(nodes, &guide::commands(GUIDE, "delete ds kube-proxy", &[])?)?;
    remove_rules_of_kube_proxy(nodes, 1)
}

/// `kubectl apply -f deploy/`, after `-k`.
fn the_single_file_says_the_same(nodes: &NodeCluster) -> Result<()> {
    let said = world::apply(nodes, "-f", "")?;
    let other: Vec<_> = said.lines().filter(|line| !line.ends_with(" unchanged")).collect();
    ensure!(!said.is_empty() && other.is_empty(), "`apply -f` after `apply -k`:\n{}", other.join("\n"));
    Ok(())
}

fn is_ready_on(nodes: &NodeCluster, names: &[&str]) -> Result<()> {
    let mut seen = vec![];
    for pod in nodes.list(&["--namespace=kube-system", "pods", "--selector=k8s-app=kube-lane"])? {
        let node = pod["spec"]["nodeName"].as_str().context("a pod without a node")?.to_owned();
        let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
        administrator(nodes, &guide::commands(GUIDE, "kube-lane status --all", &[("POD", name)])?)?;
        seen.push(node);
    }
    seen.sort();
    ensure!(seen == names, "kube-lane runs on {seen:?}");
    Ok(())
}

/// kubeadm's ConfigMap gives the API server's own address.
fn does_not_depend_on_itself(nodes: &NodeCluster) -> Result<()> {
    let address = nodes.cluster().control_plane().address().to_string();
    for node in 0..2 {
        let server = world::status(nodes, node)?["agent"]["apiServer"].take();
        let itself = server["throughService"] == false && server["fallback"] == false;
        ensure!(itself && server["inUse"] == address, "not at {address}: {server:#}");
    }
    Ok(())
}

fn remove_rules_of_kube_proxy(nodes: &NodeCluster, node: usize) -> Result<()> {
    let command = guide::commands(GUIDE, "--cleanup", &[("VERSION", &kubeadm::version()?)])?;
    nodes.machine(node).run(&["sh", "-euc", &command])?;
    let rules = rules(nodes, node)?;
    ensure!(!rules.contains("KUBE-SVC") && !rules.contains("table ip kube-proxy"), "left:\n{rules}");
    Ok(())
}

/// kube-proxy has written the rules of Service `web`, in both families, on both nodes. That its pods run says less.
fn kube_proxy_has_rules(nodes: &NodeCluster) -> Result<()> {
    for node in 0..2 {
        let rules = rules(nodes, node)?;
        for family in ["ip", "ip6"] {
            let nat = table(&rules, &format!("{family} nat"));
            let own = table(&rules, &format!("{family} kube-proxy"));
            ensure!(
                nat.contains("KUBE-SEP-") || own.contains("goto service-"),
                "kube-proxy has written no rules of {family} on {}",
                nodes.machine(node).name()
            );
        }
    }
    Ok(())
}

/// The part of a ruleset that belongs to a table.
fn table<'a>(rules: &'a str, name: &str) -> &'a str {
    let begin = rules.find(&format!("table {name} {{\n")).unwrap_or(rules.len());
    let rest = rules.get(begin..).unwrap_or_default();
    rest.get(..rest.find("\n}\n").unwrap_or(rest.len())).unwrap_or_default()
}

fn rules(nodes: &NodeCluster, node: usize) -> Result<String> {
    nodes.machine(node).run(&["nft", "list", "ruleset"])
}
