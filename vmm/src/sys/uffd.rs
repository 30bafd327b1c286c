//! userfaultfd, raw: missing-page events, copy and zero-page.
//!
//! Mappings of files are registered for one side effect only: the kernel then maps the page that was touched and not
//! its neighbours (`uffd_disable_fault_around` in `mm/memory.c`), so that the page table tells what was touched.
//! Asynchronous write protection (Linux 6.7) is what may be registered on files; no page is ever protected.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const EVENT_PAGEFAULT: u8 = 0x12;
/// Events taken with one read.
pub const EVENTS_PER_READ: usize = 64;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}
#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}
/// `struct uffd_msg`: the event, padding, and a union of which only `pagefault` is used.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    extra: u64,
}
const fn ioc(direction: u64, number: u64, size: usize) -> libc::c_ulong {
    (direction << 30) | ((size as u64) << 16) | (0xaa << 8) | number
}
const _: () = assert!(UFFDIO_API == ioc(3, 0x3f, size_of::<Api>()));
const _: () = assert!(UFFDIO_REGISTER == ioc(3, 0, size_of::<Register>()));
const _: () = assert!(UFFDIO_COPY == ioc(3, 3, size_of::<Copy>()));
const _: () = assert!(UFFDIO_ZEROPAGE == ioc(3, 4, size_of::<ZeroPage>()));
const _: () = assert!(UFFDIO_WAKE == ioc(2, 2, size_of::<Range>()));
const _: () = assert!(size_of::<Message>() == 32);

/// How far a copy or zeroing got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// All of it.
    All,
    /// So many bytes; the page after them is there already.
    UpToPresent(u64),
    /// So many bytes; the address space was changing, try the rest again.
    Retry(u64),
}

/// A userfaultfd with its handshake done.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    /// The kernel has asynchronous write protection.
    wp_async: bool,
}

impl Uffd {
    /// Open one, by `/dev/userfaultfd` or, without the device, the system call.
    ///
    /// # Errors
    /// Neither is allowed to this process, or the kernel is too old.
    pub fn open() -> io::Result<Self> {
        let fd = match std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")
        {
            Ok(device) => {
                let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
                // SAFETY: this ioctl takes flags by value and returns a new descriptor.
                unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) }
            }
            Err(_) => {
                let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
                // SAFETY: the call takes flags by value and returns a new descriptor.
                let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
                i32::try_from(fd).unwrap_or(-1)
            }
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this descriptor to us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // A handshake that was refused may be tried again.
        let wp_async = handshake(&fd, FEATURE_WP_ASYNC).is_ok();
        if !wp_async {
            handshake(&fd, 0)?;
        }
        Ok(Self { fd, wp_async })
    }

    /// Another descriptor of the same.
    ///
    /// # Errors
    /// The process has too many.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
            wp_async: self.wp_async,
        })
    }

    /// Raise an event for every missing page of a range.
    ///
    /// # Errors
    /// The range is not mapped, or not of a kind that can be served.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        self.register_as(REGISTER_MODE_MISSING, start, len)
    }

    /// Have the kernel map no neighbours of touched pages of a mapped file, if it can be told so.
    ///
    /// # Errors
    /// The range is not mapped.
    pub fn map_single_pages(&self, start: u64, len: u64) -> io::Result<()> {
        if self.wp_async {
            self.register_as(REGISTER_MODE_WP, start, len)
        } else {
            Ok(())
        }
    }

    fn register_as(&self, mode: u64, start: u64, len: u64) -> io::Result<()> {
        let mut register = Register {
            range: Range { start, len },
            mode,
            ioctls: 0,
        };
        // SAFETY: `register` is the structure of this ioctl, asserted above.
        let rc = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
        if rc < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Addresses of the faults that wait, appended to `addresses`; none if nobody waits.
    ///
    /// # Errors
    /// Reading failed.
    pub fn read_faults(&self, addresses: &mut Vec<u64>) -> io::Result<()> {
        let empty = Message {
            event: 0,
            reserved: [0; 7],
            flags: 0,
            address: 0,
            extra: 0,
        };
        let mut messages = [empty; EVENTS_PER_READ];
        // SAFETY: the buffer has EVENTS_PER_READ messages, of which any bytes are valid values.
        let n = unsafe {
            libc::read(
                self.fd.as_raw_fd(),
                messages.as_mut_ptr().cast(),
                size_of_val(&messages),
            )
        };
        let Ok(n) = usize::try_from(n) else {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(()),
                _ => Err(error),
            };
        };
        let events = &messages[..n / size_of::<Message>()];
        addresses.extend(
            events
                .iter()
                .filter(|m| m.event == EVENT_PAGEFAULT)
                .map(|m| m.address),
        );
        Ok(())
    }

    /// Put a copy of `source` at `address` and wake who waits there.
    ///
    /// # Errors
    /// Anything but "is there already" and "try again", which are results.
    pub fn copy(&self, address: u64, source: &[u8]) -> io::Result<Filled> {
        let mut copy = Copy {
            dst: address,
            src: source.as_ptr() as u64,
            len: source.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: `copy` is the structure of this ioctl; the kernel reads `source`, which is borrowed, and
        // fills only pages of the registered range that nobody could have seen yet.
        let rc = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
        outcome(rc, copy.copied, copy.len)
    }

    /// Put zero pages at `address` and wake who waits there.
    ///
    /// # Errors
    /// As [`Self::copy`].
    pub fn zero(&self, address: u64, len: u64) -> io::Result<Filled> {
        let mut zero = ZeroPage {
            range: Range { start: address, len },
            mode: 0,
            zeroed: 0,
        };
        // SAFETY: `zero` is the structure of this ioctl; it fills only missing pages of the registered range.
        let rc = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut zero) };
        outcome(rc, zero.zeroed, len)
    }

    /// Wake who waits in a range: the page may have come after the fault and before our fill.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: `range` is the structure of this ioctl.
        let rc = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, &raw mut range) };
        if rc < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn handshake(fd: &OwnedFd, features: u64) -> io::Result<()> {
    let mut api = Api {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: `api` is the structure of this ioctl, asserted above.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn outcome(rc: i32, done: i64, len: u64) -> io::Result<Filled> {
    if rc == 0 {
        return Ok(Filled::All);
    }
    let error = io::Error::last_os_error();
    // A negative count is the error of the first page; a positive one comes with EAGAIN.
    let n_bytes = u64::try_from(done).unwrap_or(0).min(len);
    match error.raw_os_error() {
        Some(libc::EEXIST) => Ok(Filled::UpToPresent(n_bytes)),
        Some(libc::EAGAIN) if done == -i64::from(libc::EEXIST) => Ok(Filled::UpToPresent(0)),
        Some(libc::EAGAIN) => Ok(Filled::Retry(n_bytes)),
        _ => Err(error),
    }
}
