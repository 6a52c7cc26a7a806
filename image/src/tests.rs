//! Tests of the archive's form, with files that are made up.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use flate2::read::GzDecoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::EntryType;

use crate::{Arch, Image, libraries};

const TIME: u64 = 1_700_000_000;

fn image() -> Image {
    let mut image = Image::new("example.org/kube-lane:1.2.3", Arch::Arm64).unwrap();
    image.created = TIME;
    image.entrypoint = ["/usr/local/bin/agent", "serve"].map(str::to_owned).into();
    image.env = vec!["PATH=/usr/local/bin".into()];
    let labels = ["title", "version", "revision", "source"];
    image.labels = labels.map(|label| (label.to_owned(), format!("the {label}"))).into();
    image.add("/usr/local/bin/agent", 0o755, b"agent".into());
    image.add("/etc/certificates", 0o644, b"certificates".into());
    image
}

/// The files of a tar archive by their paths; checks what is the same of each entry.
fn unpack(archive: &[u8]) -> BTreeMap<String, (EntryType, u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut order = Vec::new();
    for entry in tar::Archive::new(archive).entries().unwrap() {
        let mut entry = entry.unwrap();
        let header = entry.header();
        let owner = (header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap());
        assert_eq!(owner, (0, 0, TIME));
        let (kind, mode) = (header.entry_type(), header.mode().unwrap());
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        order.push(path.clone());
        found.insert(path, (kind, mode, content));
    }
    assert!(order.is_sorted(), "{order:?}");
    found
}

fn digest(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn an_archive_holds_what_each_tool_looks_for() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("image.tar");
    let written = image().write(&to).unwrap();
    let archive = fs::read(to).unwrap();
    assert_eq!(written.size, archive.len());
    let files = unpack(&archive);
    let blob = |digest: &Value| {
        let path = format!("blobs/{}", digest.as_str().unwrap().replace(':', "/"));
        let (_, _, content) = &files[&path];
        assert!(path.ends_with(&self::digest(content)), "{path}");
        content.clone()
    };
    let json = |content: &[u8]| serde_json::from_slice::<Value>(content).unwrap();

    assert_eq!(json(&files["oci-layout"].2), json!({"imageLayoutVersion": "1.0.0"}));
    let index = json(&files["index.json"].2);
    let [listed] = &index["manifests"].as_array().unwrap()[..] else { panic!("{index}") };
    assert_eq!(listed["digest"], written.digest);
    assert_eq!(listed["platform"], json!({"architecture": "arm64", "os": "linux"}));
    let names = json!({
        "io.containerd.image.name": "example.org/kube-lane:1.2.3",
        "org.opencontainers.image.ref.name": "1.2.3",
    });
    assert_eq!(listed["annotations"], names);

    let manifest = json(&blob(&listed["digest"]));
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
    let config = json(&blob(&manifest["config"]["digest"]));
    assert_eq!(config["architecture"], "arm64");
    assert_eq!(config["created"], "2023-11-14T22:13:20Z");
    assert_eq!(config["config"]["Entrypoint"], json!(["/usr/local/bin/agent", "serve"]));
    assert_eq!(config["config"]["Env"], json!(["PATH=/usr/local/bin"]));
    assert_eq!(config["config"]["User"], "0");
    assert_eq!(config["config"]["Labels"]["revision"], "the revision");

    let compressed = blob(&manifest["layers"][0]["digest"]);
    let mut layer = Vec::new();
    GzDecoder::new(&compressed[..]).read_to_end(&mut layer).unwrap();
    assert_eq!(config["rootfs"]["diff_ids"], json!([format!("sha256:{}", digest(&layer))]));
    let paths: Vec<_> = unpack(&layer).into_iter().map(|(path, (_, mode, _))| (path, mode)).collect();
    let expected = [
        ("etc/", 0o755),
        ("etc/certificates", 0o644),
        ("usr/", 0o755),
        ("usr/local/", 0o755),
        ("usr/local/bin/", 0o755),
        ("usr/local/bin/agent", 0o755),
    ];
    assert_eq!(paths, expected.map(|(path, mode)| (path.to_owned(), mode)));

    // What Docker reads names the same blobs.
    let docker = json(&files["manifest.json"].2);
    assert_eq!(docker[0]["RepoTags"], json!(["example.org/kube-lane:1.2.3"]));
    for (path, digest) in [
        (&docker[0]["Config"], &manifest["config"]["digest"]),
        (&docker[0]["Layers"][0], &manifest["layers"][0]["digest"]),
    ] {
        assert_eq!(path.as_str().unwrap(), format!("blobs/{}", digest.as_str().unwrap().replace(':', "/")));
    }
}

#[test]
fn the_same_files_make_the_same_archive() {
    let dir = tempfile::tempdir().unwrap();
    // Maps of labels have another order in each process and each map.
    let archives: Vec<_> = (0..8)
        .map(|number| {
            let to = dir.path().join(number.to_string());
            let written = image().write(&to).unwrap();
            (written, fs::read(to).unwrap())
        })
        .collect();
    assert!(archives.iter().all(|archive| *archive == archives[0]));

    let mut other = image();
    other.add("/etc/other", 0o644, Vec::new());
    let written = other.write(&dir.path().join("other")).unwrap();
    assert_ne!(written.digest, archives[0].0.digest);
}

#[test]
fn files_are_written_only_into_an_empty_folder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("rootfs");
    image().write_files(&folder).unwrap();
    assert_eq!(fs::read(folder.join("etc/certificates")).unwrap(), b"certificates");
    let error = image().write_files(&folder).unwrap_err().to_string();
    assert!(error.contains("rootfs is not empty"), "{error}");
}

#[test]
fn a_library_that_is_missing_is_named() {
    let program = std::env::current_exe().unwrap();
    let error = libraries::of(&program, Path::new("/nowhere"), "x86_64-linux-gnu").unwrap_err();
    assert!(error.to_string().starts_with("no ld-linux"), "{error}");
}

#[test]
fn a_program_comes_with_what_it_loads() {
    let dir = tempfile::tempdir().unwrap();
    let mut image = Image::new("example.org/shell:1", Arch::native().unwrap()).unwrap();
    image.add_program("/shell", Path::new("/bin/sh"), Path::new("/")).unwrap();
    let folder = dir.path().join("rootfs");
    image.write_files(&folder).unwrap();
    let paths: Vec<_> = image.files.keys().map(String::as_str).collect();
    assert!(paths.contains(&"shell") && paths.iter().any(|path| path.contains("/libc.so.")), "{paths:?}");
    // The loader runs it with no library but those.
    let loader = paths.iter().find(|path| path.contains("/ld-linux")).unwrap();
    let libraries = paths.iter().find(|path| path.contains("/libc.so.")).unwrap();
    let libraries = folder.join(libraries).parent().unwrap().to_owned();
    let mut shell = Command::new(folder.join(loader));
    shell.arg("--inhibit-cache").arg("--library-path").arg(libraries).arg(folder.join("shell"));
    let output = shell.args(["-c", "echo it runs"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "it runs\n", "{output:?}");
}

#[test]
fn an_image_has_a_tag() {
    let error = Image::new("example.org/shell", Arch::Amd64).unwrap_err().to_string();
    assert_eq!(error, "image example.org/shell has no tag");
}

#[test]
fn a_library_comes_with_what_it_loads_and_no_loader() {
    let multiarch = Arch::native().unwrap().multiarch();
    let of_libm =
        libraries::of(&Path::new("/lib").join(multiarch).join("libm.so.6"), Path::new("/"), multiarch);
    let of_libm = of_libm.unwrap();
    assert!(of_libm.keys().any(|path| path.ends_with("/libc.so.6")), "{of_libm:?}");
    assert!(!of_libm.keys().any(|path| path.starts_with("lib64/")), "{of_libm:?}");
}
