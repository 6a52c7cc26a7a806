//! An eBPF program of somebody else on a cgroup: it forbids IPv4 connections to one port.
//!
//! Loaded by bare system calls, so that it shares nothing with what is tested.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use nix::libc;

const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const CGROUP_SOCK_ADDR: u32 = 18;
const CGROUP_INET4_CONNECT: u32 = 10;
/// Where `user_port` is in `bpf_sock_addr`: 16 bits in network byte order.
const USER_PORT: i16 = 24;

/// `struct bpf_insn`.
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// `union bpf_attr` of `BPF_PROG_LOAD`, as far as it is needed.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// `union bpf_attr` of `BPF_LINK_CREATE`, as far as it is needed.
#[repr(C)]
struct Link {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// The program's link: it is detached when this is dropped.
pub(super) struct Foreign(#[expect(dead_code, reason = "the link lasts as long as its descriptor")] OwnedFd);

impl Foreign {
    /// Attaches the program.
    pub(super) fn forbid(port: u16, cgroup: &Path) -> Self {
        let insn = |code, registers, offset, immediate| Instruction { code, registers, offset, immediate };
        let program = [
            insn(0x61, 0x12, USER_PORT, 0),               // r2 = user_port
            insn(0xb7, 0x00, 0, 1),                       // r0 = 1: go on
            insn(0x55, 0x02, 1, i32::from(port.to_be())), // if r2 != port, skip one
            insn(0xb7, 0x00, 0, 0),                       // r0 = 0: EPERM
            insn(0x95, 0x00, 0, 0),                       // exit
        ];
        let load = Load {
            kind: CGROUP_SOCK_ADDR,
            instruction_count: 5,
            instructions: program.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            attach_type: CGROUP_INET4_CONNECT,
            ..Load::default()
        };
        let program = bpf(PROG_LOAD, &load).expect("the kernel takes the foreign program");
        let cgroup = File::open(cgroup).unwrap();
        let number = |fd: i32| u32::try_from(fd).unwrap();
        let link = Link {
            program: number(program.as_raw_fd()),
            target: number(cgroup.as_raw_fd()),
            attach_type: CGROUP_INET4_CONNECT,
            flags: 0,
        };
        Self(bpf(LINK_CREATE, &link).expect("the kernel attaches the foreign program"))
    }
}

fn bpf<T>(command: libc::c_long, attribute: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attribute is a prefix of `union bpf_attr` of the size that is passed, and whatever it points to lives
    // in the caller; the kernel reads it, and writes nothing, since no log is asked for.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attribute, size_of::<T>()) };
    match i32::try_from(fd) {
        // SAFETY: both commands return a descriptor that is ours.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
