//! What the image of kube-lane holds: the agent, the libraries that it loads, certificates, and the licences of all that.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kube_lane_image::Image;

use crate::Args;

/// Where the agent is in the image.
pub(crate) const AGENT: &str = "/usr/local/bin/kube-lane";

/// Where programs on Linux look for the certificates that they trust; Debian's path.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// The texts to which the licences of Debian's packages refer.
const LICENCES: [&str; 4] = ["GPL-2", "GPL-3", "LGPL-2.1", "MPL-2.0"];

/// Adds the files to the image.
///
/// # Errors
/// When one is missing.
pub(crate) fn add(args: &Args, image: &mut Image) -> Result<()> {
    image.add_program(AGENT, &args.agent, &args.system)?;
    image.add(CERTIFICATES, 0o644, certificates(&args.system.join("usr/share/ca-certificates/mozilla"))?);
    image.add("/usr/share/doc/kube-lane/LICENSE", 0o644, read(&args.license)?);
    let copyrights = args.packages.iter().map(|package| format!("usr/share/doc/{package}/copyright"));
    for path in copyrights.chain(LICENCES.map(|name| format!("usr/share/common-licenses/{name}"))) {
        image.add(&path, 0o644, read(&args.system.join(&path))?);
    }
    Ok(())
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
