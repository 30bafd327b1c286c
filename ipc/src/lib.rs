//! One datagram and its file descriptors over a unix `SOCK_SEQPACKET` socket: the transport of
//! [`torpor_api::vmm`](../torpor_api/vmm/index.html), used blocking by the VMM and non-blocking by torpord.

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, listen, recvmsg, sendmsg, socket,
};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// Largest datagram in bytes.
pub const MAX_DATAGRAM: usize = 64 << 10;
/// Most descriptors beside one datagram.
pub const MAX_FDS: usize = 16;

/// Why a datagram did not go over.
#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    /// The peer closed the connection.
    #[error("peer closed the control connection")]
    Closed,
    /// Non-blocking socket, and nothing to do now.
    #[error("control socket would block")]
    WouldBlock,
    /// Longer than [`MAX_DATAGRAM`], or more than [`MAX_FDS`] descriptors.
    #[error("control datagram is over its limits ({bytes} bytes, {fds} descriptors)")]
    TooLarge {
        /// Length in bytes.
        bytes: usize,
        /// Number of descriptors.
        fds: usize,
    },
    /// The kernel refused.
    #[error("control socket: cannot {operation}")]
    Os {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: Errno,
    },
}

fn os(operation: &'static str) -> impl Fn(Errno) -> IpcError {
    move |source| match source {
        Errno::EAGAIN => IpcError::WouldBlock,
        Errno::EPIPE | Errno::ECONNRESET => IpcError::Closed,
        source => IpcError::Os { operation, source },
    }
}

/// A received datagram.
#[derive(Debug)]
pub struct Datagram {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptors that came with it, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// A socket that listens at `path`, which must not exist.
///
/// # Errors
/// The path is taken or too long, or the process has no descriptors left.
pub fn listen_at(path: &Path) -> Result<OwnedFd, IpcError> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(os("create"))?;
    let address = UnixAddr::new(path).map_err(os("name"))?;
    bind(fd.as_raw_fd(), &address).map_err(os("bind"))?;
    listen(&fd, Backlog::new(8).map_err(os("listen"))?).map_err(os("listen"))?;
    Ok(fd)
}

/// A non-blocking connection to the socket at `path`.
///
/// # Errors
/// Nobody listens there.
pub fn connect_to(path: &Path) -> Result<OwnedFd, IpcError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(os("create"))?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path).map_err(os("name"))?).map_err(os("connect"))?;
    Ok(fd)
}

/// The next connection of a listening socket.
///
/// # Errors
/// [`IpcError::WouldBlock`] on a non-blocking listener without one.
pub fn accept(listener: &impl AsRawFd) -> Result<OwnedFd, IpcError> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).map_err(os("accept"))?;
    // SAFETY: accept4 has just returned this descriptor to us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Send one datagram with descriptors.
///
/// # Errors
/// [`IpcError::TooLarge`] before anything is sent; [`IpcError::WouldBlock`] on a full non-blocking socket.
pub fn send(socket: &impl AsRawFd, bytes: &[u8], fds: &[RawFd]) -> Result<(), IpcError> {
    if bytes.len() > MAX_DATAGRAM || fds.len() > MAX_FDS {
        return Err(IpcError::TooLarge {
            bytes: bytes.len(),
            fds: fds.len(),
        });
    }
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let iov = [IoSlice::new(bytes)];
    loop {
        match sendmsg::<UnixAddr>(socket.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(os("send")(error)),
            Ok(_) => return Ok(()),
        }
    }
}

/// Receive one datagram with its descriptors.
///
/// # Errors
/// [`IpcError::Closed`] at the end; [`IpcError::TooLarge`] if the kernel had to cut the datagram.
pub fn receive(socket: &impl AsRawFd) -> Result<Datagram, IpcError> {
    let mut bytes = vec![0u8; MAX_DATAGRAM];
    let mut space = cmsg_space!([RawFd; MAX_FDS]);
    let (len, flags, fds) = loop {
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(os("receive")(error)),
            Ok(message) => {
                let mut fds = Vec::new();
                for control in message.cmsgs().map_err(os("receive"))? {
                    if let ControlMessageOwned::ScmRights(raw) = control {
                        // SAFETY: the kernel has just installed these descriptors for us alone.
                        fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                break (message.bytes, message.flags, fds);
            }
        }
    };
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(IpcError::TooLarge {
            bytes: len,
            fds: fds.len(),
        });
    }
    if len == 0 && fds.is_empty() {
        return Err(IpcError::Closed);
    }
    bytes.truncate(len);
    Ok(Datagram { bytes, fds })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::socketpair;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap()
    }

    #[test]
    fn bytes_and_descriptors_arrive_together() {
        let (a, b) = pair();
        let mut file =
            File::from(nix::sys::memfd::memfd_create(c"t", nix::sys::memfd::MFdFlags::empty()).unwrap());
        file.write_all(b"inside").unwrap();
        send(&a, b"hello", &[file.as_raw_fd()]).unwrap();
        let got = receive(&b).unwrap();
        assert_eq!(got.bytes, b"hello");
        let mut twin = File::from(got.fds.into_iter().next().unwrap());
        twin.rewind().unwrap();
        let mut text = String::new();
        twin.read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
    }

    #[test]
    fn a_closed_peer_and_a_huge_datagram_are_told_apart() {
        let (a, b) = pair();
        assert!(matches!(
            send(&a, &vec![0; MAX_DATAGRAM + 1], &[]),
            Err(IpcError::TooLarge { .. })
        ));
        drop(a);
        assert!(matches!(receive(&b), Err(IpcError::Closed)));
    }
}
