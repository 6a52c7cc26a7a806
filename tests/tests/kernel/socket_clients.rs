//! Real clients of a Service, in both modes: each gets its answer, and is told the address that it dialled.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kube_lane_lab::{Dial, Host, Pod, Process, Proto};
use kube_lane_tests::objects::Port;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use super::world::{
    Mode, QUIET, SYNC, World, answered_in, at, endpoints, serving, until_met, vips, web_ports,
};

/// Runs a program on a host and returns what it printed.
pub(super) fn output(host: &Host, program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let output = host.run(move || command.output()).unwrap().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{out}{error}", output.status);
    out
}

/// A pod that serves as `web.default.svc` by TLS at 8443, with its certificate in `dir`.
fn tls_server(pod: &Pod, dir: &Path) -> Process {
    let names = vec!["web.default.svc".to_owned()];
    let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(names).unwrap();
    fs::write(dir.join("cert.pem"), cert.pem()).unwrap();
    fs::write(dir.join("key.pem"), signing_key.serialize_pem()).unwrap();
    let mut server = Command::new("openssl");
    server.current_dir(dir).args("s_server -4 -accept 8443 -cert cert.pem -key key.pem -www".split(' '));
    pod.spawn_logged(server, &dir.join("log")).unwrap()
}

#[test]
fn a_tls_client_and_curl_verify_the_server_that_they_dialled() {
    for mode in Mode::ALL {
        let world = World::in_mode(mode);
        let pod = world.lab.node(1).add_pod("node1-tls").unwrap();
        let client = world.lab.node(0).add_pod("client").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let _server = tls_server(&pod, dir.path());
        world.put("web", &[Port::new("TCP", 443, 8443)], 10, &endpoints(&[&pod]));
        let vip = at(vips(10)[0], 443);
        let connects = |host: &Host| {
            let connect = move || {
                (0..100).any(|_| {
                    thread::sleep(Duration::from_millis(20));
                    TcpStream::connect_timeout(&vip, QUIET)
                        .is_ok_and(|stream| stream.peer_addr().unwrap() == vip)
                })
            };
            host.run(connect).unwrap()
        };
        for host in [&*client as &Host, world.lab.node(0)] {
            assert!(connects(host), "{mode:?}");
            let ca = dir.path().join("cert.pem");
            let ca = ca.to_str().unwrap();
            let to = vip.to_string();
            let verify = ["-verify_return_error", "-verify_hostname", "web.default.svc", "-CAfile", ca];
            let session =
                output(host, "openssl", &[&["s_client", "-brief", "-connect", &to][..], &verify].concat());
            assert!(!session.contains("error"), "{session}");
            let resolve = format!("web.default.svc:443:{}", vip.ip());
            let told = output(
                host,
                "curl",
                &[
                    "--silent",
                    "--show-error",
                    "--cacert",
                    ca,
                    "--resolve",
                    &resolve,
                    "--output",
                    "/dev/null",
                    "--write-out",
                    "%{http_code} %{remote_ip} %{remote_port}",
                    "https://web.default.svc/",
                ],
            );
            assert_eq!(told, format!("200 {} 443", vip.ip()), "{mode:?} {}", host.name());
        }
    }
}

/// A name server in a pod that knows one address for every name; it ends when dropped.
struct NameServer {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

const NAMED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);

impl NameServer {
    fn start(pod: &Pod) -> Self {
        let address = at(pod.v4(), 53);
        let sockets = move || (UdpSocket::bind(address).unwrap(), TcpListener::bind(address).unwrap());
        let (udp, tcp) = pod.run(sockets).unwrap();
        udp.set_read_timeout(Some(QUIET)).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let serve = |mut once: Box<dyn FnMut() + Send>| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    once();
                }
            })
        };
        let datagrams = serve(Box::new(move || {
            let mut query = [0; 512];
            if let Ok((length, client)) = udp.recv_from(&mut query) {
                udp.send_to(&answer(&query[..length]), client).unwrap();
            }
        }));
        let streams = serve(Box::new(move || match tcp.accept() {
            Ok((mut stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut query = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut query).unwrap();
                let answer = answer(&query);
                let length = u16::try_from(answer.len()).unwrap().to_be_bytes();
                stream.write_all(&[&length[..], &answer].concat()).unwrap();
            }
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }));
        Self { stop, threads: vec![datagrams, streams] }
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

/// The answer to a DNS query of one question: [`NAMED`] for an `A`, else that there is none.
fn answer(query: &[u8]) -> Vec<u8> {
    let name = query[12..].iter().position(|length| *length == 0).unwrap() + 1;
    let question = &query[12..12 + name + 4];
    let is_a = question[name..name + 2] == [0, 1];
    let mut answer = query[..2].to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
    answer.extend(question);
    if is_a {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        answer.extend(NAMED.octets());
    }
    answer
}

#[test]
fn dns_clients_resolve_through_the_cluster_ip() {
    for mode in Mode::ALL {
        let world = World::configured(mode, |_| json!({"kubeLane": {"socketLB": {"udp": true}}}));
        let pod = world.lab.node(1).add_pod("node1-dns").unwrap();
        let client = world.lab.node(0).add_pod("client").unwrap();
        let _server = NameServer::start(&pod);
        let ports = ["UDP", "TCP"].map(|protocol| Port::new(protocol, 53, 53));
        world.put("dns", &ports, 10, &endpoints(&[&pod]));
        let vip = vips(10)[0].to_string();
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("resolv.conf");
        for options in ["", "use-vc"] {
            fs::write(&conf, format!("nameserver {vip}\noptions attempts:10 timeout:1 {options}\n")).unwrap();
            // A mount namespace of its own, for the resolver's one configuration.
            let script = r#"mount --bind "$1" /etc/resolv.conf && getent ahostsv4 "$2""#;
            let conf = conf.to_str().unwrap();
            let arguments = ["--mount", "sh", "-c", script, "sh", conf, "name.example."];
            let found = output(&client, "unshare", &arguments);
            assert!(found.starts_with(&NAMED.to_string()), "{mode:?} {options}: {found}");
        }
        for transport in ["+notcp", "+tcp"] {
            let server = format!("@{vip}");
            let found = output(&client, "dig", &[&server, "+short", "+tries=3", transport, "name.example."]);
            assert_eq!(found.trim(), NAMED.to_string(), "{mode:?} {transport}");
        }
    }
}

/// Asks the echo server at the other end who it is.
fn ask(mut stream: impl Read + Write) -> String {
    stream.write_all(b"1 0\n").unwrap();
    read_answer(stream)
}

fn read_answer(mut stream: impl Read) -> String {
    let mut answer = [0; 256];
    let length = stream.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    answer.split(' ').nth(1).unwrap_or_default().to_owned()
}

#[test]
fn an_mptcp_socket_connects() {
    for mode in Mode::ALL {
        let world = World::in_mode(mode);
        let (pod, _echoes) = serving(&world.lab, 1, "server");
        let client = world.lab.node(0).add_pod("client").unwrap();
        world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
        for vip in vips(10).map(|vip| at(vip, 80)) {
            until_met(&client, vip, answered_in(mode));
            let connect = move || {
                let socket =
                    Socket::new(Domain::for_address(vip), Type::STREAM, Some(Protocol::MPTCP)).unwrap();
                socket.connect_timeout(&vip.into(), Duration::from_secs(1)).unwrap();
                ask(socket)
            };
            assert_eq!(client.run(connect).unwrap(), pod.name(), "{mode:?} {vip}");
        }
    }
}

#[test]
fn data_in_the_syn_reaches_the_server() {
    for mode in Mode::ALL {
        let world = World::in_mode(mode);
        let (pod, _echoes) = serving(&world.lab, 1, "server");
        let client = world.lab.node(0).add_pod("client").unwrap();
        // Client and server, without a cookie, at every listener.
        let enable =
            || fs::write("/proc/sys/net/ipv4/tcp_fastopen", (0x1 | 0x2 | 0x4 | 0x200 | 0x400).to_string());
        for host in [&*client as &Host, &pod] {
            host.run(enable).unwrap().unwrap();
        }
        let echo = pod.serve(Proto::Tcp, 8090).unwrap();
        world.put("web", &[Port::new("TCP", 80, 8090)], 10, &endpoints(&[&pod]));
        for vip in vips(10).map(|vip| at(vip, 80)) {
            until_met(&client, vip, answered_in(mode));
            let begin = move || {
                let socket = Socket::new(Domain::for_address(vip), Type::STREAM, None).unwrap();
                socket.send_to_with_flags(b"1 0\n", &vip.into(), nix::libc::MSG_FASTOPEN).unwrap();
                let stream = TcpStream::from(socket);
                assert_eq!(stream.peer_addr().unwrap(), vip);
                let by = read_answer(&stream);
                (by, fs::read_to_string("/proc/thread-self/net/netstat").unwrap())
            };
            let (by, netstat) = client.run(begin).unwrap();
            assert_eq!(by, pod.name(), "{mode:?} {vip}");
            assert_ne!(counter(&netstat, "TCPFastOpenActive"), 0, "{mode:?} {vip}: no data was in the SYN");
        }
        assert!(echo.count() >= 2);
    }
}

/// A counter of `/proc/net/netstat`: lines of names, each followed by its values.
fn counter(netstat: &str, name: &str) -> u64 {
    let lines: Vec<_> = netstat.lines().map(|line| line.split(' ').collect::<Vec<_>>()).collect();
    let value = lines.chunks(2).find_map(|pair| {
        let at = pair[0].iter().position(|field| *field == name)?;
        pair[1][at].parse().ok()
    });
    value.unwrap_or_else(|| panic!("no counter {name}"))
}

#[test]
fn datagrams_come_from_where_they_were_sent() {
    for (mode, udp) in [(Mode::Nftables, false), (Mode::Ebpf, false), (Mode::Ebpf, true)] {
        let world = World::configured(mode, |_| json!({"kubeLane": {"socketLB": {"udp": udp}}}));
        let pods = [serving(&world.lab, 0, "a"), serving(&world.lab, 1, "b")];
        let client = world.lab.node(0).add_pod("client").unwrap();
        world.put("web", &web_ports(), 10, &endpoints(&[&pods[0].0, &pods[1].0]));
        for vip in vips(10).map(|vip| at(vip, 80)) {
            until_met(&client, vip, answered_in(mode));
            let exchange = move || {
                let any: IpAddr =
                    if vip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
                let socket = UdpSocket::bind((any, 0)).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                let by = |number: u32| {
                    socket.send_to(format!("{number} 0\n").as_bytes(), vip).unwrap();
                    let mut answer = [0; 256];
                    let (length, from) = socket.recv_from(&mut answer).unwrap();
                    assert_eq!(from, vip);
                    String::from_utf8_lossy(&answer[..length]).split(' ').nth(1).unwrap().to_owned()
                };
                // One socket stays with one backend: what speaks QUIC must not be torn apart.
                (0..20).map(by).collect::<Vec<_>>()
            };
            let by = client.run(exchange).unwrap();
            assert!(by.iter().all(|one| *one == by[0]), "{mode:?} {udp} {vip}: {by:?}");
            let tracked = output(
                world.lab.node(0),
                "conntrack",
                &["-L", "-p", "udp", "-d", &vip.ip().to_string(), "-f", family(vip)],
            );
            assert_eq!(tracked.contains("dport=80"), !udp, "{mode:?} {udp}: {tracked}");
        }
    }
}

fn family(address: SocketAddr) -> &'static str {
    if address.is_ipv4() { "ipv4" } else { "ipv6" }
}

#[test]
fn an_ipv6_socket_dials_an_ipv4_service() {
    for mode in Mode::ALL {
        let world = World::in_mode(mode);
        let (pod, _echoes) = serving(&world.lab, 1, "server");
        let client = world.lab.node(0).add_pod("client").unwrap();
        world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
        let IpAddr::V4(vip) = vips(10)[0] else { panic!("IPv4 comes first") };
        let mapped = at(vip.to_ipv6_mapped().into(), 80);
        let met = until_met(&client, mapped, answered_in(mode));
        assert!(answered_in(mode)(&met), "{mode:?}: {met:?}");
    }
}

#[test]
fn a_socket_bound_to_a_loopback_address_meets_what_it_does_without_ebpf() {
    let outcomes = Mode::ALL.map(|mode| {
        let world = World::in_mode(mode);
        let (pod, _echoes) = serving(&world.lab, 1, "server");
        world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
        let node = world.lab.node(0);
        let vip = at(vips(10)[0], 80);
        until_met(node, vip, answered_in(mode));
        let bound = Dial::new(Proto::Tcp, vip).from((Ipv4Addr::LOCALHOST, 0).into()).timeout(QUIET);
        node.dial_with(bound).unwrap()
    });
    assert_eq!(outcomes[0], outcomes[1]);
}

#[test]
fn a_cgroup_that_is_left_alone_meets_nftables() {
    let world = World::configured(Mode::Ebpf, |lab| {
        let alone = lab.node(0).cgroup().join("kubepods/alone");
        for path in [&alone, &alone.join("below")] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("cgroup.type"), "threaded").unwrap();
        }
        json!({"kubeLane": {"socketLB": {"leaveAlone": ["/kubepods/alone"]}}})
    });
    let (pod, _echoes) = serving(&world.lab, 1, "server");
    let client = world.lab.node(0).add_pod("client").unwrap();
    world.put("web", &web_ports(), 10, &endpoints(&[&pod]));
    let vip = at(vips(10)[0], 80);
    let cgroup = client.cgroup().to_owned();
    assert!(until_met(&client, vip, |met| met.at_socket).at_socket);
    for alone in [cgroup.join("alone"), cgroup.join("alone/below")] {
        let threads = alone.join("cgroup.threads");
        let dial = Dial::new(Proto::Tcp, vip);
        let met = client
            .run(move || {
                fs::write(threads, "0").unwrap();
                dial.meet()
            })
            .unwrap();
        assert!(met.outcome.by().is_some() && !met.at_socket, "{}: {met:?}", alone.display());
    }
    let told = || world.agents[0].status(&[]).unwrap().1;
    let line = format!("  left alone at the socket: {}\n", cgroup.join("alone").display());
    assert!(told().contains(&line), "{}", told());
    for alone in [cgroup.join("alone/below"), cgroup.join("alone")] {
        fs::remove_dir(alone).unwrap();
    }
    assert!(told().contains(&line.replace('\n', " (not there)\n")), "{}", told());

    // One that comes again is another. Looking for it each second would take half a second each time.
    let mut waited = Duration::ZERO;
    for _ in 0..6 {
        let alone = cgroup.join("alone");
        fs::create_dir(&alone).unwrap();
        fs::write(alone.join("cgroup.type"), "threaded").unwrap();
        let begun = Instant::now();
        let (threads, dial) = (alone.join("cgroup.threads"), Dial::new(Proto::Tcp, vip));
        let left_alone = move || {
            fs::write(threads, "0").unwrap();
            while dial.meet().at_socket {
                assert!(begun.elapsed() < SYNC);
            }
        };
        client.run(left_alone).unwrap();
        waited += begun.elapsed();
        fs::remove_dir(&alone).unwrap();
    }
    assert!(waited < Duration::from_millis(1500), "{waited:?}");
}
