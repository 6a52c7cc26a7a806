//! The files of an image: the agent, the libraries that it loads, certificates, and the licences of all that.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{Args, libraries};

/// Files by their paths in the image, which begin with no `/`.
pub(crate) type Files = BTreeMap<String, File>;

/// A file of the image; root owns it.
#[derive(Clone, Debug)]
pub(crate) struct File {
    pub(crate) mode: u32,
    pub(crate) content: Vec<u8>,
}

/// Where the agent is in the image.
pub(crate) const AGENT: &str = "usr/local/bin/kube-lane";

/// Where programs on Linux look for the certificates that they trust; Debian's path.
const CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";

/// The texts to which the licences of Debian's packages refer.
const LICENCES: [&str; 4] = ["GPL-2", "GPL-3", "LGPL-2.1", "MPL-2.0"];

/// The files that an image holds.
///
/// # Errors
/// When one is missing.
pub(crate) fn collect(args: &Args) -> Result<Files> {
    let mut files = Files::new();
    let mut add = |path: String, mode: u32, content: Vec<u8>| files.insert(path, File { mode, content });
    add(AGENT.into(), 0o755, read(&args.agent)?);
    for (path, file) in libraries::of(&args.agent, &args.system, args.arch.multiarch())? {
        add(path, 0o755, read(&file)?);
    }
    add(CERTIFICATES.into(), 0o644, certificates(&args.system.join("usr/share/ca-certificates/mozilla"))?);
    add("usr/share/doc/kube-lane/LICENSE".into(), 0o644, read(&args.license)?);
    let copyrights = args.packages.iter().map(|package| format!("usr/share/doc/{package}/copyright"));
    for path in copyrights.chain(LICENCES.map(|name| format!("usr/share/common-licenses/{name}"))) {
        let content = read(&args.system.join(&path))?;
        add(path, 0o644, content);
    }
    Ok(files)
}

/// All certificates of a folder in one file, as `update-ca-certificates` makes it.
fn certificates(folder: &Path) -> Result<Vec<u8>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    files.sort();
    let mut bundle = Vec::new();
    for file in files {
        bundle.extend(read(&file)?.trim_ascii_end());
        bundle.push(b'\n');
    }
    Ok(bundle)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// Writes the files into a folder that is empty or not there.
///
/// # Errors
/// When the folder holds something already, or cannot be written.
pub(crate) fn write(files: &Files, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let is_empty = fs::read_dir(folder)?.next().is_none();
    ensure!(is_empty, "{} is not empty; name a folder that is, or none", folder.display());
    for (path, File { mode, content }) in files {
        let to = folder.join(path);
        to.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(&to, content).with_context(|| format!("cannot write {}", to.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(*mode))?;
    }
    Ok(())
}
