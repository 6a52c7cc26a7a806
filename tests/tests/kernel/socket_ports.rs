//! Clients that tell their connections apart by what they dial, from one source port, or in one socket: two Services may
//! share an endpoint. In both modes each is answered, and by the name that it dialled.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use kube_lane_lab::{Host, Pod};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;
use socket2::{Domain, Socket, Type};

use super::world::{Mode, World, answered_in, at, endpoints, serving, until_met, vips, web_ports};

const PATIENCE: Duration = Duration::from_secs(2);

/// How a socket is bound before it connects.
#[derive(Clone, Copy, Debug)]
enum Bind {
    /// To this port, which others may share.
    ReuseAddress(u16),
    ReusePort(u16),
    /// To an address, which leaves the port to `connect()`.
    NoPort,
}

impl Bind {
    fn open(self, to: SocketAddr) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_linger(Some(Duration::ZERO))?;
        let port = match self {
            Self::ReuseAddress(port) => socket.set_reuse_address(true).map(|()| port)?,
            Self::ReusePort(port) => socket.set_reuse_port(true).map(|()| port)?,
            Self::NoPort => setsockopt(&socket, sockopt::IpBindAddressNoPort, &true).map(|()| 0)?,
        };
        let any =
            if to.is_ipv4() { at([0, 0, 0, 0].into(), port) } else { at(Ipv6Addr::UNSPECIFIED.into(), port) };
        socket.bind(&any.into())?;
        Ok(socket)
    }
}

/// Who answers this stream, and who that is for the socket.
fn ask(mut stream: &TcpStream) -> io::Result<(String, SocketAddr)> {
    stream.write_all(b"1 0\n")?;
    let mut answer = [0; 256];
    let length = stream.read(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    Ok((answer.split(' ').nth(1).unwrap_or_default().to_owned(), stream.peer_addr()?))
}

/// What each of these meets, which are all open at once.
fn connect_to_all(
    client: &Host,
    bind: Bind,
    all: Vec<SocketAddr>,
) -> Vec<Result<(String, SocketAddr), String>> {
    let connect = move || {
        let open = |to: &SocketAddr| -> io::Result<TcpStream> {
            let socket = bind.open(*to)?;
            socket.connect_timeout(&(*to).into(), PATIENCE)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(TcpStream::from(socket))
        };
        let streams: Vec<_> = all.iter().map(open).collect();
        let met = streams
            .iter()
            .map(|stream| ask(stream.as_ref().map_err(ToString::to_string)?).map_err(|e| e.to_string()));
        met.collect()
    };
    client.run(connect).unwrap()
}

fn mapped(to: SocketAddr) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(ip) => at(ip.to_ipv6_mapped().into(), to.port()),
        IpAddr::V6(_) => to,
    }
}

/// Services 10 and 11 have one endpoint, the pod that is returned.
fn share(world: &World, pod: &Pod) -> [Vec<SocketAddr>; 2] {
    for (name, number) in [("dns", 10), ("dns-alias", 11)] {
        world.put(name, &web_ports(), number, &endpoints(&[pod]));
    }
    [(0, pod.v4()), (1, pod.v6())]
        .map(|(family, backend)| vec![at(vips(10)[family], 80), at(vips(11)[family], 80), at(backend, 8080)])
}

#[test]
fn sockets_that_share_a_source_port_reach_all_that_they_dial() {
    for mode in Mode::ALL {
        let world = World::in_mode(mode);
        let (server, _echoes) = serving(&world.lab, 1, "server");
        let client = world.lab.node(0).add_pod("client").unwrap();
        let [v4, v6] = share(&world, &server);
        let dual = v4.iter().map(|to| mapped(*to)).collect();
        for client in [&*client as &Host, world.lab.node(0)] {
            for vip in v4[..2].iter().chain(&v6[..2]) {
                until_met(client, *vip, answered_in(mode));
            }
            for (i, all) in (0..).zip([&v4, &v6, &dual]) {
                for bind in [Bind::ReuseAddress(50123 + i), Bind::ReusePort(50223 + i), Bind::NoPort] {
                    let met = connect_to_all(client, bind, all.clone());
                    let right: Vec<_> = all.iter().map(|to| Ok((server.name().to_owned(), *to))).collect();
                    assert_eq!(met, right, "{mode:?} {} {bind:?}", client.name());
                }
            }
        }
    }
}

#[test]
fn a_socket_that_asks_services_and_their_endpoint_hears_each_by_its_name() {
    for mode in Mode::ALL {
        let world = World::configured(mode, |_| json!({"kubeLane": {"socketLB": {"udp": true}}}));
        let (server, _echoes) = serving(&world.lab, 1, "server");
        let client = world.lab.node(0).add_pod("client").unwrap();
        for all in share(&world, &server) {
            for client in [&*client as &Host, world.lab.node(0)] {
                all[..2].iter().for_each(|vip| drop(until_met(client, *vip, answered_in(mode))));
                // Each of them first, and the others in any order after it.
                for order in [[0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0], [0, 2, 1], [1, 0, 2]] {
                    let order = order.map(|i| all[i]);
                    let exchange = move || {
                        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
                        socket.set_read_timeout(Some(PATIENCE)).unwrap();
                        let asked = order.into_iter().chain(order).map(mapped);
                        let heard = asked.map(|to| {
                            socket.send_to(b"1 0\n", to).unwrap();
                            (
                                to,
                                socket
                                    .recv_from(&mut [0; 256])
                                    .map(|(_, from)| from)
                                    .map_err(|e| e.to_string()),
                            )
                        });
                        heard.collect::<Vec<_>>()
                    };
                    for (to, from) in client.run(exchange).unwrap() {
                        assert_eq!(from, Ok(to), "{mode:?} {} {order:?}", client.name());
                    }
                }
            }
        }
    }
}
