//! `cargo xtask manifests`: writes `deploy/kube-lane.yaml`, the single file of `kubectl apply -f deploy/`, from the folder
//! that `kubectl apply -k deploy/` applies.
//!
//! Owns that file and the check that versions in `deploy/` are this workspace's. Edits no other manifest.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process;
use crate::setup::{self, Need};

/// The file that is written.
const FILE: &str = "deploy/kube-lane.yaml";

/// Its first lines.
const HEADER: &str = "\
# kubectl apply -f deploy/
# Generated from deploy/base: please change that, and then run `cargo xtask manifests`.
";

/// Names the chart's version and that of the image it runs.
const CHART: &str = "deploy/chart/Chart.yaml";

/// An image in a manifest is this and the version.
const IMAGE: &str = "ghcr.io/kube-lane/kube-lane:";

/// Writes the single file.
///
/// # Errors
/// When kubectl cannot render the folder, or the file cannot be written.
pub(crate) fn write() -> Result<()> {
    setup::ensure(&[Need::ControlPlane])?;
    fs::write(process::root().join(FILE), render()?).with_context(|| format!("cannot write {FILE}"))
}

/// Checks that the single file is up to date and that all manifests name this workspace's version.
///
/// # Errors
/// When they do not.
pub(crate) fn check() -> Result<()> {
    let written =
        fs::read_to_string(process::root().join(FILE)).with_context(|| format!("cannot read {FILE}"))?;
    ensure!(
        written == render()?,
        "{FILE} is not what deploy/ renders to: please run `cargo xtask manifests` and commit the result"
    );
    let version = env!("CARGO_PKG_VERSION");
    let mut images = 0;
    for file in process::tracked_files()?.iter().filter(|file| file.starts_with("deploy")) {
        let text = fs::read_to_string(process::root().join(file))
            .with_context(|| format!("cannot read {}", file.display()))?;
        for (index, line) in text.lines().enumerate() {
            let Some((_, tag)) = line.split_once(IMAGE) else { continue };
            let place = format!("{}:{}", file.display(), index + 1);
            ensure!(
                tag == version,
                "{place}: the image's tag is {tag}, but the workspace's version is {version}"
            );
            images += 1;
        }
    }
    ensure!(images > 0, "no manifest in deploy/ names {IMAGE}");
    let chart =
        fs::read_to_string(process::root().join(CHART)).with_context(|| format!("cannot read {CHART}"))?;
    for field in ["version", "appVersion"] {
        let line = format!("{field}: {version}");
        ensure!(
            chart.lines().any(|have| have == line),
            "{CHART}: please write `{line}`, the workspace's version"
        );
    }
    Ok(())
}

/// What `kubectl apply -k deploy/` applies, below [`HEADER`].
fn render() -> Result<String> {
    let mut kubectl = Command::new(process::target("controlplane/bin/kubectl"));
    let objects = process::output(kubectl.arg("kustomize").arg(process::root().join("deploy")))?;
    Ok(format!("{HEADER}{objects}"))
}
