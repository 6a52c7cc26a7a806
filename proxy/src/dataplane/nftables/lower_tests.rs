//! Tests of the lowering: which elements one change costs, and that slots stay dense.

use std::collections::BTreeSet;

use super::super::kernel::Empty;
use super::*;

fn backend(n: u16) -> Backend {
    let [a, b] = n.to_be_bytes();
    Backend { address: SocketAddr::from(([10, 1, a, b], 8080)).into(), local: false }
}

fn address(n: u16) -> SocketAddr {
    backend(n).address.socket()
}

fn plan(backends: impl IntoIterator<Item = Backend>, nodeport: bool) -> Arc<Plan> {
    let mut backends: Vec<_> = backends.into_iter().collect();
    backends.sort();
    let verdict = if backends.is_empty() { Verdict::Reject } else { Verdict::Cluster };
    let mut frontends = vec![Frontend::cluster_ip(SocketAddr::from(([10, 96, 0, 1], 80)), verdict)];
    if nodeport {
        frontends.push(Frontend::nodeport(30080, verdict));
    }
    let port = PortPlan {
        backends: backends.into(),
        frontends: frontends.into(),
        ..PortPlan::new(Family::V4, Protocol::Tcp, "http")
    };
    let service = crate::model::input::ServiceKey::new("default", "web");
    Arc::new(Plan::new(service, [port]))
}

/// As if there were no other Service.
fn lower_alone(previous: Option<&Applied>, next: Option<&Arc<Plan>>, kernel: &impl Kernel) -> Lowered {
    lower(previous, next, kernel, &mut Ids::default())
}

/// A model of the kernel: applies what is lowered, and refuses what the kernel refuses.
#[derive(Default)]
struct Model(BTreeMap<Place, Option<Data>>);

impl Kernel for Model {
    fn holds(&self, place: &Place) -> bool {
        self.0.contains_key(place)
    }

    fn data(&self, place: &Place) -> Option<Data> {
        *self.0.get(place)?
    }

    fn below(&self, place: Place) -> impl Iterator<Item = (Place, Option<Data>)> {
        let is_below =
            move |held: &(&Place, _)| held.0.set == place.set && held.0.key.starts_with(&place.key);
        self.0.iter().filter(is_below).map(|(place, data)| (*place, *data))
    }
}

impl Model {
    fn apply(&mut self, lowered: &Lowered) {
        for place in &lowered.removed {
            assert!(self.0.remove(place).is_some(), "{place} is not there");
        }
        for element in &lowered.added {
            let before = self.0.insert(element.place, element.data);
            assert!(before.is_none(), "{} is there already", element.place);
        }
    }

    /// The backends behind the VIP, checked to be without gaps and to agree with `more`.
    fn backends(&self) -> Vec<SocketAddr> {
        let key = Key::vip("10.96.0.1:80".parse().unwrap(), Protocol::Tcp);
        let place = |set, key| Place { family: Family::V4, set, key };
        let slots: Vec<_> = (0u32..)
            .map_while(|slot| self.0.get(&place(Set::Endpoints, key.slot(slot))))
            .map(|data| data.and_then(Data::to_backend).unwrap())
            .collect();
        let all = self.0.keys().filter(|place| place.set == Set::Endpoints).count();
        assert_eq!(all, slots.len(), "the slots have a gap");
        for step in (0..CLASSES - 1).map(|i| 1 << i) {
            let more = self.0.contains_key(&place(Set::More, key.slot(step)));
            assert_eq!(more, slots.len() > step as usize, "more {step} of {}", slots.len());
        }
        slots
    }
}

const VIPS: [&str; 3] = ["10.96.0.1:80", "203.0.113.1:80", "198.51.100.1:80"];

/// A Service with a cluster IP, a load balancer, an external IP and a NodePort, as far as they have a verdict.
fn everywhere(
    verdicts: [Option<Verdict>; 4],
    cluster: impl IntoIterator<Item = Backend>,
    local: impl IntoIterator<Item = Backend>,
    ranges: Option<&[&str]>,
) -> Arc<Plan> {
    let sorted = |backends: Vec<Backend>| {
        let mut backends = backends;
        backends.sort();
        backends.into_boxed_slice()
    };
    let mut plan = Plan::clone(&plan([], false));
    let port = &mut plan.ports[0];
    port.backends = sorted(cluster.into_iter().collect());
    port.local_backends = sorted(local.into_iter().collect());
    port.source_ranges = ranges.map(|ranges| ranges.iter().map(|range| range.parse().unwrap()).collect());
    let vip = |i: usize| FrontendAddress::Vip(VIPS[i].parse::<SocketAddr>().unwrap().into());
    let kinds = [
        (vip(0), FrontendKind::ClusterIp),
        (vip(1), FrontendKind::LoadBalancer),
        (vip(2), FrontendKind::ExternalIp),
        (FrontendAddress::NodePort(30080), FrontendKind::NodePort),
    ];
    let frontends = kinds.into_iter().zip(verdicts);
    let frontends =
        frontends.filter_map(|((at, kind), verdict)| Some(Frontend { at, kind, verdict: verdict? }));
    let mut frontends: Vec<_> = frontends.collect();
    frontends.sort();
    port.frontends = frontends.into();
    Arc::new(plan)
}

/// What there is, as text: places without slots, and backends as a set for each place.
fn meaning(kernel: &Model) -> BTreeSet<String> {
    let slotless = |place: &Place, data: &Option<Data>| {
        let text = place.to_string();
        match (data, text.rsplit_once(" . ")) {
            (Some(data), Some((frontend, _))) => format!("{frontend} → {data:?}"),
            _ => text,
        }
    };
    kernel.0.iter().map(|(place, data)| slotless(place, data)).collect()
}

/// The names of the sets of an address, and what stands in slots.
fn named(lowered: &Lowered, address: &str) -> Vec<String> {
    let places = lowered.added.iter().map(|element| element.place.to_string());
    places.filter(|place| place.contains(address)).collect()
}

#[test]
fn each_kind_of_frontend_has_its_sets() {
    let (all, near) = ([1, 2, 3].map(backend), [backend(2)]);
    let verdicts = [Verdict::Local, Verdict::Local, Verdict::Cluster, Verdict::Local].map(Some);
    let lowered =
        lower_alone(None, Some(&everywhere(verdicts, all, near, Some(&["10.0.0.0/8"]))), &Empty::default());
    let places = |address: &str| named(&lowered, &format!(" {address} ")).join("\n");
    // The cluster IP has the Local set in its first slots.
    assert_eq!(
        places("10.96.0.1 . 6 . 80"),
        "vips { 10.96.0.1 . 6 . 80 }\nendpoints { 10.96.0.1 . 6 . 80 . 0 }"
    );
    let vip = |address: &str, local: &str| {
        format!(
            "endpoints {{ {address} . 0 }}\nendpoints {{ {address} . 1 }}\nendpoints {{ {address} . 2 }}\n\
             more {{ {address} . 1 }}\nmore {{ {address} . 2 }}{local}"
        )
    };
    let balancer = "203.0.113.1 . 6 . 80";
    let local = format!("\nendpoints-local {{ {balancer} . 0 }}\nranges {{ {balancer} . 10.0.0.0/8 }}");
    let names = format!("vips {{ {balancer} }}\nvips-local {{ {balancer} }}\nranged {{ {balancer} }}\n");
    assert_eq!(places(balancer), names + &vip(balancer, &local));
    let external = "198.51.100.1 . 6 . 80";
    let names = format!("vips {{ {external} }}\nvips-masq {{ {external} }}\n");
    assert_eq!(places(external), names + &vip(external, ""));
    assert_eq!(
        places("6 . 30080"),
        "nps { 6 . 30080 }\nnps-local { 6 . 30080 }\n\
         np-endpoints { 6 . 30080 . 0 }\nnp-endpoints { 6 . 30080 . 1 }\nnp-endpoints { 6 . 30080 . 2 }\n\
         np-more { 6 . 30080 . 1 }\nnp-more { 6 . 30080 . 2 }\nnp-endpoints-local { 6 . 30080 . 0 }"
    );
}

#[test]
fn a_policy_changes_in_place() {
    let (all, near) = ([1, 2, 3].map(backend), [backend(2)]);
    let verdicts = |external| [Verdict::Cluster, external, external, external].map(Some);
    let cluster = everywhere(verdicts(Verdict::Cluster), all, [], None);
    let local = everywhere(verdicts(Verdict::Local), all, near, None);
    let first = lower_alone(None, Some(&cluster), &Empty::default()).applied.unwrap();
    let lowered = lower_alone(Some(&first), Some(&local), &Empty::default());
    // Of two VIPs and a NodePort: one local slot and one name each; the VIPs are always masqueraded no more.
    assert_eq!((lowered.added.len(), lowered.removed.len()), (6, 2), "{lowered:?}");
    let back = lower_alone(lowered.applied.as_ref(), Some(&cluster), &Empty::default());
    assert_eq!((back.added.len(), back.removed.len()), (2, 6), "{back:?}");
}

#[test]
fn only_the_ranges_that_change_are_written() {
    let service = |ranges: &[&str]| {
        let verdicts = [Some(Verdict::Cluster), Some(Verdict::Cluster), None, None];
        everywhere(verdicts, [backend(1)], [], Some(ranges))
    };
    let first = service(&["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]);
    let first = lower_alone(None, Some(&first), &Empty::default()).applied.unwrap();
    let next = service(&["10.0.0.0/9", "172.16.0.0/12", "192.168.0.0/16"]);
    let lowered = lower_alone(Some(&first), Some(&next), &Empty::default());
    let removed: Vec<_> = lowered.removed.iter().map(ToString::to_string).collect();
    assert_eq!(removed, ["ranges { 203.0.113.1 . 6 . 80 . 10.0.0.0/8 }"]);
    assert_eq!(named(&lowered, "203"), ["ranges { 203.0.113.1 . 6 . 80 . 10.0.0.0/9 }"]);
}

#[test]
fn what_an_earlier_run_left_of_a_frontend_goes_when_it_is_claimed() {
    let verdicts = [Verdict::Local, Verdict::Local, Verdict::Local, Verdict::Local].map(Some);
    let before = everywhere(verdicts, (0..9).map(backend), (0..3).map(backend), Some(&["10.0.0.0/8"]));
    let mut kernel = Model::default();
    kernel.apply(&lower_alone(None, Some(&before), &Empty::default()));
    let verdicts = [Verdict::Cluster, Verdict::Cluster, Verdict::Reject, Verdict::Cluster].map(Some);
    let after = everywhere(verdicts, (2..5).map(backend), [], Some(&["10.0.0.0/9"]));
    let lowered = lower_alone(None, Some(&after), &kernel);
    // What is there already is not written again: the commit sees to that.
    assert!(lowered.removed.iter().all(|place| kernel.0.remove(place).is_some()));
    kernel.0.extend(lowered.added.iter().map(|element| (element.place, element.data)));
    let mut fresh = Model::default();
    fresh.apply(&lower_alone(None, Some(&after), &Empty::default()));
    assert_eq!(meaning(&kernel), meaning(&fresh));
}

#[test]
fn any_history_ends_where_a_fresh_start_does() {
    let mut kernel = Model::default();
    let mut applied: Option<Applied> = None;
    let mut random = random();
    for step in 0..3000 {
        let wanted = |random: &mut dyn FnMut(u64) -> u64| -> Vec<_> {
            (0..12).filter(|_| random(2) == 0).map(backend).collect()
        };
        let (cluster, local) = (wanted(&mut random), wanted(&mut random));
        let mut verdict = || match random(5) {
            0 => None,
            1 => Some(Verdict::Reject),
            2 => Some(Verdict::Local),
            _ => Some(Verdict::Cluster),
        };
        let verdicts = [verdict(), verdict(), verdict(), verdict()];
        let ranges: &[&[&str]] = &[&[], &["10.0.0.0/8"], &["10.0.0.0/9", "192.0.2.0/24"]];
        let ranges = (random(3) > 0).then(|| ranges[random(3) as usize]);
        let mut next = everywhere(verdicts, cluster, local, ranges);
        if random(10) == 0 {
            Arc::make_mut(&mut next).ports[0].name = "renamed".into();
        }
        let next = (random(20) > 0).then_some(next);
        let lowered = lower_alone(applied.as_ref(), next.as_ref(), &Empty::default());
        kernel.apply(&lowered);
        let mut fresh = Model::default();
        fresh.apply(&lower_alone(None, next.as_ref(), &Empty::default()));
        assert_eq!(meaning(&kernel), meaning(&fresh), "step {step}");
        assert_eq!(kernel.0.len(), fresh.0.len(), "step {step}");
        applied = lowered.applied;
    }
}

#[test]
fn one_change_costs_a_few_elements_at_any_size() {
    let first =
        lower_alone(None, Some(&plan((0..5000).map(backend), false)), &Empty::default()).applied.unwrap();
    let replaced = plan((1..5000).chain([6000]).map(backend), false);
    let lowered = lower_alone(Some(&first), Some(&replaced), &Empty::default());
    assert_eq!((lowered.removed.len(), lowered.added.len()), (1, 1));
    let fewer = plan((1..5000).map(backend), false);
    let lowered = lower_alone(Some(&first), Some(&fewer), &Empty::default());
    assert_eq!((lowered.removed.len(), lowered.added.len()), (2, 1), "the last takes the gap");
    let more = plan((0..5001).map(backend), false);
    let lowered = lower_alone(Some(&first), Some(&more), &Empty::default());
    assert_eq!((lowered.removed.len(), lowered.added.len()), (0, 1));
}

#[test]
fn an_equal_plan_costs_nothing() {
    let first = lower_alone(None, Some(&plan((0..9).map(backend), true)), &Empty::default()).applied.unwrap();
    let lowered = lower_alone(Some(&first), Some(&plan((0..9).map(backend), true)), &Empty::default());
    assert!(lowered.removed.is_empty() && lowered.added.is_empty());
    assert!(lowered.shared.lost.is_empty() && lowered.shared.gained.is_empty());
}

/// Numbers below what they are asked for, the same in every run.
fn random() -> impl FnMut(u64) -> u64 {
    let mut state = 1u64;
    move |n| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    }
}

#[test]
fn slots_are_dense_through_any_history() {
    let mut kernel = Model::default();
    let mut applied: Option<Applied> = None;
    let mut random = random();
    for _ in 0..2000 {
        let wanted: Vec<_> = (0..20).filter(|_| random(2) == 0).map(backend).collect();
        let next = (random(20) != 0).then(|| plan(wanted.iter().copied(), random(2) == 0));
        let lowered = lower_alone(applied.as_ref(), next.as_ref(), &Empty::default());
        kernel.apply(&lowered);
        let mut backends = kernel.backends();
        backends.sort();
        let expected: Vec<_> =
            next.iter().flat_map(|_| &wanted).map(|backend| backend.address.socket()).collect();
        assert_eq!(backends, expected);
        applied = lowered.applied;
    }
}

#[test]
fn a_service_that_goes_leaves_nothing() {
    let mut kernel = Model::default();
    let first = lower_alone(None, Some(&plan((0..7).map(backend), true)), &Empty::default());
    kernel.apply(&first);
    kernel.apply(&lower_alone(first.applied.as_ref(), None, &Empty::default()));
    assert!(kernel.0.is_empty());
}

#[test]
fn a_renamed_port_gets_its_new_comment() {
    let first = lower_alone(None, Some(&plan([backend(1)], false)), &Empty::default()).applied.unwrap();
    let mut renamed = Plan::clone(&plan([backend(1)], false));
    renamed.ports[0].name = "web".into();
    let lowered = lower_alone(Some(&first), Some(&Arc::new(renamed)), &Empty::default());
    assert_eq!(lowered.removed.len(), lowered.added.len());
    assert!(lowered.added.iter().all(|element| element.comment.as_deref() == Some("default/web:web")));
}

#[test]
fn slots_found_in_the_kernel_are_kept() {
    struct Held;
    impl Kernel for Held {
        fn holds(&self, place: &Place) -> bool {
            self.data(place).is_some()
        }

        fn below(&self, _: Place) -> impl Iterator<Item = (Place, Option<Data>)> {
            std::iter::empty()
        }

        fn data(&self, place: &Place) -> Option<Data> {
            let key = Key::vip("10.96.0.1:80".parse().unwrap(), Protocol::Tcp);
            let held = [3, 9, 1, 2].map(|n| Data::backend(address(n)));
            (0..4).find(|slot| place.key == key.slot(*slot)).map(|slot| held[slot as usize])
        }
    }
    let lowered = lower_alone(None, Some(&plan([1, 2, 3].map(backend), false)), &Held);
    let applied = lowered.applied.unwrap();
    let order = Slots(&applied.slots).of(&applied.plan.ports[0], EndpointSet::Cluster);
    let backends: Vec<_> = (0..).map_while(|slot| order.at(slot)).map(AddressPort::socket).collect();
    assert_eq!(backends, [3, 2, 1].map(address));
}
