//! An OCI image with one layer, as one tar archive. The same input leads to the same bytes. Knows nothing of what the
//! image holds.
//!
//! The archive is an OCI image layout, which containerd, podman and skopeo read; it also has Docker's `manifest.json`,
//! as BuildKit's archives do, which older `docker load` reads.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::str::FromStr as _;

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use oci_spec::image::{
    ANNOTATION_REF_NAME, Arch, ConfigBuilder, Descriptor, DescriptorBuilder, HistoryBuilder,
    ImageConfigurationBuilder, ImageIndexBuilder, ImageManifestBuilder, MediaType, OciLayoutBuilder, Os,
    PlatformBuilder, RootFsBuilder, SCHEMA_VERSION, Sha256Digest,
};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};

use crate::{File, Files, Image};

/// The annotation by which containerd names an image.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// What was written.
#[derive(Debug, PartialEq, Eq)]
pub struct Written {
    /// The digest of the image's manifest: `sha256:…`.
    pub digest: String,
    /// Bytes of the archive.
    pub size: usize,
}

/// Writes the archive `to`.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn write(image: &Image, to: &Path) -> Result<Written> {
    let seconds = i64::try_from(image.created).context("the image was created too late")?;
    let created = Timestamp::from_second(seconds)?.to_string();
    let layer = layer(&image.files, image.created)?;
    let mut compressed = GzEncoder::new(Vec::new(), Compression::best());
    compressed.write_all(&layer)?;
    let mut blobs = Blobs::default();
    let layer_blob = blobs.add(MediaType::ImageLayerGzip, compressed.finish()?)?;

    let process = ConfigBuilder::default()
        .user("0")
        .env(image.env.clone())
        .entrypoint(image.entrypoint.clone())
        .working_dir("/")
        .labels(HashMap::from_iter(image.labels.clone()))
        .build()?;
    let history = HistoryBuilder::default().created(&*created).created_by("kube-lane-image").build()?;
    let config = ImageConfigurationBuilder::default()
        .created(&*created)
        .architecture(Arch::from(image.arch.as_str()))
        .os(Os::Linux)
        .config(process)
        .rootfs(RootFsBuilder::default().diff_ids([format!("sha256:{}", sha256(&layer))]).build()?)
        .history([history])
        .build()?;
    let config_blob = blobs.add(MediaType::ImageConfig, to_json(&config)?)?;
    let docker = json!([{
        "Config": path(&config_blob),
        "RepoTags": [image.name()],
        "Layers": [path(&layer_blob)],
    }]);
    let manifest = ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(config_blob)
        .layers([layer_blob])
        .build()?;
    let manifest = blobs.add(MediaType::ImageManifest, to_json(&manifest)?)?;
    let digest = manifest.digest().to_string();
    let names =
        [(CONTAINERD_NAME.to_owned(), image.name()), (ANNOTATION_REF_NAME.to_owned(), image.tag.clone())];
    let listed = DescriptorBuilder::default()
        .media_type(MediaType::ImageManifest)
        .size(manifest.size())
        .digest(manifest.digest().clone())
        .platform(
            PlatformBuilder::default().architecture(Arch::from(image.arch.as_str())).os(Os::Linux).build()?,
        )
        .annotations(HashMap::from(names))
        .build()?;
    let index = ImageIndexBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageIndex)
        .manifests([listed])
        .build()?;
    let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;

    let mut files = blobs.0;
    for (name, content) in [
        ("oci-layout", to_json(&layout)?),
        ("index.json", to_json(&index)?),
        ("manifest.json", to_json(&docker)?),
    ] {
        files.insert(name.to_owned(), File { mode: 0o644, content });
    }
    let archive = self::layer(&files, image.created)?;
    fs::write(to, &archive).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(Written { digest, size: archive.len() })
}

/// The blobs of an image layout, by their paths in it.
#[derive(Default)]
struct Blobs(Files);

impl Blobs {
    fn add(&mut self, kind: MediaType, content: Vec<u8>) -> Result<Descriptor> {
        let digest = Sha256Digest::from_str(&sha256(&content))?;
        let blob = Descriptor::new(kind, content.len() as u64, digest);
        self.0.insert(path(&blob), File { mode: 0o644, content });
        Ok(blob)
    }
}

fn path(blob: &Descriptor) -> String {
    format!("blobs/sha256/{}", blob.digest().digest())
}

fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// By way of a value whose keys have an order: those of a `HashMap` have none.
fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(&serde_json::to_value(value)?)?)
}

/// A tar archive of these files and of the directories that they are in.
fn layer(files: &Files, time: u64) -> Result<Vec<u8>> {
    let mut entries: BTreeMap<String, Option<&File>> = BTreeMap::new();
    for (path, file) in files {
        let parents =
            Path::new(path).ancestors().skip(1).filter_map(Path::to_str).filter(|dir| !dir.is_empty());
        entries.extend(parents.map(|dir| (format!("{dir}/"), None)));
        entries.insert(path.clone(), Some(file));
    }
    let mut archive = tar::Builder::new(Vec::new());
    for (path, file) in entries {
        let mut header = Header::new_gnu();
        header.set_mtime(time);
        header.set_uid(0);
        header.set_gid(0);
        header.set_entry_type(if file.is_some() { EntryType::Regular } else { EntryType::Directory });
        header.set_mode(file.map_or(0o755, |file| file.mode));
        let content = file.map_or(&[][..], |file| &file.content);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, &path, content).with_context(|| format!("cannot archive {path}"))?;
    }
    Ok(archive.into_inner()?)
}
