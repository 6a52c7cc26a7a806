//! The lab itself: every other test here believes what it reports.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use kube_lane_lab::{Dial, Error, Filter, Host, Lab, Load, Outcome, Proto, topology};

const PROTOS: [Proto; 2] = [Proto::Tcp, Proto::Udp];

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    (ip, port).into()
}

/// The names under `/run/netns` and the cgroups that a lab has.
fn traces(lab: &str) -> usize {
    let named = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let named = named.filter(|entry| entry.file_name().to_string_lossy().starts_with(lab)).count();
    let cgroups = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
    named + cgroups.iter().filter(|root| Path::new(root).join("kube-lane-lab").join(lab).exists()).count()
}

fn everyone_reaches_everyone(bridge: bool) {
    let lab = Lab::builder().nodes(2).bridge(bridge).build().unwrap();
    let pods = [
        lab.node(0).add_pod("a").unwrap(),
        lab.node(0).add_pod("b").unwrap(),
        lab.node(1).add_pod("c").unwrap(),
    ];
    let hosts: Vec<&Host> =
        pods.iter().map(|pod| &**pod).chain([&**lab.node(0), lab.node(1), lab.outside()]).collect();
    for proto in [Proto::Tcp, Proto::Udp, Proto::Sctp] {
        for server in &hosts {
            let echo = server.serve(proto, 8080).unwrap();
            for client in &hosts {
                for (to, from) in [(echo.v4(), client.v4()), (echo.v6(), client.v6())] {
                    let outcome = client.dial(proto, to).unwrap();
                    let what = format!("{proto} from {} to {to}", client.name());
                    assert_eq!(outcome.by(), Some(server.name()), "{what}: {outcome}");
                    // Of a node's several addresses the kernel picks one; all others have only one.
                    if !(bridge && client.name().starts_with("node")) {
                        assert_eq!(outcome.seen().map(|seen| seen.ip()), Some(from), "{what}");
                    }
                }
            }
            assert_eq!(echo.count(), 2 * hosts.len() as u64);
        }
    }
}

#[test]
fn everyone_reaches_everyone_over_routed_links() {
    everyone_reaches_everyone(false);
}

#[test]
fn everyone_reaches_everyone_over_a_bridge() {
    everyone_reaches_everyone(true);
}

#[test]
fn a_bridge_keeps_its_hardware_address_as_pods_come_and_go() {
    let lab = Lab::builder().bridge(true).build().unwrap();
    let address = || {
        let list = || Command::new("ip").args(["-brief", "link", "show", topology::BRIDGE]).output();
        let output = lab.node(0).run(list).unwrap().unwrap();
        let line = String::from_utf8(output.stdout).unwrap();
        line.split_whitespace().nth(2).unwrap().to_owned()
    };
    let before = address();
    // A bridge takes the address of its first port at the latest, where it has none of its own.
    let pod = lab.node(0).add_pod("a").unwrap();
    assert_eq!(address(), before);
    drop(pod);
    assert_eq!(address(), before);
}

#[test]
fn clients_tell_refused_from_unreachable_from_silence() {
    let lab = Lab::builder().nodes(2).build().unwrap();
    let pod = lab.node(1).add_pod("a").unwrap();
    let outside = lab.outside();
    for proto in PROTOS {
        for net in topology::pod_cidrs(1) {
            let nobody = at(net.iter().nth(200).unwrap(), 80);
            assert_eq!(outside.dial(proto, nobody).unwrap(), Outcome::Unreachable, "{proto} {nobody}");
        }
        for host in [outside as &Host, lab.node(0), lab.node(1)] {
            for closed in [at(pod.v4(), 81), at(pod.v6(), 81)] {
                // More often than the kernel's default limit of ICMP errors would let pass.
                let tally = host.dial_many(proto, closed, 20).unwrap();
                assert_eq!((tally.refused, tally.failures()), (20, 20), "{proto} {closed}: {tally:?}");
            }
        }
        // Without a proxy a Service address leads to the outside host, which drops it.
        for net in topology::service_cidrs() {
            let vip = at(net.iter().nth(10).unwrap(), 80);
            let dial = Dial::new(proto, vip).timeout(Duration::from_millis(100));
            assert_eq!(lab.node(0).dial_with(dial).unwrap(), Outcome::TimedOut, "{proto} {vip}");
        }
    }
}

#[test]
fn a_dropped_server_refuses_at_once_and_a_dropped_pod_is_unreachable() {
    let lab = Lab::builder().build().unwrap();
    let pod = lab.node(0).add_pod("a").unwrap();
    for proto in PROTOS {
        let echo = pod.serve(proto, 80).unwrap();
        let to = echo.v6();
        let mut flow = lab.outside().flow(Dial::new(proto, to)).unwrap();
        assert_eq!(flow.ask().by(), Some("a"));
        drop(echo);
        assert_eq!(lab.outside().dial(proto, to).unwrap(), Outcome::Refused, "{proto}");
        assert_ne!(flow.ask().by(), Some("a"));
    }
    let to = at(pod.v4(), 80);
    drop(pod);
    assert_eq!(lab.outside().dial(Proto::Tcp, to).unwrap(), Outcome::Unreachable);
}

#[test]
fn flows_stay_open_and_carry_large_and_late_answers() {
    let lab = Lab::builder().build().unwrap();
    let pod = lab.node(0).add_pod("a").unwrap();
    for (proto, bytes) in [(Proto::Tcp, 3_000_000), (Proto::Udp, 30_000)] {
        let echo = pod.serve(proto, 80).unwrap();
        let source = at(lab.outside().v4(), 7777);
        let dial = Dial::new(proto, echo.v4()).from(source).timeout(Duration::from_millis(300));
        let mut flow = lab.outside().flow(dial).unwrap();
        let answered = Outcome::Answered { by: "a".into(), seen: source };
        assert_eq!(
            (flow.ask(), flow.fetch(bytes), flow.ask()),
            (answered.clone(), answered.clone(), answered.clone())
        );
        echo.pause();
        assert_eq!(flow.ask(), Outcome::TimedOut);
        echo.resume();
        echo.delay(Duration::from_millis(20));
        let begun = Instant::now();
        // Not the answer to the question that timed out.
        assert_eq!(flow.ask(), answered);
        assert!(begun.elapsed() >= Duration::from_millis(20));
    }
}

#[test]
fn several_addresses_answer_each_as_itself() {
    let lab = Lab::builder().build().unwrap();
    let extra: IpAddr = "192.168.77.150".parse().unwrap();
    lab.node(0).add_address(extra).unwrap();
    for proto in PROTOS {
        let echo = lab.node(0).serve(proto, 80).unwrap();
        assert_eq!(lab.outside().dial(proto, at(extra, 80)).unwrap().by(), Some("node0"), "{proto}");
        assert_eq!(echo.count(), 1);
    }
}

#[test]
fn load_counts_answers_and_the_longest_gap() {
    let lab = Lab::builder().build().unwrap();
    let pod = lab.node(0).add_pod("a").unwrap();
    let echo = pod.serve(Proto::Tcp, 80).unwrap();
    let load =
        Load::start(lab.outside(), Dial::new(Proto::Tcp, echo.v4()), 2, Duration::from_millis(1)).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(echo);
    std::thread::sleep(Duration::from_millis(100));
    let echo = pod.serve(Proto::Tcp, 80).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let report = load.stop();
    assert!(report.tally.answers() > 20 && report.tally.refused > 5, "{report}");
    assert!(report.max_gap >= Duration::from_millis(95), "{report}");
    assert!(echo.count() > 10 && echo.connections() >= echo.count());
}

#[test]
fn sniffing_counts_only_what_the_filter_names() {
    let lab = Lab::builder().nodes(2).build().unwrap();
    let pod = lab.node(1).add_pod("a").unwrap();
    let echo = pod.serve(Proto::Udp, 53).unwrap();
    let vip = topology::vip_cidrs()[0].iter().nth(7).unwrap();
    for (to, other) in [(echo.v4(), echo.v6()), (echo.v6(), echo.v4())] {
        let uplink = lab.node(1).sniff(Filter::new().to(to.ip()).on(topology::UPLINK)).unwrap();
        let replies = lab.node(1).sniff(Filter::new().from(to.ip()).on(topology::UPLINK).leaving()).unwrap();
        let net = topology::cluster_cidrs()[usize::from(to.is_ipv6())];
        let crossing = lab.fabric().sniff(Filter::new().to(net).port(53).protocol(17)).unwrap();
        let port = lab.fabric().sniff(Filter::new().to(net).port(54)).unwrap();
        let foreign = lab.fabric().sniff(Filter::new().to(vip)).unwrap();
        assert_eq!(lab.outside().dial_many(Proto::Udp, to, 50).unwrap().answers(), 50);
        assert_eq!(lab.outside().dial_many(Proto::Udp, other, 5).unwrap().answers(), 5);
        let counts = [&uplink, &replies, &crossing, &port, &foreign].map(|sniff| sniff.count().unwrap());
        assert_eq!(counts, [50, 50, 50, 0, 0], "{to}");
        let packet = crossing.packets()[0];
        assert_eq!((packet.protocol, packet.destination), (17, to));
        assert_eq!(packet.source.ip(), if to.is_ipv4() { lab.outside().v4() } else { lab.outside().v6() });
    }
}

#[test]
fn the_outside_host_sends_service_traffic_to_the_node_it_is_told() {
    let lab = Lab::builder().nodes(2).build().unwrap();
    let outside = lab.outside();
    for node in [1, 0] {
        outside.route_via(lab.node(node)).unwrap();
        for net in topology::service_cidrs().into_iter().chain(topology::vip_cidrs()) {
            let sniffs = [0, 1].map(|node| {
                lab.node(node).sniff(Filter::new().to(net).on(topology::UPLINK).arriving()).unwrap()
            });
            let to = at(net.iter().nth(9).unwrap(), 80);
            outside.dial_with(Dial::new(Proto::Udp, to).timeout(Duration::from_millis(20))).unwrap();
            let counts = sniffs.map(|sniff| sniff.count().unwrap());
            assert_eq!(counts.map(|count| count > 0), [node == 0, node == 1], "{net} {counts:?}");
        }
    }
}

#[test]
fn processes_and_sockets_belong_to_their_node() {
    let lab = Lab::builder().nodes(2).build().unwrap();
    let pod = lab.node(1).add_pod("a").unwrap();
    let of_lab = |path: &Path| {
        let lab = path.ancestors().find(|path| path.ends_with(lab.name())).unwrap();
        format!("/kube-lane-lab/{}", path.strip_prefix(lab.parent().unwrap()).unwrap().display())
    };
    let ends_with = |path: &Path| of_lab(path) + "\n";
    for host in [lab.node(0) as &Host, lab.node(1), &pod] {
        let thread = host.run(|| std::fs::read_to_string("/proc/thread-self/cgroup").unwrap()).unwrap();
        assert!(thread.ends_with(&ends_with(host.cgroup())), "{thread}");
        // Of a socket, as the kernel's socket diagnosis has it: this is what eBPF programs go by.
        let echo = host.serve(Proto::Tcp, 80).unwrap();
        let _flow = host.flow(Dial::new(Proto::Tcp, echo.v4())).unwrap();
        let mut command = Command::new("ss");
        command.args(["--cgroup", "-tanH"]).stdout(Stdio::piped());
        let sockets = host.spawn(command).unwrap().stdout().map(std::io::read_to_string).unwrap().unwrap();
        let cgroup = format!("cgroup:{}", of_lab(host.cgroup()));
        // The listener, the client's socket and the server's.
        let of_host = sockets.lines().filter(|line| line.trim_end().ends_with(&cgroup));
        assert_eq!(of_host.count(), 3, "{sockets}");
        let mut command = Command::new("cat");
        command.args(["/proc/self/cgroup", "/proc/net/fib_trie"]).stdout(Stdio::piped());
        let mut process = host.spawn(command).unwrap();
        let output = std::io::read_to_string(process.stdout().unwrap()).unwrap();
        assert!(process.wait_timeout(Duration::from_secs(5)).unwrap().unwrap().success());
        assert!(output.contains(&ends_with(host.cgroup())), "{output}");
        assert!(output.contains(&host.v4().to_string()), "{output}");
    }
    assert_eq!(pod.cgroup(), lab.node(1).cgroup().join("kubepods"));
}

#[test]
fn a_process_can_be_signalled_measured_and_ends_with_its_handle() {
    let lab = Lab::builder().build().unwrap();
    let start = || {
        let mut command = Command::new("sleep");
        command.arg("100");
        lab.node(0).spawn(command).unwrap()
    };
    let mut process = start();
    assert!(process.rss().unwrap() > 0);
    assert_eq!(process.wait_timeout(Duration::from_millis(20)).unwrap(), None);
    process.signal(Signal::SIGTERM).unwrap();
    assert!(!process.wait_timeout(Duration::from_secs(5)).unwrap().unwrap().success());
    let pid = start().id();
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn sctp_tells_of_servers_and_of_their_absence() {
    let lab = Lab::builder().build().unwrap();
    let pod = lab.node(0).add_pod("a").unwrap();
    for (ip, source) in [(pod.v4(), lab.outside().v4()), (pod.v6(), lab.outside().v6())] {
        assert_eq!(lab.outside().dial(Proto::Sctp, at(ip, 36412)).unwrap(), Outcome::Unreachable);
        let echo = pod.serve(Proto::Sctp, 36412).unwrap();
        let sniff = pod.sniff(Filter::new().protocol(132).to(ip).port(36412).arriving()).unwrap();
        let source = at(source, 5000);
        let dial = Dial::new(Proto::Sctp, at(ip, 36412)).from(source).timeout(Duration::from_millis(200));
        let mut flow = lab.outside().flow(dial).unwrap();
        assert_eq!(flow.local().unwrap(), source);
        assert_eq!([flow.ask(), flow.ask()].map(|outcome| outcome.seen()), [Some(source); 2]);
        let other = Dial::new(Proto::Sctp, at(ip, 36413)).timeout(Duration::from_millis(50));
        assert_eq!(lab.outside().dial_with(other).unwrap(), Outcome::TimedOut);
        assert_eq!((echo.count(), sniff.count().unwrap()), (2, 2));
        assert_eq!(sniff.packets()[0].source, source);
    }
}

/// Runs one of the two tests below a second time, as a process that has a lab; kills it and says the name of its lab
/// and how it ended.
fn kill_process_with_lab(test: &str, signal: Signal) -> (String, ExitStatus) {
    const FILE: &str = "KUBE_LANE_LAB_NAME_FILE";
    if let Some(file) = std::env::var_os(FILE) {
        let _guard = kube_lane_lab::on_interrupt().unwrap();
        let lab = Lab::builder().build().unwrap();
        let _pod = lab.node(0).add_pod("a").unwrap();
        std::fs::write(file, lab.name()).unwrap();
        std::thread::sleep(Duration::from_secs(60));
        panic!("nobody killed this process");
    }
    let file = std::env::temp_dir().join(format!("kube-lane-lab-{}-{signal}", std::process::id()));
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test]).env(FILE, &file).stdout(Stdio::null());
    let mut child = child.spawn().unwrap();
    let name = loop {
        match std::fs::read_to_string(&file) {
            Ok(name) if !name.is_empty() => break name,
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
        assert_eq!(child.try_wait().unwrap(), None);
    };
    std::fs::remove_file(&file).unwrap();
    assert!(traces(&name) > 0);
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    (name, child.wait().unwrap())
}

#[test]
fn ctrl_c_removes_the_lab() {
    let (name, ended) = kill_process_with_lab("lab::ctrl_c_removes_the_lab", Signal::SIGINT);
    assert_eq!(ended.code(), Some(130));
    assert_eq!(traces(&name), 0);
}

#[test]
fn the_lab_of_a_killed_process_is_swept() {
    let (name, ended) = kill_process_with_lab("lab::the_lab_of_a_killed_process_is_swept", Signal::SIGKILL);
    assert_eq!(ended.code(), None);
    let _lab = Lab::builder().nodes(0).build().unwrap();
    assert_eq!(traces(&name), 0);
}

#[test]
fn labs_are_apart_and_leave_nothing() {
    let build = || {
        let lab = Lab::builder().nodes(2).build().unwrap();
        let pod = lab.node(1).add_pod(&format!("in-{}", lab.name())).unwrap();
        let echo = pod.serve(Proto::Tcp, 80).unwrap();
        let outcome = lab.outside().dial(Proto::Tcp, echo.v4()).unwrap();
        assert_eq!(outcome.by(), Some(pod.name()));
        assert!(traces(lab.name()) > 0);
        let name = lab.name().to_owned();
        // In the unusual order: what hangs on a lab may outlive it.
        drop(lab);
        drop(pod);
        drop(echo);
        name
    };
    let names: Vec<_> = std::thread::scope(|scope| {
        let builds: Vec<_> = (0..4).map(|_| scope.spawn(build)).collect();
        builds.into_iter().map(|build| build.join().unwrap()).collect()
    });
    for name in names {
        assert_eq!(traces(&name), 0, "{name}");
    }
}

#[test]
fn a_panic_and_a_process_left_behind_leave_nothing_either() {
    let name = std::thread::spawn(|| {
        let lab = Lab::builder().build().unwrap();
        let name = lab.name().to_owned();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 100 & exec true"]);
        let mut process = lab.node(0).spawn(command).unwrap();
        process.wait_timeout(Duration::from_secs(5)).unwrap();
        std::panic::panic_any(name);
    });
    let name = *name.join().unwrap_err().downcast::<String>().unwrap();
    assert_eq!(traces(&name), 0);
}

#[test]
fn a_name_is_taken_once() {
    let lab = Lab::builder().build().unwrap();
    let _pod = lab.node(0).add_pod("a").unwrap();
    assert!(matches!(lab.node(0).add_pod("a"), Err(Error::Io { .. })));
}

/// What a proxy might load: port 80 of a Service leads to one pod, port 81 is rejected.
fn load_rules(node: &Host, vips: [IpAddr; 2], pod: &Host) {
    let [vip4, vip6] = vips;
    let (pod4, pod6) = (pod.v4(), pod.v6());
    let dnat = format!(
        "ip daddr {vip4} meta l4proto {{ tcp, udp, sctp }} th dport 80 dnat ip to {pod4}:80
         ip6 daddr {vip6} meta l4proto {{ tcp, udp, sctp }} th dport 80 dnat ip6 to [{pod6}]:80"
    );
    let reject = format!("ip daddr {vip4} th dport 81 reject\n ip6 daddr {vip6} th dport 81 reject");
    let rules = format!(
        "table inet test {{
           chain prerouting {{ type nat hook prerouting priority -100; {dnat}\n }}
           chain output {{ type nat hook output priority -100; {dnat}\n }}
           chain postrouting {{ type nat hook postrouting priority 100;
             ip saddr {pod4} ip daddr {pod4} masquerade
             ip6 saddr {pod6} ip6 daddr {pod6} masquerade\n }}
           chain forward {{ type filter hook forward priority 0; {reject}\n }}
           chain local {{ type filter hook output priority 0; {reject}\n }}
         }}"
    );
    let mut nft = Command::new("nft");
    nft.arg(rules);
    assert!(node.spawn(nft).unwrap().wait_timeout(Duration::from_secs(10)).unwrap().unwrap().success());
}

fn rules_translate_and_reject(bridge: bool) {
    let lab = Lab::builder().nodes(2).bridge(bridge).build().unwrap();
    let pod = lab.node(0).add_pod("backend").unwrap();
    let other = lab.node(0).add_pod("client").unwrap();
    let vips = topology::service_cidrs().map(|net| net.iter().nth(10).unwrap());
    load_rules(lab.node(0), vips, &pod);
    for proto in [Proto::Tcp, Proto::Udp, Proto::Sctp] {
        let _echo = pod.serve(proto, 80).unwrap();
        for client in [&pod as &Host, &other, lab.node(0), lab.outside()] {
            for vip in vips {
                let what = format!("{proto} {vip} from {}, bridge {bridge}", client.name());
                let outcome = client.dial(proto, at(vip, 80)).unwrap();
                assert_eq!(outcome.by(), Some("backend"), "{what}: {outcome}");
                let begun = Instant::now();
                assert_eq!(client.dial(proto, at(vip, 81)).unwrap(), Outcome::Refused, "{what}");
                assert!(begun.elapsed() < Duration::from_millis(500), "{what}");
            }
        }
    }
}

#[test]
fn rules_translate_and_reject_over_routed_links() {
    rules_translate_and_reject(false);
}

#[test]
fn rules_translate_and_reject_over_a_bridge() {
    rules_translate_and_reject(true);
}
