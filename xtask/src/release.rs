//! `cargo xtask release`: pushes the images of `cargo xtask image` to a registry as one multi-architecture image, and
//! writes the files of a release, which name that image by digest.
//!
//! Signs nothing and talks to no forge: `.github/workflows/release.yml` does both with what this prints and writes.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process;
use crate::setup::go_tools::{CRANE, HELM};
use crate::setup::{self, CYCLONEDX};

/// What is released: the workspace's version.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The architectures of an image.
const ARCHITECTURES: [&str; 2] = ["amd64", "arm64"];

/// The image that the manifests in `deploy/` name, without its tag.
const IMAGE: &str = "ghcr.io/kube-lane/kube-lane";

/// The single-file manifest, in the repository and among the files of a release.
const MANIFEST: &str = "kube-lane.yaml";

/// What `cargo xtask release` is told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The tag of the release, "v" and the workspace's version: checked, so that a tag cannot name another version.
    #[arg(long)]
    tag: String,
    /// Where the image is pushed to. Log in first, with `target/tools/bin/crane auth login` or `docker login`.
    #[arg(long, default_value = IMAGE)]
    repository: String,
    /// Speak HTTP with the registry: for one on this machine.
    #[arg(long)]
    insecure: bool,
    /// Where the files of the release are written.
    #[arg(long, default_value = "target/release-assets")]
    out: PathBuf,
}

/// Pushes and writes; prints the image by digest last.
///
/// # Errors
/// When the tag or CHANGELOG.md does not match the version, an image is missing, or the registry refuses it.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(
        args.tag == format!("v{VERSION}"),
        "the tag is {}, but the version in Cargo.toml is {VERSION}",
        args.tag
    );
    let changelog = read("CHANGELOG.md")?;
    let notes = notes(&changelog, VERSION).with_context(|| {
        format!("CHANGELOG.md has no heading \"## [{VERSION}] - DATE\": give the section a date before the tag is set")
    })?;
    setup::ensure_step(&CRANE)?;
    setup::ensure_step(&HELM)?;
    setup::ensure_step(&CYCLONEDX)?;

    let out = process::root().join(&args.out);
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("cannot empty {}", out.display()))?;
    }
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let image = push(args)?;
    write(&out.join(MANIFEST), &pin(&read(&format!("deploy/{MANIFEST}"))?, &image)?)?;
    chart(&image, &out)?;
    bill_of_materials(&out)?;
    checksums(&out)?;
    // Not assets: the workflow reads them.
    write(&process::root().join("target/release-notes.md"), &notes)?;
    println!("{image}");
    Ok(())
}

/// Pushes one image for each architecture, and an index of them. Returns the index by digest.
fn push(args: &Args) -> Result<String> {
    let mut append = crane(args);
    append.args(["index", "append", "--tag", &format!("{}:{VERSION}", args.repository)]);
    for arch in ARCHITECTURES {
        let archive = process::target(&format!("image/kube-lane-{VERSION}-{arch}.tar"));
        ensure!(
            archive.is_file(),
            "{} is not there: please run `cargo xtask image --arch {arch}`",
            archive.display()
        );
        // crane takes the layout of an OCI archive as a folder only.
        let layout = process::target(&format!("image/layout-{arch}"));
        if layout.exists() {
            fs::remove_dir_all(&layout).with_context(|| format!("cannot empty {}", layout.display()))?;
        }
        fs::create_dir_all(&layout)?;
        process::run(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&layout))?;
        let tag = format!("{}:{VERSION}-{arch}", args.repository);
        let pushed = process::output(crane(args).arg("push").arg(&layout).arg(&tag))?;
        let pushed = pushed.trim();
        ensure!(pushed.contains("@sha256:"), "crane push names no digest: {pushed:?}");
        append.args(["--manifest", pushed]);
    }
    let index = process::output(&mut append)?;
    let index = index.trim();
    ensure!(index.contains("@sha256:"), "crane index append names no digest: {index:?}");
    Ok(index.to_owned())
}

fn crane(args: &Args) -> Command {
    let mut crane = Command::new(CRANE.path());
    if args.insecure {
        crane.arg("--insecure");
    }
    crane
}

/// `manifest` with each mention of the agent's image, by tag, in favour of `image`, by digest. The tag stays, for
/// those who read it.
fn pin(manifest: &str, image: &str) -> Result<String> {
    let (repository, digest) = image.split_once('@').context("an image by digest has an @")?;
    let tagged = format!("{IMAGE}:{VERSION}");
    ensure!(manifest.contains(&tagged), "deploy/{MANIFEST} does not name {tagged}");
    Ok(manifest.replace(&tagged, &format!("{repository}:{VERSION}@{digest}")))
}

/// Packages the Helm chart, with `image` as its default.
fn chart(image: &str, out: &Path) -> Result<()> {
    let (repository, digest) = image.split_once('@').context("an image by digest has an @")?;
    let copy = process::target("release-chart");
    if copy.exists() {
        fs::remove_dir_all(&copy).with_context(|| format!("cannot empty {}", copy.display()))?;
    }
    process::run(Command::new("cp").arg("-r").arg(process::root().join("deploy/chart")).arg(&copy))?;
    let mut values = read("deploy/chart/values.yaml")?;
    let image = [
        (format!("  repository: {IMAGE}\n"), format!("  repository: {repository}\n")),
        ("  digest: \"\"\n".to_owned(), format!("  digest: \"{digest}\"\n")),
    ];
    for (default, released) in image {
        ensure!(values.contains(&default), "deploy/chart/values.yaml has no line {default:?}");
        values = values.replace(&default, &released);
    }
    write(&copy.join("values.yaml"), &values)?;
    let mut package = Command::new(HELM.path());
    package.arg("package").arg(&copy).args(["--version", VERSION, "--app-version", VERSION]);
    process::run(package.arg("--destination").arg(out).stdout(std::process::Stdio::null()))
}

/// The section of `version`, without its heading `## [version] - date`; none while that has no date.
fn notes(changelog: &str, version: &str) -> Option<String> {
    let heading = format!("## [{version}] - ");
    let mut lines = changelog.lines().skip_while(|line| !line.starts_with(&heading));
    let date = lines.next()?.strip_prefix(&heading)?;
    let section: Vec<_> = lines.take_while(|line| !line.starts_with("## ")).collect();
    date.starts_with(|c: char| c.is_ascii_digit()).then(|| format!("{}\n", section.join("\n").trim()))
}

/// Writes a CycloneDX list of the crates that the agent is built from.
fn bill_of_materials(out: &Path) -> Result<()> {
    let name = format!("kube-lane-{VERSION}.cdx");
    let mut list = Command::new(CYCLONEDX.path());
    list.current_dir(process::root()).args([
        "cyclonedx",
        "--manifest-path",
        "proxy/Cargo.toml",
        "--format",
        "json",
    ]);
    process::run(list.args(["--spec-version", "1.5", "--no-build-deps", "--override-filename", &name]))?;
    let file = format!("{name}.json");
    let (written, to) = (process::root().join("proxy").join(&file), out.join(&file));
    fs::copy(&written, &to)
        .with_context(|| format!("cannot copy {} to {}", written.display(), to.display()))?;

    // It writes one beside the Cargo.toml of each member of the workspace, whichever it is asked for.
    for manifest in process::tracked_files()?.iter().filter(|path| path.ends_with("Cargo.toml")) {
        let stray = process::root().join(manifest).with_file_name(&file);
        if stray.is_file() {
            fs::remove_file(&stray).with_context(|| format!("cannot remove {}", stray.display()))?;
        }
    }
    Ok(())
}

/// Writes `SHA256SUMS` of all that is in `out`, as `sha256sum --check` reads it.
fn checksums(out: &Path) -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(out)? {
        names.push(entry?.file_name());
    }
    names.sort();
    let mut sums = String::new();
    for name in names {
        write!(sums, "{}", process::output(Command::new("sha256sum").current_dir(out).arg(name))?)?;
    }
    write(&out.join("SHA256SUMS"), &sums)
}

fn read(file: &str) -> Result<String> {
    fs::read_to_string(process::root().join(file)).with_context(|| format!("cannot read {file}"))
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_the_section_of_one_version() {
        let changelog = "# C\n\n## [0.2.0] - Unreleased\n\n- c\n\n## [0.1.0] - 2026-12-01\n\n### Added\n\n- b\n\n## [0.1.0-rc] - 2026\n\n- a\n";
        assert_eq!(notes(changelog, "0.1.0").unwrap(), "### Added\n\n- b\n");
        assert_eq!(notes(changelog, "0.1.0-rc").unwrap(), "- a\n");
        assert_eq!(notes(changelog, "0.2.0"), None);
        assert_eq!(notes(changelog, "0.3.0"), None);
    }

    #[test]
    fn every_mention_of_the_image_is_pinned() {
        let manifest = format!("a: {IMAGE}:{VERSION}\nb: {IMAGE}:{VERSION}\nc: pause:3\n");
        let pinned = pin(&manifest, "r.example/k@sha256:ab").unwrap();
        let image = format!("r.example/k:{VERSION}@sha256:ab");
        assert_eq!(pinned, format!("a: {image}\nb: {image}\nc: pause:3\n"));
        assert!(pin("c: pause:3\n", "r.example/k@sha256:ab").is_err());
    }
}
