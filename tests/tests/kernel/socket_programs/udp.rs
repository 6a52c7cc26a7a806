//! Datagrams of sockets that are not connected.

use std::io;

use super::*;

/// A UDP socket in the client's namespace, in both families.
fn socket(client: &Host) -> UdpSocket {
    let open = || {
        let socket = UdpSocket::bind(any6()).unwrap();
        socket.set_read_timeout(Some(QUIET)).unwrap();
        socket
    };
    client.run(open).unwrap()
}

/// Sends a question.
fn send(socket: &UdpSocket, to: SocketAddr) -> io::Result<usize> {
    socket.send_to(b"1 0", mapped(to))
}

/// Who answers next, and who that is for the socket.
fn receive(socket: &UdpSocket) -> Option<(String, SocketAddr)> {
    let mut buffer = [0; 64];
    let (size, from) = socket.recv_from(&mut buffer).ok()?;
    let answer = String::from_utf8(buffer[..size].to_vec()).unwrap();
    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
    Some((answer.split(' ').nth(1).unwrap().to_owned(), from))
}

fn ask(socket: &UdpSocket, to: SocketAddr) -> Option<(String, SocketAddr)> {
    send(socket, to).unwrap();
    receive(socket)
}

/// Leads the IPv4 address of Service `number` to the backend with the same id, of the port with the same id.
fn lead(stage: &mut Stage, number: u8, backend: SocketAddr) -> SocketAddr {
    let [vip, _] = service(number);
    stage.programs.port(number.into(), 0, &[(number.into(), backend)]);
    stage.programs.frontend(udp(vip), number.into(), 0);
    vip
}

fn by(pod: &str, from: SocketAddr) -> Option<(String, SocketAddr)> {
    Some((pod.to_owned(), from))
}

#[test]
fn datagrams_reach_one_backend_and_answers_come_from_the_frontend() {
    let mut stage = Stage::new();
    for (port, (vip, (a, b))) in
        (1..).zip(service(1).into_iter().zip(backend(&stage.a).into_iter().zip(backend(&stage.b))))
    {
        stage.programs.port(port, 0, &[(2 * port, a), (2 * port + 1, b)]);
        stage.programs.frontend(udp(vip), port, 0);
    }
    let [v4, v6] = service(1);
    // Of an IPv6 socket, the IPv4 address is v4-mapped.
    let both = socket(&stage.client);
    for to in [v4, v6] {
        let (first, from) = ask(&both, to).unwrap();
        assert_eq!(from, to);
        for _ in 0..20 {
            assert_eq!(ask(&both, to), by(&first, to));
        }
    }
    let counts = stage.programs.connections([2, 3, 4, 5]);
    assert_eq!((counts[0] + counts[1], counts[2] + counts[3]), (1, 1));

    // An IPv4 socket; others of the client are led elsewhere.
    let met = stage.client.run(move || {
        let mut met: Vec<_> = (0..30)
            .map(|_| {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.set_read_timeout(Some(QUIET)).unwrap();
                socket.send_to(b"1 0", v4).unwrap();
                receive(&socket).unwrap()
            })
            .collect();
        met.sort();
        met.dedup();
        met
    });
    assert_eq!(met.unwrap(), [("a".to_owned(), v4), ("b".to_owned(), v4)]);
}

#[test]
fn one_socket_may_ask_several_services() {
    let mut stage = Stage::new();
    let ([a, _], [b, _]) = (backend(&stage.a), backend(&stage.b));
    let (one, two) = (lead(&mut stage, 1, a), lead(&mut stage, 2, b));
    let socket = socket(&stage.client);
    send(&socket, one).unwrap();
    send(&socket, two).unwrap();
    send(&socket, one).unwrap();
    let mut answers: Vec<_> = (0..3).map(|_| receive(&socket).unwrap()).collect();
    answers.sort();
    let expected = [("a", one), ("a", one), ("b", two)].map(|(pod, from)| (pod.to_owned(), from));
    assert_eq!(answers, expected);
    // What it asks by its own name answers by that.
    let other = stage.b.serve(Proto::Udp, 8090).unwrap();
    assert_eq!(ask(&socket, other.v4()), by("b", other.v4()));
    assert_eq!(stage.programs.connections([1, 2]), [1, 1]);

    // Two frontends that lead to one backend: the answers could be of either, so the second is left alone, for good.
    let three = lead(&mut stage, 3, a);
    assert_eq!(ask(&socket, three), None);
    lead(&mut stage, 3, b);
    let [_, fresh] = [(); 2].map(|()| self::socket(&stage.client));
    assert_eq!(ask(&socket, three), None);
    assert_eq!(ask(&fresh, three), by("b", three));
    assert_eq!(ask(&socket, one), by("a", one));
}

#[test]
fn a_backend_that_a_socket_also_asks_by_its_own_name_is_left_alone() {
    let mut stage = Stage::new();
    let ([a, a6], [b, _]) = (backend(&stage.a), backend(&stage.b));
    let (one, two) = (lead(&mut stage, 1, a), lead(&mut stage, 2, b));
    let [_, v6] = service(3);
    stage.programs.port(3, 0, &[(3, a6)]);
    stage.programs.frontend(udp(v6), 3, 0);
    // The frontend first, or the backend first: its answers come from where they do, and nftables has the frontend.
    let sockets = [(); 2].map(|()| socket(&stage.client));
    for (vip, backend) in [(one, a), (v6, a6)] {
        assert_eq!(ask(&sockets[0], vip), by("a", vip));
        assert_eq!(ask(&sockets[0], backend), by("a", backend));
        assert_eq!(ask(&sockets[1], backend), by("a", backend));
        for socket in &sockets {
            assert_eq!(ask(socket, vip), None);
            assert_eq!(ask(socket, backend), by("a", backend));
        }
    }
    // Other frontends of these sockets are not concerned, nor are other sockets.
    for socket in &sockets {
        assert_eq!(ask(socket, two), by("b", two));
    }
    assert_eq!(ask(&socket(&stage.client), one), by("a", one));
}

#[test]
fn a_ninth_service_of_a_socket_is_left_alone() {
    let mut stage = Stage::new();
    let ports: Vec<_> = (1..=9).map(|number| 9000 + number).collect();
    let echoes: Vec<_> = ports.iter().map(|port| stage.a.serve(Proto::Udp, *port).unwrap()).collect();
    let vips: Vec<_> = (1..).zip(&echoes).map(|(number, echo)| lead(&mut stage, number, echo.v4())).collect();
    let socket = socket(&stage.client);
    let (ninth, eight) = vips.split_last().unwrap();
    for _ in 0..2 {
        assert!(eight.iter().all(|vip| ask(&socket, *vip) == by("a", *vip)));
        assert_eq!(ask(&socket, *ninth), None);
    }
    assert_eq!(ask(&self::socket(&stage.client), *ninth), by("a", *ninth));
}

#[test]
fn a_backend_that_leaves_is_not_met_again() {
    let mut stage = Stage::new();
    let ([a, _], [b, _]) = (backend(&stage.a), backend(&stage.b));
    let to = lead(&mut stage, 1, a);
    let slow = stage.a.serve(Proto::Udp, 9000).unwrap();
    stage.programs.port(1, 0, &[(1, slow.v4())]);
    let socket = socket(&stage.client);
    slow.pause();
    send(&socket, to).unwrap();
    stage.programs.retire(1);
    stage.programs.port(1, 0, &[(2, b)]);
    assert_eq!(ask(&socket, to), by("b", to));
    assert_eq!(stage.programs.connections([1, 2]), [1, 1]);
    // What answers too late says who it is, as where conntrack has forgotten a flow.
    slow.resume();
    assert_eq!(receive(&socket), by("a", slow.v4()));

    // The id is another backend's by now, in the same set.
    stage.programs.port(1, 0, &[(2, a)]);
    assert_eq!(ask(&socket, to), by("a", to));
    assert_eq!(stage.programs.connections([2]), [2]);
}

#[test]
fn affinity_holds_for_new_sockets() {
    let mut stage = Stage::new();
    let ([a, _], [b, _]) = (backend(&stage.a), backend(&stage.b));
    let to = lead(&mut stage, 1, a);
    stage.programs.port(1, 10, &[(1, a), (2, b)]);
    let (first, _) = ask(&socket(&stage.client), to).unwrap();
    for _ in 0..20 {
        assert_eq!(ask(&socket(&stage.client), to), by(&first, to));
    }
}

#[test]
fn what_has_no_endpoint_is_left_alone() {
    let mut stage = Stage::new();
    let [a, _] = backend(&stage.a);
    let to = lead(&mut stage, 1, a);
    let socket = socket(&stage.client);
    stage.programs.refuse(1);
    assert_eq!(ask(&socket, to), None);
    assert_eq!(stage.programs.refused(1), 0);
    stage.programs.set(Set::cluster_of(1), &[1]);
    assert_eq!(ask(&socket, to), by("a", to));
    stage.programs.set(Set::cluster_of(1), &[]);
    stage.programs.retire(1);
    assert_eq!(ask(&socket, to), None);
}

#[test]
fn connected_sockets_are_left_alone() {
    let mut stage = Stage::new();
    let [a, _] = backend(&stage.a);
    let to = lead(&mut stage, 1, a);
    let socket = socket(&stage.client);
    socket.connect(mapped(to)).unwrap();
    assert_eq!(socket.peer_addr().unwrap(), mapped(to));
    socket.send(b"1 0").unwrap();
    assert_eq!(receive(&socket), None);
    assert_eq!(stage.programs.connections([1]), [0]);

    // Who was a frontend's backend is itself, once dialled so.
    let socket = self::socket(&stage.client);
    assert_eq!(ask(&socket, to), by("a", to));
    socket.connect(mapped(a)).unwrap();
    socket.send(b"1 0").unwrap();
    assert_eq!(receive(&socket), by("a", a));
}

#[test]
fn who_is_not_answered_is_left_alone() {
    let mut stage = Stage::new();
    let [a, _] = backend(&stage.a);
    let to = lead(&mut stage, 1, a);
    let loopback = stage.client.run(move || {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        // An error of the route's, as without any program.
        let _ = socket.send_to(b"1 0", to);
    });
    loopback.unwrap();
    let node = (**stage.node()).clone();
    assert_eq!(ask(&socket(&node), to), None);
    assert_eq!(stage.programs.connections([1]), [0]);
    stage.answer(PODS | HOST);
    assert_eq!(ask(&socket(&node), to), by("a", to));
    let own = at(node.v4(), 0);
    let bound = node.run(move || {
        let socket = UdpSocket::bind(own).unwrap();
        socket.set_read_timeout(Some(QUIET)).unwrap();
        socket.send_to(b"1 0", to).unwrap();
        receive(&socket)
    });
    assert_eq!(bound.unwrap(), None);
    assert_eq!(stage.programs.connections([1]), [1]);
}
