//! Container images for `ctr images import`, `podman load` and their like: an [`Image`] is made of files, and of programs
//! with the shared libraries that they load, and written as one archive.
//!
//! Runs no program, fetches nothing and pushes nothing. Knows nothing of kube-lane: the binary of this package does.

mod archive;
mod libraries;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

pub use self::archive::Written;

/// An architecture, by the name that container images give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    /// x86-64.
    Amd64,
    /// `AArch64`.
    Arm64,
}

impl Arch {
    /// The architecture of this machine.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn native() -> Result<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Ok(Self::Amd64),
            "aarch64" => Ok(Self::Arm64),
            other => anyhow::bail!("images are made for x86-64 and arm64, and this machine is {other}"),
        }
    }

    /// Its name in Go, Debian and container images.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// The name of Debian's folders of its libraries.
    fn multiarch(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }
}

/// A file of an image; root owns it.
#[derive(Clone, Debug)]
struct File {
    mode: u32,
    content: Vec<u8>,
}

/// Files by their paths in an image, which begin with no `/`.
type Files = BTreeMap<String, File>;

/// An image of one layer.
#[derive(Clone, Debug)]
pub struct Image {
    repository: String,
    tag: String,
    arch: Arch,
    files: Files,
    /// When its sources were made, in seconds since 1970; the time of every file.
    pub created: u64,
    /// The program that its containers start, and the first arguments.
    pub entrypoint: Vec<String>,
    /// The environment, each variable as `NAME=value`.
    pub env: Vec<String>,
    /// Labels by their names.
    pub labels: BTreeMap<String, String>,
}

impl Image {
    /// An image without files. `name` is such as `ghcr.io/kube-lane/kube-lane:0.1.0`.
    ///
    /// # Errors
    /// When the name has no tag.
    pub fn new(name: &str, arch: Arch) -> Result<Self> {
        let (repository, tag) = name.rsplit_once(':').with_context(|| format!("image {name} has no tag"))?;
        Ok(Self {
            repository: repository.to_owned(),
            tag: tag.to_owned(),
            arch,
            files: Files::new(),
            created: 0,
            entrypoint: Vec::new(),
            env: Vec::new(),
            labels: BTreeMap::new(),
        })
    }

    /// Its name with its tag.
    pub fn name(&self) -> String {
        format!("{}:{}", self.repository, self.tag)
    }

    /// Adds a file at an absolute path.
    pub fn add(&mut self, at: &str, mode: u32, content: Vec<u8>) {
        self.files.insert(at.trim_start_matches('/').to_owned(), File { mode, content });
    }

    /// Adds a program at an absolute path, and the libraries that it loads where it looks for them. `system` is a Debian
    /// system that has them, such as `/`.
    ///
    /// # Errors
    /// When one of them is missing.
    pub fn add_program(&mut self, at: &str, program: &Path, system: &Path) -> Result<()> {
        self.add(at, 0o755, read(program)?);
        for (path, file) in libraries::of(program, system, self.arch.multiarch())? {
            self.add(&path, 0o755, read(&file)?);
        }
        Ok(())
    }

    /// Writes the archive `to`: an OCI image layout, which also has the `manifest.json` that `docker load` reads.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, to: &Path) -> Result<Written> {
        archive::write(self, to)
    }

    /// Writes its files into a folder that is empty or does not exist.
    ///
    /// # Errors
    /// When the folder holds something already, or cannot be written.
    pub fn write_files(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let is_empty = fs::read_dir(folder)?.next().is_none();
        ensure!(is_empty, "{} is not empty; name a folder that is, or none", folder.display());
        for (path, File { mode, content }) in &self.files {
            let to = folder.join(path);
            to.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(&to, content).with_context(|| format!("cannot write {}", to.display()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(*mode))?;
        }
        Ok(())
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}
