//! etcd, kube-apiserver, kube-proxy and kubectl, built from the Go module in `tests/controlplane` or, for another
//! release of Kubernetes, from a Go module that is generated below `target/`.
//! They are built again only when that module or the command line below changes.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail};

use super::{Cost, Step, go};
use crate::process;

/// The name of a program, and the package that it is.
type Program = (&'static str, &'static str);

/// What the lanes run beside kube-lane.
const CONTROL_PLANE: &[Program] = &[
    ("etcd", "go.etcd.io/etcd/server/v3"),
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
    ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
];

/// What clusters of real kubelets run besides, in the release of `tests/controlplane` alone.
const NODE: &[Program] = &[
    ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
    ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    ("kubeadm", "k8s.io/kubernetes/cmd/kubeadm"),
    (AGNHOST, "k8s.io/kubernetes/test/images/agnhost"),
];

/// The server of Kubernetes' own tests: the one program that runs in images.
const AGNHOST: &str = "agnhost";

/// Users of `setup-envtest` have the first two programs in the folder that this variable names.
const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// The patch releases that stand for a minor one. The Go module proxy serves all of them.
const NEWEST: [Release; 3] =
    [Release { minor: 30, patch: 14 }, Release { minor: 33, patch: 13 }, Release { minor: 36, patch: 3 }];

/// A release of Kubernetes: 1.minor.patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Release {
    minor: u32,
    patch: u32,
}

impl Release {
    /// The folder of this release's programs.
    pub(crate) fn bin(self) -> PathBuf {
        self.dir().join("bin")
    }

    fn dir(self) -> PathBuf {
        process::target(&format!("controlplane-{self}"))
    }

    /// The release that `tests/controlplane/go.mod` requires.
    fn default() -> Result<Self> {
        let go_mod = fs::read_to_string(go::module().join("go.mod"))?;
        let version = go_mod.lines().find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes v"));
        let version = version.and_then(|version| version.split_whitespace().next());
        let version = version.context("tests/controlplane/go.mod requires no k8s.io/kubernetes")?;
        Self::exact(version)
            .with_context(|| format!("tests/controlplane/go.mod requires k8s.io/kubernetes {version}"))
    }

    fn exact(version: &str) -> Option<Self> {
        let (minor, patch) = version.strip_prefix("1.")?.split_once('.')?;
        Some(Self { minor: minor.parse().ok()?, patch: patch.parse().ok()? })
    }

    /// Writes a Go module that builds this release: the go.mod of `k8s.io/kubernetes` with the staging modules, which
    /// it replaces by folders of its own repository, at the versions that were published with this release.
    fn write_module(self) -> Result<PathBuf> {
        let source = go::download(&format!("k8s.io/kubernetes@v{self}"))?;
        let read = |file: &str| {
            let file = source.join(file);
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
        };
        let module = self.dir().join("module");
        fs::create_dir_all(&module)?;
        fs::write(module.join("go.mod"), self.go_mod(&read("go.mod")?))?;
        // The build adds the sums of the staging modules.
        fs::write(module.join("go.sum"), read("go.sum")?)?;
        Ok(module)
    }

    fn go_mod(self, kubernetes: &str) -> String {
        let staging = format!("v0.{}.{}", self.minor, self.patch);
        let lines = kubernetes.lines().map(|line| {
            if line == "module k8s.io/kubernetes" {
                return "module github.com/kube-lane/kube-lane/controlplane".to_owned();
            }
            match line.split_once("=> ./staging/src/") {
                Some((replaced, path)) => format!("{replaced}=> {path} {staging}"),
                None => line.to_owned(),
            }
        });
        let required = format!("\nrequire k8s.io/kubernetes v{self}\n");
        lines.collect::<Vec<_>>().join("\n") + &required
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "1.{}.{}", self.minor, self.patch)
    }
}

/// What `--kubernetes` names: the release of `tests/controlplane` is `None` within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Choice(pub(crate) Option<Release>);

impl FromStr for Choice {
    type Err = Error;

    /// Reads a minor release (`1.30`) or a patch release (`1.30.14`).
    fn from_str(text: &str) -> Result<Self> {
        let default = Release::default()?;
        let minor = text.strip_prefix("1.").and_then(|minor| minor.parse().ok());
        let newest =
            minor.and_then(|minor| NEWEST.into_iter().chain([default]).find(|known| known.minor == minor));
        match newest.or_else(|| Release::exact(text)) {
            Some(release) => Ok(Self((release != default).then_some(release))),
            None => {
                let known = NEWEST.map(|known| format!("1.{} ({known})", known.minor)).join(", ");
                bail!("name {known}, 1.{} ({default}) or any patch release, such as 1.31.4", default.minor)
            }
        }
    }
}

/// Programs of one release, which are built together.
pub(super) struct Programs {
    /// `None` is the release of `tests/controlplane`.
    release: Option<Release>,
    programs: &'static [Program],
    /// The file that says what they were built from.
    stamp: &'static str,
}

impl Programs {
    /// etcd, kube-apiserver, kube-proxy and kubectl of a release: `None` is that of `tests/controlplane`.
    pub(super) fn control_plane(release: Option<Release>) -> Self {
        // The release of the programs in that folder is unknown, so they stand for the default one alone.
        let given = if release.is_none() && std::env::var_os(ASSETS).is_some() { 2 } else { 0 };
        Self { release, programs: &CONTROL_PLANE[given..], stamp: "stamp" }
    }

    /// What a cluster of real kubelets runs besides.
    pub(super) fn node() -> Self {
        Self { release: None, programs: NODE, stamp: "stamp-node" }
    }

    fn dir(&self) -> PathBuf {
        self.release.map_or_else(|| process::target("controlplane"), Release::dir)
    }

    /// What decides whether a build is still good.
    fn stamp(&self) -> String {
        let read = |file| fs::read_to_string(go::module().join(file)).unwrap_or_default();
        let programs = self.programs.iter().map(|(_, package)| *package).collect::<Vec<_>>().join("\n");
        [programs, ldflags(""), read("go.mod"), read("go.sum")].join("\n")
    }
}

impl Step for Programs {
    fn name(&self) -> String {
        let names = self.programs.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let release = self.release.map(|release| format!(" of Kubernetes {release}")).unwrap_or_default();
        format!("{names}{release} in {}", self.dir().join("bin").display())
    }

    fn is_done(&self) -> Result<bool> {
        let built = self.programs.iter().all(|(name, _)| self.dir().join("bin").join(name).is_file());
        Ok(built && fs::read_to_string(self.dir().join(self.stamp)).is_ok_and(|is| is == self.stamp()))
    }

    fn run(&self) -> Result<()> {
        let bin = self.dir().join("bin");
        fs::create_dir_all(&bin)?;
        process::run_long("go mod download", go::command().args(["mod", "download"]))?;
        let version = self.release.map_or_else(Release::default, Ok)?.to_string();
        let generated = self.release.map(Release::write_module).transpose()?;
        for (name, package) in self.programs {
            // Every release talks to the newest etcd.
            let module = generated.as_deref().filter(|_| package.starts_with("k8s.io/"));
            let mut build = go::command_in(module.unwrap_or(&go::module()));
            build.arg("build");
            if module.is_some() {
                build.arg("-mod=mod").env("GOWORK", "off");
            }
            if *name == AGNHOST {
                // An image of it needs nothing else.
                build.env("CGO_ENABLED", "0");
            }
            build.args(["-trimpath", "-ldflags", &ldflags(&version), "-o"]).arg(bin.join(name));
            process::run_long(&format!("go build {name}"), build.arg(package))?;
        }
        fs::write(self.dir().join(self.stamp), self.stamp())?;
        Ok(())
    }

    fn cost(&self) -> Cost {
        Cost { minutes: 7, megabytes: 300 }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minor_releases_stand_for_their_newest_patch() {
        let read = |text: &str| text.parse::<Choice>().unwrap().0.map(|release| release.to_string());
        assert_eq!(read("1.30").as_deref(), Some("1.30.14"));
        assert_eq!(read("1.33").as_deref(), Some("1.33.13"));
        assert_eq!(read("1.36").as_deref(), Some("1.36.3"));
        assert_eq!(read("1.31.4").as_deref(), Some("1.31.4"));
        // The release that the lanes run anyway.
        let default = Release::default().unwrap();
        assert_eq!(read(&default.to_string()), None);
        assert_eq!(read(&format!("1.{}", default.minor)), None);
        for wrong in ["1.31", "v1.30", "2.1.1", "1.30.x", ""] {
            let error = wrong.parse::<Choice>().unwrap_err().to_string();
            assert!(error.contains("1.30 (1.30.14)"), "{wrong}: {error}");
        }
    }

    #[test]
    fn staging_modules_are_those_of_the_release() {
        let kubernetes = "module k8s.io/kubernetes\n\ngo 1.22.0\n\nrequire k8s.io/api v0.0.0\n\n\
                          replace (\n\tk8s.io/api => ./staging/src/k8s.io/api\n)\n";
        let expected = "module github.com/kube-lane/kube-lane/controlplane\n\ngo 1.22.0\n\n\
                        require k8s.io/api v0.0.0\n\nreplace (\n\tk8s.io/api => k8s.io/api v0.30.14\n)\n\
                        require k8s.io/kubernetes v1.30.14\n";
        assert_eq!(Release { minor: 30, patch: 14 }.go_mod(kubernetes), expected);
    }
}
