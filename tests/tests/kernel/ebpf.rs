//! The eBPF object: the kernel takes it, it sees what its cgroup does, and it goes without a trace.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use kube_lane::dataplane::socket::{self, SocketError, SocketPrograms};
use kube_lane_common::FrontendKey;

/// A cgroup of one test, removed with this.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [_, at, "cgroup2", ..] => Some(at),
            _ => None,
        });
        let path = Path::new(mount.expect("no cgroup v2 is mounted"))
            .join(format!("kube-lane-test-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Connects to `to` from a process in this cgroup; returns whether the connection was made.
    fn connect(&self, to: SocketAddr) -> bool {
        let script = r#"echo $$ > "$0/cgroup.procs" && exec 3<> "/dev/tcp/$1/$2""#;
        let mut client = Command::new("bash");
        client.arg("-c").arg(script).arg(&self.0).args([to.ip().to_string(), to.port().to_string()]);
        client.status().unwrap().success()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        fs::remove_dir(&self.0).unwrap();
    }
}

#[test]
fn connects_of_the_cgroup_are_counted_and_pass() {
    let object = socket::available().expect("`cargo xtask test --lane kernel` builds with it");
    let cgroup = Cgroup::new("counted");
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = server.local_addr().unwrap();
    let other_server = TcpListener::bind("127.0.0.1:0").unwrap();
    let watched = FrontendKey::tcp(at);
    let unwatched = FrontendKey::tcp(other_server.local_addr().unwrap());

    let mut programs = SocketPrograms::attach(object, &cgroup.0).unwrap();
    assert_eq!(programs.connects(watched).unwrap(), None);
    programs.watch(watched).unwrap();
    assert_eq!(programs.connects(watched).unwrap(), Some(0));

    assert!(cgroup.connect(at));
    assert!(cgroup.connect(at));
    assert!(cgroup.connect(other_server.local_addr().unwrap()));
    assert_eq!(programs.connects(watched).unwrap(), Some(2));
    assert_eq!(programs.connects(unwatched).unwrap(), None);

    // This process is not in the cgroup.
    drop(std::net::TcpStream::connect(at).unwrap());
    assert_eq!(programs.connects(watched).unwrap(), Some(2));

    // Dropping detaches: nothing is left in the cgroup, and clients still connect.
    assert_eq!(attached(&cgroup), ["connect4"]);
    drop(programs);
    assert_eq!(attached(&cgroup), [""; 0]);
    assert!(cgroup.connect(at));
}

#[test]
fn programs_of_others_stay_attached_and_working() {
    let object = socket::available().expect("`cargo xtask test --lane kernel` builds with it");
    let cgroup = Cgroup::new("others");
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = server.local_addr().unwrap();

    let mut first = SocketPrograms::attach(object, &cgroup.0).unwrap();
    first.watch(FrontendKey::tcp(at)).unwrap();
    let mut second = SocketPrograms::attach(object, &cgroup.0).unwrap();
    second.watch(FrontendKey::tcp(at)).unwrap();
    assert!(cgroup.connect(at));
    drop(second);
    assert!(cgroup.connect(at));
    assert_eq!(first.connects(FrontendKey::tcp(at)).unwrap(), Some(2));
}

#[test]
fn what_is_no_cgroup_is_named() {
    let object = socket::available().expect("`cargo xtask test --lane kernel` builds with it");
    let missing = SocketPrograms::attach(object, Path::new("/nonexistent")).unwrap_err();
    assert!(matches!(missing, SocketError::Cgroup { .. }), "{missing:?}");
    let no_cgroup = SocketPrograms::attach(object, Path::new("/proc")).unwrap_err();
    assert!(matches!(no_cgroup, SocketError::Attach { .. }), "{no_cgroup:?}");
    assert_eq!(no_cgroup.to_string(), "cannot attach the program connect4 to the cgroup /proc");
}

#[test]
fn what_is_no_object_is_refused() {
    let cgroup = Cgroup::new("malformed");
    let refused = SocketPrograms::attach(b"\x7fELF", &cgroup.0).unwrap_err();
    assert!(matches!(refused, SocketError::Object(_)), "{refused:?}");
}

/// The names of the programs attached to a cgroup, as bpftool sees them.
fn attached(cgroup: &Cgroup) -> Vec<String> {
    let output = Command::new("bpftool").args(["cgroup", "show"]).arg(&cgroup.0).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().skip(1).filter_map(|line| line.split_whitespace().last().map(str::to_owned)).collect()
}
