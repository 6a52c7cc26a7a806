//! The metric of the socket layer as a whole, for who asked for one.

use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::metrics::KUBE_LANE;

/// Whether the socket layer is in place.
#[derive(Clone, Debug)]
pub struct SocketLayer(Gauge);

impl SocketLayer {
    /// Registers the family: where no socket layer is asked for, there is none.
    pub fn register(registry: &mut Registry) -> Self {
        let layer = Self(Gauge::default());
        registry.sub_registry_with_prefix(KUBE_LANE).register(
            "socket_layer_in_place",
            "Whether the socket layer that was asked for is in place; 0: nftables alone serves",
            layer.0.clone(),
        );
        layer
    }

    /// It is in place, or it is not.
    pub fn tell(&self, in_place: bool) {
        self.0.set(in_place.into());
    }
}
