//! Where settings come from, and what a change of the files means.

use super::*;

fn lines(resolved: &Resolved) -> Vec<String> {
    resolved.settings.iter().map(ToString::to_string).collect()
}

#[test]
fn each_setting_names_the_file_or_flag_that_it_comes_from() {
    let base = ConfigFile::new("settings-base", include_str!("../../../tests/config/kubeadm.conf"));
    let file = ConfigFile::fields("settings", "mode: nftables\nbindAddress: ''\nkubeLane: {manifests: /m}\n");
    let [base_path, path] = [&base, &file].map(|file| file.0.join("config.conf").display().to_string());
    let base_flag = format!("--config-base={base_path}");
    let flags =
        [&base_flag, "--hostname-override=node-1", "-v=3", "--bpf-root=/b", "--master=https://192.0.2.1"];
    let resolved = file.resolve(&flags).unwrap();
    assert_eq!(
        lines(&resolved),
        [
            format!("bindAddress: \"\" ({path})"),
            format!("clusterCIDR: 10.244.0.0/16 ({base_path})"),
            "hostnameOverride: node-1 (--hostname-override)".to_owned(),
            "kubeLane.bpfRoot: /b (--bpf-root)".to_owned(),
            format!("kubeLane.manifests: /m ({path})"),
            "logging.verbosity: 3 (-v)".to_owned(),
            format!("mode: nftables ({path})"),
            "master: https://192.0.2.1 (--master)".to_owned(),
        ],
        "what kubeadm writes and leaves empty is not listed"
    );
    assert_eq!(
        resolved.settings[1].to_json(),
        serde_json::json!({"field": "clusterCIDR", "value": "10.244.0.0/16", "source": base_path})
    );
    let alone =
        resolve(&["--conntrack-max-per-core=0", "--conntrack-udp-timeout=0s", "--masquerade-all"]).unwrap();
    assert_eq!(
        lines(&alone),
        [
            "conntrack.maxPerCore: 0 (--conntrack-max-per-core)",
            "iptables.masqueradeAll: true (--masquerade-all)",
            "nftables.masqueradeAll: true (--masquerade-all)",
        ]
    );
}

#[test]
fn a_change_names_what_differs() {
    let read = |fields: &str| {
        let file = ConfigFile::fields("change", fields);
        parse(&[&file.flag()]).resolve(&node())
    };
    let running = read("clusterCIDR: 10.0.0.0/8\nnodePortAddresses: [192.0.2.0/24]\n").unwrap();
    let different = |fields| match running.compare(read(fields)) {
        Reread::Different(differences) => differences,
        other => panic!("{fields:?}: {other:?}"),
    };
    assert_eq!(
        different("clusterCIDR: 11.0.0.0/8\nmode: ebpf\n"),
        [
            "clusterCIDR: 10.0.0.0/8 -> 11.0.0.0/8",
            "mode: not set -> ebpf",
            "nodePortAddresses: [\"192.0.2.0/24\"] -> not set"
        ]
    );
    // The same by other words.
    let same = "nodePortAddresses: [192.0.2.7/24]\nclusterCIDR: 10.1.2.3/8\nmode: nftables\noomScoreAdj: 5\n";
    let Reread::Same(status) = running.compare(read(same)) else { panic!("{same}") };
    assert_eq!(status.settings.len(), 4);
    assert_eq!((status.base_problem, status.pending_problem), (None, None));
    let Reread::Unusable(why) = running.compare(read("clusterCIDR: x\nbindAddress: y\n")) else { panic!() };
    assert!(why.contains("clusterCIDR") && why.contains("; ") && why.contains("write it like"), "{why}");
    assert!(!why.contains('\n'), "{why}");
}

#[test]
fn a_base_that_served_is_not_given_up() {
    let file = ConfigFile::fields("keep", "mode: nftables\n");
    let base = ConfigFile::fields("keep-base", "clusterCIDR: 10.0.0.0/8\n");
    let path = base.0.join("config.conf");
    let flags = [file.flag(), format!("--config-base={}", path.display())];
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let read = || parse(&flags).resolve(&node());
    let running = read().unwrap();

    std::fs::write(&path, "clusterCIDR: [").unwrap();
    let Reread::Unusable(why) = running.compare(read()) else { panic!() };
    assert!(why.contains(path.to_str().unwrap()), "{why}");
    let without = read().unwrap();
    assert!(without.status().base_problem.is_some());
    std::fs::remove_file(&path).unwrap();
    let Reread::Unusable(why) = running.compare(read()) else { panic!() };
    assert!(why.contains("--config-base"), "{why}");

    // Who started without it takes it when it comes.
    let Reread::Same(status) = without.compare(read()) else { panic!() };
    assert_eq!(status.base_problem, None);
    std::fs::write(&path, "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nclusterCIDR: 10.0.0.0/8\n")
        .unwrap();
    let Reread::Different(differences) = without.compare(read()) else { panic!() };
    assert_eq!(differences, ["clusterCIDR: not set -> 10.0.0.0/8"]);
}
