//! The lab on hosts that are set otherwise than the lab: no sysctl of the host reaches a test. Needs root.

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;
    use std::time::Duration;

    use kube_lane_lab::{CONTRARY, Dial, Host, Lab, Outcome, Proto, topology};

    /// The tests below that run once more on a host that is set otherwise.
    const REPRESENTATIVE: &[&str] =
        &["tests::every_namespace_has_the_settings_of_the_lab", "tests::clients_meet_what_they_should"];

    const NONE: Vec<String> = Vec::new();

    #[test]
    fn every_namespace_has_the_settings_of_the_lab() {
        for bridge in [false, true] {
            let lab = Lab::builder().nodes(2).bridge(bridge).build().unwrap();
            let pods = [lab.node(0).add_pod("a").unwrap(), lab.node(1).add_container("b").unwrap()];
            let nodes = [&**lab.node(0), lab.node(1), lab.outside()];
            let hosts = pods.iter().map(|pod| -> &Host { pod }).chain(nodes);
            let mut found: Vec<_> =
                hosts.map(|host| (host.name().to_owned(), host.deviating_sysctls().unwrap())).collect();
            found.push(("fabric".to_owned(), lab.fabric().deviating_sysctls().unwrap()));
            for (name, (deviations, read)) in found {
                assert_eq!(deviations, NONE, "{name}, bridge {bridge}");
                assert!(read > 400, "{name}: {read}");
            }
        }
    }

    #[test]
    fn a_setting_that_deviates_is_found() {
        let lab = Lab::builder().nodes(1).build().unwrap();
        let node = lab.node(0);
        let interface = topology::UPLINK;
        for (name, value) in [
            ("ipv4/ip_forward".to_owned(), "0"),
            (format!("ipv6/conf/{interface}/accept_ra"), "2"),
            (format!("ipv4/neigh/{interface}/ucast_solicit"), "4"),
            ("ipv4/ip_local_port_range".to_owned(), "40000 50000"),
        ] {
            let file = Path::new("/proc/sys/net").join(&name);
            node.run(move || std::fs::write(file, value).unwrap()).unwrap();
            let (deviations, _) = node.deviating_sysctls().unwrap();
            let setting = name.rsplit('/').next().unwrap_or_default().replace("ip_forward", "forwarding");
            assert!(deviations.iter().any(|line| line.contains(&setting)), "{name}: {deviations:?}");
        }
    }

    #[test]
    fn clients_meet_what_they_should() {
        let lab = Lab::builder().nodes(2).build().unwrap();
        let pod = lab.node(1).add_pod("a").unwrap();
        let services = topology::service_cidrs().map(|net| net.iter().nth(10).unwrap());
        for proto in [Proto::Tcp, Proto::Udp] {
            let echo = pod.serve(proto, 80).unwrap();
            for client in [lab.outside() as &Host, lab.node(0), lab.node(1)] {
                let what = format!("{proto} from {}", client.name());
                for (to, closed, service) in
                    [(echo.v4(), pod.v4(), services[0]), (echo.v6(), pod.v6(), services[1])]
                {
                    assert_eq!(client.dial(proto, to).unwrap().by(), Some("a"), "{what}");
                    // More often than any limit of ICMP errors would let pass.
                    let tally = client.dial_many(proto, (closed, 81).into(), 20).unwrap();
                    assert_eq!((tally.refused, tally.failures()), (20, 20), "{what}: {tally:?}");
                    // The outside host drops it: a host that forwards would answer that it is unreachable.
                    let dial = Dial::new(proto, (service, 80).into()).timeout(Duration::from_millis(100));
                    if client.name() == lab.node(0).name() {
                        assert_eq!(client.dial_with(dial).unwrap(), Outcome::TimedOut, "{what}");
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_changes_whatever_the_host_has_set() {
        let mut tests = Command::new(std::env::current_exe().unwrap());
        let output = tests.arg("--exact").args(REPRESENTATIVE).env(CONTRARY, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let passed = format!("test result: ok. {} passed; 0 failed; 0 ignored;", REPRESENTATIVE.len());
        assert!(text.contains(&passed), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    }
}
