//! Booting a kernel by the PVH protocol: what is in memory and in the registers at its first instruction.

use super::{ArchError, acpi, kvm};
use crate::devices::MmioDeviceInfo;
use crate::layout::{
    ACPI_START, CMDLINE, CMDLINE_MAX, FIRMWARE_START, HIMEM_START, PAGE_BYTES, RamLayout, START_INFO,
    START_MEMMAP, VMGENID,
};
use crate::memory::GuestMemory;
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use std::fs::File;
use vm_memory::{Bytes, GuestAddress};

const XEN_HVM_START_MAGIC: u32 = 0x336e_c578;
const MEMMAP_RAM: u32 = 1;
const MEMMAP_RESERVED: u32 = 2;
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, everything write-back.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// What the boot processor starts with.
#[derive(Debug, Clone, Copy)]
pub struct BootRegisters {
    entry: u64,
}

/// Put kernel, command line, memory map and ACPI tables into memory.
///
/// # Errors
/// The kernel is not one that can be booted, or something does not fit.
pub fn boot(
    memory: &GuestMemory,
    layout: &RamLayout,
    kernel: &mut File,
    cmdline: &str,
    n_vcpus: u8,
    devices: &[MmioDeviceInfo],
) -> Result<BootRegisters, ArchError> {
    let loaded =
        Elf::load(memory, None, kernel, Some(GuestAddress(HIMEM_START))).map_err(ArchError::Kernel)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(ArchError::NoPvhEntry);
    };
    if cmdline.len() >= CMDLINE_MAX || cmdline.contains('\0') {
        return Err(ArchError::CommandLine {
            len: cmdline.len(),
            max: CMDLINE_MAX - 1,
        });
    }
    let mut text = cmdline.as_bytes().to_vec();
    text.push(0);
    write(memory, "command line", CMDLINE, &text)?;
    let (map, n_entries) = memory_map(layout);
    write(memory, "memory map", START_MEMMAP, &map)?;
    write(memory, "start info", START_INFO, &start_info(n_entries))?;
    write(
        memory,
        "ACPI tables",
        ACPI_START,
        &acpi::tables(n_vcpus, devices)?,
    )?;
    Ok(BootRegisters { entry: entry.0 })
}

/// Give the machine a new identity: 16 bytes that the guest mixes into its random numbers when told.
///
/// # Errors
/// The page is not RAM.
pub fn write_generation_id(memory: &GuestMemory, id: [u8; 16]) -> Result<(), ArchError> {
    write(memory, "generation ID", VMGENID, &id)
}

fn write(memory: &GuestMemory, what: &'static str, gpa: u64, bytes: &[u8]) -> Result<(), ArchError> {
    let failed = |source| ArchError::Write { what, gpa, source };
    memory.write_slice(bytes, GuestAddress(gpa)).map_err(failed)
}

/// `hvm_memmap_table_entry`s.
fn memory_map(layout: &RamLayout) -> (Vec<u8>, u32) {
    let low_end = layout.slots()[0].len_bytes;
    let mut ranges = vec![
        (0, FIRMWARE_START, MEMMAP_RAM),
        (ACPI_START, VMGENID + PAGE_BYTES - ACPI_START, MEMMAP_RESERVED),
        (HIMEM_START, low_end - HIMEM_START, MEMMAP_RAM),
    ];
    ranges.extend(
        layout.slots()[1..]
            .iter()
            .map(|slot| (slot.gpa, slot.len_bytes, MEMMAP_RAM)),
    );
    let mut bytes = Vec::new();
    for (address, size, kind) in &ranges {
        bytes.extend(address.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
    }
    (bytes, u32::try_from(ranges.len()).unwrap_or(0))
}

/// `hvm_start_info`, version 1, without modules.
fn start_info(n_memmap_entries: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(XEN_HVM_START_MAGIC.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(CMDLINE.to_le_bytes());
    bytes.extend(ACPI_START.to_le_bytes());
    bytes.extend(START_MEMMAP.to_le_bytes());
    bytes.extend(n_memmap_entries.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

impl BootRegisters {
    /// Set the boot processor: 32-bit protected mode without paging.
    ///
    /// # Errors
    /// KVM refused.
    pub fn apply(&self, vcpu: &VcpuFd) -> Result<(), ArchError> {
        let mut sregs = vcpu.get_sregs().map_err(kvm("get special registers"))?;
        let data = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: 0x18,
            type_: 3,
            present: 1,
            dpl: 0,
            db: 1,
            s: 1,
            l: 0,
            g: 1,
            avl: 0,
            unusable: 0,
            padding: 0,
        };
        sregs.cs = kvm_segment {
            selector: 0x10,
            type_: 11,
            ..data
        };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            limit: 0x67,
            selector: 0x20,
            type_: 11,
            db: 0,
            s: 0,
            g: 0,
            ..data
        };
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        sregs.efer = 0;
        vcpu.set_sregs(&sregs).map_err(kvm("set special registers"))?;
        let regs = kvm_regs {
            rip: self.entry,
            rbx: START_INFO,
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs).map_err(kvm("set registers"))
    }
}

/// Model-specific registers that firmware would have set, on every vCPU.
pub(super) fn firmware_msrs() -> Option<Msrs> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    ])
    .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_covers_all_ram_but_the_firmware_area() {
        for mem_mib in [128, 4096] {
            let layout = RamLayout::new(mem_mib).unwrap();
            let (bytes, n_entries) = memory_map(&layout);
            assert_eq!(bytes.len(), n_entries as usize * 24);
            let mut ram = 0;
            for entry in bytes.chunks_exact(24) {
                if entry[16] == 1 {
                    ram += u64::from_le_bytes(entry[8..16].try_into().unwrap());
                }
            }
            assert_eq!(ram, layout.len_bytes() - (HIMEM_START - FIRMWARE_START));
        }
    }

    #[test]
    fn start_info_has_the_length_of_version_1() {
        assert_eq!(start_info(3).len(), 56);
    }
}
