//! A pod's container, started by hand as kubelet and runtime start it: a root of its own, its volumes, its capabilities,
//! its environment, and `exec` probes.
//!
//! Owns the files that a kubelet would put on the node. Never talks to an API server: the caller hands over what its
//! ConfigMaps hold.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use k8s_openapi::api::core::v1::{Container, PodSpec, Probe, Volume};
use kube_lane_lab::Host;
use kube_lane_tests::agent::{self, Agent};
use tempfile::TempDir;

use crate::wait::until;

/// What runtimes set where an image sets none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The first process of a container. Its root is at `$1`, and holds the system's programs and libraries, and `$2` as
/// kube-lane. For each volume, `$3` is seen at `$4`, read-only or not (`$5`), and so on. The next argument is the
/// capabilities, the only ones it has. The rest is the command, environment first.
const CONTAINER: &str = r#"
set -eu
root=$1
mount -t tmpfs none "$root"
mkdir -p "$root/proc" "$root/sys" "$root/dev" "$root/tmp" "$root/usr/local/bin"
for folder in /usr/bin /usr/lib /usr/lib64 /bin /lib /lib64; do
    if [ -L "$folder" ]; then
        cp -P "$folder" "$root$folder"
    elif [ -d "$folder" ]; then
        mkdir -p "$root$folder"
        mount --bind "$folder" "$root$folder"
        mount -o remount,bind,ro "$root$folder"
    fi
done
mount --rbind /dev "$root/dev"
mount --bind /sys "$root/sys"
mount -o remount,bind,ro "$root/sys"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
touch "$root/usr/local/bin/kube-lane"
mount --bind "$2" "$root/usr/local/bin/kube-lane"
shift 2
while [ "${1#/}" != "$1" ]; do
    mkdir -p "$root$2"
    mount --bind "$1" "$root$2"
    mount -o "remount,bind,$3" "$root$2"
    shift 3
done
mount -o remount,ro "$root"
capabilities=$1
shift
exec chroot "$root" setpriv --no-new-privs --reuid 0 --clear-groups --bounding-set "$capabilities" \
    --inh-caps "$capabilities" env -i "$@"
"#;

/// What a kubelet keeps on one node for the pods of a test.
pub(crate) struct Kubelet {
    node: Host,
    files: TempDir,
    config_maps: BTreeMap<String, BTreeMap<String, String>>,
    /// Name and value: what every container gets unless its own environment says otherwise.
    environment: BTreeMap<String, String>,
}

impl Kubelet {
    pub(crate) fn new(node: &Host) -> Self {
        let files = tempfile::tempdir().unwrap();
        fs::create_dir(files.path().join("root")).unwrap();
        Self { node: node.clone(), files, config_maps: BTreeMap::new(), environment: BTreeMap::new() }
    }

    /// A ConfigMap of the pods' namespace; one that is not given does not exist.
    pub(crate) fn config_map(&mut self, name: &str, data: BTreeMap<String, String>) {
        self.config_maps.insert(name.to_owned(), data);
    }

    /// What kubelet sets for Service `default/kubernetes`.
    pub(crate) fn service_environment(&mut self, cluster_ip: &str) {
        let variables = [
            ("KUBERNETES_SERVICE_HOST", cluster_ip.to_owned()),
            ("KUBERNETES_SERVICE_PORT", "443".to_owned()),
            ("KUBERNETES_PORT", format!("tcp://{cluster_ip}:443")),
            ("KUBERNETES_PORT_443_TCP_ADDR", cluster_ip.to_owned()),
        ];
        self.environment.extend(variables.map(|(name, value)| (name.to_owned(), value)));
    }

    /// Writes a file in a folder that [`Self::folder`] names.
    pub(crate) fn write(&self, folder: &str, name: &str, content: &[u8]) {
        fs::write(self.folder(folder).join(name), content).unwrap();
    }

    /// A folder of the node, made at the first call.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        let folder = self.files.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// Starts a container of a pod with its arguments, or with others. Where there is a folder `account`, it is mounted as
    /// the ServiceAccount's.
    pub(crate) fn start(
        &self,
        pod: &PodSpec,
        container: &Container,
        arguments: Option<&[&str]>,
        log: &Path,
    ) -> Agent {
        let root = self.files.path().join("root");
        let mut words = vec![text(&root), text(&agent::binary().unwrap())];
        for mount in container.volume_mounts.iter().flatten() {
            let volume = pod.volumes.iter().flatten().find(|volume| volume.name == mount.name).unwrap();
            let mode = if mount.read_only == Some(true) { "ro" } else { "rw" };
            words.extend([text(&self.source(volume)), mount.mount_path.clone(), mode.into()]);
        }
        if pod.automount_service_account_token == Some(true) {
            let account = self.files.path().join("account");
            words.extend([
                text(&account),
                "/var/run/secrets/kubernetes.io/serviceaccount".into(),
                "ro".into(),
            ]);
        }
        words.push(capabilities(container));
        words.push(PATH.into());
        let environment = self.environment_of(container);
        words.extend(environment.iter().map(|(name, value)| format!("{name}={value}")));
        words.push("/usr/local/bin/kube-lane".into());
        match arguments {
            Some(arguments) => words.extend(arguments.iter().map(|argument| (*argument).to_owned())),
            None => words.extend(container.args.iter().flatten().map(|argument| {
                let node_name = environment.get("NODE_NAME").map_or("", String::as_str);
                argument.replace("$(NODE_NAME)", node_name)
            })),
        }
        let unshare = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"];
        let mut all = unshare.to_vec();
        all.extend(["sh", "-c", CONTAINER, "sh"]);
        all.extend(words.iter().map(String::as_str));
        Agent::start_binary(Path::new("unshare"), &self.node, &all, log).unwrap()
    }

    /// Where a volume's files are. A kubelet makes an empty folder for an optional ConfigMap that does not exist.
    fn source(&self, volume: &Volume) -> PathBuf {
        if let Some(config_map) = &volume.config_map {
            let folder = self.folder(&format!("config-map-{}", config_map.name));
            let data = self.config_maps.get(&config_map.name);
            assert!(data.is_some() || config_map.optional == Some(true), "no ConfigMap {}", config_map.name);
            for (name, content) in data.into_iter().flatten() {
                fs::write(folder.join(name), content).unwrap();
            }
            return folder;
        }
        let host_path = volume.host_path.as_ref().unwrap();
        match host_path.path.as_str() {
            // What is the node's alone in a lab.
            "/sys/fs/cgroup" => self.node.cgroup().to_owned(),
            "/sys/fs/bpf" => {
                fs::create_dir_all(self.node.bpf_root()).unwrap();
                self.node.bpf_root().to_owned()
            }
            "/proc/sys/net" => "/proc/sys/net".into(),
            "/var/lib/kube-lane" => self.folder("state"),
            "/etc/kube-lane" => self.folder("etc"),
            other => panic!("a host path that this test does not know: {other}"),
        }
    }

    fn environment_of(&self, container: &Container) -> BTreeMap<String, String> {
        let mut environment = self.environment.clone();
        for from in container.env_from.iter().flatten() {
            let config_map = from.config_map_ref.as_ref().unwrap();
            let data = self.config_maps.get(&config_map.name);
            assert!(data.is_some() || config_map.optional == Some(true), "no ConfigMap {}", config_map.name);
            environment.extend(data.cloned().into_iter().flatten());
        }
        for variable in container.env.iter().flatten() {
            let field = variable.value_from.as_ref().and_then(|from| from.field_ref.as_ref());
            assert_eq!(field.map(|field| field.field_path.as_str()), Some("spec.nodeName"));
            environment.insert(variable.name.clone(), self.node.name().to_owned());
        }
        environment
    }

    /// Runs an `exec` probe in a container that [`Self::start`] started.
    pub(crate) fn probe(&self, agent: &mut Agent, probe: &Probe) -> Output {
        let target = format!("--target={}", first_process(agent));
        let command = probe.exec.as_ref().unwrap().command.clone().unwrap();
        let run = move || {
            let mut nsenter = Command::new("nsenter");
            nsenter.args([&target, "--mount", "--pid", "--net", "--root", "--wd", "env", "-i", PATH]);
            nsenter.args(command).output()
        };
        self.node.run(run).unwrap().unwrap()
    }
}

/// Runs all three probes of a container that serves.
pub(crate) fn probes_succeed(kubelet: &Kubelet, container: &Container, agent: &mut Agent) {
    for probe in [&container.startup_probe, &container.liveness_probe, &container.readiness_probe] {
        let probe: &Probe = probe.as_ref().unwrap();
        let output = kubelet.probe(agent, probe);
        assert!(output.status.success(), "{probe:?}: {output:?}");
    }
}

/// Kills a container and waits for its end: that of `unshare`, which dropping an agent waits for, comes a moment before.
pub(crate) fn end(mut agent: Agent) {
    let process = Path::new("/proc").join(first_process(&mut agent).to_string());
    drop(agent);
    until(|| if process.exists() { Err(format!("{} has not ended", process.display())) } else { Ok(()) });
}

/// The process id of a container's first process, as the test sees it.
pub(crate) fn first_process(agent: &mut Agent) -> i32 {
    let unshare = agent.process().id();
    let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
    children.trim().parse().unwrap()
}

/// Those that a container adds, as `setpriv` writes them. All others are dropped.
fn capabilities(container: &Container) -> String {
    let security = container.security_context.as_ref().unwrap();
    assert_eq!(security.read_only_root_filesystem, Some(true));
    assert_eq!(security.allow_privilege_escalation, Some(false));
    let capabilities = security.capabilities.as_ref().unwrap();
    assert_eq!(capabilities.drop.as_deref().unwrap(), ["ALL"]);
    let added = capabilities.add.iter().flatten();
    let added = added.map(|capability| format!("+{}", capability.to_lowercase()));
    std::iter::once("-all".to_owned()).chain(added).collect::<Vec<_>>().join(",")
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}
