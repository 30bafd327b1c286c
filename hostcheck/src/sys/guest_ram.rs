//! Memory of the probe's guest, and the guest's code, which the assembler makes from `guest.S`.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(include_str!("../kvm/guest.S"), options(raw));

unsafe extern "C" {
    static torpor_hostcheck_guest_begin: u8;
    static torpor_hostcheck_guest_end: u8;
}

/// The guest's code; it runs wherever it is copied to.
pub(crate) fn guest_code() -> Vec<u8> {
    let begin = &raw const torpor_hostcheck_guest_begin;
    let end = &raw const torpor_hostcheck_guest_end;
    let len = end.addr() - begin.addr();
    // SAFETY: the two symbols enclose one block of read-only bytes of this program, defined in guest.S.
    let code = unsafe { std::slice::from_raw_parts(begin, len) };
    code.to_vec()
}

/// Anonymous memory that a guest may run in.
pub(crate) struct GuestRam {
    base: NonNull<c_void>,
    len: NonZeroUsize,
}

impl GuestRam {
    pub(crate) fn map(len_bytes: usize) -> io::Result<Self> {
        let len = NonZeroUsize::new(len_bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { mmap_anonymous(None, len, access, MapFlags::MAP_PRIVATE) }?;
        Ok(Self { base, len })
    }

    /// Copies bytes to a guest physical address.
    pub(crate) fn store(&self, gpa: usize, bytes: &[u8]) -> io::Result<()> {
        let end = gpa.checked_add(bytes.len()).filter(|end| *end <= self.len.get());
        end.ok_or_else(|| io::Error::other(format!("gpa={gpa:#x} is outside of guest memory")))?;
        let base: *mut u8 = self.base.as_ptr().cast();
        // SAFETY: `gpa` is within the mapping, as checked above.
        let to = unsafe { base.add(gpa) };
        // SAFETY: `to..to+len` is within the mapping, as checked above; no reference into it exists, so it does not
        // overlap `bytes`.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Makes this the memory of `vm` from gpa 0 on. `self` must outlive `vm`, which the caller sees to by declaring
    /// it first.
    pub(crate) fn attach(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: self.len.get() as u64,
            userspace_addr: self.base.as_ptr().addr() as u64,
        };
        // SAFETY: the range is our own mapping, which nothing else uses and which outlives the VM.
        unsafe { vm.set_user_memory_region(region) }
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: `base..base+len` is our own mapping, made in `map`, and the VM is gone.
        let unmapped = unsafe { munmap(self.base, self.len.get()) };
        debug_assert!(unmapped.is_ok());
    }
}
