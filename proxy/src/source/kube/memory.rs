//! The endpoints of the API server, remembered between runs: `api-servers.json` in the folder that `--state-dir` names.
//!
//! Owns this file, and says once where it cannot be read or written. What it holds is no secret and is not trusted: TLS verifies
//! whoever answers at a remembered address for the configured name, so that the file of another cluster costs only time.

use std::fs;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::future::pending;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::causes::with_causes;

/// How many endpoints are remembered, at most: each that does not answer costs seconds.
pub(super) const LIMIT: usize = 16;
/// The file's name.
const NAME: &str = "api-servers.json";
/// The form of its content.
const VERSION: u32 = 1;
/// How long to wait before what could not be written is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// A longer file is none of ours.
const BYTES: u64 = 1 << 16;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    version: u32,
    endpoints: Vec<SocketAddr>,
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
enum MemoryError {
    #[error("cannot read it")]
    Read(#[source] io::Error),
    #[error("it is malformed")]
    Malformed(#[source] serde_json::Error),
    #[error("it is of version {0}, and this build reads version {VERSION}")]
    Version(u32),
    #[error("cannot write it: is --state-dir a folder that the agent may write to?")]
    Write(#[source] io::Error),
}

/// The file. Writes happen on a thread of their own, since a disk may take its time.
pub(super) struct File(watch::Sender<Vec<SocketAddr>>);

impl File {
    /// Reads the file of this folder: what it holds, and where to write what it shall hold. Has to be called within a runtime.
    pub(super) fn open(dir: &Path) -> (Self, Vec<SocketAddr>) {
        let path = dir.join(NAME);
        let endpoints = read(&path).unwrap_or_else(|error| {
            warn!(file = %path.display(), error = with_causes(&error), "the remembered API servers cannot be used");
            Vec::new()
        });
        let (sender, receiver) = watch::channel(endpoints.clone());
        tokio::spawn(follow(path, receiver));
        (Self(sender), endpoints)
    }

    /// Has these written.
    pub(super) fn write(&self, endpoints: Vec<SocketAddr>) {
        self.0.send_replace(endpoints);
    }
}

async fn follow(path: PathBuf, mut endpoints: watch::Receiver<Vec<SocketAddr>>) {
    let mut troubled = false;
    loop {
        // A disk that is full now may not be so later.
        let again = async { if troubled { sleep(RETRY).await } else { pending().await } };
        tokio::select! {
            changed = endpoints.changed() => if changed.is_err() { return },
            () = again => {}
        }
        let (at, content) = (path.clone(), endpoints.borrow_and_update().clone());
        let count = content.len();
        let written = tokio::task::spawn_blocking(move || write(&at, content)).await;
        let file = path.display();
        match written {
            Ok(Ok(())) if std::mem::take(&mut troubled) => {
                info!(%file, count, "the API servers are remembered again");
            }
            Ok(Ok(())) => debug!(%file, count, "API servers remembered"),
            Ok(Err(error)) if !std::mem::replace(&mut troubled, true) => {
                warn!(%file, error = with_causes(&error), "the API servers cannot be remembered");
            }
            Ok(Err(error)) => debug!(%file, %error, "the API servers still cannot be remembered"),
            // The runtime ends.
            Err(_) => return,
        }
    }
}

/// What the file holds; nothing where there is none.
fn read(path: &Path) -> Result<Vec<SocketAddr>, MemoryError> {
    let mut text = String::new();
    // Who opens a FIFO waits for a writer, for ever perhaps.
    match fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(file) if !file.metadata().is_ok_and(|metadata| metadata.is_file()) => {
            return Err(MemoryError::Read(io::Error::other("it is no regular file; remove it")));
        }
        Ok(file) => file.take(BYTES).read_to_string(&mut text).map_err(MemoryError::Read)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(MemoryError::Read(error)),
    };
    let Content { version, mut endpoints } = serde_json::from_str(&text).map_err(MemoryError::Malformed)?;
    if version != VERSION {
        return Err(MemoryError::Version(version));
    }
    endpoints.truncate(LIMIT);
    Ok(endpoints)
}

/// Replaces the file as a whole. It reaches the disk before its name does: a node may lose its power at any moment.
fn write(path: &Path, endpoints: Vec<SocketAddr>) -> Result<(), MemoryError> {
    let content =
        serde_json::to_string(&Content { version: VERSION, endpoints }).map_err(MemoryError::Malformed)?;
    let replace = || {
        let dir = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(dir)?;
        let new = path.with_extension("json.new");
        // Whatever is there, a FIFO say, is not ours to write to.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::File::create_new(&new)?;
        file.write_all(content.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        fs::File::open(dir)?.sync_all()
    };
    replace().map_err(MemoryError::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_is_written_is_read_back_and_odd_files_say_why() {
        let dir = std::env::temp_dir().join(format!("kube-lane-memory-{}", std::process::id()));
        let path = dir.join("below").join(NAME);
        assert_eq!(read(&path).unwrap(), [], "there is none yet");
        let servers = addresses(&["192.0.2.1:6443", "[2001:db8::1]:6443"]);
        write(&path, servers.clone()).unwrap();
        assert_eq!(read(&path).unwrap(), servers);
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"version\":1,\"endpoints\":[\"192.0.2.1:6443\",\"[2001:db8::1]:6443\"]}\n"
        );
        write(&path, servers[..1].to_vec()).unwrap();
        assert_eq!(read(&path).unwrap(), servers[..1]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left there");

        for (text, words) in [
            ("", "malformed"),
            ("{\"version\":1,\"endpoints\":[\"192.0.2.1\"]}", "malformed"),
            ("{\"version\":2,\"endpoints\":[]}", "version 2"),
        ] {
            fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        for fifo in [&path, &path.with_extension("json.new")] {
            let _ = fs::remove_file(fifo);
            nix::unistd::mkfifo(fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        assert!(read(&path).unwrap_err().to_string().contains("read"));
        write(&path, servers.clone()).unwrap();
        assert_eq!(read(&path).unwrap(), servers, "the file takes the FIFO's place");
        let error = write(&path.join("file"), servers).unwrap_err().to_string();
        assert!(error.contains("--state-dir"), "{error}");
        fs::remove_dir_all(dir).unwrap();
    }
}
