//! A lab: a fabric, nodes on it, pods behind them, and a host outside.
//!
//! Owns how these are wired. Every link is a veth pair, every route is set here, and nothing translates addresses.
//!
//! ```text
//!            fabric (bridge, no address)
//!      ┌───────────┬───────────┐
//!    node0       node1      outside     192.168.77.0/24, fd00:77::/64
//!    ┌─┴─┐       ┌─┴─┐
//!  pod   pod   pod   pod                10.244.N.0/24, fd00:10:244:N::/64
//! ```

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

use ipnetwork::IpNetwork;
use tokio::runtime::{self, Runtime};

use crate::bpf;
use crate::cgroup::{self, LabCgroups};
use crate::error::{Doing, Error, Result};
use crate::host::Host;
use crate::leftovers;
use crate::netlink::{End, Via};
use crate::netns::Namespace;
use crate::sniff::{Filter, Sniff};
use crate::sysctls;
use crate::topology::{self, BRIDGE, BRIDGE_INDEX, UPLINK, UPLINK_INDEX, anywhere};

/// How a lab should look.
#[derive(Clone, Debug)]
pub struct Builder {
    nodes: u8,
    pods: Pods,
}

/// How pods are attached to their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pods {
    Routed,
    Bridged,
    Switched { filtered: bool },
}

impl Pods {
    fn have_bridge(self) -> bool {
        self != Self::Routed
    }
}

impl Builder {
    /// How many nodes; one unless told.
    pub fn nodes(mut self, nodes: u8) -> Self {
        self.nodes = nodes;
        self
    }

    /// Attaches pods to a bridge `cni0` on their node, rather than each by a routed link `veth…` of its own. They reach each
    /// other through the node's routing alone.
    pub fn bridge(mut self, bridge: bool) -> Self {
        self.pods = if bridge { Pods::Bridged } else { Pods::Routed };
        self
    }

    /// Attaches pods to a bridge `cni0` on their node as CNI's plugin `bridge` does: they reach each other over the bridge,
    /// and themselves (hairpin). `filtered`: bridged packets meet the rules of IP (`bridge-nf-call-iptables`,
    /// `bridge-nf-call-ip6tables`).
    pub fn switch(mut self, filtered: bool) -> Self {
        self.pods = Pods::Switched { filtered };
        self
    }

    /// Builds the lab, after sweeping what labs of dead processes left.
    ///
    /// # Errors
    /// Without root, without a cgroup v2 hierarchy, or when the kernel refuses a part.
    pub fn build(self) -> Result<Lab> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::NeedsRoot);
        }
        if self.nodes > topology::MAX_NODES {
            return Err(Error::Full(format!("{} nodes", self.nodes)));
        }
        leftovers::sweep();
        Lab::build(&self, Leftovers(leftovers::new_name()))
    }
}

/// A fabric, its nodes and the outside host. Dropping it removes everything.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: hosts before the cgroups they are in, the names' removal last.
    outside: Outside,
    nodes: Vec<Node>,
    fabric: Fabric,
    servers: Option<Runtime>,
    _cgroups: LabCgroups,
    name: Leftovers,
}

/// The lab's name; dropping it removes what the name still stands for.
#[derive(Debug)]
struct Leftovers(String);

impl Drop for Leftovers {
    fn drop(&mut self) {
        leftovers::remove(&self.0);
    }
}

impl Lab {
    /// A lab of one node, to be changed by the builder's methods.
    pub fn builder() -> Builder {
        Builder { nodes: 1, pods: Pods::Routed }
    }

    fn build(plan: &Builder, name: Leftovers) -> Result<Self> {
        let servers = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("lab-servers")
            .enable_all()
            .build()
            .doing(|| "start the servers' runtime".into())?;
        let cgroups = LabCgroups::create(&name.0)?;
        let pins = bpf::create(&name.0)?;
        let fabric = Fabric::create(&name.0, &cgroups)?;
        let attach = |host: &str, addresses, port, router| {
            let cgroup = cgroups.add(host)?;
            let namespace = Namespace::create(format!("{}-{host}", name.0), cgroup.clone(), router)?;
            fabric.attach(host, port, &namespace, addresses)?;
            let places = (cgroup, pins.join(host));
            Ok(Host::new(host, addresses, namespace, places, servers.handle().clone()))
        };
        let outside = Outside { host: attach("outside", topology::outside_addresses(), 0, false)? };
        let mut nodes = Vec::with_capacity(plan.nodes.into());
        for index in 0..plan.nodes {
            let host = attach(&format!("node{index}"), topology::node_addresses(index), index + 1, true)?;
            let pods = cgroup::add_pods(host.cgroup())?;
            nodes.push(Node { host, index, attached: plan.pods, pods, guests: AtomicU8::new(0) });
        }
        let lab = Self { outside, nodes, fabric, servers: Some(servers), _cgroups: cgroups, name };
        lab.set_routes()?;
        Ok(lab)
    }

    fn set_routes(&self) -> Result<()> {
        for node in &self.nodes {
            node.set_up(&self.outside)?;
            for other in self.nodes.iter().filter(|other| other.index != node.index) {
                other.route_pods_of(node)?;
            }
            self.outside.route_pods_of(node)?;
        }
        self.nodes.first().map_or(Ok(()), |node| self.outside.route_via(node))
    }

    /// The name that its namespaces and its cgroup begin with.
    pub fn name(&self) -> &str {
        &self.name.0
    }

    /// A node, counted from 0.
    ///
    /// # Panics
    /// When the lab has not that many.
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The host beyond the nodes: a client that no proxy runs on.
    pub fn outside(&self) -> &Outside {
        &self.outside
    }

    /// What lies between nodes and outside.
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(servers) = self.servers.take() {
            // Dropping it would wait, which an async caller may not.
            servers.shutdown_background();
        }
    }
}

/// The bridge that joins nodes and outside hosts; it has no address.
#[derive(Debug)]
pub struct Fabric {
    namespace: Namespace,
}

impl Fabric {
    fn create(lab: &str, cgroups: &LabCgroups) -> Result<Self> {
        let namespace = Namespace::create(format!("{lab}-fabric"), cgroups.add("fabric")?, false)?;
        namespace.netlink(|netlink| netlink.bridge("fabric", UPLINK_INDEX))?;
        Ok(Self { namespace })
    }

    fn attach(&self, host: &str, port: u8, to: &Namespace, addresses: [std::net::IpAddr; 2]) -> Result<()> {
        let near = End { name: host.to_owned(), index: UPLINK_INDEX + 1 + u32::from(port), mac: None };
        let far = End { name: UPLINK.to_owned(), index: UPLINK_INDEX, mac: None };
        let fd = to.fd();
        let link = near.index;
        self.namespace.netlink(move |netlink| netlink.veth(near, Some(UPLINK_INDEX), far, fd))?;
        to.netlink(move |netlink| {
            sysctls::set_up_interface(UPLINK)?;
            netlink.up(UPLINK_INDEX)?;
            for (address, net) in addresses.into_iter().zip(topology::fabric_cidrs()) {
                netlink.address(UPLINK_INDEX, address, net.prefix())?;
            }
            netlink.settle(UPLINK_INDEX)
        })?;
        self.namespace.netlink(move |netlink| netlink.settle(link))
    }

    /// As [`Host::deviating_sysctls`], in the fabric's namespace.
    ///
    /// # Errors
    /// When a sysctl cannot be read.
    pub fn deviating_sysctls(&self) -> Result<(Vec<String>, usize)> {
        self.namespace.deviating_sysctls()
    }

    /// Counts packets that cross the fabric, each once: where it comes in.
    ///
    /// # Errors
    /// When the packet socket cannot be had.
    pub fn sniff(&self, filter: Filter) -> Result<Sniff> {
        Sniff::start(&self.namespace, filter.arriving())
    }
}

/// A node: routes for its pods, and the place where a proxy runs.
#[derive(Debug)]
pub struct Node {
    host: Host,
    index: u8,
    attached: Pods,
    /// The cgroup of its pods.
    pods: PathBuf,
    /// How many pods and containers it has had.
    guests: AtomicU8,
}

/// What a network namespace behind a node is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guest {
    Pod,
    Container,
}

impl Deref for Node {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Node {
    /// The networks of its pods, IPv4 first.
    pub fn pod_cidrs(&self) -> [IpNetwork; 2] {
        topology::pod_cidrs(self.index)
    }

    /// Routes all else to the outside host, as to any default gateway; an address of no pod is unreachable.
    fn set_up(&self, outside: &Host) -> Result<()> {
        let (gateways, cidrs) = ([outside.v4(), outside.v6()], self.pod_cidrs());
        let (bridge, attached) = (self.attached.have_bridge(), self.attached);
        self.namespace().netlink(move |netlink| {
            if let Pods::Switched { filtered } = attached {
                sysctls::filter_bridged(filtered)?;
            }
            if bridge {
                netlink.bridge(BRIDGE, BRIDGE_INDEX)?;
            }
            for (gateway, cidr) in gateways.into_iter().zip(cidrs) {
                netlink.route(anywhere(gateway), Via::Gateway(gateway, UPLINK_INDEX))?;
                if bridge {
                    netlink.address(BRIDGE_INDEX, topology::nth(cidr, 1), cidr.prefix())?;
                } else {
                    netlink.route(cidr, Via::Unreachable)?;
                }
            }
            Ok(())
        })
    }

    /// Adds a pod; it leaves when dropped. Its link on the node is named `veth` and a number.
    ///
    /// # Errors
    /// When the name is taken in this lab, or the kernel refuses a part.
    pub fn add_pod(&self, name: &str) -> Result<Pod> {
        self.add(Guest::Pod, name)
    }

    /// Adds a container that is no pod, as of a runtime beside Kubernetes: its addresses are known to this node alone,
    /// its cgroup is the node's, and its link is named `ctr` and a number.
    ///
    /// # Errors
    /// As [`add_pod`](Self::add_pod).
    pub fn add_container(&self, name: &str) -> Result<Pod> {
        self.add(Guest::Container, name)
    }

    /// Makes a host of a network namespace that a container runtime made for a pod of this node. The lab changes
    /// nothing there; the namespace lives at least as long as the host.
    ///
    /// # Errors
    /// When `netns` is no network namespace.
    pub fn adopt(&self, name: &str, netns: &Path, addresses: [std::net::IpAddr; 2]) -> Result<Host> {
        let namespace = Namespace::adopt(name.to_owned(), netns.to_owned(), self.pods.clone())?;
        let places = (self.pods.clone(), self.bpf_root().to_owned());
        Ok(Host::new(name, addresses, namespace, places, self.servers().clone()))
    }

    fn add(&self, guest: Guest, name: &str) -> Result<Pod> {
        let number = self.guests.fetch_add(1, Ordering::Relaxed);
        if number >= topology::MAX_PODS {
            self.guests.store(topology::MAX_PODS, Ordering::Relaxed);
            return Err(Error::Full(format!("pod {name}")));
        }
        let (cidrs, cgroup) = match guest {
            Guest::Pod => (self.pod_cidrs(), &*self.pods),
            Guest::Container => (topology::container_cidrs(self.index), self.cgroup()),
        };
        let attached = if guest == Guest::Pod { self.attached } else { Pods::Routed };
        let bridged = attached.have_bridge();
        let switched = matches!(attached, Pods::Switched { .. });
        let addresses = cidrs.map(|cidr| topology::nth(cidr, u16::from(number) + 2));
        let lab = self.netns().strip_suffix(self.name()).unwrap_or_default();
        let namespace = Namespace::create(format!("{lab}{name}"), cgroup.to_owned(), false)?;
        let prefix = if guest == Guest::Pod { topology::POD_LINK } else { topology::CONTAINER_LINK };
        let (link, link_name) = (UPLINK_INDEX + 1 + u32::from(number), format!("{prefix}{number}"));
        self.attach(link_name, link, attached, &namespace, addresses)?;
        let gateways: [std::net::IpAddr; 2] = if bridged {
            cidrs.map(|cidr| topology::nth(cidr, 1))
        } else {
            [topology::POD_GATEWAY_V4.into(), topology::POD_GATEWAY_V6.into()]
        };
        namespace.netlink(move |netlink| {
            sysctls::set_up_interface(UPLINK)?;
            netlink.up(UPLINK_INDEX)?;
            for (address, gateway) in addresses.into_iter().zip(gateways) {
                // Unless switched, alone on its link: what goes to another pod goes through the node's routing, never
                // beside it.
                let alone = if address.is_ipv4() { 32 } else { 128 };
                let cidr = cidrs.iter().find(|cidr| cidr.contains(address)).filter(|_| switched);
                netlink.address(UPLINK_INDEX, address, cidr.map_or(alone, |cidr| cidr.prefix()))?;
                if !bridged {
                    netlink.neighbour(UPLINK_INDEX, gateway, topology::POD_GATEWAY_MAC)?;
                }
                netlink.route(anywhere(gateway), Via::Gateway(gateway, UPLINK_INDEX))?;
            }
            netlink.settle(UPLINK_INDEX)
        })?;
        self.namespace().netlink(move |netlink| {
            netlink.settle(link)?;
            if bridged { netlink.settle(BRIDGE_INDEX) } else { Ok(()) }
        })?;
        let places = (cgroup.to_owned(), self.bpf_root().to_owned());
        let host = Host::new(name, addresses, namespace, places, self.servers().clone());
        Ok(Pod { host, node: self.host.clone(), link })
    }

    fn attach(
        &self,
        name: String,
        link: u32,
        attached: Pods,
        guest: &Namespace,
        addresses: [std::net::IpAddr; 2],
    ) -> Result<()> {
        let bridged = attached.have_bridge();
        let mac = (!bridged).then_some(topology::POD_GATEWAY_MAC);
        let near = End { name, index: link, mac };
        let far = End { name: UPLINK.to_owned(), index: UPLINK_INDEX, mac: None };
        let (bridge, fd) = (bridged.then_some(BRIDGE_INDEX), guest.fd());
        self.host.namespace().netlink(move |netlink| {
            netlink.veth(near, bridge, far, fd)?;
            if matches!(attached, Pods::Switched { .. }) {
                netlink.hairpin(link)?;
            }
            if bridge.is_none() {
                for address in addresses {
                    netlink.route(IpNetwork::from(address), Via::Link(link))?;
                }
            }
            Ok(())
        })
    }
}

impl Host {
    fn route_pods_of(&self, node: &Node) -> Result<()> {
        let [cidr4, cidr6] = node.pod_cidrs();
        self.route(cidr4, node.v4())?;
        self.route(cidr6, node.v6())
    }
}

/// A host on the fabric that is no node: a client of NodePorts and load balancers.
#[derive(Debug)]
pub struct Outside {
    host: Host,
}

impl Deref for Outside {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Outside {
    /// Sends what goes to Service addresses (the Service range and the VIP range) to this node from now on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn route_via(&self, node: &Node) -> Result<()> {
        for [cidr4, cidr6] in [topology::service_cidrs(), topology::vip_cidrs()] {
            self.route(cidr4, node.v4())?;
            self.route(cidr6, node.v6())?;
        }
        Ok(())
    }
}

/// A pod, or another container on a node. Dropping it takes its link and its routes from the node at once.
#[derive(Debug)]
#[must_use = "a pod that is dropped leaves"]
pub struct Pod {
    host: Host,
    node: Host,
    link: u32,
}

impl Deref for Pod {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let link = self.link;
        // It may have gone with its lab.
        let _ = self.node.namespace().netlink(move |netlink| netlink.remove_link(link));
    }
}
