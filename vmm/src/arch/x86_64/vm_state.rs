//! Interrupt controllers, timer and clock of the VM.

use super::{ArchError, kvm};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data,
    kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// Three pages that KVM wants for itself on Intel, outside of RAM and of every device.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What the VM has beside its vCPUs.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmState {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    clock_ns: u64,
}

/// Make interrupt controllers and timer. Memslots must be there already: the other order costs ~7 ms on 6.18.
///
/// # Errors
/// KVM refused.
pub fn create_interrupt_controller(vm: &VmFd) -> Result<(), ArchError> {
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
        .map_err(kvm("set identity map address"))?;
    vm.set_tss_address(TSS_ADDRESS).map_err(kvm("set TSS address"))?;
    vm.create_irq_chip().map_err(kvm("create interrupt controller"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(kvm("create timer"))
}

fn irqchip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, ArchError> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)
        .map_err(kvm("get interrupt controller"))?;
    Ok(chip)
}

/// Save what the VM has beside its vCPUs, which must be stopped.
///
/// # Errors
/// KVM refused.
pub fn save_vm(vm: &VmFd) -> Result<VmState, ArchError> {
    Ok(VmState {
        clock_ns: vm.get_clock().map_err(kvm("get clock"))?.clock,
        pic_master: irqchip(vm, KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: irqchip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: irqchip(vm, KVM_IRQCHIP_IOAPIC)?,
        pit: vm.get_pit2().map_err(kvm("get timer"))?,
    })
}

/// Set the guest's clock to where it stopped; before the TSCs.
///
/// Without `KVM_CLOCK_REALTIME`: the time asleep must not pass for the guest's monotonic clock, or every timer
/// in it would fire at once.
///
/// # Errors
/// KVM refused.
pub fn restore_clock(vm: &VmFd, state: &VmState) -> Result<(), ArchError> {
    let clock = kvm_clock_data {
        clock: state.clock_ns,
        ..Default::default()
    };
    vm.set_clock(&clock).map_err(kvm("set clock"))
}

/// Set the interrupt controllers; after the local APICs, which pending interrupts are delivered to.
///
/// # Errors
/// KVM refused.
pub fn restore_vm(vm: &VmFd, state: &VmState) -> Result<(), ArchError> {
    vm.set_pit2(&state.pit).map_err(kvm("set timer"))?;
    for chip in [&state.pic_master, &state.pic_slave, &state.ioapic] {
        vm.set_irqchip(chip).map_err(kvm("set interrupt controller"))?;
    }
    Ok(())
}
