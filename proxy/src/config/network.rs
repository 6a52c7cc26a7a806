//! Whose addresses are whose: how this node's pods are told from other clients, and where NodePorts answer.

use std::net::IpAddr;

use clap::Args;
use ipnetwork::IpNetwork;

use super::check::{Checker, text};
use super::file::KubeProxyConfiguration;
use crate::address::parse_cidr;

/// What the configuration says of the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Tells pods from other clients.
    pub detector: Detector,
    /// Where NodePorts answer.
    pub nodeport_addresses: NodePortAddresses,
    /// `bindAddress`, which binds nothing.
    pub bind_address: Option<IpAddr>,
}

impl Network {
    /// Takes the place of the Node's primary address of its family.
    pub fn node_address(&self) -> Option<IpAddr> {
        self.bind_address.filter(|address| !address.is_unspecified())
    }
}

/// Where NodePorts answer (`nodePortAddresses`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePortAddresses {
    /// On the Node's primary addresses.
    pub primary: bool,
    /// On the addresses of interfaces that are in these networks; the keywords `all` and `localhost` are networks.
    pub networks: Vec<IpNetwork>,
}

impl NodePortAddresses {
    /// The networks of loopback addresses, where the nftables dataplane serves no NodePort. A network that merely contains
    /// such addresses does not ask for them.
    pub(super) fn loopback(&self) -> impl Iterator<Item = &IpNetwork> {
        self.networks.iter().filter(|network| network.ip().is_loopback())
    }
}

impl Default for NodePortAddresses {
    fn default() -> Self {
        Self { primary: true, networks: Vec::new() }
    }
}

/// Tells the cluster's pods from other clients (`detectLocalMode`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Detector {
    /// Nothing is known: no client is called non-local.
    #[default]
    None,
    /// Pods have an address in one of these networks: one, or one of each family.
    ClusterCidr(Vec<IpNetwork>),
    /// This node's pods have an address in `spec.podCIDRs` of its Node.
    NodeCidr,
    /// This node's pods are attached to the bridge of this name.
    BridgeInterface(String),
    /// This node's pods are attached to interfaces whose names begin with this.
    InterfaceNamePrefix(String),
}

/// The flags that [`Network`] comes from.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct NetworkFlags {
    /// Networks of the pods: one CIDR, or one of each family
    #[arg(long, value_name = "CIDR[,CIDR]")]
    cluster_cidr: Option<String>,
    /// How this node's pods are told: ClusterCIDR (default), NodeCIDR, BridgeInterface or InterfaceNamePrefix
    #[arg(long, value_name = "MODE")]
    detect_local_mode: Option<String>,
    /// The bridge that the pods are attached to, for BridgeInterface
    #[arg(long, value_name = "NAME")]
    pod_bridge_interface: Option<String>,
    /// What the names of the pods' interfaces begin with, for InterfaceNamePrefix
    #[arg(long, value_name = "PREFIX")]
    pod_interface_name_prefix: Option<String>,
    /// NodePorts answer on the node's addresses in these networks; keywords are primary (default), all and localhost
    #[arg(long, value_name = "CIDR|KEYWORD,...", value_delimiter = ',')]
    nodeport_addresses: Option<Vec<String>>,
    /// Overrides the node's primary address; binds nothing
    #[arg(long, value_name = "IP")]
    bind_address: Option<String>,
}

impl NetworkFlags {
    /// Puts the flags into the form of a file.
    pub(super) fn fill(&self, file: &mut KubeProxyConfiguration) {
        let flags = self.clone();
        file.detect_local.bridge_interface = flags.pod_bridge_interface;
        file.detect_local.interface_name_prefix = flags.pod_interface_name_prefix;
        file.cluster_cidr = flags.cluster_cidr;
        file.detect_local_mode = flags.detect_local_mode;
        file.node_port_addresses = flags.nodeport_addresses.map(super::values::not_empty);
        file.bind_address = flags.bind_address;
    }
}

impl Network {
    /// Resolves the fields that it comes from.
    pub(super) fn resolve(
        file: &KubeProxyConfiguration,
        check: &mut Checker,
        warnings: &mut Vec<String>,
    ) -> Self {
        Self {
            detector: detector(file, check, warnings),
            nodeport_addresses: nodeport_addresses(file, check),
            bind_address: check.ip("bindAddress (--bind-address)", text(&file.bind_address)),
        }
    }
}

fn detector(file: &KubeProxyConfiguration, check: &mut Checker, warnings: &mut Vec<String>) -> Detector {
    let cluster_cidr = check.parse(
        "clusterCIDR (--cluster-cidr)",
        text(&file.cluster_cidr),
        "is neither a CIDR nor a pair of one IPv4 and one IPv6 CIDR",
        "write it like 10.244.0.0/16 or 10.244.0.0/16,fd00:10:244::/56",
        cluster_cidrs,
    );
    let bridge = text(&file.detect_local.bridge_interface);
    let prefix = text(&file.detect_local.interface_name_prefix);
    let mode = text(&file.detect_local_mode).unwrap_or("ClusterCIDR");
    for (field, value, of) in [
        ("detectLocal.bridgeInterface (--pod-bridge-interface)", bridge, "BridgeInterface"),
        ("detectLocal.interfaceNamePrefix (--pod-interface-name-prefix)", prefix, "InterfaceNamePrefix"),
    ] {
        if let Some(value) = value.filter(|_| mode != of) {
            warnings.push(format!("{field}: {value:?} counts only in detectLocalMode {of}, which is {mode}"));
        }
    }
    match mode {
        "ClusterCIDR" => match cluster_cidr {
            Some(networks) => Detector::ClusterCidr(networks),
            None => {
                if text(&file.cluster_cidr).is_none() {
                    warnings.push(NO_CLUSTER_CIDR.to_owned());
                }
                Detector::None
            }
        },
        "NodeCIDR" => Detector::NodeCidr,
        "BridgeInterface" => interface(
            "detectLocal.bridgeInterface (--pod-bridge-interface)",
            bridge,
            "names no interface, which detectLocalMode (--detect-local-mode) BridgeInterface needs",
            "write the name of the bridge that the pods are attached to, like cni0",
            check,
        )
        .map_or(Detector::None, Detector::BridgeInterface),
        "InterfaceNamePrefix" => interface(
            "detectLocal.interfaceNamePrefix (--pod-interface-name-prefix)",
            prefix,
            "begins no interface's name, which detectLocalMode (--detect-local-mode) InterfaceNamePrefix needs",
            "write what the names of the pods' interfaces begin with, like cali",
            check,
        )
        .map_or(Detector::None, Detector::InterfaceNamePrefix),
        mode => {
            check.invalid(
                "detectLocalMode (--detect-local-mode)",
                mode,
                "is no mode of detection",
                "use ClusterCIDR (the default), NodeCIDR, BridgeInterface or InterfaceNamePrefix",
            );
            Detector::None
        }
    }
}

/// What an empty `clusterCIDR` means where it would count.
const NO_CLUSTER_CIDR: &str = "clusterCIDR (--cluster-cidr) is empty: pods cannot be told from other clients, so \
clients from outside the cluster keep their own address on the way to a ClusterIP, and pods meet \
externalTrafficPolicy Local like those; set it, or another detectLocalMode";

/// A name, or its beginning, that Linux would give an interface, and that a rule can hold.
fn interface(
    field: &'static str,
    written: Option<&str>,
    problem: &str,
    remedy: &'static str,
    check: &mut Checker,
) -> Option<String> {
    let fits = |text: &str| {
        let good = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'*' | b'"' | b'\\');
        (1..=15).contains(&text.len()) && text.bytes().all(good) && !matches!(text, "." | "..")
    };
    let written = written.unwrap_or_default();
    check.parse(field, Some(written), problem, remedy, |text| fits(text).then(|| text.to_owned()))
}

fn nodeport_addresses(file: &KubeProxyConfiguration, check: &mut Checker) -> NodePortAddresses {
    let field = "nodePortAddresses (--nodeport-addresses)";
    let written = file.node_port_addresses.as_deref().unwrap_or_default();
    if written.is_empty() {
        return NodePortAddresses::default();
    }
    let mut addresses = NodePortAddresses { primary: false, networks: Vec::new() };
    for (index, item) in written.iter().enumerate() {
        let keyword: Option<&[&str]> = match item.as_str() {
            PRIMARY => Some(&[]),
            "all" => Some(&["0.0.0.0/0", "::/0"]),
            "localhost" => Some(&["127.0.0.0/8", "::1/128"]),
            _ => None,
        };
        match (keyword, parse_cidr(item)) {
            (Some(_), _) if written[..index].contains(item) => {
                check.invalid(field, item, "is listed twice", "list each keyword once");
            }
            (Some(networks), _) => {
                addresses.primary |= item == PRIMARY;
                addresses.networks.extend(networks.iter().copied().filter_map(parse_cidr));
            }
            (None, Some(network)) => addresses.networks.push(network),
            (None, None) => check.invalid(
                field,
                item,
                "is neither a CIDR nor a keyword",
                "write CIDRs like 192.0.2.0/24, or the keywords primary, all and localhost",
            ),
        }
    }
    addresses
}

/// The keyword for the Node's primary addresses.
pub(super) const PRIMARY: &str = "primary";

/// One CIDR, or one of each family; host bits are cleared, as Go's parser does.
fn cluster_cidrs(text: &str) -> Option<Vec<IpNetwork>> {
    let networks = text.split(',').map(parse_cidr).collect::<Option<Vec<_>>>()?;
    match networks.as_slice() {
        [_] => Some(networks),
        [first, second] if first.is_ipv4() != second.is_ipv4() => Some(networks),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(flags: &[(&str, &str)]) -> (Network, Vec<String>, Vec<String>) {
        let mut given = NetworkFlags::default();
        for (name, value) in flags {
            let field = match *name {
                "cidr" => &mut given.cluster_cidr,
                "mode" => &mut given.detect_local_mode,
                "bridge" => &mut given.pod_bridge_interface,
                "prefix" => &mut given.pod_interface_name_prefix,
                "bind" => &mut given.bind_address,
                "nodeports" => {
                    given.nodeport_addresses = Some(value.split(',').map(str::to_owned).collect());
                    continue;
                }
                other => panic!("{other}"),
            };
            *field = Some((*value).to_owned());
        }
        let mut file = KubeProxyConfiguration::default();
        given.fill(&mut file);
        let (mut check, mut warnings) = (Checker::default(), Vec::new());
        let network = Network::resolve(&file, &mut check, &mut warnings);
        (network, warnings, check.into_invalid().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn each_mode_of_detection_needs_its_field() {
        let networks = |list: &[&str]| list.iter().map(|cidr| cidr.parse().unwrap()).collect();
        for (flags, expected) in [
            (&[("cidr", "10.244.0.0/16")][..], Detector::ClusterCidr(networks(&["10.244.0.0/16"]))),
            (
                &[("mode", "ClusterCIDR"), ("cidr", "010.244.1.7/16, fd00::/48")],
                Detector::ClusterCidr(networks(&["10.244.0.0/16", "fd00::/48"])),
            ),
            // kubeadm writes the clusterCIDR beside any mode.
            (&[("mode", "NodeCIDR"), ("cidr", "10.244.0.0/16")], Detector::NodeCidr),
            (&[("mode", "BridgeInterface"), ("bridge", "cni0")], Detector::BridgeInterface("cni0".into())),
            (
                &[("mode", "InterfaceNamePrefix"), ("prefix", "cali")],
                Detector::InterfaceNamePrefix("cali".into()),
            ),
        ] {
            let (network, warnings, invalid) = resolve(flags);
            assert_eq!(network.detector, expected, "{flags:?}");
            assert_eq!((warnings.len(), invalid.len()), (0, 0), "{flags:?}: {warnings:?} {invalid:?}");
        }
        for (flags, parts) in [
            (&[("mode", "BridgeInterface")][..], ["--pod-bridge-interface", "--detect-local-mode", "\"\""]),
            (
                &[("mode", "InterfaceNamePrefix")],
                ["detectLocal.interfaceNamePrefix", "--pod-interface-name-prefix", "detectLocalMode"],
            ),
            (
                &[("mode", "BridgeInterface"), ("bridge", "a-name-too-long-")],
                ["a-name-too-long-", "bridge", "cni0"],
            ),
            (&[("mode", "InterfaceNamePrefix"), ("prefix", "cali*")], ["cali*", "prefix", "like cali"]),
            (&[("mode", "clustercidr")], ["clustercidr", "InterfaceNamePrefix", "--detect-local-mode"]),
            (&[("mode", "NodeCIDR"), ("cidr", "10.244.0.0")], ["clusterCIDR", "10.244.0.0", "write it like"]),
        ] {
            let (network, _, invalid) = resolve(flags);
            assert_eq!(invalid.len(), 1, "{flags:?}: {invalid:?}");
            for part in parts {
                assert!(
                    invalid[0].to_lowercase().contains(&part.to_lowercase()),
                    "{part:?} is not in {invalid:?}"
                );
            }
            assert!(matches!(network.detector, Detector::None | Detector::NodeCidr));
        }
    }

    #[test]
    fn what_does_not_count_is_said() {
        let (network, warnings, _) = resolve(&[]);
        assert_eq!((network, warnings), (Network::default(), vec![NO_CLUSTER_CIDR.to_owned()]));
        let (_, warnings, _) = resolve(&[("cidr", "10.0.0.0/8"), ("bridge", "cni0")]);
        assert_eq!(
            warnings,
            [
                "detectLocal.bridgeInterface (--pod-bridge-interface): \"cni0\" counts only in detectLocalMode \
              BridgeInterface, which is ClusterCIDR"
            ]
        );
    }

    #[test]
    fn nodeports_answer_within_cidrs_or_on_the_primary_addresses() {
        for (written, primary, expected) in [
            ("", true, &[][..]),
            ("primary", true, &[]),
            ("192.0.2.7/24", false, &["192.0.2.0/24"]),
            ("192.0.2.0/24,0.0.0.0/0, ::/0", false, &["192.0.2.0/24", "0.0.0.0/0", "::/0"]),
            // Since Kubernetes 1.37.
            ("primary,localhost", true, &["127.0.0.0/8", "::1/128"]),
            ("localhost", false, &["127.0.0.0/8", "::1/128"]),
            ("all", false, &["0.0.0.0/0", "::/0"]),
            ("10.0.0.0/8,primary", true, &["10.0.0.0/8"]),
        ] {
            let networks = expected.iter().map(|cidr| cidr.parse().unwrap()).collect();
            let (network, _, invalid) = resolve(&[("nodeports", written)]);
            let expected = NodePortAddresses { primary, networks };
            assert_eq!((network.nodeport_addresses, invalid), (expected, Vec::new()), "{written}");
        }
        for (written, wrong) in [
            ("primary,primary", 1),
            ("all,localhost,all", 1),
            ("10.0.0.1", 1),
            ("eth0,lo", 2),
            ("Primary", 1),
        ] {
            assert_eq!(resolve(&[("nodeports", written)]).2.len(), wrong, "{written}");
        }
    }

    #[test]
    fn the_node_address_is_read_as_kube_proxy_does() {
        let address = |text| resolve(&[("bind", text)]).0.node_address().map(|ip| ip.to_string());
        assert_eq!(address("192.0.2.010").as_deref(), Some("192.0.2.10"));
        assert_eq!((address("0.0.0.0"), address("::")), (None, None));
    }
}
