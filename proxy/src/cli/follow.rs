//! Following the configuration files: after a change that can be used, the agent executes itself anew.
//!
//! Owns when the files are read again, and the exec. What a change means is `config`'s. A file that cannot be used never
//! ends the agent: it goes on with what it has. The new image has the same process, arguments and environment, so that
//! no supervisor notices; Services stay in the kernel meanwhile.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::{CString, NulError, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{pending, select_all};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, error, info, warn};

use super::settings;
use crate::causes::with_causes;
use crate::config::flags::RunFlags;
use crate::config::{Config, ConfigStatus, Environment, Reread, Resolved};
use crate::observability::configuration::Configuration;
use crate::source::kube::{self, SourceError};
use crate::watch::Watch;

/// After the first change, how long to wait for more of them. It is also the least time between two execs.
const QUIET: Duration = Duration::from_secs(1);
/// How often the files are read where they cannot be watched.
const POLL: Duration = Duration::from_secs(5);
/// The image of this process, whatever became of its file.
const OWN_IMAGE: &str = "/proc/self/exe";

/// Follows the files that the flags name.
pub(super) struct ConfigFollower {
    pub(super) flags: RunFlags,
    pub(super) environment: Environment,
    /// What runs.
    pub(super) running: Resolved,
    pub(super) status: watch::Sender<ConfigStatus>,
    pub(super) metric: Configuration,
}

impl ConfigFollower {
    /// Never returns: the process becomes another, or goes on as it is.
    pub(super) async fn run(mut self) -> Infallible {
        let files = self.flags.files();
        if files.is_empty() {
            return pending().await;
        }
        let mut is_watched = true;
        loop {
            // Watched before they are read: nothing that happens in between is missed.
            let watches = watch(&files);
            self.read_again().await;
            match watches {
                Ok(mut watches) => {
                    is_watched = true;
                    let changes = watches.iter_mut().map(|watch| watch.changed().boxed());
                    if let (Err(error), ..) = select_all(changes).await {
                        warn!(%error, "the watch on the configuration files failed and is set up again");
                    }
                    sleep(QUIET).await;
                }
                Err(error) => {
                    if std::mem::take(&mut is_watched) {
                        warn!(
                            %error,
                            "the configuration files cannot be watched and are read every 5 s; is \
                             fs.inotify.max_user_instances too low?"
                        );
                    }
                    sleep(POLL).await;
                }
            }
        }
    }

    async fn read_again(&mut self) {
        let (flags, environment) = (self.flags.clone(), self.environment.clone());
        let Ok(now) = tokio::task::spawn_blocking(move || flags.resolve(&environment)).await else { return };
        let usable = match &now {
            Ok(now) if now.config != self.running.config => can_connect(&now.config).await,
            _ => Ok(()),
        };
        match self.running.compare(now) {
            Reread::Same(status) => self.say(status),
            Reread::Unusable(why) => {
                self.say_not_in_force(why);
            }
            Reread::Different(differences) => {
                if let Err(error) = usable {
                    return self.say_not_in_force(with_causes(&error));
                }
                info!(
                    "the configuration changed ({}): kube-lane starts anew in this process; Services stay in place",
                    differences.join("; ")
                );
                let why = format!("kube-lane cannot execute itself anew ({}); restart it", execute_anew());
                self.say_not_in_force(why);
            }
        }
    }

    /// Says why what is on disk is not in force; the settings are those of before.
    fn say_not_in_force(&self, why: String) {
        // A statement of its own: what is borrowed is locked, and `say` replaces it.
        let running = self.status.borrow().clone();
        self.say(ConfigStatus { pending_problem: Some(why), ..running });
    }

    /// One line when trouble starts or becomes another, one when it is over.
    fn say(&self, status: ConfigStatus) {
        let before = self.status.borrow().pending_problem.clone();
        match (&before, &status.pending_problem) {
            (_, Some(why)) if before.as_ref() != Some(why) => {
                error!(
                    "the configuration on disk is not in force, kube-lane goes on with the one that it has: {why}"
                );
            }
            (Some(_), None) => info!("the configuration on disk is the one in force"),
            _ => {}
        }
        self.metric.tell(&status);
        self.status.send_replace(status);
    }
}

/// Whether the agent, once it has executed itself anew, would find its kubeconfig and what that names.
async fn can_connect(config: &Config) -> Result<(), SourceError> {
    match &config.api {
        Some(api) => kube::check(&settings::source(config, api)).await,
        None => Ok(()),
    }
}

/// Watches the folders of the files, each for the names that count there.
fn watch(files: &[PathBuf]) -> io::Result<Vec<Watch>> {
    let mut folders: BTreeMap<PathBuf, Vec<OsString>> = BTreeMap::new();
    for file in files {
        let file = std::path::absolute(file)?;
        // What a link leads to may change as well as the link.
        for file in [fs::canonicalize(&file).ok(), Some(file)].into_iter().flatten() {
            if let (Some(folder), Some(name)) = (file.parent(), file.file_name()) {
                folders.entry(folder.to_owned()).or_default().push(name.to_owned());
            }
        }
    }
    folders
        .into_iter()
        .map(|(folder, names)| Watch::new(&folder, move |name| names.iter().any(|wanted| wanted == name)))
        .collect()
}

/// Replaces this process by a new run of its own image. Returns only where that fails, and then nothing has changed.
///
/// Not by `std::process::Command::exec`, which resets signals first, also where it fails. Descriptors close themselves.
fn execute_anew() -> io::Error {
    let run = || -> io::Result<Infallible> {
        let image = CString::new(own_file().into_os_string().into_vec())?;
        let arguments: Result<Vec<_>, NulError> =
            std::env::args_os().map(|argument| CString::new(argument.into_vec())).collect();
        Ok(nix::unistd::execv(&image, &arguments?)?)
    };
    match run() {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

/// The file of this image, by which tools know the process; where another one has its name now, the image itself: a
/// change of the configuration brings no other build.
fn own_file() -> PathBuf {
    let image = Path::new(OWN_IMAGE);
    let is_image = |path: &PathBuf| match (fs::metadata(path), fs::metadata(image)) {
        (Ok(file), Ok(image)) => (file.dev(), file.ino()) == (image.dev(), image.ino()),
        (Err(error), _) | (_, Err(error)) => {
            debug!(%error, "the file of this build is not where it was");
            false
        }
    };
    fs::read_link(image).ok().filter(is_image).unwrap_or_else(|| image.to_owned())
}
