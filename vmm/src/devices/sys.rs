//! The devices' system calls on guest memory and on the tap.
//!
//! Guest memory is given to the kernel by address and never referenced: the guest writes to it all the while.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::volatile_memory::PtrGuardMut;
use vmm_sys_util::eventfd::EventFd;

use super::queue::Buffers;

/// `_IOW('T', 208, unsigned int)`; the offloads travel as the argument itself.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
/// `_IOW('T', 216, int)`.
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const _: () = assert!(size_of::<libc::c_int>() == 4 && size_of::<libc::c_uint>() == 4);

/// An eventfd as a borrowed descriptor.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Reads into guest memory.
pub(crate) fn readv(fd: BorrowedFd<'_>, into: &Buffers<'_>) -> io::Result<usize> {
    let (_guards, iovecs) = iovecs(into);
    let n_iovecs = libc::c_int::try_from(iovecs.len()).map_err(io::Error::other)?;
    // SAFETY: the iovecs are valid for the call and name guest memory that the guards keep mapped; guest
    // memory has no Rust references.
    let rc = unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), n_iovecs) };
    usize::try_from(rc).map_err(|_| io::Error::last_os_error())
}

/// Writes from guest memory.
pub(crate) fn writev(fd: BorrowedFd<'_>, from: &Buffers<'_>) -> io::Result<usize> {
    let (_guards, iovecs) = iovecs(from);
    let n_iovecs = libc::c_int::try_from(iovecs.len()).map_err(io::Error::other)?;
    // SAFETY: as in `readv`; the kernel only reads.
    let rc = unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), n_iovecs) };
    usize::try_from(rc).map_err(|_| io::Error::last_os_error())
}

/// Sends from guest memory to a stream socket; a closed peer is an error and no signal.
pub(crate) fn send(fd: BorrowedFd<'_>, from: &Buffers<'_>) -> io::Result<usize> {
    let (_guards, mut iovecs) = iovecs(from);
    // SAFETY: all-zero is a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    // SAFETY: as in `writev`; `message` points at the iovecs, which outlive the call.
    let rc = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(rc).map_err(|_| io::Error::last_os_error())
}

/// Fills guest memory with random bytes; returns how many.
pub(crate) fn fill_random(into: &Buffers<'_>) -> io::Result<usize> {
    let mut done = 0;
    for slice in into.slices() {
        let guard = slice.ptr_guard_mut();
        // SAFETY: the guard's pointer is valid for its length and nothing references guest memory.
        let rc = unsafe { libc::getrandom(guard.as_ptr().cast(), guard.len(), 0) };
        let n_bytes = usize::try_from(rc).map_err(|_| io::Error::last_os_error())?;
        done += n_bytes;
        if n_bytes < guard.len() {
            break;
        }
    }
    Ok(done)
}

/// A number nobody can guess.
pub(crate) fn random_u32() -> io::Result<u32> {
    let mut bytes = [0_u8; 4];
    // SAFETY: `bytes` is valid for writing its length.
    let rc = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if rc == 4 {
        Ok(u32::from_le_bytes(bytes))
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets the length of the header before every packet of a tap.
pub(crate) fn set_vnet_header_len(tap: BorrowedFd<'_>, len_bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: the ioctl reads one int from the pointer.
    let rc = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const len_bytes) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets what the tap may leave to us: checksums, segmentation.
pub(crate) fn set_offload(tap: BorrowedFd<'_>, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: the ioctl takes a number and touches no memory of ours.
    let rc = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn iovecs(buffers: &Buffers<'_>) -> (Vec<PtrGuardMut>, Vec<libc::iovec>) {
    let guards: Vec<_> = buffers
        .slices()
        .iter()
        .map(|slice| slice.ptr_guard_mut())
        .collect();
    let iovecs = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    (guards, iovecs)
}
