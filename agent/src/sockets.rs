//! Listening sockets that outlive this process.
//!
//! systemd keeps a copy of each ([file descriptor store]) and hands them to the next torpord. While there is none,
//! the kernel goes on completing connections, so whoever comes during a restart, an upgrade or after a kill waits
//! for the next torpord instead of being refused. A socket that nobody wants any more is shut down, which ends every copy
//! of it, and systemd then forgets its own.
//!
//! Without systemd these are ordinary sockets.
//!
//! [file descriptor store]: https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html#FileDescriptorStoreMax=

mod sys;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    ControlMessage, MsgFlags, Shutdown, SockaddrStorage, UnixAddr, getsockname, getsockopt, sendmsg,
    shutdown, sockopt,
};
use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use torpor_proxy::OwnSockets;

/// Every socket has this name in the store. Short, because all of them travel in one environment variable.
const NAME: &str = "t";

/// What an earlier torpord left, and where new sockets are kept.
#[derive(Debug, Default)]
pub struct Sockets {
    left: Mutex<Vec<OwnedFd>>,
}

impl Sockets {
    /// What systemd hands over; to be called before anything is started, or it would inherit the descriptors.
    #[must_use]
    pub fn inherited() -> Arc<Self> {
        Arc::new(Self::over(sys::inherited()))
    }

    fn over(descriptors: Vec<OwnedFd>) -> Self {
        let (left, strange): (Vec<_>, Vec<_>) = descriptors.into_iter().partition(|fd| {
            let private = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
            private.is_ok() && getsockopt(fd, sockopt::AcceptConn) == Ok(true)
        });
        if !strange.is_empty() {
            tracing::warn!(
                n = strange.len(),
                "systemd handed over descriptors that do not listen"
            );
        }
        Self {
            left: Mutex::new(left),
        }
    }

    /// A listener at this address: an earlier torpord's, or a new one.
    ///
    /// # Errors
    /// The address is taken or not this host's.
    pub fn tcp(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let wanted = SockaddrStorage::from(address);
        // Port 0 is nobody's address.
        if let Some(kept) = self.take(|fd| getsockname::<SockaddrStorage>(fd) == Ok(wanted)) {
            return Ok(kept.into());
        }
        let listener = torpor_proxy::Sockets::listen(&OwnSockets, address)?;
        keep(&listener);
        Ok(listener)
    }

    /// A listener at this path: an earlier torpord's, if the path still leads to it.
    #[must_use]
    pub fn kept_unix(&self, path: &Path) -> Option<UnixListener> {
        let is_there = path.symlink_metadata().is_ok_and(|it| it.file_type().is_socket());
        let kept =
            self.take(|fd| getsockname::<UnixAddr>(fd).is_ok_and(|address| address.path() == Some(path)))?;
        is_there.then(|| kept.into())
    }

    /// End what nobody asked for.
    pub fn end_the_rest(&self) {
        for left in self.lock().drain(..) {
            // A socket that refuses is closed already.
            let _ = shutdown(left.as_raw_fd(), Shutdown::Both);
        }
    }

    fn take(&self, wanted: impl Fn(i32) -> bool) -> Option<OwnedFd> {
        let mut left = self.lock();
        let place = left.iter().position(|fd| wanted(fd.as_raw_fd()))?;
        Some(left.swap_remove(place))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl torpor_proxy::Sockets for Sockets {
    fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        self.tcp(address)
    }
}

/// Give systemd a copy. Without one clients are refused during a restart, which is no reason not to listen.
pub fn keep(socket: &impl AsFd) {
    let Some(to) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let message = format!("FDSTORE=1\nFDNAME={NAME}\n");
    let send = || {
        let systemd = UnixDatagram::unbound()?;
        systemd.connect(&to)?;
        let descriptors = [socket.as_fd().as_raw_fd()];
        let beside = [ControlMessage::ScmRights(&descriptors)];
        let text = [IoSlice::new(message.as_bytes())];
        sendmsg::<()>(systemd.as_raw_fd(), &text, &beside, MsgFlags::empty(), None)?;
        Ok::<_, io::Error>(())
    };
    if let Err(error) = send() {
        tracing::warn!(%error, "systemd keeps no copy of a listening socket");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    const ANY: &str = "127.0.0.1:0";

    #[test]
    fn who_came_while_there_was_no_torpord_is_taken_by_the_next() {
        let before = Sockets::default().tcp(ANY.parse().unwrap()).unwrap();
        let address = before.local_addr().unwrap();
        let kept = OwnedFd::from(before.try_clone().unwrap());
        drop(before);
        let mut client = TcpStream::connect(address).expect("the kernel takes it");
        client.write_all(b"hello").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let next = Sockets::over(vec![kept]);
        let other = next.tcp(ANY.parse().unwrap()).unwrap();
        assert_ne!(other.local_addr().unwrap(), address);
        let (mut taken, _) = next.tcp(address).unwrap().accept().unwrap();
        let mut said = String::new();
        taken.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello");
        assert!(next.lock().is_empty());
    }

    #[test]
    fn what_nobody_wants_any_more_refuses_although_somebody_holds_a_copy() {
        let before = Sockets::default().tcp(ANY.parse().unwrap()).unwrap();
        let address = before.local_addr().unwrap();
        let next = Sockets::over(vec![OwnedFd::from(before.try_clone().unwrap())]);
        next.end_the_rest();
        assert!(TcpStream::connect(address).is_err());
    }

    #[test]
    fn a_unix_socket_is_found_by_its_path_unless_that_was_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let kept = || OwnedFd::from(UnixListener::bind(&path).unwrap());
        let next = Sockets::over(vec![kept()]);
        assert!(next.kept_unix(&directory.path().join("other")).is_none());
        assert!(next.kept_unix(&path).is_some());
        std::fs::remove_file(&path).unwrap();
        let next = Sockets::over(vec![kept()]);
        std::fs::remove_file(&path).unwrap();
        assert!(next.kept_unix(&path).is_none());
    }

    #[test]
    fn what_does_not_listen_is_not_kept() {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let connected = OwnedFd::from(UnixDatagram::unbound().unwrap());
        assert!(Sockets::over(vec![file, connected]).lock().is_empty());
    }
}
