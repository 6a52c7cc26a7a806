//! IP addresses and CIDRs as users write them.
//!
//! Owns what counts as one: what kube-proxy takes, which reads them as Go did before 1.17. Never judges what an address
//! is good for.

use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::IpNetwork;

/// Reads an address as Go's `ParseIPSloppy` does: leading zeros of an octet are decimal, v4-mapped is IPv4.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    let address = match text.rsplit_once(':') {
        // The last 32 bits of an IPv6 address may be written as IPv4.
        Some((head, tail)) if tail.contains('.') => format!("{head}:{}", parse_v4(tail)?).parse().ok()?,
        Some(_) => text.parse().ok()?,
        None => IpAddr::V4(parse_v4(text)?),
    };
    Some(address.to_canonical())
}

fn parse_v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0_u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        // `parse` alone would take a sign.
        let digits = parts.next().filter(|part| part.bytes().all(|byte| byte.is_ascii_digit()))?;
        *octet = digits.parse().ok()?;
    }
    parts.next().is_none().then(|| octets.into())
}

/// Reads a CIDR as Go's `ParseCIDRSloppy` does, white space around it aside, and clears its host bits.
pub fn parse_cidr(text: &str) -> Option<IpNetwork> {
    let (address, length) = text.trim().split_once('/')?;
    if !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let network = IpNetwork::new(parse_ip(address)?, length.parse().ok()?).ok()?;
    IpNetwork::new(network.network(), network.prefix()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses_as_go_does() {
        let table = [
            ("10.0.0.1", Some("10.0.0.1")),
            ("172.30.0.041", Some("172.30.0.41")),
            ("010.000.00.0000009", Some("10.0.0.9")),
            ("fd00::1", Some("fd00::1")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("::ffff:10.0.0.041", Some("10.0.0.41")),
            ("64:ff9b::192.0.2.033", Some("64:ff9b::c000:221")),
            ("10.0.0.256", None),
            ("10.0.0", None),
            ("10.0.0.1.", None),
            ("10.0.0.+1", None),
            ("10..0.1", None),
            (" 10.0.0.1", None),
            ("fe80::1%eth0", None),
            ("::10.0.0", None),
            ("", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse_ip(text).map(|address| address.to_string()).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn reads_cidrs_and_clears_host_bits() {
        let table = [
            ("10.96.0.0/12", Some("10.96.0.0/12")),
            (" 10.96.0.010/12 ", Some("10.96.0.0/12")),
            ("010.096.0.0/012", Some("10.96.0.0/12")),
            ("fd00::1/112", Some("fd00::/112")),
            ("10.96.0.0", None),
            ("10.96.0.0/33", None),
            ("10.96.0.0/+8", None),
            ("10.96.0.0/", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse_cidr(text).map(|cidr| cidr.to_string()).as_deref(), expected, "{text:?}");
        }
    }
}
