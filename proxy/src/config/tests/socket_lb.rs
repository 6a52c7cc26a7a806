//! The settings of the socket layer, by flags and in a file.

use super::*;

#[test]
fn the_socket_layer_has_a_section_and_flags() {
    let file = ConfigFile::fields(
        "socket-lb",
        "mode: ebpf\nclusterCIDR: 10.0.0.0/8\nkubeLane:\n  cgroupRoot: /c\n  bpfRoot: /b\n  socketLB:\n    udp: true\n    \
         external: true\n    loopbackNodePorts: true\n    hostNamespaceOnly: true\n    \
         leaveAlone: [/system.slice/a.service, ./b]\n    podCgroups: [/kubepods.slice, /]\n    maxFrontends: 1\n    maxServicePorts: 2\n    maxEndpoints: 3\n    \
         maxAffinityClients: 4\n",
    );
    let resolved = file.resolve(&[]).unwrap();
    let expected = SocketLb {
        cgroup_root: Some("/c".into()),
        bpf_root: "/b".into(),
        udp: true,
        external: true,
        loopback_nodeports: true,
        host_namespace_only: true,
        leave_alone: vec!["system.slice/a.service".into(), "b".into()],
        pod_cgroups: vec!["kubepods.slice".into(), "".into()],
        max_frontends: 1,
        max_service_ports: 2,
        max_endpoints: 3,
        max_affinity_clients: 4,
    };
    assert_eq!((&resolved.config.socket_lb, resolved.warnings.as_slice()), (&expected, &[][..]));
    let read = ConfigFile::new("socket-lb-again", &resolved.to_yaml()).resolve(&[]).unwrap();
    assert_eq!(read.config, resolved.config, "{}", resolved.to_yaml());

    let flags = [
        "--cgroup-root=/d",
        "--bpf-root=/e",
        "--socket-lb-udp=false",
        "--socket-lb-leave-alone=x,y",
        "--socket-lb-pod-cgroups=/z",
    ];
    let beside = SocketLb {
        cgroup_root: Some("/d".into()),
        bpf_root: "/e".into(),
        udp: false,
        leave_alone: vec!["x".into(), "y".into()],
        pod_cgroups: vec!["z".into()],
        ..expected
    };
    assert_eq!(file.resolve(&flags).unwrap().config.socket_lb, beside);
    assert_eq!(config(&[]).socket_lb, SocketLb::default());
    let alone = config(&["--proxy-mode=ebpf", "--socket-lb-external", "--socket-lb-loopback-nodeports"]);
    assert_eq!(alone.socket_lb, SocketLb { external: true, loopback_nodeports: true, ..SocketLb::default() });
}

#[test]
fn settings_of_the_socket_layer_that_do_nothing_are_said() {
    let cidr = "--cluster-cidr=10.0.0.0/8";
    for (args, part) in [
        (&["--socket-lb-udp", cidr][..], "only in mode (--proxy-mode) ebpf"),
        (&["--proxy-mode=ebpf", "--socket-lb-loopback-nodeports", cidr], "socketLB.external"),
        (&["--proxy-mode=ebpf", "--masquerade-all", cidr], "masqueradeAll"),
        (&["--proxy-mode=ebpf", "--socket-lb-host-namespace-only"], "hostNamespaceOnly"),
    ] {
        let warnings = resolve(args).unwrap().warnings;
        assert!(warnings.iter().any(|warning| warning.contains(part)), "{args:?}: {warnings:?}");
    }
    assert_eq!(resolve(&["--bpf-root=/b", cidr]).unwrap().warnings, [""; 0]);
    // NodePorts on loopback addresses, which newer kube-proxies serve by a proxy of their own.
    let localhost = "--nodeport-addresses=primary,localhost";
    let ignored = |networks: &str| {
        format!(
            "kube-lane does not support these settings and ignores them: --nodeport-addresses (its {networks})"
        )
    };
    let served =
        ["--proxy-mode=ebpf", "--socket-lb-external", "--socket-lb-loopback-nodeports", cidr, localhost];
    assert_eq!(resolve(&[localhost, cidr]).unwrap().warnings, [ignored("127.0.0.0/8, ::1/128")]);
    let one = resolve(&["--nodeport-addresses=127.0.0.0/8", cidr]).unwrap().warnings;
    assert_eq!(one, [ignored("127.0.0.0/8")]);
    assert_eq!(resolve(&served).unwrap().warnings, [ignored("::1/128")]);
    assert_eq!(resolve(&["--nodeport-addresses=all", cidr]).unwrap().warnings, [""; 0]);
    for (fields, parts) in [
        ("cgroupRoot: sys", ["kubeLane.cgroupRoot", "--cgroup-root", "begin it with /"]),
        ("bpfRoot: ./bpf", ["kubeLane.bpfRoot", "./bpf", "begin it with /"]),
        ("socketLB: {leaveAlone: [a, ../b]}", ["socketLB.leaveAlone", "../b", "/proc/PID/cgroup"]),
        ("socketLB: {leaveAlone: [/]}", ["--socket-lb-leave-alone", "\"/\"", "below the cgroup root"]),
        ("socketLB: {podCgroups: [a/../b]}", ["socketLB.podCgroups", "a/../b", "/kubepods.slice"]),
        ("socketLB: {podCgroups: []}", ["--socket-lb-pod-cgroups", "\"0\"", "one to four"]),
        ("socketLB: {podCgroups: [a, b, c, d, e]}", ["socketLB.podCgroups", "\"5\"", "one to four"]),
        ("socketLB: {maxEndpoints: 0}", ["socketLB.maxEndpoints", "\"0\"", "1 to 16777216"]),
        ("socketLB: {maxFrontends: 99999999999}", ["socketLB.maxFrontends", "99999999999", "use 1"]),
    ] {
        let error = ConfigFile::fields("socket-lb-bad", &format!("kubeLane: {{{fields}}}\n")).resolve(&[]);
        let error = error.unwrap_err();
        assert_eq!(error.lines().count(), 1, "{error}");
        for part in parts {
            assert!(error.contains(part), "{fields}: {part:?} is not in {error}");
        }
    }
}
