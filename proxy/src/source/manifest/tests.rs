//! The manifest folder on real directories: what is in force after each change, and what is said about it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use super::*;
use crate::model::input::ObjectKey;

/// A directory that is removed with the test.
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("kube-lane-manifest-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).unwrap();
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn service(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {address}, ports: [{{port: 80}}]}}\n"
    )
}

/// `+name address` and `-name` for Services, the variant's name for the rest.
fn summary(events: &[Event]) -> Vec<String> {
    events
        .iter()
        .map(|event| match event {
            Event::Source { origin: Origin::Static, change } => match change {
                Change::Service(service) => format!("+{} {}", service.key.name(), service.cluster_ips[0]),
                Change::ServiceGone(key) => format!("-{}", key.name()),
                Change::Slice(slice) => format!("+slice {}", slice.key.name()),
                Change::SliceGone(key) => format!("-slice {}", key.name()),
                Change::Node(node) => {
                    format!("node {}", node.as_ref().map_or(0, |node| node.addresses.len()))
                }
                Change::ServiceCidrs(cidrs) => format!("cidrs {}", cidrs.len()),
                Change::Triggered(..) => "triggered".to_owned(),
                Change::Complete(complete) => format!("complete {complete}"),
                Change::Synced => "synced".to_owned(),
            },
            other => format!("{other:?}"),
        })
        .collect()
}

fn scan(folder: &mut Folder) -> (Vec<String>, Vec<String>) {
    let found = folder.scan(Scope::Folder);
    (summary(&found.events), found.problems.iter().map(ToString::to_string).collect())
}

#[test]
fn reads_every_kind_in_yaml_json_and_lists() {
    let dir = TempDir::new();
    dir.write(
        "all.yaml",
        "\u{feff}%YAML 1.2\n---\n# a comment\n--- # another\napiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Node\n  \
         metadata: {name: node-a}\n  status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}\n- apiVersion: v1\n  \
         kind: Node\n  metadata: {name: node-b}\n- apiVersion: apps/v1\n  kind: Deployment\n  spec: 5\n...\n---\n\
         apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [10.96.0.0/12]}\n",
    );
    dir.write(
        "web.json",
        r#"{"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "creationTimestamp": null},
             "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]}}]}"#,
    );
    dir.write("notes.txt", "not: [a manifest");
    dir.write(".web.yaml.swp", "not: [a manifest");
    dir.write("web.yaml~", "not: [a manifest");
    dir.write("empty.yml", "# nothing yet\n");
    let (events, problems) = read_dir(&dir.0, Some("node-a"));
    let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
    assert!(
        problems.len() == 1 && problems[0].contains("all.yaml:15: kind is \"Deployment\""),
        "{problems:?}"
    );
    assert_eq!(summary(&events), ["node 1", "+web 10.0.0.1", "cidrs 1", "synced"]);
}

#[test]
fn a_file_that_does_not_parse_is_named_by_line_and_its_last_good_content_stays() {
    let dir = TempDir::new();
    dir.write("web.yaml", &service("web", "10.0.0.1"));
    let mut folder = Folder::new(dir.0.clone(), None);
    assert_eq!(scan(&mut folder).0, ["+web 10.0.0.1"]);

    dir.write(
        "web.yaml",
        &format!("{}---\nkind: Service\nmetadata: {{name: [\n", service("web", "10.0.0.2")),
    );
    let (events, problems) = scan(&mut folder);
    assert_eq!((events.len(), problems.len()), (0, 1), "{problems:?}");
    assert!(problems[0].contains("web.yaml:7:18: "), "{}", problems[0]);
    assert_eq!(scan(&mut folder), (vec![], vec![]), "reported once");

    dir.write("web.yaml", &service("web", "10.0.0.3"));
    let found = folder.scan(Scope::Folder);
    assert_eq!(summary(&found.events), ["+web 10.0.0.3"]);
    let over = |what: &str| [format!("{}: {what}", dir.0.join("web.yaml").display())];
    assert_eq!(found.over, over("good again, its new content is in force"));

    dir.write("web.yaml", "kind: [");
    assert_eq!(folder.scan(Scope::Folder).problems.len(), 1);
    fs::remove_file(dir.0.join("web.yaml")).unwrap();
    let found = folder.scan(Scope::Folder);
    assert_eq!(summary(&found.events), ["-web"]);
    assert_eq!(found.over, over("gone, and with it what was in force of it"));
}

#[test]
fn a_json_file_that_does_not_parse_is_named_by_line() {
    let dir = TempDir::new();
    dir.write("web.json", "{\n  \"kind\": \"Service\",,\n}");
    dir.write("latin.yaml", "a: 1\n");
    fs::write(dir.0.join("latin.yaml"), b"a: 1\nb: \xe9\n").unwrap();
    let (_, problems) = scan(&mut Folder::new(dir.0.clone(), None));
    assert!(problems[0].contains("latin.yaml:2: not UTF-8"), "{problems:?}");
    assert!(problems[1].contains("web.json:2:21: "), "{problems:?}");
}

#[test]
fn a_bad_document_leaves_the_good_ones_and_what_its_object_had() {
    let dir = TempDir::new();
    let (web, api) = (service("web", "10.0.0.1"), service("api", "10.0.0.2"));
    dir.write("all.yaml", &format!("{web}---\n{api}"));
    let mut folder = Folder::new(dir.0.clone(), None);
    assert_eq!(scan(&mut folder).0, ["+api 10.0.0.2", "+web 10.0.0.1"]);

    let bad = web.replace("port: 80", "port: eighty");
    dir.write("all.yaml", &format!("{bad}---\n{}", service("api", "10.0.0.3")));
    let (events, problems) = scan(&mut folder);
    assert_eq!(events, ["+api 10.0.0.3"]);
    assert!(
        problems[0].contains("all.yaml:4:") && problems[0].contains("Service default/web"),
        "{problems:?}"
    );

    dir.write("all.yaml", &format!("{}---\n42\n", service("api", "10.0.0.4")));
    let (events, problems) = scan(&mut folder);
    assert_eq!(events, ["+api 10.0.0.4"], "a document without identity may be any of the file's objects");
    assert!(problems[0].contains("all.yaml:6:1: not a Kubernetes object"), "{problems:?}");

    dir.write("all.yaml", &service("api", "10.0.0.4"));
    assert_eq!(scan(&mut folder).0, ["-web"]);
}

#[test]
fn of_two_files_the_first_by_name_wins() {
    let dir = TempDir::new();
    dir.write("b.yaml", &service("web", "10.0.0.2"));
    let mut folder = Folder::new(dir.0.clone(), None);
    assert_eq!(scan(&mut folder).0, ["+web 10.0.0.2"]);
    dir.write("a.yaml", &service("web", "10.0.0.1"));
    let (events, problems) = scan(&mut folder);
    assert_eq!(events, ["+web 10.0.0.1"]);
    assert!(
        problems[0].contains("b.yaml: Service default/web: also in") && problems.len() == 1,
        "{problems:?}"
    );
    fs::remove_file(dir.0.join("a.yaml")).unwrap();
    assert_eq!(scan(&mut folder).0, ["+web 10.0.0.2"]);
    fs::remove_file(dir.0.join("b.yaml")).unwrap();
    assert_eq!(scan(&mut folder).0, ["-web"]);
}

#[test]
fn each_malformed_object_is_named_and_the_good_ones_are_there() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/malformed");
    let (events, problems) = read_dir(&dir, Some("node-a"));
    let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();

    let mut wrong = 0;
    for file in fs::read_dir(&dir).unwrap() {
        let file = file.unwrap();
        for line in fs::read_to_string(file.path()).unwrap().lines() {
            let Some(expected) = line.strip_prefix("# wrong: ") else { continue };
            wrong += 1;
            let name = file.file_name();
            let named =
                |problem: &&String| problem.contains(expected) && problem.contains(name.to_str().unwrap());
            assert!(
                problems.iter().find(named).is_some(),
                "nothing says {expected:?} in\n{}",
                problems.join("\n")
            );
        }
    }
    assert_eq!((wrong, problems.len()), (39, 39), "{}", problems.join("\n"));
    assert!(problems.iter().all(|problem| problem.len() < 400), "huge values are shortened");

    let mut seen = summary(&events);
    seen.retain(|event| event.contains("good-"));
    assert_eq!(seen, ["+good-web 10.96.0.10", "+good-dns 10.96.0.11", "+slice good-web-1"]);
    let keys: Vec<&ObjectKey> = events
        .iter()
        .filter_map(|event| match event {
            Event::Source { change: Change::Service(service), .. } => Some(&service.key),
            _ => None,
        })
        .collect();
    assert!(keys.iter().all(|key| key.as_str().len() < 127), "{keys:?}");
}

#[test]
fn fields_of_kubernetes_that_no_proxy_reads_are_known() {
    let dir = TempDir::new();
    dir.write(
        "exported.yaml",
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  uid: 1-2\n  creationTimestamp: 2026-01-01T00:00:00Z\n  \
         annotations: {a: b}\n  managedFields: [{manager: m, fieldsV1: {'f:spec': {}}}]\nspec:\n  clusterIP: 10.0.0.1\n  \
         ipFamilies: [IPv4]\n  selector: {app: web}\n  ports: [{port: 80, targetPort: http, appProtocol: h}]\n\
         status: {loadBalancer: {}, conditions: null}\n",
    );
    // What nobody reads may even be of another type.
    dir.write("odd.yaml", &service("odd", "10.0.0.2").replace("spec: {", "spec: {selector: 5, "));
    let Checked { events, problems, .. } = check_dir(&dir.0, None);
    assert_eq!((summary(&events).len(), problems), (3, vec![]));
}

#[test]
fn slices_that_lead_nowhere_are_named_where_the_folder_is_all() {
    let slice = |name: &str, of: &str, port: &str| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, labels: \
             {{kubernetes.io/service-name: {of}}}}}\naddressType: IPv4\nendpoints: [{{addresses: [10.1.0.1]}}]\n\
             ports: [{port}]\n"
        )
    };
    let dir = TempDir::new();
    dir.write(
        "services.yaml",
        &format!(
            "{}---\n{}---\n{}",
            service("web", "10.0.0.1").replace("port: 80", "port: 80, name: http"),
            service("headless", "None"),
            service("bad", "nonsense"),
        ),
    );
    dir.write(
        "slices.yaml",
        &[
            slice("web-1", "web", "{name: http, port: 8080}"),
            slice("web-2", "web", "{name: htp, port: 8080}, {name: http, port: 53, protocol: UDP}"),
            slice("wbe-1", "wbe", "{name: http, port: 8080}"),
            slice("headless-1", "headless", "{port: 8080}"),
            slice("bad-1", "bad", "{port: 8080}"),
        ]
        .concat(),
    );
    let Checked { problems, not_served, .. } = check_dir(&dir.0, None);
    assert_eq!(not_served.len(), 1, "{not_served:?}");
    let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
    for expected in [
        "slices.yaml: EndpointSlice default/web-2: ports[].name is \"htp\": Service default/web has no TCP port of this name",
        "slices.yaml: EndpointSlice default/web-2: ports[].name is \"http\": Service default/web has no UDP port",
        "slices.yaml: EndpointSlice default/wbe-1: metadata.labels[kubernetes.io/service-name] is \"wbe\": no Service",
        "services.yaml:10: Service default/bad: spec.clusterIP is \"nonsense\"",
    ] {
        assert!(problems.iter().any(|problem| problem.contains(expected)), "{expected}: {problems:#?}");
    }
    assert_eq!(problems.len(), 4, "{problems:#?}");
    assert_eq!(read_dir(&dir.0, None).1.len(), 1, "an agent may see them in any order");
}

/// Follows a folder and hands over what changes, batch by batch.
struct Follower {
    batches: mpsc::Receiver<Vec<Event>>,
    task: JoinHandle<()>,
}

impl Follower {
    fn new(dir: &Path) -> Self {
        let (sender, batches) = mpsc::channel(16);
        Self { batches, task: spawn(dir.to_owned(), None, true, sender, drop) }
    }

    async fn next(&mut self) -> Vec<String> {
        let batch = timeout(Duration::from_secs(5), self.batches.recv()).await.expect("no event in time");
        summary(&batch.expect("the source ended"))
    }

    /// Nothing is sent for longer than a file may be gone.
    async fn quiet(&mut self) {
        let more = timeout(2 * GRACE, self.batches.recv()).await;
        assert!(more.is_err(), "{more:?}");
    }
}

#[tokio::test]
async fn follows_writes_renames_and_removals() {
    let dir = TempDir::new();
    dir.write("web.yaml", &service("web", "10.0.0.1"));
    let mut followed = Follower::new(&dir.0);
    assert_eq!(followed.next().await, ["+web 10.0.0.1", "synced"]);

    dir.write("web.yaml", &service("web", "10.0.0.2"));
    assert_eq!(followed.next().await, ["+web 10.0.0.2"]);

    dir.write(".web.yaml.new", &service("web", "10.0.0.3"));
    fs::rename(dir.0.join(".web.yaml.new"), dir.0.join("web.yaml")).unwrap();
    assert_eq!(followed.next().await, ["+web 10.0.0.3"]);

    // As an editor that keeps a backup: for a moment there is no such file.
    fs::rename(dir.0.join("web.yaml"), dir.0.join("web.yaml~")).unwrap();
    dir.write("web.yaml", &service("web", "10.0.0.4"));
    assert_eq!(followed.next().await, ["+web 10.0.0.4"]);

    fs::rename(dir.0.join("web.yaml"), dir.0.join("api.yaml")).unwrap();
    followed.quiet().await;
    fs::remove_file(dir.0.join("api.yaml")).unwrap();
    assert_eq!(followed.next().await, ["-web"]);

    let Follower { batches, task } = followed;
    drop(batches);
    timeout(Duration::from_secs(5), task).await.expect("ends with its receiver").unwrap();
}

#[tokio::test]
async fn a_folder_may_come_later_go_and_come_again() {
    let above = TempDir::new();
    let dir = above.0.join("etc/manifests");
    let mut followed = Follower::new(&dir);
    assert_eq!(followed.next().await, ["complete false", "synced"], "absent is not empty");

    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("web.yaml"), service("web", "10.0.0.1")).unwrap();
    assert_eq!(followed.next().await, ["+web 10.0.0.1", "complete true"]);

    fs::remove_dir_all(above.0.join("etc")).unwrap();
    assert_eq!(followed.next().await, ["-web"]);

    let next = above.0.join("next");
    fs::create_dir_all(&next).unwrap();
    fs::write(next.join("web.yaml"), service("web", "10.0.0.2")).unwrap();
    fs::create_dir_all(above.0.join("etc")).unwrap();
    fs::rename(&next, &dir).unwrap();
    assert_eq!(followed.next().await, ["+web 10.0.0.2"]);

    // Replaced while it is watched: the Service is never gone.
    fs::create_dir_all(&next).unwrap();
    fs::write(next.join("web.yaml"), service("web", "10.0.0.3")).unwrap();
    fs::rename(&dir, above.0.join("old")).unwrap();
    fs::rename(&next, &dir).unwrap();
    assert_eq!(followed.next().await, ["+web 10.0.0.3"]);
    fs::write(dir.join("web.yaml"), service("web", "10.0.0.4")).unwrap();
    assert_eq!(followed.next().await, ["+web 10.0.0.4"]);
}

#[tokio::test]
async fn follows_a_mounted_config_map() {
    let dir = TempDir::new();
    for (version, address) in [("..1", "10.0.0.1"), ("..2", "10.0.0.2")] {
        fs::create_dir(dir.0.join(version)).unwrap();
        fs::write(dir.0.join(version).join("web.yaml"), service("web", address)).unwrap();
    }
    symlink("..1", dir.0.join("..data")).unwrap();
    symlink("..data/web.yaml", dir.0.join("web.yaml")).unwrap();
    let mut followed = Follower::new(&dir.0);
    assert_eq!(followed.next().await, ["+web 10.0.0.1", "synced"]);

    symlink("..2", dir.0.join("..data_tmp")).unwrap();
    fs::rename(dir.0.join("..data_tmp"), dir.0.join("..data")).unwrap();
    fs::remove_dir_all(dir.0.join("..1")).unwrap();
    assert_eq!(followed.next().await, ["+web 10.0.0.2"]);
    followed.quiet().await;
}

#[test]
fn a_file_that_was_never_good_leaves_the_folder_incomplete() {
    let dir = TempDir::new();
    dir.write("a.yaml", &service("a", "10.96.0.1"));
    dir.write("b.yaml", "kind: [");
    let mut folder = Folder::new(dir.0.clone(), None);
    assert_eq!(summary(&folder.scan(Scope::Folder).events), ["+a 10.96.0.1", "complete false"]);
    assert!(!folder.condition().complete);
    dir.write("b.yaml", &service("b", "10.96.0.2"));
    assert_eq!(summary(&folder.scan(Scope::Folder).events), ["+b 10.96.0.2", "complete true"]);
    // From now on there is a last good content.
    dir.write("b.yaml", "kind: [[");
    assert!(folder.scan(Scope::Folder).events.is_empty());
}

#[test]
fn a_warning_is_said_once_until_it_changes_or_goes() {
    let dir = TempDir::new();
    let odd = service("web", "10.0.0.1").replace("spec: {", "spec: {selektor: 5, ");
    dir.write("web.yaml", &odd);
    let mut folder = Folder::new(dir.0.clone(), None);
    let said = |folder: &mut Folder| scan(folder).1;
    assert!(
        said(&mut folder)[0].contains("web.yaml:1: Service default/web: spec.selektor: Kubernetes has no")
    );
    dir.write("web.yaml", &format!("# moved\n---\n{odd}"));
    assert_eq!(said(&mut folder), [""; 0]);
    assert_eq!(folder.condition().odd[0].place.as_ref().unwrap().line, 2, "where it stands is known");

    // What is in force is as odd as before while the file does not parse.
    dir.write("web.yaml", &format!("{odd}---\n["));
    assert!(said(&mut folder)[0].contains("web.yaml:6"));
    assert_eq!((folder.condition().unread.len(), folder.condition().odd.len()), (1, 1));
    dir.write("web.yaml", &format!("{odd}---\n\n["));
    assert!(said(&mut folder)[0].contains("web.yaml:7"), "another line, another trouble");
    dir.write("web.yaml", &odd);
    assert_eq!(said(&mut folder), [""; 0]);
    dir.write("web.yaml", &odd.replace("selektor", "sellector"));
    assert_eq!(said(&mut folder).len(), 1);

    dir.write("web.yaml", &service("web", "10.0.0.1"));
    dir.write("zweb.yaml", &service("web", "10.0.0.2"));
    assert!(said(&mut folder)[0].contains("zweb.yaml: Service default/web: also in"));
    dir.write("web.yaml", &service("web", "10.0.0.3"));
    assert_eq!((said(&mut folder), folder.condition().odd.len()), (vec![], 1));
    fs::remove_file(dir.0.join("web.yaml")).unwrap();
    assert_eq!((said(&mut folder), folder.condition()), (vec![], Condition::default()));
}

/// What an agent that has followed a folder has of it, and what one that starts now has: the same objects, or else the
/// latter does not call the folder complete, so that what the former left in the kernel stays.
#[test]
fn a_restart_changes_nothing() {
    let good = service("web", "10.0.0.1");
    for (bad, remains, complete) in [
        // No port is left, or no address: the values can be read, and leave nothing.
        (good.replace("port: 80", "port: 99999"), false, true),
        (good.replace("10.0.0.1", "nonsense"), false, true),
        (good.replace("name: web", "name: Web"), false, true),
        // It cannot be read: what it had stays.
        (good.replace("port: 80", "port: eighty"), true, false),
        (good.replace("v1", "v2"), true, false),
        ("42\n".to_owned(), true, false),
        ("kind: [".to_owned(), true, false),
    ] {
        let dir = TempDir::new();
        dir.write("web.yaml", &good);
        let mut followed = Folder::new(dir.0.clone(), None);
        assert_eq!(scan(&mut followed).0, ["+web 10.0.0.1"]);
        dir.write("web.yaml", &bad);
        let gone: &[&str] = if remains { &[] } else { &["-web"] };
        assert_eq!(scan(&mut followed).0, gone, "{bad}");
        let mut restarted = Folder::new(dir.0.clone(), None);
        let expected: &[&str] = if complete { &[] } else { &["complete false"] };
        assert_eq!(summary(&restarted.scan(Scope::Folder).events), expected, "{bad}");
    }
    let slice = |endpoints: &str, ports: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-1, labels: \
             {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nendpoints: [{endpoints}]\nports: [{ports}]\n"
        )
    };
    let (endpoint, port) = ("{addresses: [10.1.0.1]}", "{port: 8080}");
    for bad in [slice("{addresses: [pod]}", port), slice(endpoint, "{port: 0}")] {
        let dir = TempDir::new();
        dir.write("slice.yaml", &slice(endpoint, port));
        let mut followed = Folder::new(dir.0.clone(), None);
        assert_eq!(scan(&mut followed).0, ["+slice web-1"]);
        dir.write("slice.yaml", &bad);
        assert_eq!(scan(&mut followed).0, ["-slice web-1"], "{bad}");
        assert_eq!(scan(&mut Folder::new(dir.0.clone(), None)).0, [""; 0], "{bad}");
    }
}
