//! Sizes of block devices and of the file systems on them.

use super::checked;
use nix::libc;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `BLKGETSIZE64`: `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `EXT4_IOC_RESIZE_FS`: `_IOW('f', 16, __u64)`.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;

/// Size of a block device in bytes.
pub fn device_len(device: &File) -> io::Result<u64> {
    let mut len: u64 = 0;
    // SAFETY: the descriptor is open, and BLKGETSIZE64 writes one u64.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut len) })?;
    Ok(len)
}

/// Grow a mounted ext4 to so many of its blocks, through any directory on it.
pub fn resize_ext4(directory: &File, blocks: u64) -> io::Result<()> {
    // SAFETY: the descriptor is open, and EXT4_IOC_RESIZE_FS reads one u64.
    checked(unsafe { libc::ioctl(directory.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) }).map(drop)
}
