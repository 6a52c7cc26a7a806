//! Which field an unknown name of a configuration file is meant to be.
//!
//! Pure. Never decides what an unknown name leads to: other versions of kube-proxy have fields of their own.

use serde_json::Value;
use strsim::normalized_damerau_levenshtein;

/// How alike two names are, of 1 at most, where one is meant to be the other.
const ALIKE: f64 = 0.75;

/// The fields that the name at the end of this dotted path may be meant to be, in words: one of the same section that is
/// written almost like it, else those of this very name in other sections. `None`: it is like no field.
pub(super) fn meant(schema: &Value, path: &str) -> Option<String> {
    let (section, name) = path.rsplit_once('.').unwrap_or(("", path));
    let place = |name: &str| if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") };
    let plain = plain(name);
    let fields = section.split('.').filter(|part| !part.is_empty()).try_fold(schema, |at, part| at.get(part));
    let likeness =
        |field: &String| (normalized_damerau_levenshtein(&plain, &self::plain(field)), field.clone());
    let best = fields.and_then(Value::as_object).into_iter().flat_map(|fields| fields.keys()).map(likeness);
    let best = best.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(likeness, _)| *likeness >= ALIKE);
    if let Some((_, field)) = best {
        return Some(place(&field));
    }
    let mut elsewhere = Vec::new();
    named(schema, "", &plain, &mut elsewhere);
    (!elsewhere.is_empty()).then(|| elsewhere.join(" or "))
}

/// Without what people mix up: capitals, and the dashes of flags.
fn plain(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '-' | '_')).collect::<String>().to_lowercase()
}

/// The paths of all fields of this name.
fn named(schema: &Value, section: &str, name: &str, found: &mut Vec<String>) {
    for (field, below) in schema.as_object().into_iter().flatten() {
        let path = if section.is_empty() { field.clone() } else { format!("{section}.{field}") };
        if plain(field) == name {
            found.push(path.clone());
        }
        named(below, &path, name, found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file::KubeProxyConfiguration;

    #[test]
    fn what_is_almost_a_field_is_meant_to_be_one() {
        let schema = serde_json::to_value(KubeProxyConfiguration::default()).unwrap();
        for (written, expected) in [
            ("clusterCidr", Some("clusterCIDR")),
            ("cluster-cidr", Some("clusterCIDR")),
            ("nodePortAddress", Some("nodePortAddresses")),
            ("nftables.minsyncPeriod", Some("nftables.minSyncPeriod")),
            ("kubelane", Some("kubeLane")),
            ("kubeLane.countConnection", Some("kubeLane.countConnections")),
            ("kubeLane.external", Some("kubeLane.socketLB.external")),
            ("masqueradeAll", Some("iptables.masqueradeAll or nftables.masqueradeAll")),
            // Fields of kube-proxy in other versions, and of nobody.
            ("udpIdleTimeout", None),
            ("resourceContainer", None),
            ("conntrack.max", None),
            ("odd", None),
            ("extra.a.b", None),
        ] {
            assert_eq!(meant(&schema, written).as_deref(), expected, "{written}");
        }
    }
}
