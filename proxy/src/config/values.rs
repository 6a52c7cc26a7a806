//! Values of flags of several sections, as kube-proxy reads them.

use clap::builder::TypedValueParser;

/// `--flag=` is an empty list, not a list of one empty text.
pub(super) fn not_empty(list: Vec<String>) -> Vec<String> {
    list.into_iter().filter(|item| !item.is_empty()).collect()
}

/// Go's `strconv.ParseBool`.
pub(crate) fn go_bool() -> impl TypedValueParser<Value = bool> {
    clap::builder::StringValueParser::new().try_map(|text| match text.as_str() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false"),
    })
}
