//! The images that nodes run: the sandbox's, agnhost, and kube-lane as users get it.
//!
//! Owns which programs are in them and how they are called.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::image::Image;
use super::runtime::PAUSE_IMAGE;
use crate::agent;
use crate::controlplane::program;

/// The server that tests of Kubernetes run in pods.
pub const AGNHOST_IMAGE: &str = "registry.k8s.io/e2e-test-images/agnhost:2.59";
/// What `deploy/` runs.
pub const KUBE_LANE_IMAGE: &str = "ghcr.io/kube-lane/kube-lane:0.1.0";

/// Writes the archives of the images that every node needs into `folder`, and returns their paths.
///
/// # Errors
/// When a program is missing.
pub(super) fn basic(folder: &Path) -> Result<Vec<PathBuf>> {
    let agnhost = Image::new()?;
    agnhost.add_program(&program("agnhost")?, Path::new("/agnhost"))?;
    let (pause, server) = (folder.join("pause.tar"), folder.join("agnhost.tar"));
    agnhost.write(&pause, PAUSE_IMAGE, &["/agnhost", "pause"])?;
    agnhost.write(&server, AGNHOST_IMAGE, &["/agnhost"])?;
    Ok(vec![pause, server])
}

/// The archive of kube-lane's image.
///
/// # Errors
/// When the agent has not been built.
pub fn kube_lane(folder: &Path) -> Result<PathBuf> {
    let image = Image::new()?;
    let program = Path::new("/usr/local/bin/kube-lane");
    image.add_program(&agent::binary()?, program)?;
    let archive = folder.join("kube-lane.tar");
    image.write(&archive, KUBE_LANE_IMAGE, &["/usr/local/bin/kube-lane"])?;
    Ok(archive)
}
