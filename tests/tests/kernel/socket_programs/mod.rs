//! The eBPF programs: what they do with sockets, given what is in their maps. The agent's own half has no part in it.

mod reuse;
mod tcp;
mod udp;

use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use aya::maps::{Array, HashMap, MapData};
use aya::programs::{CgroupAttachMode, CgroupSockAddr};
use aya::{Ebpf, EbpfLoader, Pod as Plain};
use kube_lane::dataplane::socket;
use kube_lane_common::{
    AffinityKey, Answered, Backend, Client, Frontend, FrontendKey, Member, Network4, Network6, PodCgroups,
    Port, PortWord, Remembered, Set, Settings, Slot, maps, programs,
};
use kube_lane_lab::{Dial, Host, Outcome, Proto};
use nix::libc;
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};

use super::bare::Bare;
use super::world::{at, vips};

/// Nobody answers after so long.
const QUIET: Duration = Duration::from_millis(250);
/// The port of every Service.
const WEB: u16 = 80;
/// The port of every backend.
const TARGET: u16 = 8080;
/// Slots of each set, in these tests.
const ROOM: u32 = 16;
/// What is answered: clusters IPs, in both families, for pods, which are not told from other containers: some tests use
/// a pod's socket themselves, and run below no cgroup of pods.
const PODS: u64 = Answered::bit(Client::Other, false, false) | Answered::bit(Client::Other, false, true);
/// The same for the host.
const HOST: u64 = Answered::bit(Client::Host, false, false) | Answered::bit(Client::Host, false, true);

/// The programs on one cgroup, and their maps.
struct Programs(Ebpf);

impl Programs {
    /// `refuse`: as on a kernel that lets programs choose the error.
    fn attach(cgroup: &Path, refuse: bool) -> Self {
        let object = socket::available().expect("`cargo xtask test --lane kernel` builds with it");
        let mut loader = EbpfLoader::new();
        let refuse = u8::from(refuse);
        loader.override_global("CAN_REFUSE", &refuse, true).map_max_entries(maps::AFFINITY, 2);
        let mut ebpf = loader.load(object).unwrap();
        for name in programs::TCP.into_iter().chain(programs::UDP) {
            let program: &mut CgroupSockAddr = ebpf.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap_or_else(|error| panic!("{name}: {error:?}"));
            program.attach(fs::File::open(cgroup).unwrap(), CgroupAttachMode::Single).unwrap();
        }
        Self(ebpf)
    }

    fn array<T: Plain>(&mut self, name: &str) -> Array<&mut MapData, T> {
        self.0.map_mut(name).unwrap().try_into().unwrap()
    }

    fn hash<K: Plain, V: Plain>(&mut self, name: &str) -> HashMap<&mut MapData, K, V> {
        self.0.map_mut(name).unwrap().try_into().unwrap()
    }

    fn settings(&mut self, settings: Settings) {
        self.array(maps::SETTINGS).set(0, settings, 0).unwrap();
    }

    /// A port of one family, with this affinity, whose Cluster set has these backends, by id.
    fn port(&mut self, port: u32, affinity: u32, backends: &[(u32, SocketAddr)]) {
        self.array(maps::PORTS).set(port, PortWord::new(affinity), 0).unwrap();
        for (id, at) in backends {
            let backend = Backend::new(at.ip().into(), Port::from_host(at.port()), port);
            self.array(maps::BACKENDS).set(*id, backend, 0).unwrap();
            self.array(maps::MEMBERS).set(*id, Member::new(port, true, false), 0).unwrap();
        }
        let ids: Vec<_> = backends.iter().map(|(id, _)| *id).collect();
        self.set(Set::cluster_of(port), &ids);
    }

    fn set(&mut self, set: u32, backends: &[u32]) {
        let first = set * ROOM;
        for (slot, id) in (first..).zip(backends) {
            self.array(maps::SLOTS).set(slot, Slot::new(*id, set), 0).unwrap();
        }
        self.array(maps::SETS).set(set, Set::new(first, backends.len() as u32), 0).unwrap();
    }

    fn refuse(&mut self, port: u32) {
        self.array(maps::SETS).set(Set::cluster_of(port), Set::REFUSED, 0).unwrap();
    }

    fn retire(&mut self, backend: u32) {
        self.array(maps::MEMBERS).set(backend, Member::NONE, 0).unwrap();
    }

    /// Leads a frontend to the Cluster set of a port; `flags` as of [`Frontend::new`].
    fn frontend(&mut self, key: FrontendKey, port: u32, flags: u64) {
        let frontend = Frontend::new(Set::cluster_of(port), flags, key.fingerprint());
        self.hash(maps::FRONTENDS).insert(key, frontend, 0).unwrap();
    }

    fn node_address(&mut self, address: IpAddr) {
        let address: kube_lane_common::Address = address.into();
        self.hash(maps::NODE_ADDRESSES).insert(address, 1_u64, 0).unwrap();
    }

    /// How many connections each of these backends got.
    fn connections<const N: usize>(&mut self, backends: [u32; N]) -> [u64; N] {
        let connections = self.array(maps::CONNECTIONS);
        backends.map(|id| connections.get(&id, 0).unwrap())
    }

    fn refused(&mut self, port: u32) -> u64 {
        self.array(maps::REFUSED).get(&port, 0).unwrap()
    }

    fn remembered(&mut self, client: &Host, port: u32) -> Option<Remembered> {
        self.hash(maps::AFFINITY).get(&AffinityKey::new(cookie(client), port), 0).ok()
    }

    fn remember(&mut self, client: &Host, port: u32, remembered: Remembered) {
        self.hash(maps::AFFINITY).insert(AffinityKey::new(cookie(client), port), remembered, 0).unwrap();
    }
}

/// A node with the programs on its cgroup, where pods are answered at cluster IPs.
struct Stage {
    programs: Programs,
    bare: Bare,
}

impl Deref for Stage {
    type Target = Bare;

    fn deref(&self) -> &Bare {
        &self.bare
    }
}

impl Stage {
    fn new() -> Self {
        Self::with(true)
    }

    fn with(refuse: bool) -> Self {
        let bare = Bare::new();
        let mut stage = Self { programs: Programs::attach(bare.node().cgroup(), refuse), bare };
        stage.answer(PODS);
        stage
    }

    /// Answers so, with no pods' network.
    fn answer(&mut self, answered: u64) {
        let settings = self.rules(answered);
        self.programs.settings(settings);
    }

    fn rules(&self, answered: u64) -> Settings {
        Settings {
            answered: Answered(answered),
            host: cookie(self.node()),
            pods4: Network4 { network: 0, mask: 0 },
            pods6: Network6 { network: [0; 4], mask: [0; 4] },
            pods: PodCgroups { level: 1, ids: [0, 0, 0, cgroup_id(self.client.cgroup())] },
        }
    }

    /// Whom a client meets at an address over TCP.
    fn meets(&self, client: &Host, to: SocketAddr) -> Outcome {
        client.dial_with(Dial::new(Proto::Tcp, to).timeout(QUIET)).unwrap()
    }
}

/// The cookie of a host's network namespace.
fn cookie(host: &Host) -> u64 {
    let ask = || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let (mut cookie, mut size) = (0_u64, size_of::<u64>() as libc::socklen_t);
        let (level, option) = (libc::SOL_SOCKET, libc::SO_NETNS_COOKIE);
        // SAFETY: the kernel writes at most `size` bytes, which `cookie` has.
        let result = unsafe {
            libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut cookie).cast(), &raw mut size)
        };
        assert_eq!(result, 0);
        cookie
    };
    host.run(ask).unwrap()
}

/// Now, as programs have it.
fn seconds() -> u32 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap().num_seconds() as u32
}

/// The id of a cgroup.
fn cgroup_id(cgroup: &Path) -> u64 {
    fs::metadata(cgroup).unwrap().ino()
}

fn mapped(at: SocketAddr) -> SocketAddr {
    match at.ip() {
        IpAddr::V4(ip) => (ip.to_ipv6_mapped(), at.port()).into(),
        IpAddr::V6(_) => at,
    }
}

fn udp(at: SocketAddr) -> FrontendKey {
    FrontendKey::new(at.ip().into(), Port::from_host(at.port()), kube_lane_common::UDP)
}

/// The cluster IPs of Service `number`, with the port of all.
fn service(number: u8) -> [SocketAddr; 2] {
    vips(number).map(|ip| at(ip, WEB))
}

/// A pod's addresses, with the port of all backends.
fn backend(pod: &Host) -> [SocketAddr; 2] {
    [at(pod.v4(), TARGET), at(pod.v6(), TARGET)]
}

/// An IPv4 address in an IPv6 socket's words.
fn any6() -> SocketAddr {
    at(Ipv6Addr::UNSPECIFIED.into(), 0)
}
