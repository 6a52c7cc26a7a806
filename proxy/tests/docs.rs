//! Holds the documents to the program: every `kube-lane …` command that they show is one that this build takes.
//! Knows nothing of what the commands do.
#![allow(clippy::unwrap_used, reason = "clippy knows #[test] functions, not what they call")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The documents for users, below the top of the repository.
fn documents() -> Vec<PathBuf> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = vec![top.join("README.md"), top.join(".github/ISSUE_TEMPLATE/bug.yml")];
    for entry in std::fs::read_dir(top.join("docs")).unwrap() {
        files.push(entry.unwrap().path());
    }
    files.retain(|file| file.extension().is_some_and(|ending| ending == "md" || ending == "yml"));
    files
}

/// The command lines in `text` that run kube-lane, from what follows the program's name.
fn commands(text: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = line.starts_with("```sh");
            continue;
        }
        // In prose, code stands between backticks: every second part.
        let parts: Vec<&str> = if fenced {
            vec![line.split('#').next().unwrap()]
        } else {
            line.split('`').skip(1).step_by(2).collect()
        };
        for part in parts {
            // The program stands first, or behind `kubectl exec … --`, or behind `sudo`.
            let before = ["", "-- ", "sudo "].map(|before| format!("{before}kube-lane "));
            let starts = part.starts_with("kube-lane ").then_some(0);
            let start = before
                .iter()
                .skip(1)
                .find_map(|name| part.find(name.as_str()).map(|at| at + name.len() - 10));
            let Some(start) = starts.or(start) else { continue };
            let command = part.get(start + 10..).unwrap();
            found.push(command.split_whitespace().map(str::to_owned).collect());
        }
    }
    found
}

fn help(arguments: &[&str]) -> String {
    let output =
        Command::new(env!("CARGO_BIN_EXE_kube-lane")).args(arguments).arg("--help").output().unwrap();
    assert!(output.status.success(), "kube-lane {arguments:?} --help fails");
    String::from_utf8(output.stdout).unwrap()
}

/// The names of the subcommands in a help text.
fn subcommands(help: &str) -> Vec<&str> {
    let listed = help.split("Commands:\n").nth(1).unwrap();
    listed
        .lines()
        .take_while(|line| line.starts_with("  "))
        .filter_map(|line| line.split_whitespace().next())
        .collect()
}

/// Whether a help text names exactly this flag.
fn names_flag(help: &str, flag: &str) -> bool {
    help.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).any(|word| word == flag)
}

#[test]
fn every_command_in_the_documents_exists() {
    let top = help(&[]);
    let subcommands = subcommands(&top);
    let mut helps = BTreeMap::new();
    let (mut seen, mut wrong) = (0, Vec::new());
    for file in documents() {
        let text = std::fs::read_to_string(&file).unwrap();
        for command in commands(&text) {
            seen += 1;
            let first = command.first().unwrap().as_str();
            let subcommand = if first.starts_with('-') { "run" } else { first };
            let place = format!("{}: kube-lane {}", file.display(), command.join(" "));
            if !subcommands.contains(&subcommand) {
                wrong.push(format!("{place}: no such subcommand"));
                continue;
            }
            let help = helps.entry(subcommand.to_owned()).or_insert_with(|| help(&[subcommand]));
            let flags = command.iter().filter(|word| word.starts_with('-'));
            for flag in flags.map(|flag| flag.split('=').next().unwrap()) {
                if !names_flag(help, flag) {
                    wrong.push(format!("{place}: `kube-lane {subcommand} --help` names no {flag}"));
                }
            }
        }
    }
    assert!(seen > 20, "only {seen} commands found: are the documents still where this looks?");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn commands_are_found_in_code_alone() {
    let text = "kube-lane starts; `kube-lane status a` or `-v 4`\n```sh\nkubectl exec ds/kube-lane -- kube-lane check # kube-lane x\n\
                sudo kube-lane run\n```\n```text\n# kube-lane status\n```\n";
    assert_eq!(commands(text), [vec!["status", "a"], vec!["check"], vec!["run"]]);
}
