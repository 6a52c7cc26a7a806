//! The system calls that aya does not make for us: links that are replaced in place, arrays in our own memory, a grace
//! period, elements of hash maps looked up and removed in one, or many at a time.
//!
//! Owns all that is unsafe in the socket layer. Never decides anything.

mod elements;

use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::Pod;
use nix::libc;

pub(super) use self::elements::{all, put_all, put_back, take};

/// Commands of `bpf(2)`, as `linux/bpf.h` numbers them.
mod command {
    use nix::libc::c_long;

    pub(super) const MAP_CREATE: c_long = 0;
    pub(super) const MAP_UPDATE_ELEM: c_long = 2;
    pub(super) const OBJ_PIN: c_long = 6;
    pub(super) const OBJ_GET: c_long = 7;
    pub(super) const OBJ_GET_INFO_BY_FD: c_long = 15;
    pub(super) const PROG_QUERY: c_long = 16;
    pub(super) const MAP_LOOKUP_AND_DELETE_ELEM: c_long = 21;
    pub(super) const MAP_LOOKUP_BATCH: c_long = 24;
    pub(super) const MAP_UPDATE_BATCH: c_long = 26;
    pub(super) const LINK_CREATE: c_long = 28;
    pub(super) const LINK_UPDATE: c_long = 29;
    pub(super) const LINK_DETACH: c_long = 34;
}

/// The member of `union bpf_attr` that a command reads.
///
/// # Safety
/// `repr(C)`, integers only, no padding, laid out as the kernel's; an integer that is a pointer in the kernel's has to
/// be one, to memory that is valid for the call.
unsafe trait Attribute {}

/// `BPF_MAP_CREATE`.
#[repr(C)]
struct CreateMap {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
    inner: RawDescriptor,
}

/// `BPF_MAP_*_ELEM`.
#[repr(C)]
struct Element {
    map: RawDescriptor,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `BPF_OBJ_PIN`, `BPF_OBJ_GET`.
#[repr(C)]
struct Pin {
    path: u64,
    object: RawDescriptor,
    flags: u32,
}

/// `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfo {
    object: RawDescriptor,
    length: u32,
    info: u64,
}

/// `BPF_LINK_CREATE`.
#[repr(C)]
struct CreateLink {
    program: RawDescriptor,
    target: RawDescriptor,
    attach_type: u32,
    flags: u32,
}

/// `BPF_LINK_UPDATE`.
#[repr(C)]
struct UpdateLink {
    link: RawDescriptor,
    program: RawDescriptor,
    flags: u32,
    old_program: u32,
}

/// `BPF_LINK_DETACH`.
#[repr(C)]
struct DetachLink {
    link: RawDescriptor,
}

/// `BPF_PROG_QUERY`.
#[repr(C)]
struct QueryPrograms {
    target: RawDescriptor,
    attach_type: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
}

/// A file descriptor as the kernel has it in a `union bpf_attr`; 0 where there is none.
type RawDescriptor = u32;

// SAFETY: see the struct.
unsafe impl Attribute for CreateMap {}
// SAFETY: see the struct; `element` below makes the pointers of references.
unsafe impl Attribute for Element {}
// SAFETY: see the struct; the path is that of a `CString` that outlives the call.
unsafe impl Attribute for Pin {}
// SAFETY: see the struct; the info is a local variable of the caller's.
unsafe impl Attribute for GetInfo {}
// SAFETY: see the struct.
unsafe impl Attribute for CreateLink {}
// SAFETY: see the struct.
unsafe impl Attribute for UpdateLink {}
// SAFETY: see the struct.
unsafe impl Attribute for DetachLink {}
// SAFETY: see the struct; the ids are an array of the caller's, of `count`.
unsafe impl Attribute for QueryPrograms {}

fn bpf<T: Attribute>(command: libc::c_long, attribute: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads, and for some commands writes, so many bytes of the attribute, and what it points to is
    // valid (see `Attribute`).
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attribute, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// For commands that give a descriptor.
fn bpf_open<T: Attribute>(command: libc::c_long, attribute: &mut T) -> io::Result<OwnedFd> {
    let descriptor = bpf(command, attribute)?;
    let descriptor =
        i32::try_from(descriptor).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    // SAFETY: the kernel made it for this call, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn raw(descriptor: BorrowedFd<'_>) -> RawDescriptor {
    // An open descriptor is never negative.
    descriptor.as_raw_fd().unsigned_abs()
}

fn path_text(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// Pins a map or a link at `path`, where nothing may be.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_text(path)?;
    let mut attribute = Pin { path: path.as_ptr().addr() as u64, object: raw(object), flags: 0 };
    bpf(command::OBJ_PIN, &mut attribute).map(drop)
}

/// What is pinned at `path`.
pub(super) fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = path_text(path)?;
    bpf_open(command::OBJ_GET, &mut Pin { path: path.as_ptr().addr() as u64, object: 0, flags: 0 })
}

/// A program's place at a hook of a cgroup. Where it is not pinned, it goes with this.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

/// Where a link is. As the kernel has it: `struct bpf_link_info`, as far as it goes for a cgroup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LinkInfo {
    kind: u32,
    id: u32,
    /// The id of the program.
    pub(super) program: u32,
    padding: u32,
    /// The id of the cgroup; 0 where that has gone, or the link was detached.
    pub(super) cgroup: u64,
    /// The hook: `enum bpf_attach_type`.
    pub(super) attach_type: u32,
    end: u32,
}

impl LinkInfo {
    /// Of the same link, whatever has become of it.
    pub(super) fn is_of_same_link(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Link {
    /// Attaches a program to a cgroup, beside those of others.
    pub(super) fn attach(
        program: BorrowedFd<'_>,
        cgroup: BorrowedFd<'_>,
        attach_type: u32,
    ) -> io::Result<Self> {
        let mut attribute = CreateLink { program: raw(program), target: raw(cgroup), attach_type, flags: 0 };
        bpf_open(command::LINK_CREATE, &mut attribute).map(Self)
    }

    /// The link that is pinned at `path`; an error of [`io::ErrorKind::InvalidData`] where that is no cgroup's.
    pub(super) fn pinned(path: &Path) -> io::Result<Self> {
        let link = Self(pinned(path)?);
        link.info()?;
        Ok(link)
    }

    /// Pins it, so that it stays.
    pub(super) fn pin(&self, path: &Path) -> io::Result<()> {
        pin(self.0.as_fd(), path)
    }

    /// Puts another program in the place of its program: every call of the hook meets the one or the other.
    pub(super) fn replace(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attribute =
            UpdateLink { link: raw(self.0.as_fd()), program: raw(program), flags: 0, old_program: 0 };
        bpf(command::LINK_UPDATE, &mut attribute).map(drop)
    }

    /// Detaches it, whoever else holds it.
    pub(super) fn detach(&self) -> io::Result<()> {
        bpf(command::LINK_DETACH, &mut DetachLink { link: raw(self.0.as_fd()) }).map(drop)
    }

    /// Where it is; an error of [`io::ErrorKind::InvalidData`] where it is no cgroup's.
    pub(super) fn info(&self) -> io::Result<LinkInfo> {
        /// `BPF_LINK_TYPE_CGROUP`.
        const CGROUP: u32 = 3;
        let mut info = LinkInfo::default();
        let mut attribute = GetInfo {
            object: raw(self.0.as_fd()),
            length: size_of::<LinkInfo>() as u32,
            info: (&raw mut info).addr() as u64,
        };
        bpf(command::OBJ_GET_INFO_BY_FD, &mut attribute)?;
        if info.kind == CGROUP { Ok(info) } else { Err(io::ErrorKind::InvalidData.into()) }
    }
}

/// The ids of the programs that run at a hook of a cgroup, those of the cgroups above it included.
pub(super) fn programs_at(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    /// `BPF_F_QUERY_EFFECTIVE`.
    const EFFECTIVE: u32 = 1;
    let mut ids = vec![0_u32; 64];
    loop {
        let mut attribute = QueryPrograms {
            target: raw(cgroup),
            attach_type,
            flags: EFFECTIVE,
            attach_flags: 0,
            ids: ids.as_mut_ptr().addr() as u64,
            count: ids.len() as u32,
            padding: 0,
        };
        let result = bpf(command::PROG_QUERY, &mut attribute);
        let count = attribute.count as usize;
        match result {
            // There are more: so many.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && count > ids.len() => {
                ids.resize(count, 0);
            }
            result => {
                result?;
                ids.truncate(count);
                return Ok(ids);
            }
        }
    }
}

fn element<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: *mut V) -> Element {
    Element {
        map: raw(map),
        padding: 0,
        key: (&raw const *key).addr() as u64,
        value: value.addr() as u64,
        flags: 0,
    }
}

/// `BPF_MAP_TYPE_ARRAY`.
const ARRAY: u32 = 2;
/// `BPF_MAP_TYPE_ARRAY_OF_MAPS`.
const ARRAY_OF_MAPS: u32 = 12;

/// A new array, with sizes of key and value in bytes.
fn create_array(
    kind: u32,
    (key_size, value_size): (u32, u32),
    entries: u32,
    flags: u32,
    inner: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    let inner = inner.map_or(0, raw);
    let mut attribute = CreateMap { kind, key_size, value_size, entries, flags, inner };
    bpf_open(command::MAP_CREATE, &mut attribute)
}

/// A new map, as small as there is.
pub(super) fn smallest_map() -> io::Result<OwnedFd> {
    let word = size_of::<u32>() as u32;
    create_array(ARRAY, (word, word), 1, 0, None)
}

/// An array of one map, which no program reads.
#[derive(Debug)]
pub(super) struct GracePeriod {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl GracePeriod {
    pub(super) fn new() -> io::Result<Self> {
        let word = size_of::<u32>() as u32;
        let inner = smallest_map()?;
        let outer = create_array(ARRAY_OF_MAPS, (word, word), 1, 0, Some(inner.as_fd()))?;
        Ok(Self { outer, inner })
    }

    /// Waits until no program runs that began before. Replacing a map inside of a map promises that, and costs some
    /// milliseconds; `membarrier` promises nothing where there is one processor, and is not offered with `nohz_full`.
    pub(super) fn wait(&self) -> io::Result<()> {
        let mut inner = raw(self.inner.as_fd());
        let mut attribute = element(self.outer.as_fd(), &0_u32, &raw mut inner);
        bpf(command::MAP_UPDATE_ELEM, &mut attribute).map(drop)
    }
}

/// How many words the largest value has.
const MOST_WORDS: usize = 12;

impl Words<u64> {
    /// A new array, which nobody else has.
    pub(super) fn create(entries: u32) -> io::Result<Self> {
        const MMAPABLE: u32 = 1 << 10;
        let sizes = (size_of::<u32>() as u32, size_of::<u64>() as u32);
        Self::map(create_array(ARRAY, sizes, entries, MMAPABLE, None)?.as_fd(), entries as usize)
    }
}

/// A BPF array of `T` (made with `BPF_F_MMAPABLE`) in this process's memory, read and written as the programs do: a
/// word at a time.
#[derive(Debug)]
pub(super) struct Words<T> {
    start: NonNull<AtomicU64>,
    /// How many entries.
    len: usize,
    value: PhantomData<T>,
}

// SAFETY: the memory is shared with the kernel anyway, and is only accessed by atomic loads and stores.
unsafe impl<T> Send for Words<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Words<T> {}

impl<T: Pod> Words<T> {
    /// How many words a value has. The kernel begins each value at a multiple of 8 bytes.
    const EACH: usize = {
        assert!(size_of::<T>().is_multiple_of(8) && size_of::<T>() > 0 && size_of::<T>() <= 8 * MOST_WORDS);
        size_of::<T>() / 8
    };

    /// Maps the first `len` entries of an array, of which each is a `T`.
    pub(super) fn map(array: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len * size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                array.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, len, value: PhantomData })
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The words of an entry.
    fn entry(&self, index: usize) -> Option<&[AtomicU64]> {
        // SAFETY: so many words were mapped, page-aligned, and stay until this is dropped.
        let words = unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len * Self::EACH) };
        words.get(index.checked_mul(Self::EACH)?..)?.get(..Self::EACH)
    }

    /// An entry; `None` beyond the end. One of several words may be torn where somebody else writes it.
    pub(super) fn get(&self, index: usize) -> Option<T> {
        let mut words = [0_u64; MOST_WORDS];
        for (word, from) in words.iter_mut().zip(self.entry(index)?) {
            *word = from.load(Ordering::Acquire);
        }
        // SAFETY: at least as many bytes as a `T` has, and any make one (see `Pod`).
        Some(unsafe { words.as_ptr().cast::<T>().read_unaligned() })
    }

    /// Writes an entry, a word at a time from its end; false beyond the end. Whoever sees a word of it sees whatever
    /// was written before.
    #[must_use]
    pub(super) fn set(&self, index: usize, value: T) -> bool {
        let Some(entry) = self.entry(index) else { return false };
        for (at, word) in entry.iter().enumerate().rev() {
            // SAFETY: within `value`, of which every byte is initialised (see `Pod`; none of ours has padding).
            let new = unsafe { (&raw const value).cast::<u64>().add(at).read_unaligned() };
            word.store(new, Ordering::Release);
        }
        true
    }
}

impl Words<u64> {
    /// Adds to an entry, whoever else does; false beyond the end.
    #[must_use]
    pub(super) fn add(&self, index: usize, more: u64) -> bool {
        let Some([entry]) = self.entry(index) else { return false };
        entry.fetch_add(more, Ordering::Relaxed);
        true
    }
}

impl<T> Drop for Words<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; nothing borrowed from it outlives this.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len * size_of::<T>()) };
    }
}

/// Before Linux 5.11 maps count as locked memory, of which little is allowed by default.
pub(super) fn allow_locked_memory() {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the kernel reads a limit from where one is. Where it refuses, so it will the maps, and says so.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
}

/// The cookie of the network namespace that this thread is in.
pub(super) fn network_namespace_cookie() -> io::Result<u64> {
    /// `SO_NETNS_COOKIE` of `asm-generic/socket.h`.
    const NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
