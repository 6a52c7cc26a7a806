//! The images that nodes run: the sandbox's, agnhost, and kube-lane as users get it.
//!
//! Owns which programs are in them and how they are called. Makes no image of kube-lane: `cargo xtask` does.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kube_lane_image::{Arch, Image};

use super::runtime::PAUSE_IMAGE;
use crate::controlplane::program;

/// The server that tests of Kubernetes run in pods.
pub const AGNHOST_IMAGE: &str = "registry.k8s.io/e2e-test-images/agnhost:2.59";
/// What `deploy/` runs.
pub const KUBE_LANE_IMAGE: &str = concat!("ghcr.io/kube-lane/kube-lane:", env!("CARGO_PKG_VERSION"));

/// Writes the archives of the images that every node needs into `folder`, and returns their paths.
///
/// # Errors
/// When a program is missing.
pub fn basic(folder: &Path) -> Result<Vec<PathBuf>> {
    let (pause, server) = (folder.join("pause.tar"), folder.join("agnhost.tar"));
    agnhost(PAUSE_IMAGE, &["/agnhost", "pause"])?.write(&pause)?;
    agnhost(AGNHOST_IMAGE, &["/agnhost"])?.write(&server)?;
    Ok(vec![pause, server])
}

/// An image of agnhost that is called `name` and runs `entrypoint`.
fn agnhost(name: &str, entrypoint: &[&str]) -> Result<Image> {
    let mut image = Image::new(name, Arch::native()?)?;
    image.entrypoint = entrypoint.iter().map(|&word| word.to_owned()).collect();
    image.env = vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin".to_owned()];
    image.add_program("/agnhost", &program("agnhost")?, Path::new("/"))?;
    Ok(image)
}

/// The archive of kube-lane's image: `KUBE_LANE_IMAGE`, which `cargo xtask test --lane node` makes and sets.
///
/// # Errors
/// When the variable is not set.
pub fn kube_lane() -> Result<PathBuf> {
    let path = env::var_os("KUBE_LANE_IMAGE").context(
        "KUBE_LANE_IMAGE is not set: run this through `cargo xtask test --lane node`, or name an archive that \
         `cargo xtask image` has written",
    )?;
    Ok(path.into())
}
