//! Clients that come back: through which frontends, for how long, to which backends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kube_lane::dataplane::{Batch, Dataplane};
use kube_lane::model::input::{Family, Protocol};
use kube_lane::model::plan::{Plan, Verdict};
use kube_lane_lab::{Host, Proto};

use super::{HOUR, PROTOS, Wanted, World, at, lb, nodeport, sole, vip, who};

#[test]
fn a_client_comes_back_through_every_frontend() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR));
    let lab = &world.lab;
    let client = lab.node(0).add_pod("client").unwrap();
    for (proto, _) in PROTOS {
        for family in Family::ALL {
            let hosts: [&Host; 4] = [&client, lab.outside(), lab.node(0), &world.pods[0].0];
            for host in hosts {
                let first = who(host, proto, vip(family));
                for to in [vip(family), nodeport(family), lb(family)] {
                    assert_eq!(sole(host, proto, to).as_ref(), Some(&first), "{proto} {} {to}", host.name());
                }
            }
        }
    }
    // The node's own pods are known by their own addresses, not by the node's.
    assert!(world.remembered(Protocol::Tcp).contains_key(&client.v4().to_string()));
}

#[test]
fn a_pod_comes_back_to_itself() {
    let mut world = World::new();
    world.apply(&Wanted::new(HOUR).among(&[0]));
    let ask = |world: &World| {
        for (proto, _) in PROTOS {
            for to in Family::ALL.map(vip) {
                assert_eq!(sole(&world.pods[0].0, proto, to).as_deref(), Some("pod0"), "{proto} {to}");
            }
        }
    };
    ask(&world);
    world.apply(&Wanted::new(HOUR));
    ask(&world);
}

#[test]
fn each_new_connection_starts_the_time_again() {
    let mut world = World::new();
    world.apply(&Wanted::new(2));
    let client = world.lab.node(0).add_pod("client").unwrap();
    let first = who(&client, Proto::Tcp, vip(Family::V4));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        std::thread::sleep(Duration::from_millis(700));
        assert_eq!(who(&client, Proto::Tcp, nodeport(Family::V4)), first);
    }
    assert_eq!(world.remembered(Protocol::Tcp).len(), 1);
    std::thread::sleep(Duration::from_millis(2100));
    assert!(world.remembered(Protocol::Tcp).is_empty());
}

#[test]
fn a_backend_counts_only_where_it_is_in_the_set() {
    let mut world = World::new();
    let mixed = Wanted { local: vec![0, 1], external: Verdict::Local, ..Wanted::new(HOUR).among(&[1, 2, 3]) };
    world.apply(&mixed);
    let lab = &world.lab;
    let client = lab.node(0).add_pod("client").unwrap();
    for (proto, _) in PROTOS {
        for family in Family::ALL {
            // Pods and the host get the Cluster set everywhere.
            for host in [&*client, lab.node(0)] {
                let first = sole(host, proto, vip(family)).expect("one");
                for to in [lb(family), nodeport(family)] {
                    assert_eq!(sole(host, proto, to).as_ref(), Some(&first), "{proto} {}", host.name());
                }
            }
            // Who comes from outside gets the Local set, but not through the cluster IP.
            let local = sole(lab.outside(), proto, lb(family)).expect("one");
            assert!(["pod0", "pod1"].contains(&&*local), "{local}");
            assert_eq!(sole(lab.outside(), proto, nodeport(family)).as_ref(), Some(&local));
            let cluster = sole(lab.outside(), proto, vip(family)).expect("one");
            assert_eq!(cluster == local, local == "pod1", "{local} {cluster}");
            assert_eq!(sole(lab.outside(), proto, lb(family)).as_ref(), Some(&local));
        }
    }
}

#[test]
fn backends_may_listen_on_several_ports() {
    let mut world = World::new();
    let other: Vec<_> = [1, 3].map(|i| world.pods[i].0.serve(Proto::Tcp, 9090).unwrap()).into();
    let plan = |world: &World, pods: &[usize]| {
        let mut plan = Plan::clone(&world.plan(&Wanted::new(HOUR).among(pods)));
        plan.ports = plan.ports.into_iter().filter(|port| port.protocol == Protocol::Tcp).collect();
        for port in &mut plan.ports {
            let others = [1, 3].map(|i| at(&world.pods[i].0, port.family, 8080));
            for backend in port.backends.iter_mut().filter(|backend| others.contains(&backend.address)) {
                backend.address.port = 9090;
            }
        }
        let services = vec![(plan.service.clone(), Some(Arc::new(plan)))];
        Batch { services, ..Batch::default() }
    };
    for pods in [&[0, 1, 2, 3][..], &[1], &[0, 1, 2, 3], &[0], &[0, 1, 2, 3]] {
        let outcome = world.dataplane.apply(&plan(&world, pods)).unwrap();
        assert!(outcome.failed.is_empty() && outcome.messages < 200, "{outcome:?}");
        for family in Family::ALL {
            for host in [&**world.lab.outside(), world.lab.node(0)] {
                let first = sole(host, Proto::Tcp, vip(family)).expect("one");
                assert_eq!(sole(host, Proto::Tcp, nodeport(family)), Some(first), "{pods:?}");
            }
        }
    }
    // With nobody else for a while, they stayed with the last.
    assert_eq!(sole(world.lab.outside(), Proto::Tcp, vip(Family::V4)).as_deref(), Some("pod0"));
    drop(other);
}
