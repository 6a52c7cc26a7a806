//! What the ports of Services and slices have in common: a name, a protocol, a number.

use super::names::is_label;
use super::{Report, wire};
use crate::model::input::Protocol;

/// A port whose parts are good, each by itself.
pub(super) struct Port<'a> {
    /// Empty where it has none.
    pub(super) name: &'a str,
    pub(super) protocol: Protocol,
    /// Never 0.
    pub(super) number: u16,
}

/// Reads a port. `field` gives the path of one of its fields by that field's name.
pub(super) fn read<'a>(
    given: &'a wire::Port<'_>,
    field: impl Fn(&str) -> String,
    report: &mut Report<'_>,
) -> Option<Port<'a>> {
    let name = given.name.as_deref().unwrap_or_default();
    if !name.is_empty() && !is_label(name) {
        let remedy = "not a port name: use a DNS label of at most 63 characters; the port is left out";
        report.add(field("name"), Some(name), remedy);
        return None;
    }
    let protocol = match given.protocol.as_deref() {
        None | Some("" | "TCP") => Protocol::Tcp,
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        Some(other) => {
            let remedy = "unknown protocol: use TCP, UDP or SCTP; the port is left out";
            report.add(field("protocol"), Some(other), remedy);
            return None;
        }
    };
    let Some(written) = given.port else {
        report.add(field("port"), None, "missing: use 1 to 65535; the port is left out");
        return None;
    };
    let Some(number) = number(written) else {
        let remedy = "not a port number: use 1 to 65535; the port is left out";
        report.add(field("port"), Some(&written.to_string()), remedy);
        return None;
    };
    Some(Port { name, protocol, number })
}

/// A field of which 0 means the same as absent; what is no port number is a problem, and absent.
pub(super) fn optional(
    given: Option<i64>,
    field: impl Fn() -> String,
    remedy: &str,
    report: &mut Report<'_>,
) -> Option<u16> {
    let written = given.filter(|written| *written != 0)?;
    let number = number(written);
    if number.is_none() {
        report.add(field(), Some(&written.to_string()), remedy);
    }
    number
}

fn number(written: i64) -> Option<u16> {
    u16::try_from(written).ok().filter(|number| *number != 0)
}
