//! `--config-base`: what it gives, what overrides it, and what a bad one does.

use super::*;

/// A base beside a configuration file.
struct Both {
    base: ConfigFile,
    file: ConfigFile,
}

impl Both {
    fn new(name: &str, base: &str, file: &str) -> Self {
        let base = ConfigFile::fields(&format!("{name}-base"), base);
        Self { base, file: ConfigFile::fields(name, file) }
    }

    fn base_path(&self) -> String {
        self.base.0.join("config.conf").display().to_string()
    }

    fn resolve(&self, more: &[&str]) -> Result<Resolved, String> {
        let base = format!("--config-base={}", self.base_path());
        self.file.resolve(&[&[base.as_str()], more].concat())
    }
}

fn networks(list: &[&str]) -> Detector {
    Detector::ClusterCidr(list.iter().map(|cidr| cidr.parse().unwrap()).collect())
}

#[test]
fn the_file_overrides_the_base_field_by_field() {
    let both = Both::new(
        "over",
        "clusterCIDR: 10.1.0.0/16\nmode: ipvs\nipvs: {scheduler: rr}\nnodePortAddresses: [192.0.2.0/24, 198.51.100.0/24]\n\
         conntrack: {min: 5, maxPerCore: 7, udpTimeout: null}\nhostnameOverride: base\nhealthzBindAddress: 127.0.0.1:1\n",
        "mode: nftables\nclusterCIDR: null\nconntrack: {min: 6, maxPerCore: null}\nnodePortAddresses: [203.0.113.0/24]\n\
         healthzBindAddress: ''\n",
    );
    let resolved = both.resolve(&[]).unwrap();
    let config = &resolved.config;
    assert_eq!(config.network.detector, networks(&["10.1.0.0/16"]), "null sets nothing");
    assert_eq!((config.conntrack.min, config.conntrack.max_per_core), (6, Some(7)), "sections are merged");
    let nodeports = ["203.0.113.0/24".parse().unwrap()];
    assert_eq!(config.network.nodeport_addresses.networks, nodeports, "lists replace lists");
    assert_eq!(config.healthz_address, Some("0.0.0.0:10256".parse().unwrap()), "empty: the default");
    assert_eq!((config.mode, config.node_name.as_str()), (Mode::Nftables, "base"));
    assert_eq!((resolved.warnings, resolved.base), (Vec::new(), BaseState::Read));
    assert_eq!(both.resolve(&["--hostname-override=flag"]).unwrap().config.node_name, "flag");

    let base = format!("--config-base={}", both.base_path());
    let alone = resolve(&[&base, "--cluster-cidr=10.2.0.0/16", "--proxy-mode=nftables"]).unwrap();
    assert_eq!(alone.config.network.detector, networks(&["10.2.0.0/16"]), "without --config all flags count");
    assert_eq!((alone.config.conntrack.min, alone.warnings), (5, Vec::new()));
}

#[test]
fn kubeadms_own_file_needs_nothing_but_a_mode() {
    let base = ConfigFile::new("kubeadm-base", include_str!("../../../tests/config/kubeadm.conf"));
    let flag = format!("--config-base={}", base.0.join("config.conf").display());
    let file = ConfigFile::fields("kubeadm-over", "mode: nftables\n");
    let resolved = file.resolve(&[&flag]).unwrap();
    assert_eq!(resolved.config.network.detector, networks(&["10.244.0.0/16"]));
    assert_eq!(resolved.config.conntrack, Conntrack::default());
    assert_eq!(resolved.warnings, Vec::<String>::new());
    assert_eq!(resolved.config.api, Some(Api::default()), "the kubeconfig is not there");
    assert_eq!(
        resolved.notes[0],
        "the kubeconfig that --config-base names does not exist and is not used: /var/lib/kube-proxy/kubeconfig.conf"
    );
    assert!(resolved.notes[1].contains("mode iptables") && resolved.notes.len() == 2, "{:?}", resolved.notes);
}

#[test]
fn the_kubeconfig_of_the_base_is_told_from_that_of_the_file() {
    let written = ConfigFile::new("base-kubeconfig-file", "");
    let path = written.0.join("config.conf");
    let section = format!(
        "mode: nftables\nclusterCIDR: 10.0.0.0/8\nclientConnection: {{kubeconfig: {}}}\n",
        path.display()
    );
    let api = |file: &str| {
        let resolved = Both::new("base-kubeconfig", &section, file).resolve(&[]).unwrap();
        assert_eq!(resolved.notes, Vec::<String>::new());
        resolved.config.api
    };
    assert_eq!(api(""), Some(Api { base_kubeconfig: Some(path.clone()), ..Api::default() }));
    let own = Some(Api { kubeconfig: Some("/k".into()), ..Api::default() });
    assert_eq!(api("clientConnection: {kubeconfig: /k}\n"), own);
    assert_eq!(api("clientConnection: {kubeconfig: ''}\n"), Some(Api::default()), "empty: none at all");

    let outside = Environment { hostname: "n".to_owned(), in_cluster: false };
    let both = Both::new("base-kubeconfig-gone", "clientConnection: {kubeconfig: /nowhere}\n", "");
    let flags = [both.file.flag(), format!("--config-base={}", both.base_path())];
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let error = parse(&flags).resolve(&outside).unwrap_err().to_string();
    assert!(error.contains("leaves no source of Services"), "{error}");
    let flags = [flags, vec!["--manifests=m"]].concat();
    assert_eq!(parse(&flags).resolve(&outside).unwrap().config.api, None);
}

#[test]
fn masquerading_of_the_base_survives_another_mode() {
    for (base, file, expected) in [
        ("iptables: {masqueradeAll: true}\nnftables: {masqueradeAll: false}", "mode: nftables", true),
        ("mode: ipvs\niptables: {masqueradeAll: true}", "mode: ebpf", true),
        ("mode: nftables\niptables: {masqueradeAll: true}", "mode: nftables", false),
        (
            "mode: iptables\niptables: {masqueradeAll: true}",
            "mode: nftables\nnftables: {masqueradeAll: false}",
            false,
        ),
    ] {
        let config = Both::new("base-masquerade", base, file).resolve(&[]).unwrap().config;
        assert_eq!(config.masquerade_all, expected, "{base:?} {file:?}");
    }
}

#[test]
fn a_bad_base_is_left_out_and_named() {
    let file = "mode: nftables\ndetectLocalMode: NodeCIDR\n";
    for (base, parts) in [
        ("conntrack: {min: many}\n", ["line 3", "conntrack.min", "configuration reference"]),
        ("bindAddress: [\n", ["line", "configuration reference", "config.conf"]),
        ("bindAddress: eth0\nconntrack: {min: 1}\n", ["bindAddress", "eth0", "leave it out"]),
    ] {
        let both = Both::new("base-bad", base, file);
        let resolved = both.resolve(&[]).unwrap();
        let BaseState::Refused(why) = &resolved.base else { panic!("{:?}", resolved.base) };
        for part in parts.into_iter().chain([both.base_path().as_str()]) {
            assert!(why.contains(part), "{part:?} is not in {why}");
        }
        assert_eq!(resolved.warnings, [format!("--config-base is not used: {why}")]);
        assert_eq!(resolved.config, both.file.resolve(&[]).unwrap().config);
    }
    let both = Both::new("base-odd", "oomScoreAdj: 5\nnew: 1\nclusterCIDR: 10.0.0.0/8\n", "mode: nftables\n");
    let path = both.base_path();
    assert_eq!(
        both.resolve(&[]).unwrap().warnings,
        [
            format!("{path}, line 4: unknown field new"),
            format!("kube-lane does not support these settings and ignores them: oomScoreAdj ({path})"),
        ]
    );
    let missing = both.file.resolve(&["--config-base=/nowhere/config.conf"]).unwrap();
    assert_eq!(missing.base, BaseState::Missing);
    assert_eq!(missing.config, both.file.resolve(&[]).unwrap().config);
}

#[test]
fn a_bad_file_is_an_error_that_names_it_beside_any_base() {
    let both = Both::new("file-bad", "bindAddress: eth1\n", "bindAddress: eth0\n");
    let error = both.resolve(&[]).unwrap_err();
    let start = format!("configuration file {}, bindAddress", both.file.0.join("config.conf").display());
    assert!(error.starts_with(&start), "{error}");
    assert!(Both::new("file-bad-2", "", "bindAddress: [\n").resolve(&[]).is_err());
}

#[test]
fn other_commands_take_the_base_too() {
    let both = Both::new("base-bpf", "kubeLane: {bpfRoot: /b}\n", "mode: nftables\n");
    let flags = [both.file.flag(), format!("--config-base={}", both.base_path())];
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    assert_eq!(parse(&flags).bpf_root().unwrap(), Some("/b".into()));
    let flags = [flags, vec!["--bpf-root=/c"]].concat();
    assert_eq!(parse(&flags).bpf_root().unwrap(), Some("/c".into()));
}

#[test]
fn fields_of_other_versions_in_the_base_are_no_mistake() {
    let both =
        Both::new("base-misspelt", "clusterCidr: 10.0.0.0/8\nudpIdleTimeout: 1s\n", "mode: nftables\n");
    let resolved = both.resolve(&[]).unwrap();
    let path = both.base_path();
    let told = |rest: &str| resolved.warnings.contains(&format!("{path}, line {rest}"));
    assert!(told("3: unknown field clusterCidr, is clusterCIDR meant?"), "{:?}", resolved.warnings);
    assert!(told("4: unknown field udpIdleTimeout"), "{:?}", resolved.warnings);
    let both =
        Both::new("file-misspelt", "clusterCIDR: 10.0.0.0/8\n", "mode: nftables\nkubelane: {bpfRoot: /b}\n");
    assert!(both.resolve(&[]).unwrap_err().contains("line 4: unknown field kubelane, is kubeLane meant?"));
    let flags = [both.file.flag()];
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    assert!(parse(&flags).bpf_root().is_ok(), "a cleanup needs no other field to be right");
}

#[test]
fn what_differs_from_the_iptables_mode_is_said() {
    let note = |base: &str, file: &str| -> Option<String> {
        let resolved = Both::new("iptables", base, file).resolve(&[]).unwrap();
        resolved.notes.into_iter().find(|note| note.contains("mode iptables"))
    };
    let (primary, loopback, invalid) = ("on all of them", "127.0.0.1", "INVALID");
    for (base, file, parts) in [
        ("mode: ''\n", "mode: nftables\n", &[primary, loopback, invalid][..]),
        ("mode: iptables\nnodePortAddresses: null\n", "mode: ebpf\n", &[primary, loopback, invalid]),
        ("clusterCIDR: ''\niptables: {localhostNodePorts: true}\n", "", &[primary, loopback, invalid]),
        ("iptables: {localhostNodePorts: false}\n", "mode: nftables\n", &[primary, invalid]),
        ("mode: ''\n", "nodePortAddresses: ['0.0.0.0/0']\n", &[loopback, invalid]),
    ] {
        let note = note(base, file).unwrap();
        for part in [primary, loopback, invalid] {
            assert_eq!(note.contains(part), parts.contains(&part), "{base:?}: {note}");
        }
        assert!(note.contains("iptables-base") && note.contains("docs/migrate.md"), "{note}");
    }
    assert_eq!(note("mode: nftables\n", "mode: nftables\n"), None);
    assert_eq!(note("mode: ipvs\n", ""), None);
    for (fields, is_said) in
        [("mode: iptables\n", true), ("mode: ''\n", true), ("mode: nftables\n", false), ("", false)]
    {
        let resolved = ConfigFile::fields("iptables-alone", fields).resolve(&[]).unwrap();
        assert_eq!(resolved.notes.iter().any(|note| note.contains("mode iptables")), is_said, "{fields:?}");
    }
}
