//! The metrics of the socket layer as a whole.

use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::metrics::KUBE_LANE;
use crate::dataplane::InFront;

/// Whether there is a socket layer, the agent's own or an earlier run's.
#[derive(Clone, Debug, Default)]
pub struct SocketLayer {
    in_place: Gauge,
    left_over: Gauge,
    shared: Gauge,
    troubles: Gauge,
}

impl SocketLayer {
    /// Registers the families: where no socket layer is asked for, that of its being in place is not there.
    pub fn register(registry: &mut Registry, is_wanted: bool) -> Self {
        let layer = Self::default();
        let registry = registry.sub_registry_with_prefix(KUBE_LANE);
        if is_wanted {
            registry.register(
                "socket_layer_in_place",
                "Whether the socket layer that was asked for is in place; 0: nftables alone serves",
                layer.in_place.clone(),
            );
        }
        registry.register(
            "socket_layer_left_over",
            "Whether the socket layer of an earlier run may still lead clients to endpoints that are gone",
            layer.left_over.clone(),
        );
        registry.register(
            "socket_layer_shared",
            "Whether another kube-lane's socket layer is attached at the same cgroup: one alone answers",
            layer.shared.clone(),
        );
        registry.register(
            "troubles",
            "What is wrong with the layer in front of nftables, or left to nftables for want of room",
            layer.troubles.clone(),
        );
        layer
    }

    /// Whether it is in place now.
    pub fn is_in_place(&self) -> bool {
        self.in_place.get() == 1
    }

    /// How it is now.
    pub fn tell(&self, front: InFront) {
        self.in_place.set(front.in_place.into());
        self.left_over.set(front.left_over.into());
        self.shared.set(front.shared.into());
        self.troubles.set(front.troubles as i64);
    }
}
