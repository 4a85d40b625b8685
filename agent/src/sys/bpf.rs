//! bpf(2) commands that aya keeps to itself: opening pinned links, replacing a link's program, reading what a link is
//! attached to, map access from many threads through a shared reference, and the memory of an array map.
//!
//! The attribute structures are the leading fields of `union bpf_attr` (linux/bpf.h); the kernel takes shorter ones and
//! reads the rest as zero.

mod network;

use std::{
    ffi::CString,
    io,
    marker::PhantomData,
    mem::{MaybeUninit, size_of},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

use aya::{
    Pod,
    maps::{MapData, RingBuf},
};
use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

pub use network::{Hook, link_create_first, links_on};

const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;

/// `BPF_CGROUP_INET_EGRESS` of `enum bpf_attach_type`.
const BPF_CGROUP_INET_EGRESS: u32 = 1;

const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_LRU_HASH: u32 = 9;
const BPF_MAP_TYPE_SK_STORAGE: u32 = 24;

/// `BPF_F_MMAPABLE`.
const MMAPABLE: u32 = 1 << 10;

const BPF_LINK_TYPE_CGROUP: u32 = 3;
const BPF_LINK_TYPE_TCX: u32 = 11;
const BPF_LINK_TYPE_NETKIT: u32 = 13;

#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct InfoByFd {
    fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
struct MapElem {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Leading fields of `struct bpf_link_info`. The union's members used here are `{u64 cgroup_id, u32 attach_type}` and
/// `{u32 ifindex, u32 attach_type}`.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    _pad: u32,
    target: [u32; 4],
}

/// Leading fields of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct RawProgramInfo {
    kind: u32,
    id: u32,
}

/// Leading fields of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct RawMapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// What a link is and where it is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkInfo {
    /// Number of the link.
    pub id: u32,
    /// Number of the program it runs.
    pub program_id: u32,
    /// Where.
    pub target: LinkTarget,
}

/// Where a link is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkTarget {
    /// A cgroup, by id (the inode number of its directory); 0 when the cgroup is gone.
    Cgroup(u64),
    /// A network interface, by index in its namespace; 0 when the interface is gone.
    Interface(u32),
    /// Something this agent never makes.
    Other,
}

/// # Safety
/// `attr` must be the layout of `command`'s part of `union bpf_attr`, and every pointer in it valid for what the
/// command does with it.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes at most `size_of::<T>()` bytes of `attr`; the pointers in it are the caller's
    // promise.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Opens the object pinned at `path`.
pub fn object_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: `attr` is BPF_OBJ_GET's layout and `path` a C string that outlives the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr) }?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just returned this descriptor (with O_CLOEXEC), nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins what `object` is at `path`, which must be free.
pub fn object_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: raw(object), file_flags: 0 };
    // SAFETY: `attr` is BPF_OBJ_PIN's layout, which is BPF_OBJ_GET's, and `path` a C string that
    // outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Attaches a program for packets that a cgroup sends, beside others. `EPERM` when the cgroup has
/// one that allows no other.
pub fn link_cgroup_egress(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attr =
        LinkCreate { prog_fd: raw(program), target_fd: raw(cgroup), attach_type: BPF_CGROUP_INET_EGRESS, flags: 0 };
    // SAFETY: `attr` is BPF_LINK_CREATE's layout and holds no pointer.
    let fd = unsafe { bpf(BPF_LINK_CREATE, &mut attr) }?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just returned this descriptor (with O_CLOEXEC), nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The kernel's number of a program.
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    info_by_fd::<RawProgramInfo>(program).map(|info| info.id)
}

/// Makes `link` run `program` from now on, without a moment in which it runs neither. `ENOLINK` when what it was
/// attached to is gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate { link_fd: raw(link), new_prog_fd: raw(program), flags: 0, old_prog_fd: 0 };
    // SAFETY: `attr` is BPF_LINK_UPDATE's layout and holds no pointer.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// What `link` is attached to. Fails with `EINVAL` or `EBADF` when the descriptor is no link.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let info: RawLinkInfo = info_by_fd(link)?;
    let [a, b, ..] = info.target;
    let target = match info.kind {
        // The union starts with the 64-bit id: both halves in memory order.
        BPF_LINK_TYPE_CGROUP => {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&a.to_ne_bytes());
            bytes[4..].copy_from_slice(&b.to_ne_bytes());
            LinkTarget::Cgroup(u64::from_ne_bytes(bytes))
        }
        BPF_LINK_TYPE_TCX | BPF_LINK_TYPE_NETKIT => LinkTarget::Interface(a),
        _ => LinkTarget::Other,
    };
    Ok(LinkInfo { id: info.id, program_id: info.prog_id, target })
}

/// `T` must be made of integers only: the leading fields of the info structure of what `fd` is.
fn info_by_fd<T: Default>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attr =
        InfoByFd { fd: raw(fd), info_len: size_of::<T>() as u32, info: std::ptr::from_mut(&mut info) as u64 };
    // SAFETY: `attr` is BPF_OBJ_GET_INFO_BY_FD's layout; the kernel writes at most `info_len` bytes to `info`, whose
    // fields (private to this module) are integers and take any bit pattern.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// Every key of a hash map with eight-byte keys, whatever its values are. The map may change
/// meanwhile: a key that goes is no error, and there are never more than the map has room for.
pub fn keys(map: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    let info: RawMapInfo = info_by_fd(map)?;
    if info.kind != BPF_MAP_TYPE_HASH || info.key_size as usize != size_of::<u64>() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("map of kind {} with keys of {} bytes is not the expected one", info.kind, info.key_size),
        ));
    }
    let mut keys: Vec<u64> = Vec::new();
    while keys.len() < info.max_entries as usize {
        let (last, mut next) = (keys.last().copied(), 0_u64);
        let mut attr = MapElem {
            map_fd: raw(map),
            _pad: 0,
            key: last.as_ref().map_or(0, |key| std::ptr::from_ref(key) as u64),
            value: std::ptr::from_mut(&mut next) as u64,
            flags: 0,
        };
        // SAFETY: the layout is that of BPF_MAP_GET_NEXT_KEY, where a null key asks for the first
        // one. The kernel reads and writes keys, whose size was checked above, through pointers to
        // values that outlive the call.
        match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) } {
            Ok(_) => keys.push(next),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(keys)
}

/// A hash or socket-storage map that threads use at the same time: the kernel does the locking.
#[derive(Debug)]
pub struct SharedMap<K, V> {
    fd: OwnedFd,
    _types: PhantomData<fn(K) -> V>,
}

impl<K: Pod, V: Pod> SharedMap<K, V> {
    /// Wraps a map after checking its kind and that keys and values have the sizes of `K` and `V`.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let info: RawMapInfo = info_by_fd(fd.as_fd())?;
        let sizes = (info.key_size as usize, info.value_size as usize);
        if !matches!(info.kind, BPF_MAP_TYPE_HASH | BPF_MAP_TYPE_LRU_HASH | BPF_MAP_TYPE_SK_STORAGE)
            || sizes != (size_of::<K>(), size_of::<V>())
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("map of kind {} with key and value sizes {sizes:?} is not the expected one", info.kind),
            ));
        }
        Ok(Self { fd, _types: PhantomData })
    }

    /// Inserts or replaces.
    pub fn insert(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attr = MapElem {
            map_fd: raw(self.fd.as_fd()),
            _pad: 0,
            key: std::ptr::from_ref(key) as u64,
            value: std::ptr::from_ref(value) as u64,
            flags: 0,
        };
        // SAFETY: the layout is that of BPF_MAP_UPDATE_ELEM; `new` checked that the kernel reads `size_of` bytes from
        // each pointer.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    /// Removes and returns the value, in one step; `None` when there is none. Hash maps only (Linux 5.14).
    pub fn take(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = MaybeUninit::<V>::zeroed();
        let mut attr = MapElem {
            map_fd: raw(self.fd.as_fd()),
            _pad: 0,
            key: std::ptr::from_ref(key) as u64,
            value: value.as_mut_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the layout is that of BPF_MAP_LOOKUP_AND_DELETE_ELEM; `new` checked that the kernel reads
        // `size_of::<K>()` bytes and writes `size_of::<V>()`.
        match unsafe { bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr) } {
            // SAFETY: the kernel filled the value, and a `Pod` takes any bit pattern.
            Ok(_) => Ok(Some(unsafe { value.assume_init() })),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// The memory of an array map whose values are words: programs and processes change them at the same time, atomically.
#[derive(Debug)]
pub struct SharedWords {
    start: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the memory belongs to the map and not to a thread, and all access to it is atomic.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the memory of an array with `BPF_F_MMAPABLE` whose values are `words` words of 64 bits each.
    pub fn map(fd: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        let info: RawMapInfo = info_by_fd(fd)?;
        let size = words * size_of::<u64>();
        if info.kind != BPF_MAP_TYPE_ARRAY || info.map_flags & MMAPABLE == 0 || info.value_size as usize != size {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "map of kind {} with flags {:#x} and values of {} bytes is not the expected one",
                    info.kind, info.map_flags, info.value_size
                ),
            ));
        }
        let len = info.max_entries as usize * words;
        // SAFETY: the kernel chooses an address where nothing else is. An array's values lie behind each other without gaps
        // (their size is a multiple of 8), so the mapping has `len` words.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len * size_of::<u64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, len })
    }

    /// A word by its number; `None` behind the end.
    pub fn word(&self, number: usize) -> Option<&AtomicU64> {
        // SAFETY: within the mapping, which is aligned to a page and lives as long as `self`; everybody who writes these
        // words does so atomically.
        (number < self.len).then(|| unsafe { self.start.add(number).as_ref() })
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; references into it do not outlive `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len * size_of::<u64>()) };
    }
}

/// What reads a ring buffer.
///
/// # Safety
/// The descriptor is owned, and the same as long as the value lives.
pub unsafe trait Ring: AsRawFd {}

// SAFETY: a ring buffer owns its map's descriptor and offers no way to replace it.
unsafe impl Ring for RingBuf<MapData> {}
// SAFETY: a logger owns a ring buffer and offers no way to replace it.
unsafe impl<T> Ring for EbpfLogger<T> {}

/// Makes a ring buffer awaitable. Must be called within a Tokio runtime.
pub fn awaitable<T: Ring>(ring: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: what `Ring` promises.
    unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(|e| e.into_parts().1)
}
