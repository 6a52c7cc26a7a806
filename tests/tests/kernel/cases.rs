//! Inputs from the field that went wrong elsewhere, with real packets: the right outcome of each.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use kube_lane::dataplane::nftables::NftablesError;
use kube_lane_lab::{Dial, Host, Lab, Outcome, Pod, Proto, topology};
use kube_lane_tests::objects::Endpoint;
use serde_json::json;

use super::plans::nft;
use super::world::{QUIET, World, answered, at, endpoints, serving, until, vip, vips, web_ports};

/// A load balancer's address.
fn lb(number: usize) -> SocketAddr {
    at(topology::vip_cidrs()[0].iter().nth(number).unwrap(), 80)
}

/// `nft` on a node.
fn nft_on(node: &Host, arguments: &[&str], input: Option<&str>) -> String {
    let arguments: Vec<_> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    let input = input.map(str::to_owned);
    node.run(move || {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        nft(&arguments, input.as_deref())
    })
}

fn dial_from(host: &Host, from: IpAddr, to: SocketAddr) -> Outcome {
    let dial = Dial::new(Proto::Tcp, to).from((from, 0).into()).timeout(QUIET);
    host.dial_with(dial).unwrap()
}

/// The elements of a set, each in a line, in order.
fn elements(listing: &str) -> Vec<String> {
    let inside = listing.split_once("elements = {").and_then(|(_, rest)| rest.split_once('}'));
    let mut elements: Vec<_> = inside
        .map(|(elements, _)| elements.split(',').map(|e| e.split_whitespace().collect::<Vec<_>>().join(" ")))
        .into_iter()
        .flatten()
        .collect();
    elements.sort();
    elements
}
