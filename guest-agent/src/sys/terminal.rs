//! Pseudo-terminals.

use super::checked;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use torpor_api::guest::WindowSize;

/// Both ends of a new terminal.
#[derive(Debug)]
pub struct Pty {
    /// The agent's end; non-blocking.
    pub controller: OwnedFd,
    /// The process's end.
    pub terminal: OwnedFd,
}

/// Open a terminal of this size. Not `openpty`, whose descriptors would leak into a concurrent exec.
pub fn open_pty(size: WindowSize) -> io::Result<Pty> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let controller = open("/dev/ptmx", flags | OFlag::O_NONBLOCK, Mode::empty())?;
    let unlocked: libc::c_int = 0;
    // SAFETY: the descriptor is open, and TIOCSPTLCK reads one int.
    checked(unsafe { libc::ioctl(controller.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) })?;
    // SAFETY: the descriptor is open, and TIOCGPTPEER takes flags by value.
    let fd = checked(unsafe { libc::ioctl(controller.as_raw_fd(), libc::TIOCGPTPEER, flags.bits()) })?;
    // SAFETY: the ioctl just made this descriptor, and nothing else owns it.
    let terminal = unsafe { OwnedFd::from_raw_fd(fd) };
    resize(&controller, size)?;
    Ok(Pty { controller, terminal })
}

/// Change a terminal's size; its foreground group gets SIGWINCH.
pub fn resize(controller: impl AsFd, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptor is open for as long as it is borrowed, and TIOCSWINSZ reads one winsize.
    checked(unsafe { libc::ioctl(controller.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
        .map(drop)
}
