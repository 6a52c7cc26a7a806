//! Reading one field: what is wrong with it is noted, and all of it is reported at once.

use std::net::{IpAddr, SocketAddr};

use super::error::InvalidField;
use crate::address::parse_ip;

/// Collects the fields whose values cannot be used.
#[derive(Debug, Default)]
pub(super) struct Checker(Vec<InvalidField>);

impl Checker {
    /// The fields that cannot be used.
    pub(super) fn into_invalid(self) -> Vec<InvalidField> {
        self.0
    }

    /// Notes one.
    pub(super) fn invalid(&mut self, field: &'static str, value: &str, problem: &str, remedy: &'static str) {
        let (value, problem) = (value.to_owned(), problem.to_owned());
        self.0.push(InvalidField { source_file: None, field, value, problem, remedy });
    }

    /// What `parse` makes of a field, if it is there and good.
    pub(super) fn parse<T>(
        &mut self,
        field: &'static str,
        value: Option<&str>,
        problem: &str,
        remedy: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let value = value?;
        let parsed = parse(value);
        if parsed.is_none() {
            self.invalid(field, value, problem, remedy);
        }
        parsed
    }

    /// A number that must not be negative.
    pub(super) fn count(&mut self, field: &'static str, value: i32) -> u32 {
        u32::try_from(value).unwrap_or_else(|_| {
            self.invalid(field, &value.to_string(), "is negative", "use 0 or more");
            0
        })
    }

    /// `IP:port`, or an IP alone with the default's port.
    pub(super) fn address(
        &mut self,
        field: &'static str,
        value: Option<&str>,
        default: SocketAddr,
    ) -> SocketAddr {
        self.parse(
            field,
            value,
            "is no IP address with a port",
            "write it like 127.0.0.1:10249 or [::]:10256, with a port from 1 to 65535",
            |text| match parse_ip(text) {
                Some(address) => Some(SocketAddr::new(address, default.port())),
                None => socket_address(text).filter(|address| address.port() != 0),
            },
        )
        .unwrap_or(default)
    }

    /// An IP address.
    pub(super) fn ip(&mut self, field: &'static str, value: Option<&str>) -> Option<IpAddr> {
        let remedy = "write an address like 192.0.2.7 or 2001:db8::7, or leave it out";
        self.parse(field, value, "is no IP address", remedy, parse_ip)
    }

    /// Flag, then file, then host name; trimmed and in lower case.
    pub(super) fn node_name(&mut self, written: Option<&str>, hostname: &str) -> String {
        let name = match written {
            None | Some("") => hostname,
            Some(written) => written,
        };
        let name = name.trim().to_lowercase();
        if name.is_empty() {
            self.invalid(
                "hostnameOverride (--hostname-override)",
                written.unwrap_or_default(),
                "leaves the node without a name",
                "write the name of this machine's Node object",
            );
        }
        name
    }

    /// The URL of an API server: a client can be made of `http://` or `https://` and a host.
    pub(super) fn server_url(&mut self, field: &'static str, value: Option<&str>) -> Option<String> {
        let is_url = |text: &str| {
            text.parse::<http::Uri>()
                .is_ok_and(|url| matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some())
        };
        let remedy = "write it like https://192.0.2.1:6443";
        self.parse(field, value, "is no URL of an API server", remedy, |text| {
            is_url(text).then(|| text.to_owned())
        })
    }
}

/// `192.0.2.1:80` or `[2001:db8::1]:80`.
fn socket_address(text: &str) -> Option<SocketAddr> {
    let (host, port) = text.rsplit_once(':')?;
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let address = match bracketed {
        Some(host) => parse_ip(host)?,
        None => parse_ip(host).filter(IpAddr::is_ipv4)?,
    };
    Some(SocketAddr::new(address, port.parse().ok()?))
}

/// A string field; empty means not set, as everywhere in kube-proxy's configuration.
pub(super) fn text(field: &Option<String>) -> Option<&str> {
    field.as_deref().filter(|text| !text.is_empty())
}
