//! The kernel's entropy pool.

use super::checked;
use nix::libc;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `RNDADDENTROPY`: `_IOW('R', 0x03, int[2])`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `RNDRESEEDCRNG`: `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
/// Most bytes of one addition.
pub const MAX_ENTROPY: usize = 512;

/// `struct rand_pool_info`.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    len_bytes: libc::c_int,
    bytes: [u8; MAX_ENTROPY],
}

const _: () = assert!(size_of::<PoolInfo>() == 8 + MAX_ENTROPY);

/// Mix bytes into the pool, credit them, and make the generator reseed from it before this returns.
pub fn stir(random: &File, entropy: &[u8]) -> io::Result<()> {
    let too_long = || io::Error::from_raw_os_error(libc::EINVAL);
    let mut info = PoolInfo {
        entropy_bits: 0,
        len_bytes: 0,
        bytes: [0; MAX_ENTROPY],
    };
    info.bytes
        .get_mut(..entropy.len())
        .ok_or_else(too_long)?
        .copy_from_slice(entropy);
    info.len_bytes = libc::c_int::try_from(entropy.len()).map_err(|_| too_long())?;
    info.entropy_bits = info.len_bytes.saturating_mul(8);
    // SAFETY: the descriptor is open, and the kernel reads the header and `len_bytes` bytes after it,
    // which are at most the array's length.
    checked(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    // SAFETY: the descriptor is open, and RNDRESEEDCRNG takes no argument.
    checked(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }).map(drop)
}
