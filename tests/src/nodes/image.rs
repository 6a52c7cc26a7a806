//! Archives of images for `ctr images import`, made of programs of this machine: one layer, a name, an entrypoint.
//!
//! Owns the files of an image while it is made. Builds no program, and knows no registry.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

/// The file tree of an image.
#[derive(Debug)]
pub(super) struct Image {
    dir: TempDir,
}

impl Image {
    /// An image without any file.
    ///
    /// # Errors
    /// When no folder can be made for it.
    pub(super) fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("kube-lane-image-").tempdir()?;
        fs::create_dir(dir.path().join("root"))?;
        Ok(Self { dir })
    }

    fn place(&self, at: &Path) -> Result<PathBuf> {
        let place = self.dir.path().join("root").join(at.strip_prefix("/").unwrap_or(at));
        if let Some(dir) = place.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(place)
    }

    /// Puts a file at an absolute path of the image.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub(super) fn add(&self, file: &Path, at: &Path) -> Result<()> {
        let place = self.place(at)?;
        fs::copy(file, &place).with_context(|| format!("cannot copy {}", file.display()))?;
        Ok(())
    }

    /// Puts a program at an absolute path of the image, and the libraries that it loads where it looks for them.
    ///
    /// # Errors
    /// When one of them cannot be copied.
    pub(super) fn add_program(&self, program: &Path, at: &Path) -> Result<()> {
        self.add(program, at)?;
        self.add_libraries(program)
    }

    fn add_libraries(&self, of: &Path) -> Result<()> {
        let output = Command::new("ldd").arg(of).output().context("cannot start ldd")?;
        let listed = String::from_utf8_lossy(&output.stdout);
        // ldd fails where a program loads none.
        for line in listed.lines().filter(|_| output.status.success()) {
            ensure!(!line.contains("not found"), "{}: {}", of.display(), line.trim());
            let file = line.split_whitespace().find(|word| word.starts_with('/'));
            if let Some(file) = file.map(Path::new)
                && !self.place(file)?.exists()
            {
                self.add(file, file)?;
            }
        }
        Ok(())
    }

    /// Writes the archive (`docker save` writes the same form): an image called `name` that runs `entrypoint`.
    ///
    /// # Errors
    /// When `tar` or `sha256sum` fails.
    pub(super) fn write(&self, archive: &Path, name: &str, entrypoint: &[&str]) -> Result<()> {
        let dir = self.dir.path();
        let sorted = ["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0"];
        run(
            Command::new("tar").args(sorted).arg("-C").arg(dir.join("root")).args(["-cf", "layer.tar", "."]),
            dir,
        )?;
        let layer = run(Command::new("sha256sum").arg("layer.tar"), dir)?;
        let layer = layer.split(' ').next().unwrap_or_default();
        let architecture = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": {"Entrypoint": entrypoint, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]},
        });
        fs::write(dir.join("config.json"), config.to_string())?;
        let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
        fs::write(dir.join("manifest.json"), manifest.to_string())?;
        let files = ["manifest.json", "config.json", "layer.tar"];
        run(Command::new("tar").args(sorted).arg("-cf").arg(archive).args(files), dir)?;
        Ok(())
    }
}

fn run(command: &mut Command, dir: &Path) -> Result<String> {
    let output = command.current_dir(dir).output().with_context(|| format!("cannot start {command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_its_program_and_all_that_it_loads() {
        let image = Image::new().unwrap();
        image.add_program(Path::new("/bin/sh"), Path::new("/usr/local/bin/shell")).unwrap();
        let archive = image.dir.path().join("archive.tar");
        image.write(&archive, "example.test/shell:1", &["/usr/local/bin/shell"]).unwrap();
        let layer = run(Command::new("tar").args(["-tf", "layer.tar"]), image.dir.path()).unwrap();
        assert!(layer.contains("./usr/local/bin/shell\n") && layer.contains("libc.so"), "{layer}");
        let listed = run(Command::new("tar").arg("-tf").arg(&archive), image.dir.path()).unwrap();
        assert_eq!(listed, "manifest.json\nconfig.json\nlayer.tar\n");
    }
}
