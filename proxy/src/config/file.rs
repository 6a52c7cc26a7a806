//! `KubeProxyConfiguration` v1alpha1 as it is written: every field optional, nothing judged.
//!
//! The flags are turned into this form too, so that what a field means is decided in one place (`resolve`).
//! `kubeLane` is the one section of our own; kube-proxy warns of it and goes on, so both can read one ConfigMap.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::duration::GoDuration;

/// `apiVersion` of the file.
pub(super) const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// `kind` of the file.
pub(super) const KIND: &str = "KubeProxyConfiguration";

/// Declares a section of the file: every field optional, `null` the same as absent, camelCase names.
macro_rules! section {
    ($(#[$attribute:meta])* $name:ident { $($(#[$field_attribute:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$attribute])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        pub(super) struct $name {
            $(
                $(#[$field_attribute])*
                pub(super) $field: $type,
            )*
        }

        impl Overlay for $name {
            fn over(self, lower: Self) -> Self {
                Self { $($field: self.$field.over(lower.$field),)* }
            }
        }
    };
}

/// What can be laid over another of its kind, field by field.
pub(super) trait Overlay {
    /// What is set here wins; the rest is `lower`'s.
    fn over(self, lower: Self) -> Self;
}

impl<T> Overlay for Option<T> {
    fn over(self, lower: Self) -> Self {
        self.or(lower)
    }
}

section! {
    /// The whole file.
    KubeProxyConfiguration {
        api_version: Option<String>,
        kind: Option<String>,
        feature_gates: Option<BTreeMap<String, bool>>,
        #[serde(deserialize_with = "null_as_default")]
        client_connection: ClientConnection,
        #[serde(deserialize_with = "null_as_default")]
        logging: LoggingSection,
        hostname_override: Option<String>,
        bind_address: Option<String>,
        healthz_bind_address: Option<String>,
        metrics_bind_address: Option<String>,
        bind_address_hard_fail: Option<bool>,
        enable_profiling: Option<bool>,
        show_hidden_metrics_for_version: Option<String>,
        mode: Option<String>,
        #[serde(deserialize_with = "null_as_default")]
        iptables: IptablesSection,
        #[serde(deserialize_with = "null_as_default")]
        ipvs: IpvsSection,
        #[serde(deserialize_with = "null_as_default")]
        nftables: NftablesSection,
        #[serde(deserialize_with = "null_as_default")]
        winkernel: WinkernelSection,
        detect_local_mode: Option<String>,
        #[serde(deserialize_with = "null_as_default")]
        detect_local: DetectLocalSection,
        #[serde(rename = "clusterCIDR")]
        cluster_cidr: Option<String>,
        node_port_addresses: Option<Vec<String>>,
        oom_score_adj: Option<i32>,
        #[serde(deserialize_with = "null_as_default")]
        conntrack: ConntrackSection,
        config_sync_period: Option<GoDuration>,
        port_range: Option<String>,
        windows_run_as_service: Option<bool>,
        #[serde(deserialize_with = "null_as_default")]
        kube_lane: KubeLaneSection,
    }
}

section! {
    /// `kubeLane`: what kube-proxy has no field for.
    KubeLaneSection {
        manifests: Option<PathBuf>,
        state_dir: Option<PathBuf>,
        log_level: Option<String>,
        #[serde(rename = "conntrackCleanSCTP")]
        conntrack_clean_sctp: Option<bool>,
        count_connections: Option<bool>,
        drop_invalid: Option<bool>,
        cgroup_root: Option<PathBuf>,
        bpf_root: Option<PathBuf>,
        #[serde(rename = "socketLB", deserialize_with = "null_as_default")]
        socket_lb: SocketLbSection,
    }
}

section! {
    /// `kubeLane.socketLB`.
    SocketLbSection {
        udp: Option<bool>,
        external: Option<bool>,
        loopback_node_ports: Option<bool>,
        host_namespace_only: Option<bool>,
        leave_alone: Option<Vec<PathBuf>>,
        pod_cgroups: Option<Vec<PathBuf>>,
        max_frontends: Option<i64>,
        max_service_ports: Option<i64>,
        max_endpoints: Option<i64>,
        max_affinity_clients: Option<i64>,
    }
}

section! {
    /// `clientConnection`.
    ClientConnection {
        kubeconfig: Option<String>,
        accept_content_types: Option<String>,
        content_type: Option<String>,
        qps: Option<f32>,
        burst: Option<i32>,
    }
}

section! {
    /// `logging`.
    LoggingSection {
        format: Option<String>,
        flush_frequency: Option<Value>,
        verbosity: Option<u32>,
        vmodule: Option<Value>,
        options: Option<Value>,
    }
}

section! {
    /// `iptables`.
    IptablesSection {
        masquerade_bit: Option<i32>,
        masquerade_all: Option<bool>,
        localhost_node_ports: Option<bool>,
        sync_period: Option<GoDuration>,
        min_sync_period: Option<GoDuration>,
    }
}

section! {
    /// `nftables`.
    NftablesSection {
        masquerade_bit: Option<i32>,
        masquerade_all: Option<bool>,
        sync_period: Option<GoDuration>,
        min_sync_period: Option<GoDuration>,
    }
}

section! {
    /// `ipvs`.
    IpvsSection {
        sync_period: Option<GoDuration>,
        min_sync_period: Option<GoDuration>,
        scheduler: Option<String>,
        #[serde(rename = "excludeCIDRs")]
        exclude_cidrs: Option<Vec<String>>,
        #[serde(rename = "strictARP")]
        strict_arp: Option<bool>,
        tcp_timeout: Option<GoDuration>,
        tcp_fin_timeout: Option<GoDuration>,
        udp_timeout: Option<GoDuration>,
    }
}

section! {
    /// `winkernel`.
    WinkernelSection {
        network_name: Option<String>,
        source_vip: Option<String>,
        #[serde(rename = "enableDSR")]
        enable_dsr: Option<bool>,
        root_hns_endpoint_name: Option<String>,
        forward_health_check_vip: Option<bool>,
    }
}

section! {
    /// `detectLocal`.
    DetectLocalSection {
        bridge_interface: Option<String>,
        interface_name_prefix: Option<String>,
    }
}

section! {
    /// `conntrack`.
    ConntrackSection {
        max_per_core: Option<i32>,
        min: Option<i32>,
        tcp_established_timeout: Option<GoDuration>,
        tcp_close_wait_timeout: Option<GoDuration>,
        tcp_be_liberal: Option<bool>,
        udp_timeout: Option<GoDuration>,
        udp_stream_timeout: Option<GoDuration>,
    }
}

/// Go's decoder leaves a field alone when it meets `null`.
fn null_as_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl KubeProxyConfiguration {
    /// The fields that are set, as JSON: no `null`, no empty section.
    pub(super) fn to_value(&self) -> Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        prune(&mut value);
        value
    }
}

/// Removes what is not set: `null` and sections without fields.
pub(super) fn prune(value: &mut Value) {
    if let Value::Object(fields) = value {
        fields.values_mut().for_each(prune);
        fields.retain(|_, field| !field.is_null() && field.as_object().is_none_or(|map| !map.is_empty()));
    }
}

/// The set fields of a pruned value as (dotted path, value), in the order of their names. A list counts as one
/// field, and so do the feature gates, whose keys a user chooses.
pub(super) fn leaves(value: &Value) -> Vec<(String, &Value)> {
    let mut found = Vec::new();
    collect_leaves("", value, &mut found);
    found
}

fn collect_leaves<'a>(path: &str, value: &'a Value, found: &mut Vec<(String, &'a Value)>) {
    match value {
        Value::Object(fields) if path != "featureGates" => {
            for (name, field) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                collect_leaves(&path, field, found);
            }
        }
        leaf => found.push((path.to_owned(), leaf)),
    }
}
