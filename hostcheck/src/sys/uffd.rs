//! userfaultfd and one page to try it on.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::time::Duration;

const PAGE_BYTES: usize = 4096;
const UFFD_API: u64 = 0xAA;
const REGISTER_MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const MSG_BYTES: usize = 32;
const MSG_ADDRESS_OFFSET: usize = 16;

/// `struct uffdio_api`
#[repr(C)]
pub struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`
#[repr(C)]
pub struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`
#[repr(C)]
pub struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

const _: () = assert!(nix::request_code_readwrite!(0xAA, 0x3F, size_of::<Api>()) == 0xC018_AA3F);
const _: () = assert!(nix::request_code_readwrite!(0xAA, 0x00, size_of::<Register>()) == 0xC020_AA00);
const _: () = assert!(nix::request_code_readwrite!(0xAA, 0x03, size_of::<Copy>()) == 0xC028_AA03);

nix::ioctl_readwrite!(uffdio_api, 0xAA, 0x3F, Api);
nix::ioctl_readwrite!(uffdio_register, 0xAA, 0x00, Register);
nix::ioctl_readwrite!(uffdio_copy, 0xAA, 0x03, Copy);

/// A private anonymous page, not present until somebody touches it.
pub(crate) struct Page {
    base: NonNull<c_void>,
}

// SAFETY: the mapping belongs to no thread; all access is by the kernel or by volatile reads.
unsafe impl Sync for Page {}

impl Page {
    pub(crate) fn map() -> io::Result<Self> {
        let len = NonZeroUsize::new(PAGE_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { mmap_anonymous(None, len, access, MapFlags::MAP_PRIVATE) }?;
        Ok(Self { base })
    }

    fn address(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }

    /// Has the kernel write into the page what it reads from `source`.
    pub(crate) fn read_into(&self, source: &mut (impl AsFd + Read)) -> io::Result<usize> {
        let fd = source.as_fd().as_raw_fd();
        // SAFETY: the page is mapped for as long as `self` lives, is writable, and nothing refers to it.
        let n_read = unsafe { libc::read(fd, self.base.as_ptr(), PAGE_BYTES) };
        usize::try_from(n_read).map_err(|_| io::Error::last_os_error())
    }

    /// Copies the page's first bytes.
    pub(crate) fn load(&self, into: &mut [u8; 8]) {
        let base: *const [u8; 8] = self.base.as_ptr().cast_const().cast();
        // SAFETY: the page is mapped, readable, longer than 8 bytes and aligned.
        *into = unsafe { base.read_volatile() };
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: `base` is our own mapping of that length, made in `map`, and nothing refers to it any more.
        let unmapped = unsafe { munmap(self.base, PAGE_BYTES) };
        debug_assert!(unmapped.is_ok());
    }
}

/// An open userfaultfd.
pub(crate) struct Userfaultfd {
    file: File,
}

impl Userfaultfd {
    pub(crate) fn open() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes flags only and makes a descriptor.
        let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let raw = i32::try_from(raw)
            .ok()
            .filter(|raw| *raw >= 0)
            .ok_or_else(io::Error::last_os_error)?;
        // SAFETY: `raw` was just made by the call above and is owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let mut api = Api {
            api: UFFD_API,
            features: 0,
            ioctls: 0,
        };
        // SAFETY: `fd` is a userfaultfd, and `api` is a whole uffdio_api that the kernel writes back in place.
        unsafe { uffdio_api(fd.as_raw_fd(), &raw mut api) }?;
        Ok(Self { file: File::from(fd) })
    }

    pub(crate) fn register(&self, page: &Page) -> io::Result<()> {
        let mut register = Register {
            start: page.address(),
            len: PAGE_BYTES as u64,
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the range is the page's own mapping, and `register` is a whole uffdio_register.
        unsafe { uffdio_register(self.file.as_raw_fd(), &raw mut register) }?;
        Ok(())
    }

    /// Waits for one fault on the page and fills it with a byte.
    pub(crate) fn fill_one(&self, page: &Page, byte: u8, patience: Duration) -> io::Result<()> {
        let timeout = PollTimeout::try_from(patience).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, timeout)? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut message = [0; MSG_BYTES];
        (&self.file).read_exact(&mut message)?;
        let mut address = [0; 8];
        address.copy_from_slice(&message[MSG_ADDRESS_OFFSET..MSG_ADDRESS_OFFSET + 8]);
        let faulted = u64::from_ne_bytes(address) & !(PAGE_BYTES as u64 - 1);
        if message[0] != EVENT_PAGEFAULT || faulted != page.address() {
            return Err(io::Error::other("the event is not a fault on the page"));
        }
        let content = [byte; PAGE_BYTES];
        let src = content.as_ptr().addr() as u64;
        let mut copy = Copy {
            dst: page.address(),
            src,
            len: PAGE_BYTES as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: source and destination are whole pages of ours that outlive the call, and nothing refers to the
        // destination.
        unsafe { uffdio_copy(self.file.as_raw_fd(), &raw mut copy) }?;
        Ok(())
    }
}
