//! What the parts of the agent are told of the configuration.

use crate::config::{Api, Config, Detector, SocketLb};
use crate::dataplane::nftables;
use crate::dataplane::socket::answers::{Clients, Policy};
use crate::dataplane::socket::write::Sizes;
use crate::dataplane::socket::{self, Room};
use crate::model::input::Origin;
use crate::model::planner::{self, NodePortAddresses, OwnPort, PodCidrs};
use crate::source::kube::{self, KubeSourceConfig};

/// The planner's part.
pub(super) fn planner(config: &Config, origins: Vec<Origin>) -> planner::Settings {
    let network = &config.network;
    let servers = [("health", config.healthz_address), ("metrics", config.metrics_address)];
    planner::Settings {
        node_name: config.node_name.as_str().into(),
        origins,
        node_address: network.node_address(),
        pod_cidrs: match &network.detector {
            Detector::ClusterCidr(networks) => PodCidrs::Cluster(networks.clone()),
            Detector::NodeCidr => PodCidrs::Node,
            Detector::None | Detector::BridgeInterface(_) | Detector::InterfaceNamePrefix(_) => {
                PodCidrs::Unknown
            }
        },
        nodeport_addresses: NodePortAddresses {
            primary: network.nodeport_addresses.primary,
            within: network.nodeport_addresses.networks.clone(),
        },
        own_ports: servers
            .into_iter()
            .filter_map(|(server, address)| Some(OwnPort { server, address: address? }))
            .collect(),
    }
}

/// What the API source is told.
pub(super) fn source(config: &Config, api: &Api) -> KubeSourceConfig {
    KubeSourceConfig {
        kubeconfig: api.kubeconfig.clone(),
        base_kubeconfig: api.base_kubeconfig.clone(),
        environment: kube::Environment::read(),
        state_dir: config.state_dir.clone(),
        master: api.master.clone(),
        node: config.node_name.clone(),
        plugin: kube::Plugin::default(),
        complaints: None,
    }
}

/// What the ruleset depends on.
pub(super) fn nftables(config: &Config) -> nftables::Settings {
    nftables::Settings {
        detector: detector(&config.network.detector),
        masquerade_all: config.masquerade_all,
        count_connections: config.count_connections,
        drop_invalid: config.drop_invalid,
    }
}

/// How the dataplane tells pods from other clients.
fn detector(detector: &Detector) -> nftables::Detector {
    match detector {
        Detector::None => nftables::Detector::None,
        Detector::ClusterCidr(_) | Detector::NodeCidr => nftables::Detector::PodCidrs,
        Detector::BridgeInterface(name) => nftables::Detector::Interface(name.clone()),
        Detector::InterfaceNamePrefix(prefix) => nftables::Detector::InterfacePrefix(prefix.clone()),
    }
}

/// How the socket layer is set up.
pub(super) fn socket(settings: &SocketLb, detector: &Detector, masquerade_all: bool) -> socket::Options {
    socket::Options {
        cgroup_root: settings.cgroup_root.clone(),
        left_alone: settings.leave_alone.clone(),
        pod_cgroups: settings.pod_cgroups.clone(),
        policy: policy(settings, detector, masquerade_all),
        room: room(settings),
    }
}

/// Who is answered at the socket.
pub(super) fn policy(settings: &SocketLb, detector: &Detector, masquerade_all: bool) -> Policy {
    Policy {
        external: settings.external,
        udp: settings.udp,
        loopback_nodeports: settings.loopback_nodeports,
        host_namespace_only: settings.host_namespace_only,
        leave_alone: !settings.leave_alone.is_empty(),
        detector: match detector {
            Detector::None => Clients::None,
            Detector::ClusterCidr(_) | Detector::NodeCidr => Clients::PodCidrs,
            Detector::BridgeInterface(_) | Detector::InterfaceNamePrefix(_) => Clients::Interface,
        },
        masquerade_all,
    }
}

/// How far the maps may grow.
pub(super) fn room(settings: &SocketLb) -> Room {
    let SocketLb { max_frontends, max_service_ports, max_endpoints, max_affinity_clients, .. } = *settings;
    Room {
        services: Sizes {
            frontends: max_frontends,
            ports: max_service_ports,
            // An endpoint may be in two sets, and the range of a set has room for a power of two.
            slots: 4 * max_endpoints,
            backends: max_endpoints,
        },
        clients: max_affinity_clients,
    }
}
