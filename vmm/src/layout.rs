//! Where things are in guest physical memory.
//!
//! RAM has two addresses: the guest physical address (GPA) and the *RAM offset*, which counts bytes of RAM
//! without the hole below 4 GiB. Images, bitmaps and the working set go by RAM offset; the host maps RAM
//! contiguously by it. The fixed addresses are part of the image format: changing one needs a new
//! [`torpor_api::vmm::IMAGE_FORMAT`].

use torpor_api::limits::MEM_MIB;

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;
/// Bytes of a page, for arithmetic with addresses.
pub const PAGE_BYTES: u64 = 4096;
/// End of the RAM below the hole.
pub const LOW_RAM_END: u64 = 3 << 30;
/// Start of the RAM above the hole.
pub const HIGH_RAM_START: u64 = 4 << 30;
/// `hvm_start_info` of the PVH boot protocol.
pub const START_INFO: u64 = 0x6000;
/// Memory map that it points at.
pub const START_MEMMAP: u64 = 0x7000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest kernel command line with its zero byte.
pub const CMDLINE_MAX: usize = 4096;
/// End of the RAM below the firmware area.
pub const FIRMWARE_START: u64 = 0xa_0000;
/// ACPI tables, the RSDP first.
pub const ACPI_START: u64 = 0xe_0000;
/// Where ACPI tables must end.
pub const ACPI_END: u64 = 0xf_0000;
/// Page of the VM generation ID.
pub const VMGENID: u64 = 0xf_f000;
/// Start of RAM that is free for the kernel.
pub const HIMEM_START: u64 = 0x10_0000;
/// The virtio devices, one page each; [`crate::devices`] assigns them.
pub const MMIO_START: u64 = 0xd000_0000;
/// Interrupt of the ACPI event device.
pub const GED_GSI: u32 = 23;
/// Fixed ACPI event registers: status and enable, two bytes each.
pub const PM1_EVENT_PORT: u16 = 0x600;
/// Fixed ACPI control register, two bytes.
pub const PM1_CONTROL_PORT: u16 = 0x604;
/// ACPI interrupt; nothing ever raises it.
pub const SCI_GSI: u16 = 10;
/// Command port of the keyboard controller, which resets the machine.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// Command that resets the machine.
pub const I8042_RESET: u8 = 0xfe;

/// One memslot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamSlot {
    /// First guest physical address.
    pub gpa: u64,
    /// First RAM offset.
    pub ram_offset: u64,
    /// Length in bytes.
    pub len_bytes: u64,
}

/// The RAM of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    slots: Vec<RamSlot>,
    len_bytes: u64,
}

/// The size is not one that a machine can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest memory of {mem_mib} MiB is outside {}..={} MiB", MEM_MIB.start(), MEM_MIB.end())]
pub struct BadMemorySize {
    /// What was asked for.
    pub mem_mib: u32,
}

impl RamLayout {
    /// The layout of so much RAM.
    ///
    /// # Errors
    /// More or less than a machine may have.
    pub fn new(mem_mib: u32) -> Result<Self, BadMemorySize> {
        if !MEM_MIB.contains(&mem_mib) {
            return Err(BadMemorySize { mem_mib });
        }
        let len_bytes = u64::from(mem_mib) << 20;
        let low_bytes = len_bytes.min(LOW_RAM_END);
        let mut slots = vec![RamSlot {
            gpa: 0,
            ram_offset: 0,
            len_bytes: low_bytes,
        }];
        if len_bytes > low_bytes {
            slots.push(RamSlot {
                gpa: HIGH_RAM_START,
                ram_offset: low_bytes,
                len_bytes: len_bytes - low_bytes,
            });
        }
        Ok(Self { slots, len_bytes })
    }

    /// The memslots, by address.
    #[must_use]
    pub fn slots(&self) -> &[RamSlot] {
        &self.slots
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Pages of RAM.
    #[must_use]
    pub fn n_pages(&self) -> u64 {
        self.len_bytes / PAGE_BYTES
    }

    /// RAM offset of a range of guest physical addresses, if all of it is RAM of one slot.
    #[must_use]
    pub fn ram_offset(&self, gpa: u64, len_bytes: u64) -> Option<u64> {
        self.slots.iter().find_map(|slot| {
            let inside = gpa.checked_sub(slot.gpa)?;
            let end = inside.checked_add(len_bytes)?;
            (end <= slot.len_bytes && inside < slot.len_bytes).then(|| slot.ram_offset + inside)
        })
    }

    /// Guest physical ranges of a range of RAM offsets: `(gpa, length)`, at most one per slot.
    pub fn gpa_ranges(&self, ram_offset: u64, len_bytes: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let end = ram_offset.saturating_add(len_bytes);
        self.slots.iter().filter_map(move |slot| {
            let from = ram_offset.max(slot.ram_offset);
            let to = end.min(slot.ram_offset + slot.len_bytes);
            (from < to).then(|| (slot.gpa + (from - slot.ram_offset), to - from))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_of_every_size_is_contiguous_by_offset_and_leaves_the_hole_free() {
        for mem_mib in [128, 512, 3071, 3072, 3073, 4096, 8192, 65_536] {
            let layout = RamLayout::new(mem_mib).unwrap();
            let mut offset = 0;
            for slot in layout.slots() {
                assert_eq!(slot.ram_offset, offset, "{mem_mib} MiB");
                offset += slot.len_bytes;
                assert!(slot.gpa + slot.len_bytes <= LOW_RAM_END || slot.gpa >= HIGH_RAM_START);
            }
            assert_eq!(offset, u64::from(mem_mib) << 20);
            assert_eq!(layout.n_pages() * PAGE_BYTES, offset);
        }
    }

    #[test]
    fn sizes_outside_the_limits_are_refused() {
        assert!(RamLayout::new(127).is_err());
        assert!(RamLayout::new(65_537).is_err());
    }

    #[test]
    fn addresses_translate_both_ways_and_the_hole_does_not() {
        let layout = RamLayout::new(4096).unwrap();
        assert_eq!(layout.ram_offset(HIGH_RAM_START, 4096), Some(LOW_RAM_END));
        assert_eq!(
            layout.ram_offset(LOW_RAM_END - 4096, 4096),
            Some(LOW_RAM_END - 4096)
        );
        assert_eq!(layout.ram_offset(LOW_RAM_END - 4096, 8192), None);
        assert_eq!(layout.ram_offset(LOW_RAM_END, 1), None);
        assert_eq!(layout.ram_offset(u64::MAX, 2), None);
        let ranges: Vec<_> = layout.gpa_ranges(LOW_RAM_END - 4096, 8192).collect();
        assert_eq!(ranges, [(LOW_RAM_END - 4096, 4096), (HIGH_RAM_START, 4096)]);
    }

    #[test]
    fn the_fixed_addresses_do_not_overlap() {
        let mut ranges = [
            (START_INFO, 0x1000),
            (START_MEMMAP, 0x1000),
            (CMDLINE, CMDLINE_MAX as u64),
            (ACPI_START, ACPI_END - ACPI_START),
            (VMGENID, PAGE_BYTES),
            (HIMEM_START, PAGE_BYTES),
        ];
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        const { assert!(MMIO_START >= LOW_RAM_END) };
    }
}
