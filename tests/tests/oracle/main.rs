//! The oracle lane: every scenario of `tests/scenarios` over kube-lane and over the real kube-proxy. One test a
//! scenario; `cargo xtask test --lane oracle -- FILTER`. Writes the summary to `target/oracle/`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use kube_lane_tests::oracle::{self, Oracle};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> Result<ExitCode> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut arguments = Arguments::from_args();
    // They share labs and proxies.
    arguments.test_threads = Some(1);
    // Started by the first scenario: a list of names, or none that match, needs no API server.
    let oracle: Arc<Mutex<Option<Oracle>>> = Arc::default();
    let trials = oracle::load(&root.join("scenarios"))?.into_iter().map(|(number, scenario)| {
        let oracle = Arc::clone(&oracle);
        Trial::test(scenario.name.clone(), move || {
            let mut oracle = oracle.lock().unwrap_or_else(PoisonError::into_inner);
            let mut run = || -> Result<Vec<String>> {
                if oracle.is_none() {
                    *oracle = Some(Oracle::start()?);
                }
                oracle.as_mut().context("no oracle")?.run(&scenario, number)
            };
            match run() {
                Ok(wrong) if wrong.is_empty() => Ok(()),
                Ok(wrong) => Err(Failed::from(wrong.join("\n"))),
                Err(error) => Err(Failed::from(format!("{error:#}"))),
            }
        })
    });
    let _interrupt = kube_lane_lab::on_interrupt()?;
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    if let Some(oracle) = oracle.lock().unwrap_or_else(PoisonError::into_inner).take() {
        oracle.write_summary(&root.join("../target/oracle"))?;
    }
    Ok(conclusion.exit_code())
}
