//! The tables of the families: which there are, when they come, and that they stay.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use kube_lane::dataplane::nftables::{Nftables, cleanup};
use kube_lane::dataplane::{Batch, Dataplane as _, Outcome};
use kube_lane::model::input::{Family, ServiceKey};
use kube_lane::model::plan::{NodePlan, Plan};
use kube_lane_lab::{Dial, Load, Proto};
use kube_lane_tests::objects::{service as service_object, slices};
use nix::sys::signal::Signal;

use super::plans::{in_namespace, listing, nft, node, opened, service, sorted, with_affinity};
use super::world::{SYNC, World, answered, at, endpoints, serving, until, vips, web_ports};

type Service = (ServiceKey, Option<Arc<Plan>>);

/// A Service of this family alone.
fn of(family: Family, (key, plan): Service) -> Service {
    let mut plan = Plan::clone(plan.as_deref().unwrap());
    plan.ports = plan.ports.iter().filter(|port| port.family == family).cloned().collect();
    (key, Some(Arc::new(plan)))
}

fn gone((key, _): Service) -> Service {
    (key, None)
}

/// A node with addresses and pods of both families, in a cluster whose Services are IPv4.
fn single_stack() -> NodePlan {
    let mut node = node();
    node.service_cidrs.retain(|cidr| cidr.is_ipv4());
    node
}

fn start(dataplane: &mut Nftables, services: Vec<Service>) -> Outcome {
    dataplane.apply(&Batch { node: Some(single_stack()), services, sweep: true }).unwrap()
}

fn change(dataplane: &mut Nftables, services: Vec<Service>) -> Outcome {
    dataplane.apply(&Batch { services, ..Batch::default() }).unwrap()
}

/// The families that have a table.
fn tables() -> Vec<&'static str> {
    let listed = nft(&["list", "tables"], None);
    let has = |family: &&str| listed.lines().any(|line| line == format!("table {family} kube-lane"));
    ["ip", "ip6"].into_iter().filter(has).collect()
}

#[test]
fn a_family_has_a_table_once_something_of_it_is_there() {
    in_namespace(|| {
        let mut dataplane = opened();
        dataplane.apply(&Batch::default()).unwrap();
        assert_eq!(listing(), "", "nothing is known yet");
        let (v4, v6) = (of(Family::V4, service(1, 5)), of(Family::V6, with_affinity(service(2, 3))));
        assert!(start(&mut dataplane, vec![v4.clone()]).failed.is_empty());
        assert_eq!(tables(), ["ip"]);
        let mut without_services = single_stack();
        without_services.nodeport_addresses.push("fd00:77::2".parse().unwrap());
        dataplane.apply(&Batch { node: Some(without_services), ..Batch::default() }).unwrap();
        assert_eq!(tables(), ["ip"], "NodePort addresses and pods alone need none");
        dataplane.apply(&Batch { node: Some(single_stack()), ..Batch::default() }).unwrap();

        // The first Service finds the table as it would have been, with what is the node's.
        assert!(change(&mut dataplane, vec![v6.clone()]).failed.is_empty());
        let right = sorted(&listing());
        let (both, fresh) = ([v4, v6.clone()], |services: Vec<Service>| {
            in_namespace(move || {
                start(&mut opened(), services);
                sorted(&listing())
            })
        });
        assert_eq!(right, fresh(both.to_vec()));
        let chain = nft(&["list", "chain", "ip6", "kube-lane", "masq-cluster-ip"], None);
        assert!(chain.contains("@pod-cidrs"), "{chain}");

        // It stays, and follows the node, through a restart, too.
        change(&mut dataplane, vec![gone(v6.clone())]);
        assert_eq!(tables(), ["ip", "ip6"]);
        let mut second = opened();
        let outcome = start(&mut second, vec![both[0].clone()]);
        assert_eq!((outcome.added, outcome.removed), (0, 0));
        change(&mut second, vec![v6]);
        assert_eq!(sorted(&listing()), right);
    });
}

#[test]
fn a_service_cidr_needs_a_table_too() {
    in_namespace(|| {
        let mut dataplane = opened();
        start(&mut dataplane, vec![]);
        assert_eq!(tables(), ["ip"]);
        dataplane.apply(&Batch { node: Some(node()), ..Batch::default() }).unwrap();
        let right = sorted(&listing());
        let fresh = in_namespace(|| {
            opened().apply(&Batch { node: Some(node()), services: vec![], sweep: true }).unwrap();
            sorted(&listing())
        });
        assert_eq!(right, fresh);
        cleanup().unwrap();
        assert_eq!(listing(), "");
    });
}

#[test]
fn a_table_that_somebody_deletes_comes_back_where_it_is_needed() {
    in_namespace(|| {
        let mut dataplane = opened();
        let delete = |family| drop(nft(&["delete", "table", family, "kube-lane"], None));
        let v6 = of(Family::V6, service(2, 3));
        start(&mut dataplane, vec![of(Family::V4, service(1, 5)), v6.clone()]);
        let right = sorted(&listing());
        for family in ["ip", "ip6"] {
            delete(family);
            assert!(dataplane.repair().unwrap().expect("noticed").failed.is_empty());
            assert_eq!(sorted(&listing()), right, "{family}");
            assert!(dataplane.repair().unwrap().is_none(), "the repair itself is not foreign");
        }
        change(&mut dataplane, vec![gone(v6.clone())]);
        delete("ip6");
        dataplane.repair().unwrap().expect("noticed");
        assert_eq!(tables(), ["ip"], "nothing needs it");
        delete("ip");
        dataplane.repair().unwrap().expect("noticed");
        assert_eq!(tables(), ["ip"]);
        change(&mut dataplane, vec![v6]);
        assert_eq!(sorted(&listing()), right);

        // Not noticed before the next change: that finds out.
        delete("ip6");
        assert!(change(&mut dataplane, vec![of(Family::V6, service(2, 4))]).failed.is_empty());
        assert_eq!(tables(), ["ip", "ip6"]);
    });
}

/// A process that holds `ip6 kube-lane` so that nobody else may write to it: as if the kernel had no IPv6.
struct Holder(Child);

impl Holder {
    fn start() -> Self {
        let mut child = Command::new("nft")
            .arg("--interactive")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("nft");
        let stdin = child.stdin.as_mut().unwrap();
        stdin.write_all(b"add table ip6 kube-lane { flags owner; }\nlist tables\n").unwrap();
        stdin.flush().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line == "table ip6 kube-lane"));
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_family_that_the_kernel_refuses_does_not_keep_the_other_one() {
    in_namespace(|| {
        let mut dataplane = opened();
        start(&mut dataplane, vec![of(Family::V4, service(1, 5))]);
        let holder = Holder::start();
        let (v4, both) = (of(Family::V4, service(2, 3)), service(3, 3));
        let outcome = change(&mut dataplane, vec![v4, both.clone()]);
        let [(key, words)] = &outcome.failed[..] else { panic!("{outcome:?}") };
        assert!(*key == both.0 && words.contains("IPv6") && words.contains("EPERM"), "{key}: {words}");
        assert!(listing().contains("default/svc-2:http"));
        // A Service of both has its IPv4 ports, and whoever follows is told of these.
        let half = of(Family::V4, both.clone());
        assert_eq!(outcome.partly, slice::from_ref(&half));
        let changed = Batch { services: vec![both.clone()], ..Batch::default() };
        assert_eq!(changed.in_force(&outcome).services, slice::from_ref(&half));
        let v4_alone = in_namespace(move || {
            start(&mut opened(), vec![of(Family::V4, service(1, 5)), of(Family::V4, service(2, 3)), half]);
            nft(&["list", "table", "ip", "kube-lane"], None)
        });
        assert_eq!(sorted(&nft(&["list", "table", "ip", "kube-lane"], None)), sorted(&v4_alone));
        // Trying again costs nothing there.
        let outcome = change(&mut dataplane, vec![both.clone()]);
        assert_eq!((outcome.added, outcome.removed, outcome.failed.len()), (0, 0, 1));
        // Of what has no other family nothing is told.
        let v6 = of(Family::V6, service(4, 1));
        let outcome = change(&mut dataplane, vec![v6.clone()]);
        assert_eq!((outcome.failed.len(), outcome.partly), (1, vec![]));
        // Nor does a ServiceCIDR.
        dataplane.apply(&Batch { node: Some(node()), ..Batch::default() }).unwrap();
        assert!(!listing().contains("fd00:96::"));
        // Nor does it keep a repair, or a start.
        let at = "{ 10.96.0.1 . tcp . 80 }";
        nft(&["delete", "element", "ip", "kube-lane", "vips", at], None);
        let outcome = dataplane.repair().unwrap().expect("noticed");
        assert_eq!(outcome.added, 1, "{outcome:?}");
        assert!(change(&mut dataplane, vec![of(Family::V4, service(2, 4))]).failed.is_empty());
        let mut dataplane = opened();
        let services = vec![of(Family::V4, service(1, 5)), of(Family::V4, service(2, 3))];
        let batch = Batch { node: Some(node()), services, sweep: true };
        assert!(dataplane.apply(&batch).unwrap().failed.is_empty());

        drop(holder);
        assert!(change(&mut dataplane, vec![both.clone()]).failed.is_empty());
        let services = vec![of(Family::V4, service(1, 5)), of(Family::V4, service(2, 3)), both];
        let fresh = in_namespace(|| {
            opened().apply(&Batch { node: Some(node()), services, sweep: true }).unwrap();
            sorted(&listing())
        });
        assert_eq!(sorted(&listing()), fresh);
    });
}

#[test]
fn the_second_family_comes_under_load_and_nobody_notices() {
    let mut world = World::single_stack();
    let (near, _e1) = serving(&world.lab, 0, "near");
    let (far, _e2) = serving(&world.lab, 1, "far");
    let client = world.lab.node(0).add_pod("client").unwrap();
    let tables = |world: &World| world.lab.node(0).run(tables).unwrap();
    let [v4, v6] = vips(10);
    let web = [
        vec![service_object("web", &[v4], &web_ports())],
        slices("web", &web_ports(), &endpoints(&[&near, &far])),
    ];
    world.folder.put("web", &web.concat()).unwrap();
    assert!(answered(&until(&client, Proto::Tcp, at(v4, 80), answered)));
    assert_eq!(tables(&world), ["ip"]);
    let dial = Dial::new(Proto::Tcp, at(v4, 80)).timeout(Duration::from_secs(2));
    let load = Load::start(&client, dial, 2, Duration::ZERO).unwrap();
    let restart = |world: &mut World, expected: &[&str]| {
        let mut old = world.agents.remove(0);
        old.process().signal(Signal::SIGTERM).unwrap();
        old.process().wait_timeout(SYNC).unwrap().unwrap();
        let mut next = world.start_agent(0, &[]);
        next.wait_synced(SYNC).unwrap();
        for count in ["added", "removed"] {
            let count = next.metric(&format!("kubelane_nftables_elements_{count}_total")).unwrap();
            assert_eq!(count, 0.0);
        }
        world.agents.insert(0, next);
        assert_eq!(tables(world), expected);
    };
    restart(&mut world, &["ip"]);
    world.put("web", &web_ports(), 10, &endpoints(&[&near, &far]));
    assert!(answered(&until(&client, Proto::Tcp, at(v6, 80), answered)));
    // A NodePort answers there from the first moment on, too.
    let nodeport = at(world.lab.node(0).v6(), 30080);
    assert!(answered(&until(world.lab.node(1), Proto::Tcp, nodeport, answered)));
    restart(&mut world, &["ip", "ip6"]);
    assert!(answered(&until(&client, Proto::Tcp, at(v6, 80), answered)));
    let report = load.stop();
    assert_eq!(report.tally.failures(), 0, "{:?}", report.tally);
    assert!(report.tally.answers() > 200, "{:?}", report.tally);
}
