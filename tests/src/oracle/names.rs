//! What a scenario's placeholders stand for: `$vip1`, `$pod0a`, `$np1` and their like, for one scenario and family.
//!
//! Owns the addresses and ports that scenarios may take, so that no two meet, and what objects may leave out.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::format::{Family, Scenario};

/// How many addresses of each kind a scenario has.
const ADDRESSES: u16 = 9;
/// How many node ports of each kind a scenario has, for each family.
const PORTS: u16 = 5;
const FIRST_NODE_PORT: u16 = 30000;

/// The addresses of the lab's hosts, IPv4 first.
pub(super) type Hosts = BTreeMap<String, [IpAddr; 2]>;

/// The names of one scenario in one family.
#[derive(Clone, Debug)]
pub(super) struct Names<'a> {
    hosts: &'a Hosts,
    /// The scenario's number: scenarios have ranges of their own.
    number: u16,
    pub(super) family: Family,
    /// The scenario's namespace in the API.
    pub(super) namespace: String,
}

impl<'a> Names<'a> {
    pub(super) fn new(hosts: &'a Hosts, scenario: &Scenario, number: usize, family: Family) -> Result<Self> {
        // From 1, as the Service range begins with the API server's own address; as many as there are node ports for.
        let number = u16::try_from(number + 1).ok().filter(|number| *number < 138);
        let number = number.context("too many scenarios for the address plan")?;
        let suffix = if family == Family::IPv4 { "v4" } else { "v6" };
        Ok(Self { hosts, number, family, namespace: format!("{}-{suffix}", scenario.name) })
    }

    /// What stands behind a name (without `$`), and whether it is a number.
    fn lookup(&self, name: &str, family: Family) -> Result<String> {
        if let Some(addresses) = self.hosts.get(name) {
            return Ok(addresses[family.index()].to_string());
        }
        match name {
            "family" => return Ok(family.to_string()),
            "loopback" => {
                let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
                return Ok(loopback[family.index()].to_string());
            }
            "prefix" => return Ok(if family == Family::IPv4 { "32" } else { "128" }.into()),
            "anywhere" => return Ok(if family == Family::IPv4 { "0.0.0.0/0" } else { "::/0" }.into()),
            _ => {}
        }
        let (kind, digits) = name.split_at(name.find(|c: char| c.is_ascii_digit()).unwrap_or(name.len()));
        let which: u16 = digits.parse().with_context(|| format!("`${name}` stands for nothing"))?;
        let most = if matches!(kind, "np" | "hc") { PORTS } else { ADDRESSES };
        ensure!((1..=most).contains(&which), "`${name}`: they go from 1 to {most}");
        let (number, v4) = (self.number, family == Family::IPv4);
        Ok(match kind {
            "vip" if v4 => format!("10.96.{number}.{which}"),
            "vip" => format!("fd00:10:96::{:x}", number << 8 | which),
            // Scenarios run one after the other; a few turns apart is enough for conntrack.
            "lb" if v4 => format!("203.0.113.{}", number % 25 * 10 + which),
            "lb" => format!("2001:db8:113::{:x}", number % 25 * 10 + which),
            "np" | "hc" => {
                let block = number * 4 + u16::from(kind == "hc") * 2 + u16::from(!v4);
                (FIRST_NODE_PORT + block * PORTS + which).to_string()
            }
            _ => bail!("`${name}` stands for nothing"),
        })
    }

    /// A text with its placeholders replaced.
    pub(super) fn text(&self, text: &str) -> Result<String> {
        let mut out = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            out.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).unwrap_or(rest.len());
            let name = &rest[..end];
            rest = &rest[end..];
            let mut family = self.family;
            for (suffix, other) in [(".v4", Family::IPv4), (".v6", Family::IPv6)] {
                if let Some(after) = rest.strip_prefix(suffix) {
                    (family, rest) = (other, after);
                }
            }
            out.push_str(&self.lookup(name, family)?);
        }
        out.push_str(rest);
        Ok(out)
    }

    /// The address and port of a flow's `to`.
    pub(super) fn destination(&self, to: &str) -> Result<SocketAddr> {
        let parts = to.rsplit_once(':').with_context(|| format!("`{to}` has no port"))?;
        let (address, port) = (self.text(parts.0)?, self.text(parts.1)?);
        let address = address.trim_matches(['[', ']']);
        let wrong = || format!("`{to}`: {address} and {port} are no address and port");
        Ok((address.parse::<IpAddr>().with_context(wrong)?, port.parse().with_context(wrong)?).into())
    }

    /// An object, or a change of one, with its placeholders replaced and in the scenario's namespace.
    pub(super) fn object(&self, object: &Value) -> Result<Value> {
        let mut object = self.value(object)?;
        let namespaced = match object["kind"].as_str() {
            Some("Service" | "EndpointSlice") => true,
            Some("Node" | "ServiceCIDR") => false,
            other => bail!("kind {other:?}: a scenario has Services, EndpointSlices, Nodes and ServiceCIDRs"),
        };
        if namespaced {
            let fields = object.as_object_mut().context("an object is a map")?;
            let metadata = fields.entry("metadata").or_insert_with(|| json!({}));
            let metadata = metadata.as_object_mut().context("`metadata` is a map")?;
            metadata.entry("namespace").or_insert_with(|| self.namespace.clone().into());
        }
        Ok(object)
    }

    /// Adds what an object may leave out.
    pub(super) fn complete(&self, object: &mut Value) {
        let kind = object["kind"].as_str().unwrap_or_default().to_owned();
        let Some(fields) = object.as_object_mut() else { return };
        let version = match kind.as_str() {
            "EndpointSlice" => "discovery.k8s.io/v1",
            "ServiceCIDR" => "networking.k8s.io/v1",
            _ => "v1",
        };
        fields.entry("apiVersion").or_insert_with(|| version.into());
        match kind.as_str() {
            "Service" => self.complete_service(fields),
            "EndpointSlice" => self.complete_slice(fields),
            _ => {}
        }
    }

    fn complete_service(&self, fields: &mut Map<String, Value>) {
        let Some(spec) = fields.get_mut("spec").and_then(Value::as_object_mut) else { return };
        if spec.get("type").and_then(Value::as_str) == Some("ExternalName") {
            spec.remove("ipFamilies");
            spec.remove("ipFamilyPolicy");
        } else {
            spec.entry("ipFamilies").or_insert_with(|| json!([self.family.to_string()]));
            spec.entry("ipFamilyPolicy").or_insert_with(|| "SingleStack".into());
        }
    }

    /// The family is the scenario's, and an endpoint is on the node of the pod that has its address.
    fn complete_slice(&self, fields: &mut Map<String, Value>) {
        fields.entry("addressType").or_insert_with(|| self.family.to_string().into());
        let endpoints = fields.get_mut("endpoints").and_then(Value::as_array_mut);
        for endpoint in endpoints.into_iter().flatten().filter_map(Value::as_object_mut) {
            if let Some(node) = endpoint.get("nodeName") {
                if node.is_null() {
                    endpoint.remove("nodeName");
                }
                continue;
            }
            let address = endpoint.get("addresses").and_then(|addresses| addresses[0].as_str());
            let node = address.and_then(|address| self.node_of(address));
            if let Some(node) = node {
                endpoint.insert("nodeName".into(), node.into());
            }
        }
    }

    fn node_of(&self, address: &str) -> Option<String> {
        let address: IpAddr = address.parse().ok()?;
        let (host, _) = self.hosts.iter().find(|(_, addresses)| addresses.contains(&address))?;
        let number = host.strip_prefix("node").or(host.strip_prefix("pod"))?.get(..1)?;
        Some(format!("node{number}"))
    }

    fn value(&self, value: &Value) -> Result<Value> {
        Ok(match value {
            Value::String(text) => {
                let resolved = self.text(text)?;
                match resolved.parse::<u16>() {
                    // A placeholder for a port is a number where it stands alone.
                    Ok(number) if text.starts_with('$') => number.into(),
                    _ => resolved.into(),
                }
            }
            Value::Array(items) => items.iter().map(|item| self.value(item)).collect::<Result<_>>()?,
            Value::Object(fields) => {
                let field = |(name, value): (&String, &Value)| Ok((name.clone(), self.value(value)?));
                Value::Object(fields.iter().map(field).collect::<Result<_>>()?)
            }
            other => other.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_stand_for_the_familys_addresses_and_for_numbers() {
        let pod = ["10.244.1.2".parse().unwrap(), "fd00:10:244:1::2".parse().unwrap()];
        let hosts = Hosts::from([("pod0a".to_owned(), pod)]);
        let scenario = Scenario::parse("one", "about: x").unwrap();
        let names = |family| Names::new(&hosts, &scenario, 3, family).unwrap();
        let (v4, v6) = (names(Family::IPv4), names(Family::IPv6));
        assert_eq!(v4.text("$vip1/$prefix,$vip2.v6").unwrap(), "10.96.4.1/32,fd00:10:96::402");
        assert_eq!(v6.destination("$vip1:80").unwrap(), "[fd00:10:96::401]:80".parse().unwrap());
        assert_ne!(v4.text("$np1").unwrap(), v6.text("$np1").unwrap());
        assert!(v4.text("$vip0").is_err() && v4.text("$pod9z").is_err());
        let slice = json!({"kind": "EndpointSlice", "ports": [{"port": "$np1"}], "endpoints": [
            {"addresses": ["$pod0a"]}, {"addresses": ["$pod0a"], "nodeName": null}]});
        let mut slice = v6.object(&slice).unwrap();
        v6.complete(&mut slice);
        assert!(slice["ports"][0]["port"].is_u64());
        assert_eq!(slice["endpoints"][0]["nodeName"], "node0");
        assert_eq!(slice["endpoints"][1]["nodeName"], Value::Null);
        assert_eq!(slice["metadata"]["namespace"], "one-v6");
    }
}
