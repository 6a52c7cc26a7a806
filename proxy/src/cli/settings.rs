//! What the parts of the agent are told of the configuration.

use crate::config::{Detector, Network};
use crate::dataplane::nftables;
use crate::model::input::Origin;
use crate::model::planner::{self, NodePortAddresses, PodCidrs};

/// The planner's part.
pub(super) fn planner(node_name: &str, origins: Vec<Origin>, network: &Network) -> planner::Settings {
    planner::Settings {
        node_name: node_name.into(),
        origins,
        node_address: network.node_address(),
        pod_cidrs: match &network.detector {
            Detector::ClusterCidr(networks) => PodCidrs::Cluster(networks.clone()),
            Detector::NodeCidr => PodCidrs::Node,
            Detector::None | Detector::BridgeInterface(_) | Detector::InterfaceNamePrefix(_) => {
                PodCidrs::Unknown
            }
        },
        nodeport_addresses: match &network.nodeport_addresses {
            None => NodePortAddresses::Primary,
            Some(networks) => NodePortAddresses::Within(networks.clone()),
        },
    }
}

/// How the dataplane tells pods from other clients.
pub(super) fn detector(detector: &Detector) -> nftables::Detector {
    match detector {
        Detector::None => nftables::Detector::None,
        Detector::ClusterCidr(_) | Detector::NodeCidr => nftables::Detector::PodCidrs,
        Detector::BridgeInterface(name) => nftables::Detector::Interface(name.clone()),
        Detector::InterfaceNamePrefix(prefix) => nftables::Detector::InterfacePrefix(prefix.clone()),
    }
}
