//! What the tests of the nftables dataplane share: a namespace of their own, plans made by hand, and what `nft` lists.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use kube_lane::dataplane::nftables::{Detector, Nftables, Settings};
use kube_lane::dataplane::{Batch, Dataplane, Outcome};
use kube_lane::model::input::{Family, Protocol, ServiceKey};
use kube_lane::model::plan::{
    Backend, Frontend, FrontendAddress, FrontendKind, NodePlan, Plan, PortPlan, Verdict,
};
use nix::sched::{CloneFlags, unshare};

/// Runs in a network namespace of its own, which goes with the thread.
pub(super) fn in_namespace<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (needs root)");
        test()
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

pub(super) fn nft(arguments: &[&str], input: Option<&str>) -> String {
    use std::io::Write;
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nft");
    child.stdin.take().unwrap().write_all(input.unwrap_or_default().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "nft {arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

pub(super) fn listing() -> String {
    nft(&["list", "ruleset"], None)
}

/// A Service with a cluster IP of each family and a NodePort, and so many endpoints.
pub(super) fn service(number: u16, endpoints: u16) -> (ServiceKey, Option<Arc<Plan>>) {
    named(&format!("svc-{number}"), number, (1..=endpoints).collect::<Vec<_>>().as_slice())
}

pub(super) fn named(name: &str, number: u16, endpoints: &[u16]) -> (ServiceKey, Option<Arc<Plan>>) {
    let [high, low] = number.to_be_bytes();
    let ports = Family::ALL.map(|family| {
        let address = |v4: [u8; 4], v6: String, port| match family {
            Family::V4 => SocketAddr::from((v4, port)),
            Family::V6 => format!("[{v6}]:{port}").parse().unwrap(),
        };
        let backends = endpoints.iter().map(|n| {
            let [a, b] = n.to_be_bytes();
            Backend {
                address: address([10, 1, a, b], format!("fd00:1::{n:x}"), 8080).into(),
                local: n % 2 == 0,
            }
        });
        let verdict = if endpoints.is_empty() { Verdict::Reject } else { Verdict::Cluster };
        let vip = address([10, 96, high, low], format!("fd00:96::{number:x}"), 80);
        PortPlan {
            backends: backends.collect(),
            frontends: [Frontend::cluster_ip(vip, verdict), Frontend::nodeport(number, verdict)].into(),
            ..PortPlan::new(family, Protocol::Tcp, "http")
        }
    });
    let service = ServiceKey::new("default", name);
    let plan = Plan::new(service.clone(), ports);
    (service, Some(Arc::new(plan)))
}

/// The same with session affinity.
pub(super) fn with_affinity((key, plan): (ServiceKey, Option<Arc<Plan>>)) -> (ServiceKey, Option<Arc<Plan>>) {
    let mut plan = Plan::clone(plan.as_deref().unwrap());
    plan.ports.iter_mut().for_each(|port| port.affinity = NonZeroU32::new(100));
    (key, Some(Arc::new(plan)))
}

/// How a Service of every kind looks from outside; the same number gives the same addresses.
#[derive(Clone, Copy)]
pub(super) struct Outside {
    /// `type: LoadBalancer`, with its VIP.
    pub(super) load_balancer: bool,
    pub(super) external_ip: bool,
    pub(super) node_port: bool,
    /// What its external frontends meet.
    pub(super) external: Verdict,
    /// What its cluster IP meets.
    pub(super) internal: Verdict,
    pub(super) ranges: Option<&'static [&'static str]>,
}

pub(super) const EVERYTHING: Outside = Outside {
    load_balancer: true,
    external_ip: true,
    node_port: true,
    external: Verdict::Cluster,
    internal: Verdict::Cluster,
    ranges: None,
};

pub(super) const RANGES: &[&str] =
    &["10.0.0.0/9", "192.168.77.0/24", "198.51.100.7/32", "fd00::/32", "fd00:77::9/128"];

/// A Service with these ways in and so many endpoints, the even ones of them local.
pub(super) fn reached(number: u16, endpoints: u16, outside: Outside) -> (ServiceKey, Option<Arc<Plan>>) {
    let (key, plan) = service(number, endpoints);
    let mut plan = Plan::clone(plan.as_deref().unwrap());
    for port in &mut plan.ports {
        let wants_local = [outside.external, outside.internal].contains(&Verdict::Local);
        let local = port.backends.iter().filter(|backend| backend.local && wants_local);
        port.local_backends = local.copied().collect();
        if ![outside.external, outside.internal].contains(&Verdict::Cluster) && !outside.node_port {
            port.backends = [].into();
        }
        let ranges = outside.ranges.map(|ranges| {
            let networks = ranges.iter().map(|range| range.parse::<ipnetwork::IpNetwork>().unwrap());
            let mut networks: Vec<_> = networks.filter(|n| Family::of(n.ip()) == port.family).collect();
            networks.sort();
            networks.into()
        });
        port.source_ranges = ranges;
        let vip = |v4: [u8; 2], v6: &str| {
            let [high, low] = number.to_be_bytes();
            let ip: std::net::IpAddr = match port.family {
                Family::V4 => [v4[0], v4[1], high, low].into(),
                Family::V6 => format!("{v6}::{number:x}").parse().unwrap(),
            };
            FrontendAddress::Vip(SocketAddr::from((ip, 80)).into())
        };
        let mut frontends = vec![Frontend { verdict: outside.internal, ..port.frontends[0] }];
        let external = |at, kind| Frontend { at, kind, verdict: outside.external };
        if outside.load_balancer {
            frontends.push(external(vip([203, 0], "fd00:203"), FrontendKind::LoadBalancer));
        }
        if outside.external_ip {
            frontends.push(external(vip([198, 51], "fd00:198"), FrontendKind::ExternalIp));
        }
        if outside.node_port {
            frontends.push(external(FrontendAddress::NodePort(number), FrontendKind::NodePort));
        }
        frontends.sort();
        port.frontends = frontends.into();
    }
    (key, Some(Arc::new(plan)))
}

pub(super) fn node() -> NodePlan {
    NodePlan {
        nodeport_addresses: vec!["192.168.77.1".parse().unwrap(), "fd00:77::1".parse().unwrap()],
        pod_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/56".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/12".parse().unwrap(), "fd00:96::/108".parse().unwrap()],
        ..NodePlan::default()
    }
}

pub(super) fn settings() -> Settings {
    Settings { detector: Detector::PodCidrs, masquerade_all: false, ..Settings::default() }
}

pub(super) fn batch(services: Vec<(ServiceKey, Option<Arc<Plan>>)>) -> Batch {
    Batch { node: Some(node()), services, sweep: true }
}

/// Applies Services with the node's own elements, and sweeps.
pub(super) fn apply(dataplane: &mut Nftables, services: Vec<(ServiceKey, Option<Arc<Plan>>)>) -> Outcome {
    dataplane.apply(&batch(services)).expect("commit")
}

pub(super) fn opened() -> Nftables {
    Nftables::open(settings()).unwrap()
}

/// What is listed, in an order that does not depend on where the kernel hashed it.
pub(super) fn sorted(listing: &str) -> Vec<String> {
    let flat = listing.replace(",\n", "\n");
    let mut lines: Vec<_> = flat
        .lines()
        .map(|l| l.trim().replace("elements = { ", "").trim_end_matches(" }").to_owned())
        .collect();
    lines.sort();
    lines
}

/// The listed lines with this in them, without the slots, whose order depends on history.
pub(super) fn slotless(listing: &str, with: &str) -> BTreeSet<String> {
    let lines = sorted(listing).into_iter().filter(|line| line.contains(with));
    let slotless = |line: String| match line.split_once(" comment ") {
        Some((key, rest)) if rest.contains(" : ") => {
            format!("{} {rest}", key.rsplit_once(" . ").map_or(key, |(key, _)| key))
        }
        _ => line,
    };
    lines.map(slotless).collect()
}

/// How many rules there are: lines of chains that are neither headers nor blank.
pub(super) fn rules(listing: &str) -> usize {
    let mut in_chain = false;
    let mut count = 0;
    for line in listing.lines().map(str::trim) {
        match line {
            _ if line.starts_with("chain ") => in_chain = true,
            "}" => in_chain = false,
            _ => count += usize::from(in_chain && !line.starts_with("type ")),
        }
    }
    count
}
