//! Links, addresses and routes of the namespace that the calling thread is in.
//!
//! Owns nothing that lasts: a netlink socket and its small runtime, for the length of a few requests.

use std::fmt::Display;
use std::net::IpAddr;
use std::os::fd::RawFd;

use ipnetwork::IpNetwork;
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder, new_connection,
};
use tokio::runtime::{self, Runtime};

use crate::error::{Doing, Error, Result};

/// The index of `lo` in every namespace.
pub(crate) const LOOPBACK: u32 = 1;

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

    /// Removes a link.
    pub(crate) fn remove_link(&self, index: u32) -> Result<()> {
        self.wait(self.handle.link().del(index).execute(), || format!("remove link {index}"))
    }

    /// Makes a bridge that is up.
    pub(crate) fn bridge(&self, name: &str, index: u32) -> Result<()> {
        let message = LinkBridge::new(name).index(index).up().build();
        self.wait(self.handle.link().add(message).execute(), || format!("add bridge {name}"))
    }

    /// Makes a veth pair, both ends up: `near` here, in `bridge` if one is given, `far` in another namespace.
    pub(crate) fn veth(&self, near: End, bridge: Option<u32>, far: End, far_netns: RawFd) -> Result<()> {
        let far_name = far.name.clone();
        let what = format!("add veth {} with {far_name} in another namespace", near.name);
        let far = end(LinkMessageBuilder::<LinkUnspec>::new(), far).setns_by_fd(far_netns).build();
        let mut message =
            end(LinkVeth::new("", &far_name), near).set_info_data(InfoData::Veth(InfoVeth::Peer(far)));
        if let Some(bridge) = bridge {
            message = message.controller(bridge);
        }
        self.wait(self.handle.link().add(message.build()).execute(), || what)
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

    fn wait(
        &self,
        request: impl Future<Output = std::result::Result<(), rtnetlink::Error>>,
        what: impl FnOnce() -> String,
    ) -> Result<()> {
        self.runtime
            .block_on(request)
            .map_err(|source| Error::Netlink { what: what(), source: Box::new(source) })
    }
}

fn end<T>(message: LinkMessageBuilder<T>, end: End) -> LinkMessageBuilder<T> {
    let message = message.name(end.name).index(end.index).up();
    match end.mac {
        Some(mac) => message.address(mac.to_vec()),
        None => message,
    }
}
