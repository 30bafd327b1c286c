//! x86-64: PVH boot, ACPI, CPUID, and the state of vCPUs and interrupt controllers.

mod acpi;
mod boot;
mod cpuid;
mod vcpu_state;
mod vm_state;

pub use boot::{BootRegisters, boot, write_generation_id};
pub use cpuid::{CpuProfile, configure_vcpu, prepare_cpuid, signature};
pub use vcpu_state::{VcpuState, msr_indices, restore_vcpu, save_vcpu};
pub use vm_state::{VmState, create_interrupt_controller, restore_clock, restore_vm, save_vm};

/// What KVM or the guest's kernel image refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchError {
    /// An ioctl failed.
    #[error("cannot {operation}")]
    Kvm {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The kernel is no ELF, or it does not fit.
    #[error("cannot load the kernel")]
    Kernel(#[source] linux_loader::loader::Error),
    /// The kernel has no PVH entry point (`CONFIG_PVH`).
    #[error("the kernel has no PVH entry point")]
    NoPvhEntry,
    /// The command line is too long.
    #[error("kernel command line of {len} bytes is over the limit of {max}")]
    CommandLine {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// Boot data does not fit into guest memory.
    #[error("cannot write {what} at {gpa:#x}")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Where.
        gpa: u64,
        /// Why not.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// The ACPI tables outgrew their place.
    #[error("ACPI tables of {len} bytes do not fit")]
    AcpiTooLarge {
        /// Their length.
        len: usize,
    },
}

fn kvm(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> ArchError {
    move |source| ArchError::Kvm { operation, source }
}
