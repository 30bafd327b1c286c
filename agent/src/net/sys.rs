//! Kernel interfaces of a slot that have no safe wrapper: the tap device, and a socket's send queue.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

/// Length of the virtio-net header in front of every packet, as VIRTIO 1 has it.
static VNET_HEADER_LEN: libc::c_int = 12;

nix::ioctl_write_ptr!(tun_set_vnet_header_len, b'T', 216, libc::c_int);

nix::ioctl_read_bad!(send_queue_len, libc::TIOCOUTQ, libc::c_int);

/// Bytes that were written to a TCP socket and not acknowledged by the other side yet.
pub(super) fn unacknowledged_bytes(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut len_bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which is TIOCOUTQ, writes one int at the address given, which lives through the call; the
    // descriptor is open for as long as it is borrowed.
    unsafe { send_queue_len(socket.as_raw_fd(), &raw mut len_bytes) }?;
    usize::try_from(len_bytes).map_err(io::Error::other)
}

// The number is part of the kernel's interface: _IOW('T', 202, int).
const _: () = assert!(libc::TUNSETIFF == 0x4004_54ca);

/// A new tap device in the network namespace of the calling thread, non-blocking, with virtio-net headers. It
/// lives for as long as its descriptor, or a duplicate, is open.
pub(super) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let mut options = OpenOptions::new();
    let file: File = options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is plain old data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() || !name.is_ascii() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq at the address given, which is our own and lives through
    // the call; the descriptor is open.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TUNSETVNETHDRSZ reads one int at the address given, which lives through the call.
    unsafe { tun_set_vnet_header_len(file.as_raw_fd(), &raw const VNET_HEADER_LEN) }?;
    Ok(file.into())
}
