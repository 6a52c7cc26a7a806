//! Which frontends the socket layer answers, for whom, and why nftables answers the others.
//!
//! Owns the rule that both layers give the same outcome: what the socket cannot do exactly as nftables does is left to
//! nftables. Pure: the lowering, `render` and `status` ask here. Never knows how the maps say it.

use std::fmt::{self, Display, Formatter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use kube_lane_common::{Answered, Client, Network4, Network6, PodCgroups, Settings};

use crate::model::input::{Family, Protocol};
use crate::model::plan::{AddressPort, Frontend, FrontendAddress, FrontendKind, NodePlan, PortPlan, Verdict};

/// What is asked of the socket layer, for all Services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// NodePorts, load balancer addresses and externalIPs are answered, too.
    pub external: bool,
    /// Datagrams of unconnected UDP sockets are answered, too.
    pub udp: bool,
    /// NodePorts answer the host's own sockets on 127.0.0.0/8, too.
    pub loopback_nodeports: bool,
    /// Only sockets of the host's network namespace are answered.
    pub host_namespace_only: bool,
    /// There are cgroups whose sockets are left alone.
    pub leave_alone: bool,
    /// How nftables tells this node's pods from other clients.
    pub detector: Clients,
    /// nftables masquerades everybody who dials a cluster IP.
    pub masquerade_all: bool,
}

/// How this node's pods are told from other clients, as far as it matters here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clients {
    /// They are not.
    #[default]
    None,
    /// By their address, in [`NodePlan::pod_cidrs`].
    PodCidrs,
    /// By the interface that their packets come in through.
    Interface,
}

impl Policy {
    /// Whether pods of a family are told from other clients, so that nftables masquerades host processes.
    pub fn detects(&self, family: Family, node: &NodePlan) -> bool {
        match self.detector {
            Clients::None => false,
            Clients::PodCidrs => pod_network(family, node).is_some(),
            Clients::Interface => true,
        }
    }

    /// Whether it matters anywhere who is a pod, and who in another network namespace is not.
    pub fn tells_pods(&self) -> bool {
        let at_cluster_ips = !self.masquerade_all && self.detector != Clients::None;
        !self.host_namespace_only && (at_cluster_ips || self.external)
    }

    /// What the programs read. `host` is the cookie of the host's network namespace.
    pub fn settings(&self, node: &NodePlan, host: u64, pods: PodCgroups) -> Settings {
        let mut answered = 0;
        for family in Family::ALL {
            let is_ipv6 = family == Family::V6;
            for external in [false, true] {
                let clients = self.clients(external, family, node);
                let bit = |client| Answered::bit(client, external, is_ipv6);
                answered |= if clients.pods { bit(Client::Pod) } else { 0 };
                answered |= if clients.hosts { bit(Client::Host) } else { 0 };
                answered |= if clients.others { bit(Client::Other) } else { 0 };
            }
            if self.pod_network(family, node).is_some() {
                answered |= Answered::SOURCE << Answered::family(is_ipv6);
            }
        }
        let flags = [
            (self.external, Answered::NODEPORTS),
            (self.external && self.loopback_nodeports, Answered::LOOPBACK_NODEPORTS),
            (self.leave_alone, Answered::LEFT_ALONE),
        ];
        answered |= flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum::<u64>();
        let (mut pods4, mut pods6) =
            (Network4 { network: 0, mask: 0 }, Network6 { network: [0; 4], mask: [0; 4] });
        for network in Family::ALL.into_iter().filter_map(|family| self.pod_network(family, node)) {
            match network {
                IpNetwork::V4(network) => {
                    pods4 = Network4 { network: word(network.network()), mask: word(network.mask()) };
                }
                IpNetwork::V6(network) => {
                    pods6 = Network6 { network: words(network.network()), mask: words(network.mask()) };
                }
            }
        }
        Settings { answered: Answered(answered), host, pods4, pods6, pods }
    }

    fn pod_network(&self, family: Family, node: &NodePlan) -> Option<IpNetwork> {
        pod_network(family, node).filter(|_| self.detector == Clients::PodCidrs)
    }

    /// Who can be answered at a kind of frontend.
    ///
    /// At a cluster IP nftables rewrites the source of all but pods where it has a detector: that of host processes to
    /// what it is without a Service, that of other network namespaces to one that endpoints can answer to. At an
    /// external address it rewrites that of everybody, pods included: the one difference that `external` accepts.
    fn clients(&self, external: bool, family: Family, node: &NodePlan) -> Answering {
        let (pods, hosts, others) = match external {
            false if self.masquerade_all => (false, false, false),
            false if self.detects(family, node) => (true, true, false),
            false => (true, false, true),
            true => (self.external, self.external, false),
        };
        let namespaces = !self.host_namespace_only;
        Answering { pods: pods && namespaces, hosts, others: others && namespaces, awaits_pods: false }
    }
}

/// In network byte order.
fn word(address: Ipv4Addr) -> u32 {
    u32::from(address).to_be()
}

/// In network byte order.
fn words(address: Ipv6Addr) -> [u32; 4] {
    kube_lane_common::Address::from(IpAddr::V6(address)).words()
}

fn pod_network(family: Family, node: &NodePlan) -> Option<IpNetwork> {
    node.pod_cidrs.iter().copied().find(|network| Family::of(network.ip()) == family)
}

/// One of a port's two endpoint sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointSet {
    /// [`PortPlan::backends`].
    Cluster,
    /// [`PortPlan::local_backends`].
    Local,
}

/// Whose sockets are answered: there is nobody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answering {
    /// Those of pods.
    pub pods: bool,
    /// Those of the host's network namespace.
    pub hosts: bool,
    /// Those of other network namespaces: containers beside Kubernetes.
    pub others: bool,
    /// Nobody is known to be a pod: what is said of pods holds once there is a cgroup of pods.
    pub awaits_pods: bool,
}

/// Who answers a frontend. `Display` is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The socket layer.
    Socket {
        /// Whom; the others meet nftables.
        clients: Answering,
        /// With one of this set.
        set: EndpointSet,
    },
    /// nftables alone.
    Nftables(Why),
}

/// Why nftables answers a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The option for external addresses is off.
    External,
    /// The option for UDP is off.
    Udp,
    /// Sockets of this protocol are never answered.
    Sctp,
    /// [`PortPlan::source_ranges`] is about packets.
    SourceRanges,
    /// Every client is masqueraded.
    MasqueradeAll,
    /// Pods are not answered, and host processes only where there is a detector.
    HostsUndetected,
    /// Which clients the short-circuit is for cannot be told.
    LocalUndetected,
    /// Connections are dropped.
    NoLocalEndpoint,
    /// A socket that dials this means something else, each in its network namespace, or another family.
    Address,
    /// An interface of the node has this address: rules of the node's own say what becomes of packets there, such as those
    /// by which NodeLocal DNSCache keeps them from being translated.
    OwnAddress,
    /// Where a VIP has a NodePort's number on an address of the node, VIPs come first.
    VipOnNode,
    /// This backend is a frontend itself.
    TranslatedTwice(AddressPort),
    /// A socket that dials this backend means something else, each in its network namespace, or another family.
    Backend(AddressPort),
    /// There is no endpoint. nftables refuses by ICMP, of which unconnected sockets hear nothing.
    UdpRefused,
    /// Connected sockets of UDP are left to nftables, and would be remembered there.
    UdpAffinity,
    /// Other frontends of the port are answered by nftables, at least for some clients.
    Affinity,
    /// There is no room left for the Service.
    Full(Limit),
}

/// What a map can have too little room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Addresses and NodePorts.
    Frontends,
    /// Ports of Services.
    Ports,
    /// Places in endpoint sets.
    Slots,
    /// Endpoints.
    Backends,
}

/// What the addresses of other Services say of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clashes {
    /// A backend that the socket layer cannot lead to: [`Why::TranslatedTwice`] or [`Why::Backend`].
    pub backend: Option<Why>,
    /// A VIP on one of the node's NodePort addresses has the number and protocol of the port's NodePort.
    pub vip_on_node: bool,
}

/// Who answers each frontend of a port, in their order.
pub fn answers(port: &PortPlan, policy: &Policy, node: &NodePlan, clashes: Clashes) -> Box<[Answer]> {
    let mut answers: Box<[_]> =
        port.frontends.iter().map(|f| answer(port, f, policy, node, clashes)).collect();
    // All frontends of the port share what is remembered, so each client has to meet one layer at all of them.
    let clients = |answer: &Answer| match answer {
        Answer::Socket { clients, .. } => Some(*clients),
        // Who is dropped is not remembered.
        Answer::Nftables(Why::NoLocalEndpoint) => Some(policy.clients(false, port.family, node)),
        Answer::Nftables(_) => None,
    };
    let first = answers.first().and_then(clients);
    if port.affinity.is_some() && !answers.iter().all(|answer| clients(answer) == first) {
        for answer in &mut answers {
            if answer.set().is_some() {
                *answer = Answer::Nftables(Why::Affinity);
            }
        }
    }
    answers
}

fn answer(
    port: &PortPlan,
    frontend: &Frontend,
    policy: &Policy,
    node: &NodePlan,
    clashes: Clashes,
) -> Answer {
    match answered(port, frontend, policy, node, clashes) {
        Ok(answer) => answer,
        Err(why) => Answer::Nftables(why),
    }
}

fn answered(
    port: &PortPlan,
    frontend: &Frontend,
    policy: &Policy,
    node: &NodePlan,
    clashes: Clashes,
) -> Result<Answer, Why> {
    let unless = |reason: bool, why| if reason { Err(why) } else { Ok(()) };
    let external = frontend.kind != FrontendKind::ClusterIp;
    unless(port.protocol == Protocol::Sctp, Why::Sctp)?;
    if port.protocol == Protocol::Udp {
        unless(!policy.udp, Why::Udp)?;
        unless(port.affinity.is_some(), Why::UdpAffinity)?;
    }
    unless(external && !policy.external, Why::External)?;
    unless(!external && policy.masquerade_all, Why::MasqueradeAll)?;
    unless(frontend.kind == FrontendKind::LoadBalancer && port.source_ranges.is_some(), Why::SourceRanges)?;
    let clients = policy.clients(external, port.family, node);
    unless(!clients.pods && !clients.hosts, Why::HostsUndetected)?;
    match frontend.at {
        FrontendAddress::Vip(vip) => {
            unless(!is_dialled_alike(vip.ip), Why::Address)?;
            unless(node.interface_addresses.binary_search(&vip.ip).is_ok(), Why::OwnAddress)?;
        }
        FrontendAddress::NodePort(_) => unless(clashes.vip_on_node, Why::VipOnNode)?,
    }
    clashes.backend.map_or(Ok(()), Err)?;
    unless(port.protocol == Protocol::Udp && frontend.verdict == Verdict::Reject, Why::UdpRefused)?;
    let set = match frontend.verdict {
        // No set has anything: either says so.
        Verdict::Cluster | Verdict::Reject => EndpointSet::Cluster,
        Verdict::Local if external => {
            unless(!policy.detects(port.family, node), Why::LocalUndetected)?;
            EndpointSet::Cluster
        }
        Verdict::Local => {
            unless(port.local_backends.is_empty(), Why::NoLocalEndpoint)?;
            EndpointSet::Local
        }
    };
    Ok(Answer::Socket { clients, set })
}

/// Whether every socket that dials an address means the same: not one of its own network namespace, and no IPv4 address
/// in its v4-mapped form.
pub(super) fn is_dialled_alike(address: IpAddr) -> bool {
    let link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    let own = address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local;
    !own && address.to_canonical() == address
}

impl Answer {
    /// The endpoint set that the frontend leads to in the maps; `None`: it is not there. An empty set leads to nftables
    /// without the frontend having to come and go.
    pub fn set(self) -> Option<EndpointSet> {
        match self {
            Self::Socket { set, .. } => Some(set),
            Self::Nftables(Why::NoLocalEndpoint) => Some(EndpointSet::Local),
            Self::Nftables(Why::UdpRefused) => Some(EndpointSet::Cluster),
            Self::Nftables(_) => None,
        }
    }

    /// The same where nobody is known to be a pod, if that matters.
    pub fn awaiting_pods(self) -> Self {
        match self {
            Self::Socket { clients, set } => {
                let awaits_pods = clients.pods && !clients.others;
                Self::Socket { clients: Answering { awaits_pods, ..clients }, set }
            }
            Self::Nftables(_) => self,
        }
    }

    /// The layer's name: `socket` or `nftables`.
    pub fn layer(self) -> &'static str {
        match self {
            Self::Socket { .. } => "socket",
            Self::Nftables(_) => "nftables",
        }
    }
}

impl Display for Answer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket { clients: Answering { awaits_pods: true, .. }, .. } => {
                f.write_str("socket for host processes; nftables for pods (none of the podCgroups is there)")
            }
            Self::Socket { clients: Answering { pods: true, hosts: true, .. }, .. } => {
                f.write_str("socket for pods and host processes")
            }
            Self::Socket { clients: Answering { pods: true, .. }, .. } => f.write_str(
                "socket for pods and other containers; nftables for host processes (no detectLocalMode tells them apart)",
            ),
            Self::Socket { .. } => {
                f.write_str("socket for host processes; nftables for pods (hostNamespaceOnly)")
            }
            Self::Nftables(why) => write!(f, "nftables ({why})"),
        }
    }
}

impl Display for Why {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::External => "socketLB.external is off",
            Self::Udp => "socketLB.udp is off",
            Self::Sctp => "SCTP",
            Self::SourceRanges => "loadBalancerSourceRanges",
            Self::MasqueradeAll => "masqueradeAll",
            Self::HostsUndetected => {
                "hostNamespaceOnly, and no detectLocalMode tells pods from host processes"
            }
            Self::LocalUndetected => {
                "externalTrafficPolicy is Local, and no detectLocalMode tells pods from other clients"
            }
            Self::NoLocalEndpoint => {
                "dropped: internalTrafficPolicy is Local, and no endpoint is on this node"
            }
            Self::Address => "each network namespace has such an address of its own",
            Self::OwnAddress => "an interface of this node has the address",
            Self::VipOnNode => "an address of a Service on this node has the same port, and comes first",
            Self::TranslatedTwice(backend) => {
                return write!(
                    f,
                    "endpoint {} is an address of a Service itself: it would be translated twice",
                    backend.socket()
                );
            }
            Self::Backend(backend) => {
                return write!(
                    f,
                    "endpoint {}: each network namespace has such an address of its own",
                    backend.socket()
                );
            }
            Self::UdpRefused => "UDP without an endpoint: refused by ICMP",
            Self::UdpAffinity => "session affinity of UDP: connected sockets are remembered in nftables",
            Self::Affinity => {
                "session affinity: other addresses of this port need nftables, and all share one memory"
            }
            Self::Full(limit) => return write!(f, "no room: {limit}"),
        })
    }
}

impl Display for Limit {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Frontends => "the map of addresses is full",
            Self::Ports => "the maps of Service ports are full",
            Self::Slots => "the map of endpoint sets is full",
            Self::Backends => "the map of endpoints is full",
        })
    }
}
