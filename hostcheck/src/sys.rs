//! All FFI of the probes. Everything unsafe is in here, behind types that undo themselves on drop.
//!
//! Guest memory and the probed page are only ever reached by pointer, never by reference: the guest, or the kernel,
//! writes them meanwhile.

mod guest_ram;
mod uffd;

pub(crate) use guest_ram::{GuestRam, guest_code};
pub(crate) use uffd::{Page, Userfaultfd};

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFNAMSIZ: usize = 16;

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
pub struct TunRequest {
    name: [u8; IFNAMSIZ],
    flags: u16,
    padding: [u8; 22],
}

const _: () = assert!(size_of::<TunRequest>() == 40);

nix::ioctl_write_ptr_bad!(
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<i32>()),
    TunRequest
);

/// Makes a tap device that lives as long as `tun` is open; answers with its name.
pub(crate) fn make_tap(tun: &File) -> io::Result<String> {
    let mut request = TunRequest {
        name: [0; IFNAMSIZ],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        padding: [0; 22],
    };
    let pattern = b"tprchk%d";
    request.name[..pattern.len()].copy_from_slice(pattern);
    // SAFETY: `tun` is open, and `request` is a whole ifreq, which the kernel reads and writes back in place.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw mut request) }.map_err(io::Error::from)?;
    let len = request
        .name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(IFNAMSIZ);
    Ok(String::from_utf8_lossy(&request.name[..len]).into_owned())
}

/// `struct pm_scan_arg` of Linux 6.7.
#[repr(C)]
#[derive(Default)]
pub struct PagemapScan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<PagemapScan>() == 96);

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, PagemapScan);

/// Whether the kernel scans page tables in one call. An empty range is asked for.
pub(crate) fn has_pagemap_scan() -> bool {
    let Ok(pagemap) = File::open("/proc/self/pagemap") else {
        return false;
    };
    let mut scan = PagemapScan {
        size: size_of::<PagemapScan>() as u64,
        ..PagemapScan::default()
    };
    // SAFETY: `pagemap` is open, and `scan` is a whole pm_scan_arg with an empty range and no output vector.
    unsafe { pagemap_scan(pagemap.as_raw_fd(), &raw mut scan) }.is_ok()
}
