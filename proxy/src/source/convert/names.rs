//! What Kubernetes accepts as a name (RFC 1123).

/// Whether this is a DNS label: what names a Service, a namespace and a port.
pub(super) fn is_label(text: &str) -> bool {
    text.len() <= 63 && is_part(text)
}

/// Whether this is a DNS subdomain: what names a slice, a node and most other objects.
pub(super) fn is_subdomain(text: &str) -> bool {
    // Unlike a label, a part of a subdomain has no length limit of its own in Kubernetes.
    text.len() <= 253 && text.split('.').all(is_part)
}

fn is_part(text: &str) -> bool {
    let is_alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    bytes.first().is_some_and(|first| is_alphanumeric(*first))
        && bytes.last().is_some_and(|last| is_alphanumeric(*last))
        && bytes.iter().all(|byte| is_alphanumeric(*byte) || *byte == b'-')
}
