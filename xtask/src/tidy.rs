//! Rules of the project that no compiler checks: what each part may import, how long a file may be, that
//! it says what it owns. Reads source text; knows no types.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::process;

/// Lines in a file, at most: one that grows past 500 is due to be split.
const MAX_LINES: usize = 600;

/// Pure code.
const PURE: &[&str] = &[
    "proxy/src/model/",
    "proxy/src/dataplane/nftables/lower.rs",
    "proxy/src/dataplane/socket/answers.rs",
    "proxy/src/dataplane/socket/lower/",
    "proxy/src/dataplane/socket/write.rs",
];

/// What it must not name: anything that waits or reads the world.
const IMPURE: &[&str] = &[
    "tokio",
    "kube",
    "k8s_openapi",
    "std::fs",
    "std::net::UdpSocket",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::time::Instant",
    "std::time::SystemTime",
];

/// Pure code that looks nothing up by hash either: what has an order of its own cannot slip into what it says.
const ORDERED: &[&str] = &[
    "proxy/src/model/",
    "proxy/src/dataplane/nftables/lower.rs",
    "proxy/src/dataplane/socket/answers.rs",
    "proxy/src/dataplane/socket/lower/mod.rs",
];

/// What that must not name.
const HASHED: &[&str] = &["std::collections::HashMap", "std::collections::HashSet"];

/// Parts of the `kube-lane` crate, and all that each may import of that crate and of `proxy-common`.
const BOUNDARIES: &[(&str, &[&str])] = &[
    ("proxy/src/model/", &["crate::model"]),
    (
        "proxy/src/source/",
        &[
            "crate::source",
            "crate::model::input",
            "crate::address",
            "crate::causes",
            "crate::ready",
            "crate::watch",
        ],
    ),
    (
        "proxy/src/dataplane/",
        &["crate::backoff", "crate::causes", "crate::dataplane", "crate::model", "kube_lane_common"],
    ),
];

/// Checks every Rust file that git tracks.
///
/// # Errors
/// When a rule is broken; each place has been printed.
pub(crate) fn check() -> Result<()> {
    let mut broken = 0;
    for file in process::tracked_files()?.iter().filter(|file| file.extension().is_some_and(|e| e == "rs")) {
        let text = fs::read_to_string(process::root().join(file))
            .with_context(|| format!("cannot read {}", file.display()))?;
        for (line, what) in check_file(file, &text) {
            eprintln!("{}:{line}: {what}", file.display());
            broken += 1;
        }
    }
    if broken > 0 {
        bail!("{broken} rules broken");
    }
    Ok(())
}

/// The places in one file where a rule is broken: line and what is wrong.
fn check_file(file: &Path, text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    if !text.starts_with("//!") {
        found.push((1, "does not start with `//!`: say what the module owns and what it never does".into()));
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        found.push((lines, format!("{lines} lines: split it, {MAX_LINES} at most")));
    }

    let file = file.to_string_lossy();
    let is_in = |parts: &[&str]| parts.iter().any(|part| file.starts_with(part));
    let (pure, ordered) = (is_in(PURE), is_in(ORDERED));
    let allowed = BOUNDARIES.iter().find(|(part, _)| file.starts_with(part));
    if !pure && allowed.is_none() {
        return found;
    }
    for (line, path) in paths(text) {
        let names = |listed: &[&str]| listed.iter().any(|listed| is_below(&path, listed));
        if (pure && names(IMPURE)) || (ordered && names(HASHED)) {
            found.push((line, format!("`{path}`: this code is pure; it must not know {path}")));
        }
        if let Some((part, allowed)) = allowed {
            let ours = is_below(&path, "crate") || is_below(&path, "kube_lane_common");
            if ours && !allowed.iter().any(|allowed| is_below(&path, allowed)) {
                found.push((line, format!("`{path}`: {part} may import only {}", allowed.join(", "))));
            }
        }
    }
    found
}

/// Whether `path` is `parent` or in it.
fn is_below(path: &str, parent: &str) -> bool {
    path.strip_prefix(parent).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The paths of two segments or more that `text` names, with their lines; `a::{b, c::d}` names `a::b` and
/// `a::c::d`. Comments do not count.
fn paths(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    // The prefixes of the `{` groups that are open; `None` for a `{` that is no import group.
    let mut groups: Vec<Option<String>> = Vec::new();
    let mut path = String::new();
    for (index, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for token in tokens(code) {
            let is_word = token.starts_with(|c: char| c.is_alphanumeric() || c == '_');
            let continues = path.is_empty() || path.ends_with("::");
            if token == "::" || (is_word && continues) {
                path.push_str(token);
                continue;
            }
            let prefix = if token == "{" && path.ends_with("::") { Some(path.clone()) } else { None };
            if prefix.is_none() {
                note(&mut found, index + 1, &path);
            }
            path.clear();
            match token {
                "{" => groups.push(prefix),
                "}" => drop(groups.pop()),
                _ => {}
            }
            // Within a group every path starts from the group's prefix.
            if let Some(Some(prefix)) = groups.last() {
                path.clone_from(prefix);
            }
            if is_word {
                path.push_str(token);
            }
        }
    }
    found
}

fn note(found: &mut Vec<(usize, String)>, line: usize, path: &str) {
    let path = path.trim_matches(':');
    if path.contains("::") {
        found.push((line, path.to_owned()));
    }
}

/// Words, `::` and single other characters; blanks are left out.
fn tokens(mut code: &str) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        code = code.trim_start();
        let word = code.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(code.len());
        let length = match word {
            0 if code.starts_with("::") => 2,
            0 => code.chars().next()?.len_utf8(),
            _ => word,
        };
        let (token, rest) = code.split_at(length);
        code = rest;
        Some(token)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(text: &str) -> Vec<String> {
        paths(text).into_iter().map(|(_, path)| path).collect()
    }

    fn complaints(file: &str, text: &str) -> usize {
        check_file(Path::new(file), text).len()
    }

    #[test]
    fn import_groups_are_taken_apart() {
        let text = "use std::{fs, collections::{BTreeMap, HashMap}};\nfn f() { let x = a::b(c); }";
        let expected = ["std::fs", "std::collections::BTreeMap", "std::collections::HashMap", "a::b"];
        assert_eq!(named(text), expected);
    }

    #[test]
    fn comments_name_nothing() {
        assert!(named("//! std::fs\nlet x = 1; // tokio::spawn").is_empty());
    }

    #[test]
    fn pure_code_names_nothing_impure() {
        let text = "//! Pure.\nuse std::{\n    time::Instant,\n};\n";
        assert_eq!(complaints("proxy/src/model/plan.rs", text), 1);
        assert_eq!(complaints("proxy/src/dataplane/nftables/lower.rs", text), 1);
        assert_eq!(complaints("proxy/src/dataplane/socket/lower/image.rs", text), 1);
        let hashed = "//! Pure.\nuse std::collections::HashMap;\n";
        assert_eq!(complaints("proxy/src/model/plan.rs", hashed), 1);
        assert_eq!(complaints("proxy/src/dataplane/socket/lower/image.rs", hashed), 0);
        assert_eq!(complaints("proxy/src/controller.rs", text), 0);
        assert_eq!(complaints("proxy/src/model/plan.rs", "//! kube_lane::x\nuse kube_lane::x;\n"), 0);
    }

    #[test]
    fn parts_import_only_what_they_may() {
        assert_eq!(complaints("proxy/src/source/kube.rs", "//! S.\nuse crate::model::input::Service;\n"), 0);
        assert_eq!(complaints("proxy/src/source/kube.rs", "//! S.\nuse crate::model::plan::Plan;\n"), 1);
        assert_eq!(complaints("proxy/src/dataplane/mod.rs", "//! D.\nuse crate::source::Event;\n"), 1);
        assert_eq!(complaints("proxy/src/controller.rs", "//! C.\nuse crate::source::Event;\n"), 0);
    }

    #[test]
    fn files_are_short_and_say_what_they_own() {
        assert_eq!(complaints("xtask/src/main.rs", "fn main() {}\n"), 1);
        assert_eq!(complaints("xtask/src/main.rs", &"//! x\n".repeat(MAX_LINES)), 0);
        assert_eq!(complaints("xtask/src/main.rs", &"//! x\n".repeat(MAX_LINES + 1)), 1);
    }
}
