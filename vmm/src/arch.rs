//! What differs between processor architectures. Every architecture's module exports the same names.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    ArchError, VcpuState, VmState, boot, configure_vcpu, create_interrupt_controller, msr_indices,
    prepare_cpuid, restore_clock, restore_vcpu, restore_vm, save_vcpu, save_vm, signature,
    write_generation_id,
};
#[cfg(target_arch = "x86_64")]
pub use x86_64::{BootRegisters, CpuProfile};
