//! What a second start reads of the kernel, and what it leaves alone: by counts, whose growth does not depend on the clock.

use kube_lane::dataplane::{Batch, Dataplane, Outcome};
use kube_lane::model::plan::Verdict;

use crate::plans::{
    EVERYTHING, Outside, apply, in_namespace, listing, named, nft, opened, reached, service, slotless,
    sorted, with_affinity,
};

/// What is listed with the handle of each rule.
fn handles() -> Vec<String> {
    let listing = nft(&["--handle", "--terse", "list", "ruleset"], None);
    sorted(&listing)
}

#[test]
fn a_second_start_lists_names_and_asks_for_the_rest() {
    let second_start = |services: u16| -> Outcome {
        in_namespace(move || {
            let all = || (1..=services).map(|n| service(n, 5)).collect::<Vec<_>>();
            let first = apply(&mut opened(), all());
            assert_eq!((first.listed, first.asked), (0, 0), "there is nothing to read");
            let rules = handles();
            let outcome = apply(&mut opened(), all());
            assert_eq!((outcome.added, outcome.removed), (0, 0));
            assert_eq!(rules, handles(), "no rule is written again");
            outcome
        })
    };
    let (few, many) = (second_start(100), second_start(1000));
    // In each family a VIP and a NodePort: eight slots, of which five are there, and 1, 2, 4, 8 of `more`.
    assert_eq!([few.asked, many.asked], [100 * 4 * 12, 1000 * 4 * 12]);
    // `vips`, `nps` and `cluster-ips`; what is the node's is the same.
    assert_eq!(many.listed - few.listed, 900 * 6);
    assert_eq!(few.messages, many.messages, "what is sent says that the sets and chains are there");
}

#[test]
fn what_changed_while_nobody_was_there_is_settled() {
    let local = Outside { external: Verdict::Local, ..EVERYTHING };
    let first = move || {
        let mut services: Vec<_> = (1..=5).map(|n| service(n, 9)).collect();
        services.extend([reached(6, 9, local), reached(7, 1, local), reached(8, 40, local)]);
        services
    };
    // Fewer endpoints, none, more; another VIP and NodePort; other policies; two have gone.
    let second = move || {
        let moved = named("svc-4", 44, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let services = [service(1, 2), service(2, 0), service(3, 40), moved];
        services.into_iter().chain([reached(6, 9, EVERYTHING), reached(7, 20, local)]).collect::<Vec<_>>()
    };
    let expected = in_namespace(move || {
        apply(&mut opened(), second());
        listing()
    });
    in_namespace(move || {
        apply(&mut opened(), first());
        let mut next = opened();
        next.apply(&Batch { services: second(), ..Batch::default() }).unwrap();
        assert!(
            listing().contains("default/svc-5:http"),
            "what may be somebody's stays until all have synced"
        );
        let outcome = apply(&mut next, vec![]);
        let swept =
            |number: &str| outcome.swept.iter().filter(|at| format!("{at:?}").contains(number)).count();
        assert!(swept("10.96.0.5") > 0 && swept("203.0.0.8") > 0 && swept("10.96.0.4") > 0, "{outcome:?}");
        assert_eq!(slotless(&listing(), ""), slotless(&expected, ""));
        let outcome = apply(&mut opened(), second());
        assert_eq!((outcome.added, outcome.removed), (0, 0));
    });
}

#[test]
fn what_others_put_into_the_maps_leads_nobody_anywhere() {
    in_namespace(|| {
        let services = || vec![service(1, 5), service(2, 3)];
        apply(&mut opened(), services());
        let right = sorted(&listing());
        let nft = |verb: &str, set: &str, element: &str| {
            nft(&[verb, "element", "ip", "kube-lane", set, &format!("{{ {element} }}")], None);
        };
        // A slot that a pick may draw, and a name without which nobody asks for slots.
        nft("add", "endpoints", "10.96.0.1 . tcp . 80 . 6 : 10.9.9.9 . 99");
        nft("delete", "vips", "10.96.0.2 . tcp . 80");
        let outcome = apply(&mut opened(), services());
        assert_eq!((outcome.added, outcome.removed), (1, 1));
        assert_eq!(sorted(&listing()), right);
        // A slot that no pick draws is found when it is in the way.
        nft("add", "endpoints", "10.96.0.1 . tcp . 80 . 8 : 10.9.9.9 . 99");
        let mut dataplane = opened();
        let outcome = apply(&mut dataplane, services());
        assert_eq!((outcome.added, outcome.removed), (0, 0));
        let grown = || vec![service(1, 9), service(2, 3)];
        assert!(apply(&mut dataplane, grown()).failed.is_empty());
        let grown_right = in_namespace(move || {
            apply(&mut opened(), grown());
            sorted(&listing())
        });
        assert_eq!(sorted(&listing()), grown_right);
    });
}

/// What a build may have left that had other chains and sets.
const OF_ANOTHER_BUILD: &str = "
table ip kube-lane {
    set once { type ipv4_addr; elements = { 10.1.1.1 } }
    map led { type ipv4_addr : verdict; elements = { 10.1.1.2 : goto once-led } }
    chain once-led {
        tcp dport { 80, 443 } drop
    }
    chain once {
        ip daddr @once goto once-led
        ip daddr vmap @led
    }
    chain once-hooked {
        type nat hook prerouting priority -120; policy accept;
        goto once
    }
}
";

#[test]
fn what_another_build_left_in_a_table_goes() {
    in_namespace(|| {
        apply(&mut opened(), vec![service(1, 5)]);
        let right = sorted(&listing());
        nft(&["-f", "-"], Some(OF_ANOTHER_BUILD));
        assert_ne!(sorted(&listing()), right);
        let outcome = apply(&mut opened(), vec![service(1, 5)]);
        assert_eq!((outcome.added, outcome.removed), (0, 0));
        assert_eq!(sorted(&listing()), right);

        // Ours come first, and the rule that leads to theirs goes with it.
        nft(&["-f", "-"], Some(OF_ANOTHER_BUILD));
        nft(&["insert", "rule", "ip", "kube-lane", "services", "jump", "once"], None);
        assert!(apply(&mut opened(), vec![service(1, 5)]).failed.is_empty());
        assert_eq!(sorted(&listing()), right);
    });
}

#[test]
fn members_whose_port_has_lost_its_number_are_in_nobodys_way() {
    in_namespace(|| {
        let services = |endpoints| [1, 2, 3].map(|n| with_affinity(service(n, endpoints))).to_vec();
        apply(&mut opened(), services(5));
        for family in ["ip", "ip6"] {
            nft(&["flush", "map", family, "kube-lane", "affinity-ids"], None);
            nft(&["flush", "map", family, "kube-lane", "np-affinity-ids"], None);
        }
        let outcome = apply(&mut opened(), services(3));
        assert!(outcome.failed.is_empty(), "{outcome:?}");
        let listed = nft(&["list", "map", "ip", "kube-lane", "affinity-members"], None);
        assert_eq!(listed.matches(" . 8080").count(), 3 * 3, "{listed}");
        let outcome = apply(&mut opened(), services(3));
        assert_eq!((outcome.added, outcome.removed), (0, 0));
    });
}
