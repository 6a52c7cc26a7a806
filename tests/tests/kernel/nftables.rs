//! The nftables dataplane against the real kernel, without packets: what it writes, finds, repairs and refuses.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use kube_lane::dataplane::nftables::{Nftables, Settings, cleanup};
use kube_lane::dataplane::{Batch, Dataplane, Outcome};
use kube_lane::model::input::{Family, Protocol, ServiceKey};
use kube_lane::model::plan::{
    Backend, Frontend, FrontendAddress, FrontendKind, NodePlan, Plan, PortPlan, Verdict,
};
use nix::sched::{CloneFlags, unshare};

/// Runs in a network namespace of its own, which goes with the thread.
fn in_namespace<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (needs root)");
        test()
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn nft(arguments: &[&str], input: Option<&str>) -> String {
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

fn listing() -> String {
    nft(&["list", "ruleset"], None)
}

/// A Service with a cluster IP of each family and a NodePort, and so many endpoints.
fn service(number: u16, endpoints: u16) -> (ServiceKey, Option<Arc<Plan>>) {
    named(&format!("svc-{number}"), number, (1..=endpoints).collect::<Vec<_>>().as_slice())
}

fn named(name: &str, number: u16, endpoints: &[u16]) -> (ServiceKey, Option<Arc<Plan>>) {
    let [high, low] = number.to_be_bytes();
    let ports = Family::ALL.map(|family| {
        let address = |v4: [u8; 4], v6: String, port| match family {
            Family::V4 => SocketAddr::from((v4, port)),
            Family::V6 => format!("[{v6}]:{port}").parse().unwrap(),
        };
        let backends = endpoints.iter().map(|n| {
            let [a, b] = n.to_be_bytes();
            Backend { address: address([10, 1, a, b], format!("fd00:1::{n:x}"), 8080), local: n % 2 == 0 }
        });
        let verdict = if endpoints.is_empty() { Verdict::Reject } else { Verdict::Balance };
        let vip = address([10, 96, high, low], format!("fd00:96::{number:x}"), 80);
        PortPlan {
            family,
            protocol: Protocol::Tcp,
            name: "http".into(),
            backends: backends.collect(),
            frontends: [
                Frontend { at: FrontendAddress::Vip(vip), kind: FrontendKind::ClusterIp, verdict },
                Frontend {
                    at: FrontendAddress::NodePort(30000 + number % 2768),
                    kind: FrontendKind::NodePort,
                    verdict,
                },
            ]
            .into(),
        }
    });
    let service = ServiceKey::new("default", name);
    let plan = Plan { service: service.clone(), ports: ports.into(), warnings: [].into() };
    (service, Some(Arc::new(plan)))
}

fn node() -> NodePlan {
    NodePlan {
        nodeport_addresses: vec!["192.168.77.1".parse().unwrap(), "fd00:77::1".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/12".parse().unwrap(), "fd00:96::/108".parse().unwrap()],
    }
}

fn settings() -> Settings {
    Settings {
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/56".parse().unwrap()],
        masquerade_all: false,
    }
}

fn apply(dataplane: &mut Nftables, services: Vec<(ServiceKey, Option<Arc<Plan>>)>) -> Outcome {
    dataplane.apply(&Batch { node: None, services, sweep: true }).expect("commit")
}

fn full(dataplane: &mut Nftables, services: Vec<(ServiceKey, Option<Arc<Plan>>)>) -> Outcome {
    dataplane.apply(&Batch { node: Some(node()), services, sweep: true }).expect("commit")
}

/// What is listed, in an order that does not depend on where the kernel hashed it.
fn sorted(listing: &str) -> Vec<String> {
    let flat = listing.replace(",\n", "\n");
    let mut lines: Vec<_> = flat
        .lines()
        .map(|l| l.trim().replace("elements = { ", "").trim_end_matches(" }").to_owned())
        .collect();
    lines.sort();
    lines
}

#[test]
fn what_nft_lists_nft_takes_back() {
    in_namespace(|| {
        let mut dataplane = Nftables::open(settings()).unwrap();
        let outcome = full(&mut dataplane, vec![service(1, 5), service(2, 1), service(3, 0)]);
        assert!(outcome.failed.is_empty(), "{outcome:?}");
        let before = listing();
        println!("{before}");
        nft(&["flush", "ruleset"], None);
        nft(&["-f", "-"], Some(&before));
        assert_eq!(sorted(&before), sorted(&listing()));
    });
}
