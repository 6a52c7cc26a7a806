//! The image of kube-lane as `cargo xtask image` packs it, with the agent that the lanes build: what it holds, that its
//! agent runs with nothing else, and that it is the same each time. Needs no cluster.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use flate2::read::GzDecoder;
use kube_lane_image::{Arch, Image};
use kube_lane_lab::{Host, Lab};
use kube_lane_tests::agent::places;
use kube_lane_tests::nodes::{self, KUBE_LANE_IMAGE};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Bytes of the archive, at most. The agent in it is larger than that of a release: it is less optimised.
const MAX_SIZE: u64 = 25_000_000;

/// The program of the image.
const AGENT: &str = "usr/local/bin/kube-lane";

/// A file of a tar archive.
struct Entry {
    mode: u32,
    time: u64,
    content: Vec<u8>,
}

/// The image, read from its archive.
struct Unpacked {
    /// The digest of its manifest.
    digest: String,
    config: Value,
    /// The files of its only layer, by their paths.
    files: BTreeMap<String, Entry>,
}

impl Unpacked {
    /// Reads the archive; an error where a blob has another digest or size than what refers to it says.
    fn read() -> Result<Self> {
        let archive = files(&fs::read(nodes::kube_lane()?)?)?;
        let blob = |descriptor: &Value| -> Result<&[u8]> {
            let digest = descriptor["digest"].as_str().context("a descriptor without digest")?;
            let path = format!("blobs/{}", digest.replace(':', "/"));
            let content = &archive.get(&path).with_context(|| format!("no {path}"))?.content;
            ensure!(sha256(content) == digest, "{path} has the digest {}", sha256(content));
            ensure!(descriptor["size"] == content.len(), "{path} has {} bytes", content.len());
            Ok(content)
        };
        let index: Value = serde_json::from_slice(&archive["index.json"].content)?;
        let listed = &index["manifests"][0];
        ensure!(listed["annotations"]["io.containerd.image.name"] == KUBE_LANE_IMAGE, "{index:#}");
        let manifest: Value = serde_json::from_slice(blob(listed)?)?;
        let config: Value = serde_json::from_slice(blob(&manifest["config"])?)?;
        let mut layer = Vec::new();
        GzDecoder::new(blob(&manifest["layers"][0])?).read_to_end(&mut layer)?;
        ensure!(config["rootfs"]["diff_ids"] == json!([sha256(&layer)]), "{config:#}");
        // An index, a manifest and a configuration, `oci-layout`, and what Docker reads: one layer.
        let blobs = archive.keys().filter(|path| path.starts_with("blobs/")).count();
        ensure!(blobs == 3, "{blobs} blobs");
        let digest = listed["digest"].as_str().context("no digest")?.to_owned();
        Ok(Self { digest, config, files: files(&layer)? })
    }

    fn label(&self, name: &str) -> Result<&str> {
        let label = &self.config["config"]["Labels"][format!("org.opencontainers.image.{name}")];
        label.as_str().with_context(|| format!("no label {name}: {:#}", self.config))
    }

    /// The same image, made anew of what was read.
    fn image(&self) -> Result<Image> {
        let mut image = Image::new(KUBE_LANE_IMAGE, Arch::native()?)?;
        let config = &self.config["config"];
        image.entrypoint = serde_json::from_value(config["Entrypoint"].clone())?;
        image.env = serde_json::from_value(config["Env"].clone())?;
        image.labels = serde_json::from_value(config["Labels"].clone())?;
        for (path, Entry { mode, time, content }) in &self.files {
            image.created = *time;
            image.add(path, *mode, content.clone());
        }
        Ok(image)
    }
}

/// The files of a tar archive. Directories are not told; anything else is refused.
fn files(archive: &[u8]) -> Result<BTreeMap<String, Entry>> {
    let mut found = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_str().context("a path that is no text")?.to_owned();
        match entry.header().entry_type() {
            tar::EntryType::Directory => continue,
            tar::EntryType::Regular => {}
            other => bail!("{path} is {other:?}"),
        }
        let (mode, time) = (entry.header().mode()?, entry.header().mtime()?);
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        found.insert(path, Entry { mode, time, content });
    }
    Ok(found)
}

fn sha256(content: &[u8]) -> String {
    let digest = Sha256::digest(content);
    format!("sha256:{}", digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// The agent, shared libraries, certificates and licences; nothing else can be run.
pub(crate) fn holds_little() -> Result<()> {
    let size = fs::metadata(nodes::kube_lane()?)?.len();
    ensure!(size < MAX_SIZE, "the archive has {size} bytes");
    let image = Unpacked::read()?;
    ensure!(image.config["config"]["Entrypoint"] == json!([format!("/{AGENT}")]), "{:#}", image.config);
    for (path, Entry { mode, content, .. }) in &image.files {
        let name = path.rsplit('/').next().unwrap_or(path);
        if path == AGENT {
            ensure!(*mode == 0o755, "{path} has mode {mode:o}");
        } else if path.starts_with("lib") {
            ensure!(name.contains(".so.") && content.starts_with(b"\x7fELF"), "{path} is no shared library");
        } else {
            let is_text = ["etc/ssl/certs/", "usr/share/"].iter().any(|folder| path.starts_with(folder));
            ensure!(is_text && *mode == 0o644 && std::str::from_utf8(content).is_ok(), "{path} is no text");
        }
    }
    let certificates = &image.files["etc/ssl/certs/ca-certificates.crt"].content;
    let count = String::from_utf8_lossy(certificates).matches("-----BEGIN CERTIFICATE-----").count();
    ensure!(count > 100, "{count} certificates");
    ensure!(
        image.label("version")? == env!("CARGO_PKG_VERSION")
            && image.label("source")? == env!("CARGO_PKG_REPOSITORY")
    );
    Ok(())
}

/// Runs the agent of the image, which is unpacked at `root`, on a host: what it prints. It sees nothing but the image, the
/// kernel's file systems, and the lab's BPF file system below `/run`.
fn run(root: &Path, host: &Host, arguments: &[&str]) -> Result<String> {
    let mount_and_run = "for at in proc sys run; do mount --rbind /$at $at; done && exec chroot . \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", mount_and_run, "sh", &format!("/{AGENT}")]);
    command.args(arguments).current_dir(root).env_clear().env("PATH", "/usr/sbin:/usr/bin");
    let output = host.run(move || command.output())??;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "kube-lane {arguments:?}: {}\n{stderr}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// The agent runs with nothing but the files of the image: what it says of itself, and what it can do.
pub(crate) fn runs() -> Result<()> {
    let image = Unpacked::read()?;
    let dir = tempfile::tempdir()?;
    let root = dir.path().join("root");
    image.image()?.write_files(&root)?;
    for folder in ["proc", "sys", "run"] {
        fs::create_dir(root.join(folder))?;
    }
    let lab = Lab::builder().build()?;
    let node = lab.node(0);
    let version: Value = serde_json::from_str(&run(&root, node, &["version", "-o=json"])?)?;
    ensure!(version["version"] == image.label("version")?, "{version}");
    ensure!(version["commit"] == image.label("revision")?, "{version}");
    ensure!(run(&root, node, &["--help"])?.contains("Usage: kube-lane"));
    let places = places(node);
    let mut check = vec!["check", "-o=json", "--proxy-mode=ebpf"];
    check.extend(places.iter().map(String::as_str));
    let checked: Value = serde_json::from_str(&run(&root, node, &check)?)?;
    ensure!(checked["nftables"]["works"] == true && checked["ebpf"]["works"] == true, "{checked:#}");
    Ok(())
}

/// The archive, made anew of what is in it, is the same to the byte.
pub(crate) fn is_reproducible() -> Result<()> {
    let unpacked = Unpacked::read()?;
    let dir = tempfile::tempdir()?;
    let again = dir.path().join("again.tar");
    let written = unpacked.image()?.write(&again)?;
    ensure!(written.digest == unpacked.digest, "{} became {}", unpacked.digest, written.digest);
    ensure!(fs::read(&again)? == fs::read(nodes::kube_lane()?)?, "the same image in another archive");
    Ok(())
}
