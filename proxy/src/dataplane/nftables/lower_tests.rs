//! Tests of the lowering: which elements one change costs, and that slots stay dense.

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
    let vip = FrontendAddress::Vip("10.96.0.1:80".parse::<SocketAddr>().unwrap().into());
    let mut frontends = vec![Frontend { at: vip, kind: FrontendKind::ClusterIp, verdict }];
    if nodeport {
        let at = FrontendAddress::NodePort(30080);
        frontends.push(Frontend { at, kind: FrontendKind::NodePort, verdict });
    }
    let port = PortPlan {
        family: Family::V4,
        protocol: Protocol::Tcp,
        name: "http".into(),
        affinity: None,
        source_ranges: None,
        backends: backends.into(),
        local_backends: [].into(),
        draining: [].into(),
        frontends: frontends.into(),
    };
    let service = crate::model::input::ServiceKey::new("default", "web");
    Arc::new(Plan { service, ports: [port].into(), health_check: None, warnings: [].into() })
}

/// A model of the kernel: applies what is lowered, and refuses what the kernel refuses.
#[derive(Default)]
struct Model(BTreeMap<Place, Option<Data>>);

impl Model {
    fn apply(&mut self, lowered: &Lowered) {
        for place in &lowered.removed {
            assert!(self.0.remove(place).is_some(), "{place} is not there");
        }
        for element in &lowered.added {
            let before = self.0.insert(element.place, element.data.clone());
            assert!(before.is_none(), "{} is there already", element.place);
        }
    }

    /// The backends behind the VIP, checked to be without gaps and to agree with `more`.
    fn backends(&self) -> Vec<SocketAddr> {
        let key = Key::vip("10.96.0.1:80".parse().unwrap(), Protocol::Tcp);
        let place = |set, key| Place { family: Family::V4, set, key };
        let slots: Vec<_> = (0u32..)
            .map_while(|slot| self.0.get(&place(Set::Endpoints, key.slot(slot))))
            .map(|data| data.as_ref().and_then(Data::to_backend).unwrap())
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

#[test]
fn one_change_costs_a_few_elements_at_any_size() {
    let first = lower(None, Some(&plan((0..5000).map(backend), false)), &Empty).applied.unwrap();
    let replaced = plan((1..5000).chain([6000]).map(backend), false);
    let lowered = lower(Some(&first), Some(&replaced), &Empty);
    assert_eq!((lowered.removed.len(), lowered.added.len()), (1, 1));
    let fewer = plan((1..5000).map(backend), false);
    let lowered = lower(Some(&first), Some(&fewer), &Empty);
    assert_eq!((lowered.removed.len(), lowered.added.len()), (2, 1), "the last takes the gap");
    let more = plan((0..5001).map(backend), false);
    let lowered = lower(Some(&first), Some(&more), &Empty);
    assert_eq!((lowered.removed.len(), lowered.added.len()), (0, 1));
}

#[test]
fn an_equal_plan_costs_nothing() {
    let first = lower(None, Some(&plan((0..9).map(backend), true)), &Empty).applied.unwrap();
    let lowered = lower(Some(&first), Some(&plan((0..9).map(backend), true)), &Empty);
    assert!(lowered.removed.is_empty() && lowered.added.is_empty());
    assert!(lowered.shared.lost.is_empty() && lowered.shared.gained.is_empty());
}

#[test]
fn slots_are_dense_through_any_history() {
    let mut kernel = Model::default();
    let mut applied: Option<Applied> = None;
    let mut state = 1u64;
    let mut random = move |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    for _ in 0..2000 {
        let wanted: Vec<_> = (0..20).filter(|_| random(2) == 0).map(backend).collect();
        let next = (random(20) != 0).then(|| plan(wanted.iter().copied(), random(2) == 0));
        let lowered = lower(applied.as_ref(), next.as_ref(), &Empty);
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
    let first = lower(None, Some(&plan((0..7).map(backend), true)), &Empty);
    kernel.apply(&first);
    kernel.apply(&lower(first.applied.as_ref(), None, &Empty));
    assert!(kernel.0.is_empty());
}

#[test]
fn a_renamed_port_gets_its_new_comment() {
    let first = lower(None, Some(&plan([backend(1)], false)), &Empty).applied.unwrap();
    let mut renamed = Plan::clone(&plan([backend(1)], false));
    renamed.ports[0].name = "web".into();
    let lowered = lower(Some(&first), Some(&Arc::new(renamed)), &Empty);
    assert_eq!(lowered.removed.len(), lowered.added.len());
    assert!(lowered.added.iter().all(|element| element.comment.as_deref() == Some("default/web:web")));
}

#[test]
fn slots_found_in_the_kernel_are_kept() {
    struct Held;
    impl Kernel for Held {
        fn holds(&self, place: &Place) -> bool {
            self.backend(place).is_some()
        }

        fn ranges(&self, _: Place) -> impl Iterator<Item = Place> {
            std::iter::empty()
        }

        fn backend(&self, place: &Place) -> Option<SocketAddr> {
            let key = Key::vip("10.96.0.1:80".parse().unwrap(), Protocol::Tcp);
            let held = [3, 9, 1, 2].map(address);
            (0..4).find(|slot| place.key == key.slot(*slot)).map(|slot| held[slot as usize])
        }

        fn holds_object(&self, _: &Object) -> bool {
            false
        }
    }
    let lowered = lower(None, Some(&plan([1, 2, 3].map(backend), false)), &Held);
    let applied = lowered.applied.unwrap();
    let order = applied.ports[0].of(&applied.plan.ports[0], EndpointSet::Cluster);
    let backends: Vec<_> = (0..).map_while(|slot| order.at(slot)).map(AddressPort::socket).collect();
    assert_eq!(backends, [3, 2, 1].map(address));
}
