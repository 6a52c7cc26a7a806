//! When an origin's objects count, and which of two origins wins.

use kube_lane::model::input::{Change, Event};

use crate::build::{api, file, ip, key, planner, reported, service, slice, synced, text};

#[test]
fn objects_wait_for_their_own_origin_only() {
    let mut planner = planner();
    planner.apply(api(Change::Service(service("from-api", 0, &["10.96.0.1"], None))));
    planner.apply(file(Change::Service(service("from-file", 0, &["10.96.0.2"], None))));
    planner.apply(api(Change::Slice(slice("late", "from-file", &["10.244.0.1"]))));
    planner.apply(Event::HostAddresses(vec![ip("192.0.2.1")]));
    assert!(planner.replan().is_empty());

    planner.apply(file(Change::Synced));
    let changes = planner.replan();
    assert_eq!(changes.services.len(), 1);
    assert_eq!(changes.node.unwrap().nodeport_addresses, [ip("192.0.2.1")]);
    assert!(text(&planner, "from-file").contains("ClusterIP 10.96.0.2:80 refused"));
    assert!(!planner.synced());

    planner.apply(api(Change::Synced));
    assert_eq!(reported(&mut planner), ["from-api", "from-file"]);
    assert!(text(&planner, "from-file").contains("to 10.244.0.1:8080"));
    assert!(planner.synced());

    planner.apply(api(Change::Synced));
    assert!(planner.replan().is_empty());
}

#[test]
fn an_incomplete_origin_is_planned_but_holds_the_sweep_back() {
    let mut planner = planner();
    planner.apply(file(Change::Service(service("web", 0, &["10.96.0.1"], None))));
    planner.apply(file(Change::Complete(false)));
    planner.apply(file(Change::Synced));
    planner.apply(api(Change::Synced));
    assert_eq!(reported(&mut planner), ["web"]);
    assert!(!planner.synced());
    planner.apply(file(Change::Complete(true)));
    assert!(planner.synced());
}

#[test]
fn a_static_service_wins_while_it_is_there() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("web", 0, &["10.96.0.1"], None))));
    planner.replan();
    planner.apply(file(Change::Service(service("web", 9, &["10.96.0.2"], None))));
    assert_eq!(reported(&mut planner), ["web"]);
    assert!(text(&planner, "web").contains("10.96.0.2:80"));

    let planned = planner.services_planned();
    planner.apply(api(Change::Service(service("web", 0, &["10.96.0.3"], None))));
    assert!(planner.replan().is_empty());
    assert_eq!(planner.services_planned(), planned);

    planner.apply(file(Change::ServiceGone(key("web"))));
    planner.replan();
    assert!(text(&planner, "web").contains("10.96.0.3:80"));
    planner.apply(api(Change::ServiceGone(key("web"))));
    assert_eq!(reported(&mut planner), ["web"]);
    assert_eq!(text(&planner, "web"), "-");
}

#[test]
fn slices_of_one_service_come_from_both_origins() {
    let mut planner = synced();
    planner.apply(api(Change::Service(service("web", 0, &["10.96.0.1"], None))));
    planner.apply(api(Change::Slice(slice("pods", "web", &["10.244.0.1"]))));
    planner.apply(file(Change::Slice(slice("hosts", "web", &["192.0.2.5"]))));
    planner.replan();
    assert!(text(&planner, "web").contains("to 10.244.0.1:8080\n    to 192.0.2.5:8080"));

    // A static slice of another Service takes the name of the API's: both Services feel it.
    planner.apply(api(Change::Service(service("other", 0, &["10.96.0.2"], None))));
    planner.replan();
    planner.apply(file(Change::Slice(slice("pods", "other", &["10.244.0.9"]))));
    assert_eq!(reported(&mut planner), ["other", "web"]);
    assert!(!text(&planner, "web").contains("10.244.0.1"));
    planner.apply(file(Change::SliceGone(key("pods"))));
    assert_eq!(reported(&mut planner), ["other", "web"]);
    assert!(text(&planner, "web").contains("10.244.0.1"));
}
