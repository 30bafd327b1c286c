//! KVM ioctls that `kvm-ioctls` marks unsafe or does not have.

use kvm_bindings::{kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

/// `KVM_CAP_PRE_FAULT_MEMORY`.
pub const CAP_PRE_FAULT_MEMORY: libc::c_ulong = 236;
const KVM_PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct PreFault {
    gpa: u64,
    size: u64,
    flags: u64,
    padding: [u64; 5],
}
const _: () = assert!(size_of::<PreFault>() == 64);
const _: () = assert!(KVM_PRE_FAULT_MEMORY == (3 << 30) | (64 << 16) | (0xae << 8) | 0xd5);

/// Host address range that a memslot is bound to; it must stay mapped, with whatever protection, for the
/// life of the VM.
#[derive(Debug, Clone, Copy)]
pub struct SlotMapping {
    /// Number of the memslot.
    pub slot: u32,
    /// First guest physical address.
    pub gpa: u64,
    /// First host address.
    pub hva: u64,
    /// Length in bytes.
    pub len_bytes: u64,
}

/// Bind a memslot.
///
/// # Errors
/// KVM refused.
pub fn set_memslot(vm: &VmFd, mapping: SlotMapping) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: mapping.slot,
        flags: 0,
        guest_phys_addr: mapping.gpa,
        memory_size: mapping.len_bytes,
        userspace_addr: mapping.hva,
    };
    // SAFETY: the range is a reservation of `memory::Ram` that nothing else is mapped in and that lives as
    // long as the process; the guest can touch only what is mapped there later.
    unsafe { vm.set_user_memory_region(region) }
}

/// Set a vCPU's extended state.
///
/// # Errors
/// KVM refused.
pub fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the guest's CPUID has no dynamically enabled feature (arch_prctl never asked for one), so KVM
    // reads the fixed 4096 bytes.
    unsafe { vcpu.set_xsave(xsave) }
}

/// Fill the second-level page table for present memory, so that the guest takes no exit for it.
///
/// # Errors
/// Not supported for this VM, or interrupted; both only cost speed.
pub fn pre_fault(vcpu: &VcpuFd, gpa: u64, len_bytes: u64) -> io::Result<()> {
    let mut range = PreFault {
        gpa,
        size: len_bytes,
        flags: 0,
        padding: [0; 5],
    };
    while range.size > 0 {
        let before = range.size;
        // SAFETY: `range` is the structure of this ioctl, asserted above, and outlives the call.
        let rc = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &raw mut range) };
        if rc < 0 {
            return Err(io::Error::last_os_error());
        }
        if range.size >= before {
            return Err(io::Error::from(io::ErrorKind::Interrupted));
        }
    }
    Ok(())
}

/// The byte in a vCPU's shared page that makes the next `KVM_RUN` return at once.
#[derive(Debug)]
pub struct ImmediateExit {
    byte: *mut u8,
}

// SAFETY: the byte is accessed atomically only, and stays mapped: its vCPU thread is joined before the
// owner of this value lets go of it (`vcpu::Vcpu::drop`).
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// The flag of a vCPU.
    pub fn of(vcpu: &mut VcpuFd) -> Self {
        Self {
            byte: &raw mut vcpu.get_kvm_run().immediate_exit,
        }
    }

    /// Set or clear it.
    pub fn set(&self, value: bool) {
        // SAFETY: the pointer is into the vCPU's shared page, which outlives this value, and is aligned.
        let byte = unsafe { AtomicU8::from_ptr(self.byte) };
        byte.store(u8::from(value), Ordering::SeqCst);
    }
}

/// What KVM said of an internal error, for a message.
pub fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: `internal` is the member of this union for the exit reason KVM_EXIT_INTERNAL_ERROR, and every
    // bit pattern of it is valid.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    format!(
        "suberror {} data {:x?}",
        internal.suberror,
        &internal.data[..internal.data.len().min(internal.ndata as usize)]
    )
}
