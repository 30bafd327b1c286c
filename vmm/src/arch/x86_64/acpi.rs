//! ACPI tables: processors, virtio-mmio devices, the serial port, power-off and
//! reset, and the VM generation ID with the event device that announces a change of it.

use super::ArchError;
use crate::devices::MmioDeviceInfo;
use crate::layout::{
    ACPI_END, ACPI_START, GED_GSI, I8042_COMMAND_PORT, I8042_RESET, PM1_CONTROL_PORT, PM1_EVENT_PORT,
    SCI_GSI, VMGENID,
};
use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
    Scope, ZERO,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;

const OEM_ID: [u8; 6] = *b"TORPOR";
const OEM_TABLE_ID: [u8; 8] = *b"TORPORVM";
const HEADER_LEN: u32 = 36;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const COM1_PORT: u16 = 0x3f8;
const COM1_GSI: u32 = 4;
/// The RSDP, and after it the FACS, which is aligned to its own size.
const FACS_OFFSET: usize = 64;
const FACS_LEN: u8 = 64;

/// All tables as they lie from [`ACPI_START`], the RSDP first.
pub(super) fn tables(n_vcpus: u8, devices: &[MmioDeviceInfo]) -> Result<Vec<u8>, ArchError> {
    let mut bytes = vec![0; FACS_OFFSET];
    bytes.extend(facs());
    let dsdt = place(&mut bytes, dsdt(devices).as_slice());
    let fadt = place(&mut bytes, fadt(dsdt).as_slice());
    let madt = place(&mut bytes, madt(n_vcpus).as_slice());
    let mut xsdt = Sdt::new(*b"XSDT", HEADER_LEN, 1, OEM_ID, OEM_TABLE_ID, 1);
    xsdt.append_slice(&fadt.to_le_bytes());
    xsdt.append_slice(&madt.to_le_bytes());
    let xsdt = place(&mut bytes, xsdt.as_slice());
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    if bytes.len() as u64 > ACPI_END - ACPI_START {
        return Err(ArchError::AcpiTooLarge { len: bytes.len() });
    }
    Ok(bytes)
}

/// Append a table; its guest physical address.
fn place(bytes: &mut Vec<u8>, table: &[u8]) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    let gpa = ACPI_START + bytes.len() as u64;
    bytes.extend_from_slice(table);
    gpa
}

/// Shared with a guest that owns no firmware to share a lock with: all zero but its own description.
fn facs() -> [u8; FACS_LEN as usize] {
    let mut table = [0; FACS_LEN as usize];
    table[..4].copy_from_slice(b"FACS");
    table[4] = FACS_LEN;
    table[32] = 2;
    table
}

/// `GenericAddress` of an I/O port.
fn io_port(port: u16, width_bits: u8) -> [u8; 12] {
    let [low, high] = port.to_le_bytes();
    let access = if width_bits == 8 { 1 } else { 2 };
    [1, width_bits, 0, access, low, high, 0, 0, 0, 0, 0, 0]
}

fn fadt(dsdt: u64) -> Sdt {
    const WBINVD: u32 = 1;
    const PWR_BUTTON_ABSENT: u32 = 1 << 4;
    const SLP_BUTTON_ABSENT: u32 = 1 << 5;
    const RTC_WAKE_ABSENT: u32 = 1 << 6;
    const RESET_REG_SUPPORTED: u32 = 1 << 10;
    const NO_VGA: u16 = 1 << 2;
    const NO_MSI: u16 = 1 << 3;
    const NO_ASPM: u16 = 1 << 4;
    const NO_RTC: u16 = 1 << 5;
    let (facs, dsdt32) = (
        u32::try_from(ACPI_START).unwrap_or(0) + 64,
        u32::try_from(dsdt).unwrap_or(0),
    );
    let mut table = Sdt::new(*b"FACP", 276, 6, OEM_ID, OEM_TABLE_ID, 1);
    table.write_u32(36, facs);
    table.write_u32(40, dsdt32);
    table.write_u16(46, SCI_GSI);
    table.write_u32(56, PM1_EVENT_PORT.into());
    table.write_u32(64, PM1_CONTROL_PORT.into());
    table.write_u8(88, 4);
    table.write_u8(89, 2);
    // Latencies that say: no such processor state.
    table.write_u16(96, 101);
    table.write_u16(98, 1001);
    table.write_u16(109, NO_VGA | NO_MSI | NO_ASPM | NO_RTC);
    let absent = PWR_BUTTON_ABSENT | SLP_BUTTON_ABSENT | RTC_WAKE_ABSENT;
    table.write_u32(112, WBINVD | absent | RESET_REG_SUPPORTED);
    table.write_bytes(116, &io_port(I8042_COMMAND_PORT, 8));
    table.write_u8(128, I8042_RESET);
    table.write_u8(131, 5);
    table.write_u64(140, dsdt);
    table.write_bytes(148, &io_port(PM1_EVENT_PORT, 32));
    table.write_bytes(172, &io_port(PM1_CONTROL_PORT, 16));
    table.update_checksum();
    table
}

fn madt(n_vcpus: u8) -> Sdt {
    let mut table = Sdt::new(*b"APIC", HEADER_LEN, 5, OEM_ID, OEM_TABLE_ID, 1);
    // There are 8259 interrupt controllers as well (PCAT_COMPAT): they give the legacy interrupts their numbers.
    table.append_slice(&LOCAL_APIC.to_le_bytes());
    table.append_slice(&1u32.to_le_bytes());
    for id in 0..n_vcpus {
        table.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    table.append_slice(&[1, 12, n_vcpus, 0]);
    table.append_slice(&IO_APIC.to_le_bytes());
    table.append_slice(&0u32.to_le_bytes());
    table
}

fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(devices: &[MmioDeviceInfo]) -> Sdt {
    let mut body = Vec::new();
    for device in devices {
        virtio(device).to_aml_bytes(&mut body);
    }
    serial(&mut body);
    event_device(&mut body);
    generation_id(&mut body);
    let (sleep_type, zero) = (5u8, ZERO);
    let package = Package::new(vec![&sleep_type, &sleep_type, &zero, &zero]);
    let power_off = Name::new(Path::new("_S5_"), &package);
    let mut table = Sdt::new(*b"DSDT", HEADER_LEN, 6, OEM_ID, OEM_TABLE_ID, 1);
    let mut aml = Scope::raw(Path::new("_SB_"), body);
    power_off.to_aml_bytes(&mut aml);
    table.append_slice(&aml);
    table
}

/// A device object, already encoded.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn device(name: &str, parts: Vec<&dyn Aml>) -> Encoded {
    let mut bytes = Vec::new();
    Device::new(Path::new(name), parts).to_aml_bytes(&mut bytes);
    Encoded(bytes)
}

fn virtio(info: &MmioDeviceInfo) -> Encoded {
    let name = format!("V{:03}", info.id % 1000);
    let (base, len) = (
        u32::try_from(info.gpa).unwrap_or(0),
        u32::try_from(info.len).unwrap_or(0),
    );
    let (registers, irq) = (Memory32Fixed::new(true, base, len), interrupt(info.gsi));
    let resources = ResourceTemplate::new(vec![&registers, &irq]);
    device(
        &name,
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &info.id),
            // The guest's writes to RAM and the device's are coherent.
            &Name::new(Path::new("_CCA"), &1u8),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
}

fn serial(body: &mut Vec<u8>) {
    let (ports, irq) = (IO::new(COM1_PORT, COM1_PORT, 0, 8), interrupt(COM1_GSI));
    let resources = ResourceTemplate::new(vec![&ports, &irq]);
    device(
        "COM1",
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(body);
}

/// The generic event device has one event only, so that its method need not ask what happened.
fn event_device(body: &mut Vec<u8>) {
    let irq = interrupt(GED_GSI);
    let resources = ResourceTemplate::new(vec![&irq]);
    let target = Path::new("\\_SB_.VGEN");
    let changed = 0x80u8;
    let notify = Notify::new(&target, &changed);
    device(
        "GED_",
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(Path::new("_CRS"), &resources),
            &Method::new(Path::new("_EVT"), 1, true, vec![&notify]),
        ],
    )
    .to_aml_bytes(body);
}

fn generation_id(body: &mut Vec<u8>) {
    let (low, high) = (u32::try_from(VMGENID).unwrap_or(0), 0u32);
    let address = Package::new(vec![&low, &high]);
    device(
        "VGEN",
        vec![
            &Name::new(Path::new("_HID"), &"TORP0001"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &address),
        ],
    )
    .to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn table_at(bytes: &[u8], gpa: u64) -> &[u8] {
        let start = usize::try_from(gpa - ACPI_START).unwrap();
        let len = u32::from_le_bytes(bytes[start + 4..start + 8].try_into().unwrap());
        &bytes[start..start + len as usize]
    }

    #[test]
    fn every_table_is_reachable_from_the_rsdp_and_sums_to_zero() {
        let devices = [MmioDeviceInfo {
            gpa: crate::layout::MMIO_START,
            len: 0x1000,
            gsi: 5,
            id: 0,
        }];
        let bytes = tables(8, &devices).unwrap();
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let xsdt = table_at(&bytes, u64_at(&bytes, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let fadt = table_at(&bytes, u64_at(xsdt, 36));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        let madt = table_at(&bytes, u64_at(xsdt, 44));
        assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
        let dsdt = table_at(&bytes, u64_at(fadt, 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        let facs = usize::try_from(u32::from_le_bytes(fadt[36..40].try_into().unwrap())).unwrap();
        assert_eq!(
            &bytes[facs - usize::try_from(ACPI_START).unwrap()..][..5],
            b"FACS\x40"
        );
        assert!(dsdt.windows(8).any(|w| w == b"LNRO0005"));
    }

    #[test]
    fn the_generation_id_can_be_read_before_the_first_fork() {
        const { assert!(VMGENID >= ACPI_END) };
    }
}
