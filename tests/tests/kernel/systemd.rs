//! `deploy/systemd`: the units as they are written, run by a systemd in namespaces of its own, which has no other units.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use kube_lane_lab::{Lab, Proto, topology};
use kube_lane_tests::agent::{self, Agent};
use kube_lane_tests::objects::{Folder, node, service, slices};
use serde_json::json;

use super::world::{SYNC, answered, at, endpoints, serving, until, vips, web_ports};

/// Joins the cgroup `$1`, which what follows sees as the root; `$2` are the units, configuration and logs, `$3` the
/// binary, `$4` the manifests.
const BOOT: &str = r#"
set -eu
echo $$ > "$1/cgroup.procs"
shift
exec unshare --fork --pid --mount --ipc --cgroup --mount-proc --kill-child sh -eu -c '
    mount -t cgroup2 none /sys/fs/cgroup
    mount -t bpf none /sys/fs/bpf
    mount -t tmpfs none /run
    mount -t tmpfs none /var/lib
    mkdir -p /run/kube-lane/etc /run/kube-lane/manifests
    touch /run/kube-lane/bin
    mount --bind "$1" /run/kube-lane/etc
    mount --bind "$2" /run/kube-lane/bin
    mount --bind "$3" /run/kube-lane/manifests
    export SYSTEMD_UNIT_PATH=/run/kube-lane/etc/units
    systemd-analyze verify kube-lane.service > /run/kube-lane/etc/verified 2>&1
    exec env -i container=other SYSTEMD_UNIT_PATH=$SYSTEMD_UNIT_PATH \
        /lib/systemd/systemd --system --unit=kube-lane.service --log-target=console
' sh "$@"
"#;

/// A cgroup that is nobody else's: those of a lab cannot be a systemd's. Removed when dropped, with those below it.
struct OwnCgroup(PathBuf);

impl OwnCgroup {
    fn new(lab: &Lab) -> Self {
        // Beside `kube-lane-lab/<lab>/<node>`.
        let root = lab.node(0).cgroup().ancestors().nth(3).unwrap();
        let own = root.join(format!("kube-lane-systemd-{}", lab.node(0).netns()));
        // As kubelet makes it.
        fs::create_dir_all(own.join("kubepods.slice")).unwrap();
        Self(own)
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        fn remove(path: &Path) {
            let below = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
            below.filter(|path| path.is_dir()).for_each(|path| remove(&path));
            // The kernel takes a moment to see the last process off.
            let gone = || fs::remove_dir(path).is_ok();
            (0..100).any(|_| {
                gone() || {
                    thread::sleep(Duration::from_millis(10));
                    false
                }
            });
        }
        remove(&self.0);
    }
}

/// The unit, in place of its paths those that [`BOOT`] mounts; and what else there has to be for a systemd.
fn write_units(folder: &Path, ebpf: bool) {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd");
    let unit = fs::read_to_string(deploy.join("kube-lane.service")).unwrap();
    let here = unit.replace("/usr/local/bin/kube-lane", "/run/kube-lane/bin");
    let here = here.replace("/etc/kube-lane/", "/run/kube-lane/etc/");
    assert_ne!(here, unit);
    let units = folder.join("units");
    let additions = units.join("kube-lane.service.d");
    fs::create_dir_all(&additions).unwrap();
    fs::write(units.join("kube-lane.service"), here).unwrap();
    if ebpf {
        fs::copy(deploy.join("kube-lane.service.d/ebpf.conf"), additions.join("ebpf.conf")).unwrap();
    }
    fs::write(additions.join("log.conf"), "[Service]\nStandardError=append:/run/kube-lane/etc/log\n")
        .unwrap();
    for target in ["sysinit.target", "basic.target", "network-online.target", "shutdown.target"] {
        fs::write(units.join(target), "[Unit]\nDefaultDependencies=no\n").unwrap();
    }
}

#[test]
fn the_unit_serves_as_it_is_written() {
    // NET_ADMIN is capability 12.
    serves_as_it_is_written(false, 1 << 12);
}

#[test]
fn the_unit_with_the_drop_in_for_mode_ebpf_serves_as_it_is_written() {
    // And PERFMON and BPF are 38 and 39.
    serves_as_it_is_written(true, 1 << 12 | 1 << 38 | 1 << 39);
}

fn serves_as_it_is_written(ebpf: bool, capabilities: u64) {
    let lab = Lab::builder().build().unwrap();
    let cgroup = OwnCgroup::new(&lab);
    let (pod, _echoes) = serving(&lab, 0, "server");
    let manifests = Folder::new().unwrap();
    manifests.put("node", &[node(lab.node(0).name(), &topology::node_addresses(0))]).unwrap();
    let ports = web_ports();
    let mut objects = vec![service("web", &vips(10), &ports)];
    objects.extend(slices("web", &ports, &endpoints(&[&pod])));
    manifests.put("web", &objects).unwrap();

    let folder = tempfile::tempdir().unwrap();
    write_units(folder.path(), ebpf);
    let mode = if ebpf { "ebpf" } else { "nftables" };
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "mode": mode, "clusterCIDR": topology::cluster_cidrs().map(|cidr| cidr.to_string()).join(","),
        "hostnameOverride": lab.node(0).name(),
        // A cgroup namespace's root is not the host's.
        "kubeLane": {"manifests": "/run/kube-lane/manifests", "cgroupRoot": "/sys/fs/cgroup"},
    });
    fs::write(folder.path().join("config.conf"), config.to_string()).unwrap();

    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let paths = [&cgroup.0, folder.path(), &agent::binary().unwrap(), manifests.path()].map(text);
    let mut arguments = vec!["-c", BOOT, "sh"];
    arguments.extend(paths.iter().map(String::as_str));
    let console = folder.path().join("console");
    let mut agent = Agent::start_binary(Path::new("sh"), lab.node(0), &arguments, &console).unwrap();
    let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap_or_default();
    if let Err(error) = agent.wait_synced(SYNC) {
        panic!("{error}\n{}\n{}", read("verified"), read("log"));
    }
    let client = lab.node(0).add_pod("client").unwrap();
    assert!(answered(&until(&client, Proto::Tcp, at(vips(10)[0], 80), answered)), "{}", read("log"));
    let (_, told) = agent.status(&["default/web"]).unwrap();
    assert!(told.contains(&format!("mode {mode}")) && told.contains("[socket") == ebpf, "{told}");
    assert_eq!(read("verified"), "");
    let log = read("log");
    assert!(!log.contains(" WARN ") && !log.contains(" ERROR "), "{log}");

    // It was as confined as the unit says.
    let processes = cgroup.0.join("system.slice/kube-lane.service/cgroup.procs");
    let pid = fs::read_to_string(processes).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap();
    let confined = format!("{capabilities:016x}");
    for (field, value) in
        [("CapEff", &*confined), ("CapBnd", &confined), ("NoNewPrivs", "1"), ("Seccomp", "2")]
    {
        assert!(status.contains(&format!("\n{field}:\t{value}\n")), "{field} {value}\n{status}");
    }
    // It may write where the unit's --state-dir says, and not beside it.
    let write = |path: &str| fs::write(format!("/proc/{}/root/var/lib/{path}", pid.trim()), "");
    write("kube-lane/file").unwrap();
    assert!(write("file").is_err_and(|error| error.kind() == io::ErrorKind::ReadOnlyFilesystem));
}
