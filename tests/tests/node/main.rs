//! The lane `node`: kube-lane on clusters of real kubelets, installed as users install it. One test a scenario;
//! `cargo xtask test --lane node -- FILTER`.
//!
//! Scenarios of one group share a cluster, in this order; each of them also works alone. A cluster in which a scenario
//! failed is not used again, and its logs are kept.

// Named test modules for clippy, which else forbids `unwrap` in the helpers.
#[cfg(test)]
mod alone;
#[cfg(test)]
mod guide;
#[cfg(test)]
mod image;
#[cfg(test)]
mod install;
#[cfg(test)]
mod migrate;
#[cfg(test)]
mod remove;
#[cfg(test)]
mod restart;
#[cfg(test)]
mod rollout;
#[cfg(test)]
mod systemd;
#[cfg(test)]
mod traffic;
mod vm;
#[cfg(test)]
mod world;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use kube_lane_tests::nodes::NodeCluster;
use libtest_mimic::{Arguments, Failed, Trial};

/// A scenario on a cluster that starts without a proxy.
type Scenario = fn(&mut NodeCluster) -> Result<()>;

/// Scenarios that share a cluster.
const GROUPS: &[&[(&str, Scenario)]] = &[
    &[
        ("install::a_fresh_install_serves_pods_nodes_and_outside", install::serves),
        ("rollout::an_update_of_kube_lane_breaks_no_connection", rollout::of_kube_lane),
        ("rollout::a_deployment_rolls_and_no_connection_fails", rollout::of_a_deployment),
        ("restart::a_node_comes_back_without_a_service_that_works", restart::of_a_node),
        ("remove::nothing_is_left_after_uninstalling", remove::everything),
        ("systemd::the_unit_serves_on_nodes_whose_proxy_is_no_pod", systemd::unit),
    ],
    &[("migrate::from_kube_proxy_in_mode_iptables_and_back", migrate::from_iptables)],
    &[("migrate::from_kube_proxy_in_mode_nftables_and_back", migrate::from_nftables)],
];

/// A scenario that needs no cluster, or makes what it needs.
type Alone = fn() -> Result<()>;

const ALONE: &[(&str, Alone)] = &[
    ("image::holds_the_agent_and_what_it_loads_and_no_shell", image::holds_little),
    ("image::its_agent_runs_in_it", image::runs),
    ("image::the_same_files_make_the_same_archive", image::is_reproducible),
    ("guide::every_block_of_commands_runs_or_says_why_not", guide::is_complete),
    ("alone::a_kubelet_without_an_api_server_serves_a_folder", alone::static_pod),
    ("migrate::the_manifests_that_tests_read_are_those_of_kubeadm", migrate::manifests_are_current),
];

fn main() -> Result<ExitCode> {
    if let Some(result) = vm::guest() {
        return result.map(|()| ExitCode::SUCCESS);
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    // The cluster of a group, started by its first scenario: a list of names needs none.
    let running: Arc<Mutex<Option<(usize, NodeCluster)>>> = Arc::default();
    let trials = GROUPS.iter().enumerate().flat_map(|(group, scenarios)| {
        let running = Arc::clone(&running);
        scenarios.iter().map(move |(name, scenario)| {
            let running = Arc::clone(&running);
            Trial::test(*name, move || {
                let mut running = running.lock().unwrap_or_else(PoisonError::into_inner);
                run(&mut running, group, *scenario).map_err(|error| Failed::from(format!("{error:#}")))
            })
        })
    });
    let alone = ALONE.iter().map(|(name, scenario)| {
        Trial::test(*name, move || scenario().map_err(|error| Failed::from(format!("{error:#}"))))
    });
    let machine = std::env::var_os("KUBE_LANE_LONG").map(|_| vm::trials());
    let all = alone.chain(trials).chain(machine.into_iter().flatten());
    let _interrupt = kube_lane_lab::on_interrupt()?;
    let conclusion = libtest_mimic::run(&arguments, all.collect());
    drop(running.lock().unwrap_or_else(PoisonError::into_inner).take());
    Ok(conclusion.exit_code())
}

fn run(running: &mut Option<(usize, NodeCluster)>, group: usize, scenario: Scenario) -> Result<()> {
    let mut nodes = match running.take() {
        Some((of, nodes)) if of == group => nodes,
        // Two clusters at once would be much for a small machine.
        other => {
            drop(other);
            NodeCluster::start()?
        }
    };
    match scenario(&mut nodes) {
        Ok(()) => {
            *running = Some((group, nodes));
            Ok(())
        }
        Err(error) => {
            let logs = nodes.keep_logs();
            Err(error).with_context(|| format!("logs in {}", logs.display()))
        }
    }
}
