//! Child processes, and where things lie in the repository. Knows no task.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Lines of a failed command's output that are shown.
const TAIL_LINES: usize = 40;

/// The top of the repository.
pub(crate) fn root() -> &'static Path {
    const MANIFEST_DIR: &str = env!("CARGO_MANIFEST_DIR");
    Path::new(MANIFEST_DIR).parent().unwrap_or(Path::new(MANIFEST_DIR))
}

/// A path below `target/`: what `cargo clean` removes.
pub(crate) fn target(below: &str) -> PathBuf {
    root().join("target").join(below)
}

/// The files that git tracks and the working tree still has, relative to the top of the repository.
///
/// # Errors
/// When git cannot list them.
pub(crate) fn tracked_files() -> Result<Vec<PathBuf>> {
    let list = output(Command::new("git").current_dir(root()).args(["ls-files", "-z"]))
        .context("lint looks only at what git tracks")?;
    let files = list.split_terminator('\0').map(PathBuf::from);
    Ok(files.filter(|file| root().join(file).is_file()).collect())
}

/// The cargo that runs this xtask, at the top of the repository.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.current_dir(root());
    // `cargo run` tells xtask about its own package. ring's build script would take that for a change, and half of the
    // dependencies would be built again at each switch between `cargo` and `cargo xtask`.
    let of_xtask = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(of_xtask)) {
        command.env_remove(name);
    }
    command
}

/// The program called `name` in PATH or in the system directories that an unprivileged PATH leaves out.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Whether this process may do what only root may.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Runs `command` on the caller's own streams.
///
/// # Errors
/// When it cannot be started or does not exit with 0; the error shows the command line.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {}", display(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", display(command));
    }
    Ok(())
}

/// Runs `command` and returns what it wrote to its standard output.
///
/// # Errors
/// As [`run`], with its standard error in the message.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {}", display(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}\n{}", display(command), output.status, stderr.trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command that takes long, with its output in a log file: a live line tells how long it has been
/// running, or a line every half minute where the output is no terminal.
///
/// # Errors
/// As [`run`], with the end of the log in the message.
pub(crate) fn run_long(title: &str, command: &mut Command) -> Result<()> {
    let log_path =
        target("xtask").join(format!("{}.log", title.replace(|c: char| !c.is_alphanumeric(), "-")));
    fs::create_dir_all(target("xtask"))?;
    let log = File::create(&log_path).with_context(|| format!("cannot write {}", log_path.display()))?;
    let mut child = command
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", display(command)))?;

    let start = Instant::now();
    let mut stdout = io::stdout();
    let live = stdout.is_terminal();
    let mut next_line = Duration::ZERO;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let elapsed = start.elapsed();
        if live {
            write!(stdout, "\r\x1b[2K  {title}: {}", minutes(elapsed))?;
        } else if elapsed >= next_line {
            writeln!(stdout, "  {title}: {}", minutes(elapsed))?;
            next_line += Duration::from_secs(30);
        }
        stdout.flush()?;
        thread::sleep(Duration::from_millis(200));
    };
    if live {
        write!(stdout, "\r\x1b[2K")?;
    }
    if !status.success() {
        let tail = tail(&fs::read_to_string(&log_path).unwrap_or_default());
        bail!("{} failed: {status}\n{tail}\n(all of it: {})", display(command), log_path.display());
    }
    println!("  {title}: done in {}", minutes(start.elapsed()));
    Ok(())
}

fn minutes(elapsed: Duration) -> String {
    format!("{}m{:02}s", elapsed.as_secs() / 60, elapsed.as_secs() % 60)
}

fn tail(text: &str) -> String {
    let mut lines = VecDeque::with_capacity(TAIL_LINES);
    for line in text.lines() {
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
    Vec::from(lines).join("\n")
}

fn display(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
