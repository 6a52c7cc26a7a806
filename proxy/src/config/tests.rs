//! The configuration as a user writes it: flags, files, both.

use std::path::PathBuf;

use clap::{CommandFactory, Parser};

use super::flags::{Action, RunFlags};
use super::*;

mod base;
mod settings;
mod socket_lb;

#[derive(Debug, Parser)]
#[command(disable_version_flag = true, args_override_self = true)]
struct Cli {
    #[command(flatten)]
    flags: RunFlags,
}

fn parse(args: &[&str]) -> RunFlags {
    Cli::try_parse_from([&["kube-lane"], args].concat())
        .unwrap_or_else(|error| panic!("{args:?}: {error}"))
        .flags
}

fn node() -> Environment {
    Environment { hostname: "Host-1".to_owned(), in_cluster: true }
}

fn resolve(args: &[&str]) -> Result<Resolved, String> {
    parse(args).resolve(&node()).map_err(|error| error.to_string())
}

fn config(args: &[&str]) -> Config {
    resolve(args).unwrap_or_else(|error| panic!("{args:?}: {error}")).config
}

/// A configuration file in a folder of its own, gone with the value.
struct ConfigFile(PathBuf);

impl ConfigFile {
    fn new(name: &str, text: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("kube-lane-config-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("config.conf"), text).unwrap();
        Self(folder)
    }

    fn fields(name: &str, fields: &str) -> Self {
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        Self::new(name, &format!("{head}{fields}"))
    }

    fn flag(&self) -> String {
        format!("--config={}", self.0.join("config.conf").display())
    }

    fn resolve(&self, more: &[&str]) -> Result<Resolved, String> {
        resolve(&[&[self.flag().as_str()], more].concat())
    }
}

impl Drop for ConfigFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Every flag of kube-proxy 1.37, which are those of 1.36, as `--name=value`.
const KUBE_PROXY_FLAGS: &[&str] = &[
    "--bind-address=0.0.0.0",
    "--bind-address-hard-fail=false",
    "--cleanup=false",
    "--cluster-cidr=10.244.0.0/16",
    "--config=",
    "--config-sync-period=15m0s",
    "--conntrack-max-per-core=32768",
    "--conntrack-min=131072",
    "--conntrack-tcp-be-liberal=false",
    "--conntrack-tcp-timeout-close-wait=1h0m0s",
    "--conntrack-tcp-timeout-established=24h0m0s",
    "--conntrack-udp-timeout=0s",
    "--conntrack-udp-timeout-stream=0s",
    "--detect-local-mode=ClusterCIDR",
    "--feature-gates=ContextualLogging=true,LoggingAlphaOptions=false",
    "--healthz-bind-address=0.0.0.0:10256",
    "--healthz-port=10256",
    "--hostname-override=node-1",
    "--init-only=false",
    "--iptables-localhost-nodeports=true",
    "--iptables-masquerade-bit=14",
    "--iptables-min-sync-period=1s",
    "--iptables-sync-period=30s",
    "--ipvs-exclude-cidrs=10.0.0.0/8,192.0.2.0/24",
    "--ipvs-min-sync-period=0s",
    "--ipvs-scheduler=rr",
    "--ipvs-strict-arp=false",
    "--ipvs-sync-period=30s",
    "--ipvs-tcp-timeout=0s",
    "--ipvs-tcpfin-timeout=0s",
    "--ipvs-udp-timeout=0s",
    "--kube-api-burst=10",
    "--kube-api-content-type=application/vnd.kubernetes.protobuf",
    "--kube-api-qps=5",
    "--kubeconfig=/etc/kubeconfig",
    "--log-flush-frequency=5s",
    "--log-json-info-buffer-size=0",
    "--log-json-split-stream=false",
    "--log-text-info-buffer-size=0",
    "--log-text-split-stream=false",
    "--logging-format=text",
    "--masquerade-all=false",
    "--master=https://192.0.2.1:6443",
    "--metrics-bind-address=127.0.0.1:10249",
    "--metrics-port=10249",
    "--nodeport-addresses=",
    "--oom-score-adj=-999",
    "--pod-bridge-interface=",
    "--pod-interface-name-prefix=",
    "--profiling=false",
    "--proxy-mode=nftables",
    "--show-hidden-metrics-for-version=",
    "--v=2",
    "--version=false",
    "--vmodule=",
    "--write-config-to=",
];

#[test]
fn every_flag_of_kube_proxy_is_accepted_in_both_forms() {
    let resolved = resolve(KUBE_PROXY_FLAGS).unwrap();
    // All the others have kube-proxy's default, which is nothing to warn of.
    assert_eq!(
        resolved.warnings,
        [
            "kube-lane does not support these settings and ignores them: --feature-gates, --ipvs-exclude-cidrs, --ipvs-scheduler"
        ]
    );
    for flag in KUBE_PROXY_FLAGS {
        let (name, value) = flag.split_once('=').unwrap();
        match value {
            "true" | "false" => parse(&[name]),
            value => parse(&[name, value]),
        };
    }
}

#[test]
fn the_command_line_of_the_readme() {
    let config = config(&[
        "--kubeconfig",
        "F",
        "--hostname-override",
        " Node-A ",
        "--proxy-mode",
        "nftables",
        "--cluster-cidr",
        "10.244.1.7/16,fd00::/48",
        "--masquerade-all",
        "-v",
        "2",
    ]);
    assert_eq!(config.api, Some(Api { kubeconfig: Some("F".into()), ..Api::default() }));
    assert_eq!(config.node_name, "node-a");
    assert_eq!(config.mode, Mode::Nftables);
    let networks = ["10.244.0.0/16", "fd00::/48"].map(|cidr| cidr.parse().unwrap()).to_vec();
    assert_eq!(config.network.detector, Detector::ClusterCidr(networks), "host bits are cleared");
    assert!(config.masquerade_all);
    assert_eq!(config.logging.verbosity, 2);
    assert_eq!(config.min_sync_period, Duration::ZERO, "no delay unless asked for");
    assert_eq!(config.healthz_address, Some("0.0.0.0:10256".parse().unwrap()));
    assert_eq!(config.metrics_address, Some("127.0.0.1:10249".parse().unwrap()));
}

#[test]
fn go_style_values() {
    for (args, expected) in [
        (&["--masquerade-all"][..], true),
        (&["--masquerade-all=T"], true),
        (&["--masquerade-all=1"], true),
        (&["--masquerade-all=false"], false),
        (&["--masquerade-all", "--masquerade-all=0"], false),
    ] {
        assert_eq!(config(args).masquerade_all, expected, "{args:?}");
    }
    for args in [&["-v", "4"][..], &["-v4"], &["-v=4"], &["--v", "4"], &["--v=4"], &["-v=2", "-v=4"]] {
        assert_eq!(config(args).logging.verbosity, 4, "{args:?}");
    }
    assert_eq!(config(&["--iptables-min-sync-period=1.5s"]).min_sync_period, Duration::from_millis(1500));
    let error =
        Cli::try_parse_from(["kube-lane", "--iptables-min-sync-period=soon"]).unwrap_err().to_string();
    assert!(error.contains("write it like 500ms"), "{error}");
}

#[test]
fn addresses() {
    let addresses = |args: &[&str]| {
        let config = config(args);
        [config.healthz_address, config.metrics_address]
            .map(|at| at.map(|at| at.to_string()).unwrap_or_default())
    };
    for (args, healthz, metrics) in [
        (&["--bind-address=::"][..], "[::]:10256", "[::1]:10249"),
        (&["--healthz-bind-address=192.0.2.1"], "192.0.2.1:10256", "127.0.0.1:10249"),
        (&["--healthz-bind-address=192.0.2.041:80"], "192.0.2.41:80", "127.0.0.1:10249"),
        (&["--metrics-bind-address=[::1]:9"], "0.0.0.0:10256", "[::1]:9"),
        (&["--healthz-bind-address=::1", "--healthz-port=1"], "[::1]:1", "127.0.0.1:10249"),
        (&["--healthz-bind-address=", "--metrics-bind-address="], "", ""),
        (&["--healthz-port=0", "--metrics-port=0"], "", ""),
    ] {
        assert_eq!(addresses(args), [healthz, metrics], "{args:?}");
    }
    assert_eq!(
        config(&["--bind-address=192.0.2.9"]).network.node_address(),
        Some("192.0.2.9".parse().unwrap())
    );
    assert_eq!(config(&["--bind-address=0.0.0.0"]).network.node_address(), None);
}

#[test]
fn modes_of_kube_proxy_are_served_by_nftables_and_said_so() {
    for (mode, expected, warned) in [
        ("", Mode::Nftables, false),
        ("nftables", Mode::Nftables, false),
        ("ebpf", Mode::Ebpf, false),
        ("iptables", Mode::Nftables, true),
        ("ipvs", Mode::Nftables, true),
    ] {
        let resolved = resolve(&["--proxy-mode", mode]).unwrap();
        assert_eq!(resolved.config.mode, expected, "{mode:?}");
        let warning = format!("mode {mode}: kube-lane serves with its nftables dataplane instead");
        assert_eq!(resolved.warnings.contains(&warning), warned, "{mode:?}: {:?}", resolved.warnings);
    }
}

#[test]
fn what_has_no_effect_is_named_in_one_warning() {
    let flags = ["--oom-score-adj=5", "--cluster-cidr=10.0.0.0/8", "--profiling", "--ipvs-scheduler=rr"];
    assert_eq!(
        resolve(&flags).unwrap().warnings,
        [
            "kube-lane does not support these settings and ignores them: --profiling, --ipvs-scheduler, --oom-score-adj"
        ]
    );
    assert_eq!(
        resolve(&["--cluster-cidr=10.0.0.0/8", "--kube-api-qps=50", "--kube-api-burst=10"]).unwrap().warnings,
        ["kube-lane does not support these settings and ignores them: --kube-api-qps"],
        "there is no limit"
    );
    let file = ConfigFile::fields(
        "idle",
        "detectLocalMode: NodeCIDR\nfeatureGates: {A: true}\noomScoreAdj: 5\nclientConnection: {acceptContentTypes: a, \
         contentType: b, burst: 0}\nconntrack: {min: 5, maxPerCore: 0}\n",
    );
    let warnings = file.resolve(&[]).unwrap().warnings;
    assert_eq!(
        warnings,
        [
            "kube-lane does not support these settings and ignores them: clientConnection.acceptContentTypes, clientConnection.contentType, \
          featureGates, oomScoreAdj"
        ]
    );
}

#[test]
fn errors_name_field_value_and_remedy() {
    for (args, parts) in [
        (&["--proxy-mode=ipfw"][..], ["--proxy-mode", "ipfw", "use nftables"]),
        (&["--cluster-cidr=10.0.0.1"], ["clusterCIDR", "10.0.0.1", "10.244.0.0/16,fd00"]),
        (&["--cluster-cidr=10.0.0.0/8,11.0.0.0/8"], ["--cluster-cidr", "11.0.0.0/8", "write it like"]),
        (&["--healthz-bind-address=:10256"], ["healthzBindAddress", ":10256", "[::]:10256"]),
        (&["--healthz-bind-address=::1]:9"], ["healthzBindAddress", "::1]:9", "[::]:10256"]),
        (&["--metrics-bind-address=127.0.0.1:0"], ["metricsBindAddress", "127.0.0.1:0", "1 to 65535"]),
        (&["--bind-address=eth0"], ["bindAddress", "eth0", "192.0.2.7"]),
        (&["--detect-local-mode=BridgeInterface"], ["--pod-bridge-interface", "--detect-local-mode", "cni0"]),
        (
            &["--nodeport-addresses=primary,primary"],
            ["nodePortAddresses", "\"primary\"", "each keyword once"],
        ),
        (&["--nodeport-addresses=eth0"], ["nodePortAddresses", "\"eth0\"", "primary, all and localhost"]),
        (&["--hostname-override= "], ["hostnameOverride", "\" \"", "Node object"]),
        (&["--detect-local-mode=Guess"], ["detectLocalMode", "Guess", "ClusterCIDR"]),
        (&["--master=foo"], ["--master", "foo", "write it like https://"]),
        (&["--master=192.0.2.1:6443"], ["--master", "192.0.2.1:6443", "write it like https://"]),
        (&["--conntrack-max-per-core=-1"], ["conntrack.maxPerCore", "\"-1\"", "0 or more"]),
        (&["--log-format=xml"], ["logging.format", "xml", "text or json"]),
    ] {
        let error = resolve(args).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{args:?}: {part:?} is not in {error}");
        }
    }
    let error = resolve(&["--bind-address=a", "--cluster-cidr=b"]).unwrap_err();
    assert_eq!(error.lines().count(), 2, "all at once: {error}");
}

#[test]
fn the_api_server_may_be_absent_only_beside_a_manifest_folder() {
    let outside = Environment { hostname: "n".to_owned(), in_cluster: false };
    let api = |args: &[&str]| parse(args).resolve(&outside).map(|resolved| resolved.config.api);
    assert_eq!(api(&["--manifests=m"]).unwrap(), None);
    let master = Api { master: Some("http://[::1]".into()), ..Api::default() };
    assert_eq!(api(&["--manifests=m", "--master=http://[::1]"]).unwrap(), Some(master));
    let error = api(&[]).unwrap_err().to_string();
    assert!(error.contains("--kubeconfig") && error.contains("--manifests"), "{error}");
    assert_eq!(config(&[]).api, Some(Api::default()), "in a pod, its ServiceAccount");
}

#[test]
fn kubeadm_and_written_defaults_are_read_without_a_warning() {
    for (name, text) in [
        ("kubeadm", include_str!("../../tests/config/kubeadm.conf")),
        ("defaults", include_str!("../../tests/config/kube-proxy-defaults.yaml")),
    ] {
        let resolved = ConfigFile::new(name, text).resolve(&["--hostname-override=worker-1"]).unwrap();
        let warned = resolved.warnings.iter().filter(|warning| !warning.starts_with("clusterCIDR")).count();
        assert_eq!(warned, 0, "{name}: {:?}", resolved.warnings);
        assert_eq!(resolved.config.node_name, "worker-1");
        assert_eq!(resolved.config.min_sync_period, Duration::ZERO);
        assert_eq!(resolved.config.healthz_address, Some("0.0.0.0:10256".parse().unwrap()));
    }
    let file = ConfigFile::new("kubeadm-2", include_str!("../../tests/config/kubeadm.conf"));
    let config = file.resolve(&[]).unwrap().config;
    let kubeconfig = Some("/var/lib/kube-proxy/kubeconfig.conf".into());
    assert_eq!(config.api, Some(Api { kubeconfig, ..Api::default() }));
    assert_eq!(config.network.detector, Detector::ClusterCidr(vec!["10.244.0.0/16".parse().unwrap()]));
    assert_eq!(config.node_name, "host-1", "the host name where nobody names the node");
}

#[test]
fn masquerade_all_is_read_from_the_section_of_the_mode() {
    for (fields, expected) in [
        ("mode: nftables\nnftables: {masqueradeAll: true}", true),
        ("mode: nftables\niptables: {masqueradeAll: true}", false),
        ("mode: iptables\niptables: {masqueradeAll: true}", true),
        ("mode: ipvs\niptables: {masqueradeAll: true}", true),
        ("mode: iptables\nnftables: {masqueradeAll: true}", false),
        ("nftables: {masqueradeAll: true}", true),
        ("iptables: {masqueradeAll: true}\nnftables: {masqueradeAll: false}", true),
        ("mode: ''", false),
    ] {
        let config = ConfigFile::fields("masquerade", fields).resolve(&[]).unwrap().config;
        assert_eq!(config.masquerade_all, expected, "{fields}");
    }
}

#[test]
fn beside_a_file_only_some_flags_count_and_the_rest_are_named() {
    let file = ConfigFile::fields(
        "beside",
        "hostnameOverride: from-file\nlogging: {verbosity: 1, format: text}\nclusterCIDR: 10.0.0.0/8\n\
         kubeLane: {manifests: /etc/kube-lane, stateDir: /var/lib/kube-lane, logLevel: warn}\n",
    );
    let resolved = file.resolve(&[]).unwrap();
    assert_eq!(resolved.config.node_name, "from-file");
    assert_eq!(resolved.config.manifests, Some("/etc/kube-lane".into()));
    assert_eq!(resolved.config.state_dir, Some("/var/lib/kube-lane".into()));
    assert_eq!(resolved.config.logging.level.as_deref(), Some("warn"));

    let resolved = file
        .resolve(&[
            "--hostname-override=from-flag",
            "--master=https://192.0.2.1",
            "-v=5",
            "--log-format=json",
            "--manifests=m",
            "--state-dir=s",
            "--cluster-cidr=11.0.0.0/8",
            "--masquerade-all",
            "--profiling",
        ])
        .unwrap();
    let config = &resolved.config;
    assert_eq!(config.node_name, "from-flag");
    assert_eq!(config.api.as_ref().and_then(|api| api.master.as_deref()), Some("https://192.0.2.1"));
    assert_eq!((config.logging.verbosity, config.logging.format), (5, LogFormat::Json));
    assert_eq!((config.manifests.clone(), config.state_dir.clone()), (Some("m".into()), Some("s".into())));
    assert_eq!(config.network.detector, Detector::ClusterCidr(vec!["10.0.0.0/8".parse().unwrap()]));
    assert_eq!(
        resolved.warnings,
        ["--config is set, so these flags have no effect: --cluster-cidr, --masquerade-all, --profiling"]
    );
}

#[test]
fn only_strict_reading_refuses_unknown_and_repeated_fields() {
    let file = ConfigFile::fields(
        "strict",
        "mode: nftables\nclusterCidr: 10.0.0.0/8\nnftables:\n  masqueradeAll: false\n  minsyncPeriod: 1s\n\
         extra: {a: {b: 1}}\nmode: ebpf\ndetectLocalMode: NodeCIDR\n",
    );
    let error = file.resolve(&[]).unwrap_err();
    for part in [
        "config.conf, line 4: unknown field clusterCidr, is clusterCIDR meant?; line 7: unknown field \
         nftables.minsyncPeriod, is nftables.minSyncPeriod meant?; correct",
        "--config-lenient",
    ] {
        assert!(error.contains(part), "{part:?} is not in\n{error}");
    }
    assert!(!error.contains("extra"), "another version may have such a field");
    assert!(file.resolve(&["--config-lenient=false"]).is_err());
    let resolved = file.resolve(&["--config-lenient"]).unwrap();
    assert_eq!(resolved.config.mode, Mode::Ebpf, "the last one counts");
    let warnings = resolved.warnings.join("\n");
    for part in [
        "line 4: unknown field clusterCidr",
        "line 7: unknown field nftables.minsyncPeriod",
        "line 8: unknown field extra",
        "line 9: field mode is written twice; the last one counts",
    ] {
        assert!(warnings.contains(part), "{part:?} is not in\n{warnings}");
    }
    assert_eq!(resolved.warnings.len(), 4, "{warnings}");
}

#[test]
fn wrong_types_are_errors_that_name_line_and_field() {
    for (fields, parts) in [
        ("nftables:\n  masqueradeAll: 7\n", ["line 4", "nftables.masqueradeAll"]),
        ("conntrack:\n  min: many\n", ["line 4", "conntrack.min"]),
        ("configSyncPeriod: soon\n", ["line 3", "configSyncPeriod"]),
        ("nodePortAddresses: 10.0.0.0/8\n", ["line 3", "nodePortAddresses"]),
        ("mode: [a]\n", ["line 3", "mode"]),
        ("mode: {\n", ["line", "config.conf"]),
    ] {
        let error = ConfigFile::fields("types", fields).resolve(&[]).unwrap_err();
        for part in parts.into_iter().chain(["configuration reference"]) {
            assert!(error.contains(part), "{fields:?}: {part:?} is not in {error}");
        }
    }
    for text in ["", "kind: Pod\napiVersion: v1\n", "[]", "kind: KubeProxyConfiguration\n"] {
        let error = ConfigFile::new("kind", text).resolve(&[]).unwrap_err();
        assert!(error.contains("config.conf"), "{text:?}: {error}");
    }
    let error = resolve(&["--config=/nowhere/config.conf"]).unwrap_err();
    assert!(error.contains("/nowhere/config.conf"), "{error}");
}

#[test]
fn json_is_read_too() {
    let text = r#"{"kind": "KubeProxyConfiguration", "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "nftables": {"minSyncPeriod": "2s", "odd": 1}}"#;
    let file = ConfigFile::new("json", text);
    let resolved = file.resolve(&["--hostname-override=n", "--proxy-mode=nftables"]).unwrap();
    assert_eq!(resolved.config.min_sync_period, Duration::from_secs(2));
    assert!(resolved.warnings[0].ends_with("line 2: unknown field nftables.odd"), "{:?}", resolved.warnings);
}

#[test]
fn what_is_written_is_read_back_the_same() {
    let flags = [
        "--kubeconfig=/k",
        "--hostname-override=Node-1",
        "--cluster-cidr=10.244.0.0/16,fd00::/48",
        "--detect-local-mode=InterfaceNamePrefix",
        "--pod-interface-name-prefix=veth",
        "--nodeport-addresses=192.0.2.0/24,2001:db8::/64",
        "--masquerade-all",
        "--metrics-bind-address=0.0.0.0",
        "--iptables-min-sync-period=1500ms",
        "--conntrack-min=7",
        "--conntrack-udp-timeout=1m0s",
        "--conntrack-max-per-core=0",
        "--conntrack-clean-sctp",
        "--oom-score-adj=7",
        "--manifests=/m",
        "--state-dir=/s",
        "-v=3",
    ];
    let written = resolve(&flags).unwrap();
    let read = ConfigFile::new("round-trip", &written.to_yaml()).resolve(&[]).unwrap();
    assert_eq!(read.config, written.config, "{}", written.to_yaml());
    assert_eq!(read.to_yaml(), written.to_yaml());
    assert_eq!(read.warnings, ["kube-lane does not support these settings and ignores them: oomScoreAdj"]);
    assert!(written.to_yaml().contains("hostnameOverride: node-1\n"), "{}", written.to_yaml());
    let written = resolve(&["--kubeconfig=/k"]).unwrap();
    assert_eq!(written.config.node_name, "host-1");
    assert!(!written.to_yaml().contains("host-1"), "every node has a name of its own: {}", written.to_yaml());
}

#[test]
fn conntrack_has_the_defaults_of_kube_proxy() {
    assert_eq!(config(&[]).conntrack, Conntrack::default());
    let written = include_str!("../../tests/config/kube-proxy-defaults.yaml");
    assert_eq!(
        ConfigFile::new("conntrack", written).resolve(&[]).unwrap().config.conntrack,
        Conntrack::default()
    );
    let file = ConfigFile::fields(
        "conntrack-set",
        "conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 90s, tcpBeLiberal: true, \
         udpTimeout: 1ms, udpStreamTimeout: 2m}\nkubeLane: {conntrackCleanSCTP: true}\n",
    );
    let expected = Conntrack {
        max_per_core: None,
        min: 0,
        tcp_established: None,
        tcp_close_wait: Some(Duration::from_secs(90)),
        tcp_be_liberal: true,
        udp: Some(Duration::from_secs(1)),
        udp_stream: Some(Duration::from_secs(120)),
        clean_sctp: true,
    };
    assert_eq!(file.resolve(&[]).unwrap().config.conntrack, expected);
    assert!(!file.resolve(&["--conntrack-clean-sctp=false"]).unwrap().config.conntrack.clean_sctp);
}

#[test]
fn invalid_packets_are_dropped_where_asked_for() {
    assert!(!config(&[]).drop_invalid);
    assert!(config(&["--drop-invalid"]).drop_invalid);
    let file = ConfigFile::fields("invalid", "clusterCIDR: 10.0.0.0/8\nkubeLane: {dropInvalid: true}\n");
    let resolved = file.resolve(&[]).unwrap();
    assert!(resolved.config.drop_invalid && resolved.warnings.is_empty(), "{:?}", resolved.warnings);
    assert!(!file.resolve(&["--drop-invalid=false"]).unwrap().config.drop_invalid);
}

#[test]
fn nothing_is_counted_unless_asked_for() {
    assert!(!config(&[]).count_connections);
    assert!(config(&["--count-connections"]).count_connections);
    let file = ConfigFile::fields("count", "clusterCIDR: 10.0.0.0/8\nkubeLane: {countConnections: true}\n");
    let resolved = file.resolve(&[]).unwrap();
    assert!(resolved.config.count_connections && resolved.warnings.is_empty(), "{:?}", resolved.warnings);
    assert!(!file.resolve(&["--count-connections=false"]).unwrap().config.count_connections);
    let read = ConfigFile::new("count-again", &resolved.to_yaml()).resolve(&[]).unwrap();
    assert_eq!(read.config, resolved.config);
}

#[test]
fn actions() {
    for (args, action) in [
        (&[][..], Action::Run),
        (&["--cleanup"], Action::Cleanup),
        (&["--cleanup=false"], Action::Run),
        (&["--version"], Action::Version),
        (&["--init-only"], Action::InitOnly),
        (&["--write-config-to=f", "--cleanup"], Action::WriteConfig("f".into())),
    ] {
        assert_eq!(parse(args).action(), action, "{args:?}");
    }
}

#[test]
fn every_flag_named_in_a_warning_exists() {
    let command = Cli::command();
    for (_, flag) in names::FLAGS {
        assert!(command.get_arguments().any(|argument| argument.get_long() == Some(flag)), "--{flag}");
    }
}
