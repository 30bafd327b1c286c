//! Everything that needs `unsafe`: fork and exec, ioctls, and calls that nix does not wrap.
//!
//! Each function is safe to call with any argument; raw file descriptors never leave this module.

#![allow(unsafe_code)]

pub mod listen;
pub mod process;
pub mod random;
pub mod route;
pub mod spawn;
pub mod storage;
pub mod terminal;

use nix::libc;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `Ok` of a C return value that is not negative.
fn checked(rc: libc::c_int) -> io::Result<libc::c_int> {
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(rc)
    }
}

/// How many bytes a read from this pipe or terminal would find.
pub fn bytes_readable(fd: impl AsFd) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as `fd` is borrowed, and FIONREAD writes one int,
    // which is what `count` is.
    let rc = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) };
    checked(rc)?;
    Ok(usize::try_from(count).unwrap_or(0))
}
