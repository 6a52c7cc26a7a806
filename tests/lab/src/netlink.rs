//! Links, addresses and routes of the namespace that the calling thread is in.
//!
//! Owns nothing that lasts: a netlink socket and its small runtime, for the length of a few requests.

use std::fmt::Display;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use futures::TryStreamExt;
use ipnetwork::IpNetwork;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, State};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::{
    Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    new_connection,
};
use tokio::runtime::{self, Runtime};

use crate::error::{Doing, Error, Result};
use crate::sysctls;

/// The index of `lo` in every namespace.
pub(crate) const LOOPBACK: u32 = 1;

/// The hardware address of every bridge: no two share a wire.
const BRIDGE_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];

/// How long a link may take until it carries packets.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// One end of a veth pair. The lab gives the index itself, so that no link is ever looked up by name.
pub(crate) struct End {
    pub(crate) name: String,
    pub(crate) index: u32,
    /// The hardware address, where it matters.
    pub(crate) mac: Option<[u8; 6]>,
}

/// Where a route leads.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Via {
    /// Straight out of a link.
    Link(u32),
    /// To a gateway that is reached through a link, whatever the other routes say.
    Gateway(IpAddr, u32),
    /// Nowhere: the sender is told "unreachable" at once.
    Unreachable,
}

/// A netlink socket in the calling thread's namespace.
pub(crate) struct Netlink {
    runtime: Runtime,
    handle: Handle,
}

impl Netlink {
    /// Opens a socket.
    pub(crate) fn open() -> Result<Self> {
        let opened = || {
            let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
            let guard = runtime.enter();
            let (connection, handle, _messages) = new_connection()?;
            drop(guard);
            runtime.spawn(connection);
            Ok::<_, std::io::Error>(Self { runtime, handle })
        };
        opened().doing(|| "open a netlink socket".into())
    }

    /// Sets a link up.
    pub(crate) fn up(&self, index: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.wait(self.handle.link().set(message).execute(), || format!("set link {index} up"))
    }

    /// Waits until a link carries packets and its addresses can be bound. The kernel leaves both to workers, and until
    /// then drops what is sent.
    pub(crate) fn settle(&self, index: u32) -> Result<()> {
        let deadline = Instant::now() + SETTLE_LIMIT;
        while !(self.is_operational(index)? && has_final_addresses(index)?) {
            if Instant::now() > deadline {
                return Err(io::Error::from(io::ErrorKind::TimedOut))
                    .doing(|| format!("wait for link {index}"));
            }
            thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    fn is_operational(&self, index: u32) -> Result<bool> {
        let mut links = self.handle.link().get().match_index(index).execute();
        let link = self.wait(links.try_next(), || format!("read link {index}"))?;
        Ok(link.is_some_and(|link| link.attributes.contains(&LinkAttribute::OperState(State::Up))))
    }

    /// Removes a link.
    pub(crate) fn remove_link(&self, index: u32) -> Result<()> {
        self.wait(self.handle.link().del(index).execute(), || format!("remove link {index}"))
    }

    /// Makes a bridge that is up. Its hardware address is set: a bridge without one takes the lowest of its ports. That
    /// address changes when pods come and go, and pods that have the former one cached lose their packets.
    pub(crate) fn bridge(&self, name: &str, index: u32) -> Result<()> {
        let message = LinkBridge::new(name).index(index).address(BRIDGE_MAC.to_vec()).up().build();
        self.wait(self.handle.link().add(message).execute(), || format!("add bridge {name}"))?;
        sysctls::set_up_interface(name)
    }

    /// Makes a veth pair: `near` here and up, in `bridge` if one is given; `far` in another namespace and still down,
    /// as the kernel refuses to open an end that has no other yet.
    pub(crate) fn veth(&self, near: End, bridge: Option<u32>, far: End, far_netns: RawFd) -> Result<()> {
        let (near_name, far_name) = (near.name.clone(), far.name.clone());
        let what = format!("add veth {} with {far_name} in another namespace", near.name);
        let far = end(LinkMessageBuilder::<LinkUnspec>::new(), far).setns_by_fd(far_netns).build();
        let mut message =
            end(LinkVeth::new("", &far_name), near).up().set_info_data(InfoData::Veth(InfoVeth::Peer(far)));
        if let Some(bridge) = bridge {
            message = message.controller(bridge);
        }
        self.wait(self.handle.link().add(message.build()).execute(), || what)?;
        sysctls::set_up_interface(&near_name)
    }

    /// Has a bridge send packets back through the port that they came in by.
    pub(crate) fn hairpin(&self, port: u32) -> Result<()> {
        let message = LinkBridgePort::new(port).hairpin(true).build();
        self.wait(self.handle.link().set_port(message).execute(), || format!("set hairpin of port {port}"))
    }

    /// Gives a link an address.
    pub(crate) fn address(&self, index: u32, address: IpAddr, prefix: u8) -> Result<()> {
        self.wait(self.handle.address().add(index, address, prefix).execute(), || {
            format!("add address {address}/{prefix}")
        })
    }

    /// Says which hardware address a neighbour has, for good.
    pub(crate) fn neighbour(&self, index: u32, address: IpAddr, mac: [u8; 6]) -> Result<()> {
        self.wait(self.handle.neighbours().add(index, address).link_layer_address(&mac).execute(), || {
            format!("add neighbour {address}")
        })
    }

    /// Sets the route to a destination, in place of the one it had.
    pub(crate) fn route(&self, to: IpNetwork, via: Via) -> Result<()> {
        let invalid = |source: &dyn Display| Error::Unsupported(format!("route to {to} {via:?}: {source}"));
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(to.network(), to.prefix())
            .map_err(|error| invalid(&error))?;
        builder = match via {
            Via::Link(index) => builder.output_interface(index),
            Via::Gateway(gateway, index) => {
                builder.gateway(gateway).map_err(|error| invalid(&error))?.output_interface(index).onlink()
            }
            Via::Unreachable => builder.kind(RouteType::Unreachable),
        };
        self.wait(self.handle.route().add(builder.build()).replace().execute(), || {
            format!("add route to {to} {via:?}")
        })
    }

    fn wait<T>(
        &self,
        request: impl Future<Output = std::result::Result<T, rtnetlink::Error>>,
        what: impl FnOnce() -> String,
    ) -> Result<T> {
        self.runtime
            .block_on(request)
            .map_err(|source| Error::Netlink { what: what(), source: Box::new(source) })
    }
}

/// Whether no IPv6 address of a link is tentative.
fn has_final_addresses(index: u32) -> Result<bool> {
    let path = "/proc/thread-self/net/if_inet6";
    let addresses = fs::read_to_string(path).doing(|| format!("read {path}"))?;
    // Address, link, prefix length, scope, flags (all hexadecimal), name.
    let hex = |field: Option<&str>| field.and_then(|field| u32::from_str_radix(field, 16).ok());
    Ok(addresses.lines().all(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (link, flags) = (hex(fields.next()), hex(fields.nth(2)));
        link != Some(index) || flags.is_some_and(|flags| flags & libc::IFA_F_TENTATIVE == 0)
    }))
}

fn end<T>(message: LinkMessageBuilder<T>, end: End) -> LinkMessageBuilder<T> {
    let message = message.name(end.name).index(end.index);
    match end.mac {
        Some(mac) => message.address(mac.to_vec()),
        None => message,
    }
}
