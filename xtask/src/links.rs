//! Holds the documents to the repository: a relative link leads to a file, and its anchor to a heading; a path of the
//! repository that is named in code exists. Follows no link to other hosts.

use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// Folders whose files the documents name by their paths from the top of the repository.
const NAMED: &[&str] =
    &["deploy/", "docs/", ".github/", "tests/", "xtask/", "proxy/", "proxy-common/", "proxy-ebpf/"];

/// Checks every document that git tracks.
///
/// # Errors
/// When something that a document names is missing; each place has been printed.
pub(crate) fn check() -> Result<()> {
    let files = process::tracked_files()?;
    let documents: Vec<_> = files.iter().filter(|file| file.extension().is_some_and(|e| e == "md")).collect();
    ensure!(!documents.is_empty(), "no document found");
    let mut missing = 0;
    for document in documents {
        let text = read(document)?;
        for (line, what) in check_document(document, &text)? {
            eprintln!("{}:{line}: {what}", document.display());
            missing += 1;
        }
    }
    if missing > 0 {
        bail!("{missing} links or paths lead nowhere");
    }
    Ok(())
}

fn check_document(document: &Path, text: &str) -> Result<Vec<(usize, String)>> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for target in links(line) {
            if let Some(what) = check_link(document, text, target)? {
                found.push((index + 1, what));
            }
        }
        for path in named_paths(line).filter(|path| !process::root().join(path).exists()) {
            found.push((index + 1, format!("`{path}` does not exist")));
        }
    }
    Ok(found)
}

/// What is wrong with a link.
fn check_link(document: &Path, text: &str, target: &str) -> Result<Option<String>> {
    if target.contains("://") || target.starts_with("mailto:") {
        return Ok(None);
    }
    let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
    let file = if path.is_empty() { document.to_owned() } else { beside(document, path) };
    if !process::root().join(&file).exists() {
        return Ok(Some(format!("{target}: {} does not exist", file.display())));
    }
    if anchor.is_empty() {
        return Ok(None);
    }
    let known = if path.is_empty() { anchors(text) } else { anchors(&read(&file)?) };
    Ok((!known.iter().any(|known| known == anchor))
        .then(|| format!("{target}: {} has no heading #{anchor}", file.display())))
}

/// The targets of the links `[text](target)` in a line.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
}

/// The words of a line that are paths below [`NAMED`], by their look. What is no plain path is left out: patterns, places of
/// an absolute path or of another repository.
fn named_paths(line: &str) -> impl Iterator<Item = &str> {
    let is_path = |c: char| c.is_ascii_alphanumeric() || "/._-{}*<>$…".contains(c);
    line.split(move |c: char| !is_path(c))
        .map(|word| word.trim_end_matches(['.', '/']))
        .filter(|word| NAMED.iter().any(|folder| word.starts_with(folder)))
        .filter(|word| !word.contains(|c| "{}*<>$…".contains(c)))
}

/// `path` as seen from the folder of `document`, without `..`.
fn beside(document: &Path, path: &str) -> PathBuf {
    let mut file = document.parent().unwrap_or(Path::new("")).to_owned();
    for component in Path::new(path).components() {
        match component {
            Component::ParentDir => drop(file.pop()),
            Component::CurDir => {}
            other => file.push(other),
        }
    }
    file
}

/// The anchors that GitHub gives to the headings of a document.
fn anchors(text: &str) -> Vec<String> {
    let mut in_code = false;
    let mut found = Vec::new();
    for line in text.lines() {
        in_code ^= line.starts_with("```");
        if let Some(heading) = (!in_code).then(|| line.strip_prefix('#')).flatten() {
            found.push(anchor(heading.trim_start_matches('#').trim()));
        }
    }
    found
}

fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(process::root().join(file)).with_context(|| format!("cannot read {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(text: &str) -> Vec<String> {
        let found = check_document(Path::new("docs/operations.md"), text).unwrap();
        found.into_iter().map(|(_, what)| what).collect()
    }

    #[test]
    fn links_lead_to_files_and_headings() {
        let text = "# One `word`, two\n[a](#one-word-two) [b](../Cargo.toml) [c](https://example.com/x#y)\n";
        assert!(complaints(text).is_empty(), "{:?}", complaints(text));
        assert_eq!(complaints("[a](#none)").len(), 1);
        assert_eq!(complaints("[a](none.md) [b](../none.md#x)").len(), 2);
        assert_eq!(complaints("```sh\n# comment\n```\n[a](#comment)").len(), 1);
    }

    #[test]
    fn paths_exist() {
        assert!(
            complaints("`xtask/src/links.rs`, in xtask/src/. Or `proxy/tests/*.rs`, `../x/deploy/none`")
                .is_empty()
        );
        assert_eq!(complaints("as `xtask/src/none.rs` says: xtask/none").len(), 2);
    }
}
