//! Programs from the Go module in `tests/tools`, built into `target/tools/bin`. Kubernetes' own programs are
//! `controlplane`'s.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{Step, go};
use crate::process;

/// Checks GitHub workflows.
pub(crate) const ACTIONLINT: GoTool =
    GoTool { name: "actionlint", package: "github.com/rhysd/actionlint/cmd/actionlint" };

/// Pushes images to registries.
pub(crate) const CRANE: GoTool =
    GoTool { name: "crane", package: "github.com/google/go-containerregistry/cmd/crane" };

/// Renders and installs the chart in `deploy/chart`.
pub(crate) const HELM: GoTool = GoTool { name: "helm", package: "helm.sh/helm/v4/cmd/helm" };

/// The folder of the Go module that lists these programs.
pub(crate) const MODULE: &str = "tests/tools";

/// A `tool` of the module's go.mod, in the version that go.mod requires.
pub(crate) struct GoTool {
    /// The program's file name.
    pub(crate) name: &'static str,
    /// The Go package that it is built from.
    pub(crate) package: &'static str,
}

impl GoTool {
    /// Where the program is once installed.
    pub(crate) fn path(&self) -> PathBuf {
        process::target("tools/bin").join(self.name)
    }

    /// Holds the [`GoTool::wanted`] of the program that is installed.
    fn stamp(&self) -> PathBuf {
        process::target("tools/bin").join(format!("{}.stamp", self.name))
    }

    /// What decides whether a build is still good.
    fn wanted(&self) -> Result<String> {
        let read = |file: &str| {
            let path = process::root().join(MODULE).join(file);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        Ok([self.package.to_owned(), read("go.mod")?, read("go.sum")?].join("\n"))
    }
}

impl Step for GoTool {
    fn name(&self) -> String {
        format!("{} in target/tools/bin", self.name)
    }

    fn is_done(&self) -> Result<bool> {
        let wanted = self.wanted()?;
        Ok(self.path().is_file() && fs::read_to_string(self.stamp()).is_ok_and(|built| built == wanted))
    }

    fn run(&self) -> Result<()> {
        fs::create_dir_all(process::target("tools/bin"))?;
        let mut build = go::command_in(MODULE);
        build.args(["build", "-trimpath", "-ldflags", "-s -w", "-o"]).arg(self.path()).arg(self.package);
        process::run_long(&format!("go build {}", self.name), &mut build)?;
        fs::write(self.stamp(), self.wanted()?)?;
        Ok(())
    }
}
