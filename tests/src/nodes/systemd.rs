//! systemd on a node: it runs the units in `/etc/systemd/system`, and no other ones of this machine.
//!
//! It is process 1 of a process namespace within the node's, since the node's own process 1 is a shell: containerd and
//! kubelet are none of its units. Network, name and files are the node's. Owns its start, and knows no unit.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::machine::Machine;

/// How long it may take to start on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Gives the node empty folders where this machine has its own units and programs, and writes the targets that units name.
const PREPARE: &str = r#"
for folder in /etc/systemd/system /usr/local/bin; do
    mkdir -p "$folder"
    mount -t tmpfs -o mode=755 none "$folder"
done
mkdir -p /run/systemd-targets
for target in sysinit basic network-online shutdown multi-user; do
    printf '[Unit]\nDefaultDependencies=no\n' > "/run/systemd-targets/$target.target"
done
"#;

/// Joins the cgroup `$1` of the second version, which systemd sees as the root.
const START: &str = r#"
mkdir -p "$1"
echo $$ > "$1/cgroup.procs"
exec unshare --fork --pid --mount --cgroup --mount-proc --kill-child sh -euc '
    mount -t cgroup2 none /sys/fs/cgroup
    exec env -i container=other SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/systemd-targets \
        /lib/systemd/systemd --system --unit=multi-user.target --log-target=console
'
"#;

/// Starts systemd on a node, and waits until it answers `systemctl`.
///
/// # Errors
/// When the kernel refuses a namespace or a mount, or it does not come up; what it says is in the message.
pub fn start(machine: &mut Machine) -> Result<()> {
    machine.run(&["sh", "-euc", PREPARE])?;
    let cgroup = cgroup(machine)?;
    machine.start("systemd", &["sh", "-euc", START, "sh", &cgroup])?;
    let deadline = Instant::now() + LIMIT;
    while let Err(error) = run(machine, &["systemctl", "is-active", "--quiet", "multi-user.target"]) {
        machine.ensure_running("systemd")?;
        ensure!(Instant::now() < deadline, "systemd does not answer: {error:#}");
        sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Runs a program on the node where systemd runs: it answers no process of another namespace.
///
/// # Errors
/// With what it says, when it fails.
pub fn run(machine: &Machine, program: &[&str]) -> Result<String> {
    let systemd = process_in(machine, "init.scope")?.to_string();
    let mut all = vec!["nsenter", "--target", &systemd, "--pid", "--mount", "--"];
    all.extend(program);
    machine.run(&all)
}

/// The process of a service, by its number on the node: systemd itself knows it by another one.
///
/// # Errors
/// When the service has no process, or several.
pub fn process_of(machine: &Machine, service: &str) -> Result<u32> {
    process_in(machine, &format!("system.slice/{service}.service"))
}

fn process_in(machine: &Machine, cgroup_below: &str) -> Result<u32> {
    let file = format!("{}/{cgroup_below}/cgroup.procs", cgroup(machine)?);
    let processes = machine.run(&["cat", &file])?;
    processes.trim().parse().with_context(|| format!("{file} has these processes: {processes:?}"))
}

fn cgroup(machine: &Machine) -> Result<String> {
    Ok(machine.cgroup_v2()?.join("systemd").display().to_string())
}
