//! `connect()` and `getpeername()` of TCP sockets.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

use socket2::{Domain, Protocol, Socket, Type};

use super::*;

/// Dials, and says who answered and who the socket says its peer is.
fn ask(client: &Host, to: SocketAddr) -> (String, SocketAddr) {
    client.run(move || answer(TcpStream::connect(to).unwrap())).unwrap()
}

fn answer(mut stream: TcpStream) -> (String, SocketAddr) {
    stream.write_all(b"1 0\n").unwrap();
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    (line.split(' ').nth(1).unwrap().to_owned(), stream.peer_addr().unwrap())
}

/// A socket of the client's that is bound to this address.
fn bound(client: &Host, from: SocketAddr, to: SocketAddr) -> Outcome {
    client.dial_with(Dial::new(Proto::Tcp, to).from(from).timeout(QUIET)).unwrap()
}

/// A Service's ports, 1 and 2, that lead to pod a, in IPv4 and IPv6.
fn lead_to_a(stage: &mut Stage) -> [SocketAddr; 2] {
    let to = service(1);
    for (id, (vip, backend)) in (1..).zip(to.into_iter().zip(backend(&stage.a))) {
        stage.programs.port(id, 0, &[(id, backend)]);
        stage.programs.frontend(FrontendKey::tcp(vip), id, 0);
    }
    to
}

/// A Service's IPv4 port, 1, with this affinity, that leads to the pods a and b, which are the backends 1 and 2.
fn lead_to_both(stage: &mut Stage, affinity: u32) -> SocketAddr {
    let [vip, _] = service(1);
    let ([a, _], [b, _]) = (backend(&stage.a), backend(&stage.b));
    stage.programs.port(1, affinity, &[(1, a), (2, b)]);
    stage.programs.frontend(FrontendKey::tcp(vip), 1, 0);
    vip
}

#[test]
fn clients_reach_backends_and_see_what_they_dialled() {
    let mut stage = Stage::new();
    let [v4, v6] = lead_to_a(&mut stage);
    for to in [v4, v6, mapped(v4)] {
        assert_eq!(ask(&stage.client, to), ("a".to_owned(), to), "{to}");
    }
    assert_eq!(stage.programs.connections([1, 2]), [2, 1]);

    // Another port, another protocol's frontend, and what is no Service's at all pass.
    let other = at(v4.ip(), 81);
    stage.programs.frontend(udp(other), 1, 0);
    assert_eq!(stage.meets(&stage.client, other).by(), None);
    let [direct, _] = backend(&stage.b);
    assert_eq!(ask(&stage.client, direct), ("b".to_owned(), direct));
    assert_eq!(stage.programs.connections([1, 2]), [2, 1]);
}

#[test]
fn every_backend_of_the_set_is_picked_and_no_other() {
    let mut stage = Stage::new();
    let to = lead_to_both(&mut stage, 0);
    let tally = stage.client.dial_many(Proto::Tcp, to, 60).unwrap();
    assert_eq!((tally.answers(), tally.answered.len()), (60, 2), "{tally:?}");

    stage.programs.set(Set::cluster_of(1), &[2]);
    let tally = stage.client.dial_many(Proto::Tcp, to, 20).unwrap();
    assert_eq!(tally.answered["b"], 20);

    // A slot of another set, and a backend of another port, mean that the program is late.
    let set = Set::cluster_of(1);
    stage.programs.array(maps::SLOTS).set(set * ROOM, Slot::new(2, set + 1), 0).unwrap();
    assert_eq!(stage.meets(&stage.client, to).by(), None);
    stage.programs.set(set, &[2]);
    let [b, _] = backend(&stage.b);
    let foreign = Backend::new(b.ip().into(), Port::from_host(b.port()), 7);
    stage.programs.array(maps::BACKENDS).set(2, foreign, 0).unwrap();
    assert_eq!(stage.meets(&stage.client, to).by(), None);
    // As does a frontend whose fingerprint is another key's.
    let frontend = Frontend::new(set, 0, 1);
    stage.programs.port(1, 0, &[(2, b)]);
    assert_eq!(stage.meets(&stage.client, to).by(), Some("b"));
    stage.programs.hash(maps::FRONTENDS).insert(FrontendKey::tcp(to), frontend, 0).unwrap();
    assert_eq!(stage.meets(&stage.client, to).by(), None);
}

#[test]
fn what_has_no_endpoint_is_refused_or_left_alone() {
    let mut stage = Stage::new();
    let [v4, v6] = lead_to_a(&mut stage);
    stage.programs.refuse(1);
    stage.programs.refuse(2);
    for to in [v4, v6, mapped(v4)] {
        let refused = stage.client.run(move || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.connect(&to.into()).unwrap_err().raw_os_error()
        });
        assert_eq!(refused.unwrap(), Some(libc::ECONNREFUSED), "{to}");
    }
    assert_eq!([1, 2].map(|port| stage.programs.refused(port)), [2, 1]);
    assert_eq!(stage.programs.connections([1, 2]), [0, 0]);

    stage.programs.set(Set::cluster_of(1), &[]);
    assert_eq!(stage.meets(&stage.client, v4), Outcome::TimedOut);

    // A kernel on which programs cannot say why.
    drop(stage);
    let mut stage = Stage::with(false);
    let [v4, _] = lead_to_a(&mut stage);
    stage.programs.refuse(1);
    assert_eq!(stage.meets(&stage.client, v4), Outcome::TimedOut);
    assert_eq!(stage.programs.refused(1), 0);
}

#[test]
fn clients_come_back_to_the_backend_they_had() {
    let mut stage = Stage::new();
    let to = lead_to_both(&mut stage, 10);
    let pods = ["a", "b"];
    let had = ask(&stage.client, to).0;
    let id = 1 + pods.iter().position(|pod| **pod == had).unwrap() as u32;
    assert_eq!(stage.client.dial_many(Proto::Tcp, to, 20).unwrap().answered[&had], 20);
    assert_eq!(stage.programs.remembered(&stage.bare.client, 1).unwrap().backend(), id);

    // Long ago, but not too long.
    let other = 3 - id;
    stage.programs.remember(&stage.bare.client, 1, Remembered::new(other, seconds() - 9));
    assert_eq!(ask(&stage.client, to).0, pods[other as usize - 1]);
    let refreshed = stage.programs.remembered(&stage.bare.client, 1).unwrap();
    assert!(seconds() - refreshed.seconds() < 5, "{refreshed:?}");

    // Too long ago: whoever is picked.
    let met: BTreeSet<_> = (0..40)
        .map(|_| {
            stage.programs.remember(&stage.bare.client, 1, Remembered::new(other, seconds() - 20));
            ask(&stage.client, to).0
        })
        .collect();
    assert_eq!(met.len(), 2);

    // What has left the set is not met again, and forgotten.
    stage.programs.remember(&stage.bare.client, 1, Remembered::new(1, seconds()));
    stage.programs.set(Set::cluster_of(1), &[2]);
    stage.programs.retire(1);
    assert_eq!(ask(&stage.client, to).0, "b");
    assert_eq!(stage.programs.remembered(&stage.bare.client, 1).unwrap().backend(), 2);
}

#[test]
fn who_cannot_be_remembered_is_left_alone() {
    let mut stage = Stage::new();
    let to = lead_to_both(&mut stage, 10);
    // The map has room for two clients.
    stage.programs.remember(&stage.bare.a, 1, Remembered::new(1, seconds()));
    stage.programs.remember(&stage.bare.b, 1, Remembered::new(1, seconds()));
    assert_eq!(stage.meets(&stage.client, to), Outcome::TimedOut);
    assert_eq!(stage.programs.connections([1, 2]), [0, 0]);
    assert_eq!(stage.meets(&stage.b, to).by(), Some("a"));
}

#[test]
fn sockets_bound_to_an_address_are_answered_where_it_changes_nothing() {
    let mut stage = Stage::new();
    stage.answer(PODS | HOST);
    let [v4, v6] = lead_to_a(&mut stage);
    let (own4, own6) = (at(stage.client.v4(), 0), at(stage.client.v6(), 0));
    let source = Answered::SOURCE | Answered::SOURCE << Answered::family(true);
    let none = Network6 { network: [1; 4], mask: [!0; 4] };
    let rules = stage.rules(PODS | HOST);
    let elsewhere = Settings {
        answered: Answered(PODS | HOST | source),
        pods4: Network4 { network: 1, mask: !0 },
        pods6: none,
        ..rules
    };
    for (rules, pods_are_answered) in
        [(rules, true), (Settings { answered: elsewhere.answered, ..rules }, true), (elsewhere, false)]
    {
        stage.programs.settings(rules);
        for (from, to) in [(own4, v4), (own6, v6), (mapped(own4), mapped(v4))] {
            assert_eq!(bound(&stage.client, from, to).by().is_some(), pods_are_answered, "{from} → {to}");
        }
        // Bound to no address.
        assert_eq!(bound(&stage.client, any6(), v6).by(), Some("a"));
        assert_eq!(bound(&stage.client, any6(), mapped(v4)).by(), Some("a"));
        assert_eq!(stage.meets(stage.node(), v4).by(), Some("a"));
        // Loopback, and the host's.
        let before = stage.programs.connections([1, 2]);
        bound(&stage.client, "127.0.0.1:0".parse().unwrap(), v4);
        bound(&stage.client, "127.9.9.9:0".parse().unwrap(), v4);
        bound(&stage.client, "[::1]:0".parse().unwrap(), v6);
        bound(stage.node(), at(stage.node().v4(), 0), v4);
        bound(stage.node(), at(stage.node().v6(), 0), v6);
        assert_eq!(stage.programs.connections([1, 2]), before);
    }
}

#[test]
fn sockets_that_bind_gave_a_port_are_left_alone() {
    let mut stage = Stage::new();
    stage.answer(PODS | HOST);
    let [v4, v6] = lead_to_a(&mut stage);
    let any4 = at(Ipv4Addr::UNSPECIFIED.into(), 0);
    for (any, own, to) in [
        (any4, at(stage.client.v4(), 0), v4),
        (any6(), at(stage.client.v6(), 0), v6),
        (any6(), mapped(at(stage.client.v4(), 0)), mapped(v4)),
    ] {
        // A port of choice, and one that the kernel chooses.
        for (from, port) in [(any, 999), (own, 999), (any, 0), (own, 0)] {
            let from = at(from.ip(), port);
            let connect = move || {
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket.bind(&from.into()).unwrap();
                socket.connect_timeout(&to.into(), QUIET).unwrap_err().kind()
            };
            assert_eq!(stage.client.run(connect).unwrap(), io::ErrorKind::TimedOut, "{from} → {to}");
        }
    }
    assert_eq!(stage.programs.connections([1, 2]), [0, 0]);
    // The kernel takes the port back that it gave a socket for a connection.
    let again = move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        for _ in 0..3 {
            socket.connect(&v4.into()).unwrap();
            disconnect(&socket);
        }
        socket.connect(&v4.into()).unwrap();
        answer(socket.into())
    };
    assert_eq!(stage.client.run(again).unwrap(), ("a".to_owned(), v4));
    assert_eq!(stage.programs.connections([1]), [4]);
}

/// Takes a socket's peer away: `connect()` to an address of no family.
fn disconnect(socket: &Socket) {
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: the kernel reads as many bytes as `nobody` has.
    let result = unsafe {
        libc::connect(socket.as_raw_fd(), &raw const nobody, size_of_val(&nobody) as libc::socklen_t)
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

#[test]
fn sockets_tied_to_a_device_are_left_alone() {
    let mut stage = Stage::new();
    let [v4, _] = lead_to_a(&mut stage);
    let outcome = stage.client.run(move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind_device(Some(b"eth0")).unwrap();
        socket.connect_timeout(&v4.into(), QUIET).unwrap_err().kind()
    });
    assert_eq!(outcome.unwrap(), io::ErrorKind::TimedOut);
    assert_eq!(stage.programs.connections([1]), [0]);
}

#[test]
fn host_and_pods_are_told_apart_and_answered_by_what_is_set() {
    let mut stage = Stage::new();
    let [v4, v6] = lead_to_a(&mut stage);
    let external = service(2);
    for (port, vip) in (1..).zip(external) {
        stage.programs.frontend(FrontendKey::tcp(vip), port, Frontend::EXTERNAL);
    }
    let other = stage.node().add_container("other").unwrap();
    let clients = [
        (Client::Pod, (*stage.client).clone()),
        (Client::Host, (**stage.node()).clone()),
        (Client::Other, (*other).clone()),
    ];
    for (client, host) in &clients {
        for (is_external, [v4, v6]) in [(false, [v4, v6]), (true, external)] {
            for (is_ipv6, to) in [(false, v4), (true, v6)] {
                let bit = Answered::bit(*client, is_external, is_ipv6);
                stage.answer(bit);
                assert_eq!(stage.meets(host, to).by(), Some("a"), "{to} {client:?}");
                // Where others are answered, pods are not told from them.
                let other = Answered::bit(Client::Other, is_external, is_ipv6);
                let bits = if *client == Client::Pod { bit | other } else { bit };
                let sources = Answered::SOURCE | Answered::SOURCE << Answered::family(true);
                stage.answer(!bits & 0xffff & !sources);
                assert_eq!(stage.meets(host, to).by(), None, "{to} {client:?}");
            }
        }
    }
}

#[test]
fn nodeports_are_answered_on_the_nodes_addresses() {
    let mut stage = Stage::new();
    lead_to_a(&mut stage);
    let external =
        |is_ipv6| Answered::bit(Client::Pod, true, is_ipv6) | Answered::bit(Client::Host, true, is_ipv6);
    let answered = PODS | external(false) | external(true);
    let node = (**stage.node()).clone();
    let port = 30080;
    for (id, any) in (1..).zip(["0.0.0.0", "::"]) {
        let key = FrontendKey::tcp(at(any.parse().unwrap(), port));
        stage.programs.frontend(key, id, Frontend::EXTERNAL);
    }
    let loopback = at(Ipv4Addr::LOCALHOST.into(), port);
    let (node4, node6) = (at(node.v4(), port), at(node.v6(), port));

    stage.programs.node_address(node.v4());
    stage.answer(answered);
    assert_eq!(stage.meets(&stage.client, node4), Outcome::Refused);
    stage.answer(answered | Answered::NODEPORTS);
    assert_eq!(ask(&stage.client, node4), ("a".to_owned(), node4));
    assert_eq!(ask(&stage.client, mapped(node4)), ("a".to_owned(), mapped(node4)));
    assert_eq!(ask(&node, node4), ("a".to_owned(), node4));
    assert_eq!(stage.meets(&stage.client, node6), Outcome::Refused);
    stage.programs.node_address(node.v6());
    assert_eq!(ask(&stage.client, node6), ("a".to_owned(), node6));

    // Elsewhere nobody listens on that port.
    for to in [at(stage.b.v4(), port), at(stage.client.v4(), port), loopback] {
        assert_eq!(stage.meets(&stage.client, to), Outcome::Refused, "{to}");
    }
    assert_eq!(stage.meets(&node, loopback), Outcome::Refused);
    stage.answer(answered | Answered::NODEPORTS | Answered::LOOPBACK_NODEPORTS);
    assert_eq!(ask(&node, loopback), ("a".to_owned(), loopback));
    assert_eq!(stage.meets(&stage.client, loopback), Outcome::Refused);
    assert_eq!(stage.meets(&node, "[::1]:30080".parse().unwrap()), Outcome::Refused);
    // That is how a socket dials its own host.
    for any in ["0.0.0.0:30080", "[::]:30080", "[::ffff:0.0.0.0]:30080"] {
        assert_eq!(stage.meets(&node, any.parse().unwrap()), Outcome::Refused, "{any}");
    }
}

#[test]
fn cgroups_are_left_alone_with_all_below_them() {
    let mut stage = Stage::new();
    let [to, _] = lead_to_a(&mut stage);
    let parent = stage.client.cgroup().join("parent");
    let child = parent.join("child");
    for cgroup in [&parent, &child] {
        fs::create_dir(cgroup).unwrap();
        fs::write(cgroup.join("cgroup.type"), "threaded").unwrap();
    }
    stage.programs.hash(maps::LEFT_ALONE).insert(cgroup_id(&parent), 1_u64, 0).unwrap();
    let client = (*stage.client).clone();
    let dial_in = |cgroup: &Path| {
        let threads = cgroup.join("cgroup.threads");
        let dial = Dial::new(Proto::Tcp, to).timeout(QUIET);
        let outcome = client.run(move || {
            fs::write(threads, "0").unwrap();
            dial.ask()
        });
        outcome.unwrap().by().is_some()
    };
    assert!([&parent, &child].into_iter().all(|cgroup| dial_in(cgroup)));
    let settings = stage.rules(PODS | Answered::LEFT_ALONE);
    stage.programs.settings(settings);
    assert!(![&parent, &child].into_iter().any(|cgroup| dial_in(cgroup)));
    assert!(dial_in(stage.client.cgroup()));
    fs::remove_dir(&child).unwrap();
    fs::remove_dir(&parent).unwrap();
}

#[test]
fn a_socket_that_dials_again_knows_its_new_peer() {
    let mut stage = Stage::new();
    let [to, _] = service(1);
    let closed = at(stage.a.v4(), 8081);
    stage.programs.port(1, 0, &[(1, closed)]);
    stage.programs.frontend(FrontendKey::tcp(to), 1, 0);
    let open = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let socket = stage.client.run(open).unwrap();
    let refused = socket.connect(&to.into()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);

    // The same address, but dialled by its own name.
    let _listener = stage.a.run(move || TcpListener::bind(closed).unwrap()).unwrap();
    socket.connect(&closed.into()).unwrap();
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(closed));
}

#[test]
fn what_does_not_block_is_answered_alike() {
    let mut stage = Stage::new();
    let [to, _] = lead_to_a(&mut stage);
    let met = stage.client.run(move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let begun = Instant::now();
        while let Err(error) = socket.connect(&to.into()) {
            match error.raw_os_error() {
                Some(libc::EINPROGRESS | libc::EALREADY) => assert!(begun.elapsed() < QUIET, "{error}"),
                Some(libc::EISCONN) => break,
                _ => panic!("{error}"),
            }
        }
        socket.set_nonblocking(false).unwrap();
        answer(socket.into())
    });
    assert_eq!(met.unwrap(), ("a".to_owned(), to));
    // Asking again how far it is, is no new connection.
    assert_eq!(stage.programs.connections([1]), [1]);
}

#[test]
fn fast_open_dials_by_the_first_write() {
    let mut stage = Stage::new();
    let [to, _] = lead_to_a(&mut stage);
    let met = stage.client.run(move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.send_to_with_flags(b"1 0\n", &to.into(), libc::MSG_FASTOPEN).unwrap();
        let mut line = [0; 4];
        let mut stream = TcpStream::from(socket);
        stream.read_exact(&mut line).unwrap();
        (String::from_utf8_lossy(&line).into_owned(), stream.peer_addr().unwrap())
    });
    assert_eq!(met.unwrap(), ("1 a ".to_owned(), to));

    // By the option, connect() only notes the address.
    let met = stage.client.run(move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let (level, option, on) = (libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1_i32);
        let size = size_of_val(&on) as libc::socklen_t;
        // SAFETY: the kernel reads `size` bytes, which `on` has.
        let result =
            unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), size) };
        assert_eq!(result, 0);
        socket.connect(&to.into()).unwrap();
        answer(socket.into())
    });
    assert_eq!(met.unwrap(), ("a".to_owned(), to));
    assert_eq!(stage.programs.connections([1]), [2]);
}

/// An MPTCP socket dials by a TCP socket of its own: that is translated. But it is the first that `getpeername()` asks,
/// and that has no memory of it.
#[test]
fn mptcp_reaches_backends_and_sees_their_addresses() {
    let mut stage = Stage::new();
    let [to, _] = lead_to_a(&mut stage);
    let met = stage.client.run(move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).unwrap();
        socket.connect(&to.into()).unwrap();
        answer(socket.into())
    });
    let [a, _] = backend(&stage.a);
    assert_eq!(met.unwrap(), ("a".to_owned(), a));
    assert_eq!(stage.programs.connections([1]), [1]);
}

#[test]
fn servers_see_their_clients() {
    let mut stage = Stage::new();
    let [to, _] = service(1);
    let own = at(stage.client.v4(), TARGET);
    stage.programs.port(1, 0, &[(1, own)]);
    stage.programs.frontend(FrontendKey::tcp(to), 1, 0);
    // A pod that is led to itself.
    let (client, server, said) = stage
        .client
        .run(move || {
            let listener = TcpListener::bind(own).unwrap();
            let client = TcpStream::connect(to).unwrap();
            let (server, said) = listener.accept().unwrap();
            ((client.local_addr().unwrap(), client.peer_addr().unwrap()), server.peer_addr().unwrap(), said)
        })
        .unwrap();
    assert_eq!((client.1, server, said), (to, client.0, client.0));
    assert_eq!(client.0.ip(), own.ip());
}

#[test]
fn programs_of_others_stay_attached_and_go_without_a_trace() {
    let mut stage = Stage::new();
    let [to, _] = lead_to_a(&mut stage);
    let mut others = Programs::attach(stage.node().cgroup(), true);
    assert_eq!(stage.meets(&stage.client, to).by(), Some("a"));
    // These see the backend dialled, which is no frontend of theirs.
    assert_eq!(others.connections([1]), [0]);
    drop(others);
    assert_eq!(stage.meets(&stage.client, to).by(), Some("a"));
    assert_eq!(stage.programs.connections([1]), [2]);
}
