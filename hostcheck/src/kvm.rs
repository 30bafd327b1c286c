//! A guest that runs, step by step, what an unmodified kernel runs.
//!
//! The emulations of KVM that some containers have run simple guests and stop at others. So the guest (`guest.S`)
//! uses each kind of instruction that a kernel does and names every step before it begins; where the steps end is
//! where a kernel would. Everything runs in a supervised child. The host's half of the guest's world, its page tables
//! and descriptors, is made here; the addresses are those that `guest.S` names.

use crate::Finding;
use crate::supervise::{self, Outcome, step};
use crate::sys::{self, GuestRam};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_pit_config, kvm_regs, kvm_segment};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use std::io;
use std::path::Path;
use std::time::Duration;

pub(crate) const CHILD: &str = "kvm";
const LIMIT: Duration = Duration::from_secs(20);
const DEVICE: &str = "/dev/kvm";
const CHECK: &str = "KVM";

const RAM_BYTES: usize = 2 << 20;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const LOW_PD: usize = 0x3000;
const HIGH_PD: usize = 0x4000;
const GDT: usize = 0x5000;
const GDT_PTR: usize = 0x5800;
const IDT_PTR: usize = 0x5810;
const IDT: u64 = 0x6000;
const TSS: usize = 0x7000;
const REMAP_PT: usize = 0x9000;
const REMAPPED_PAGE: u64 = 0x10_0000;
const STACK: u64 = 0xF000;
const CODE: usize = 0x1_0000;
const PRESENT_WRITABLE_USER: u64 = 7;
const LARGE: u64 = 0x80;
const UNCACHED: u64 = 0x10;
const MMIO: u64 = 0xD000_0000;

/// The guest's steps by number; 0 is none of them.
const STEPS: [&str; 20] = [
    "nothing of the guest",
    "64-bit code and port input",
    "CPUID",
    "LGDT, far return, segment loads",
    "LTR and LLDT",
    "LIDT, INT, IRETQ",
    "an invalid opcode's exception (#UD)",
    "a page fault (#PF) with CR2",
    "EFER by RDMSR and WRMSR",
    "STAR, LSTAR and FMASK",
    "CR0, CR3, CR4 and CR8",
    "x87, SSE and XSETBV",
    "INVLPG after a page table change",
    "GS bases and SWAPGS",
    "debug registers, WBINVD and flags",
    "user mode by IRETQ, SYSCALL and SYSRETQ",
    "MMIO answered by the VMM",
    "the local APIC by MMIO",
    "HLT woken by the APIC timer",
    "RDTSC",
];

/// Why the guest did not come to its end.
#[derive(Debug, thiserror::Error)]
enum KvmError {
    #[error("{operation}: {source}")]
    Call {
        operation: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error("guest memory: {0}")]
    Memory(#[from] io::Error),
    #[error("KVM lacks {0:?}")]
    Lacks(Cap),
    #[error("wrong result")]
    WrongResult,
    #[error("an exception that must not happen")]
    Exception,
    #[error("KVM stopped the guest: {0}")]
    Stopped(String),
}

fn call<T>(operation: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, KvmError> {
    result.map_err(|source| KvmError::Call { operation, source })
}

pub(crate) fn check() -> Finding {
    if !Path::new(DEVICE).exists() {
        return Finding::no(
            CHECK,
            format!("{DEVICE} does not exist"),
            "Load kvm_intel or kvm_amd, turn VT-x or SVM on in the firmware, or turn nested virtualisation on.",
        );
    }
    let report = supervise::run(CHILD, LIMIT);
    let at = report.last_step.unwrap_or_else(|| "the start".to_owned());
    let not_real =
        "Use a host whose KVM is backed by VT-x or SVM; this one would not run an unmodified kernel.";
    match report.outcome {
        Outcome::Passed => Finding::ok(
            CHECK,
            format!("a guest ran all {} steps that a kernel needs", STEPS.len() - 1),
        ),
        Outcome::Failed(why) if why.contains("Permission denied") => Finding::no(
            CHECK,
            format!("{DEVICE}: {why}"),
            "Run as root, or join the group kvm.",
        ),
        Outcome::Failed(why) => Finding::no(CHECK, format!("the guest failed at '{at}': {why}"), not_real),
        Outcome::Died(why) => Finding::no(CHECK, format!("the probe died at '{at}': {why}"), not_real),
        Outcome::Hung => Finding::no(
            CHECK,
            format!("the guest hung at '{at}' for {} s", LIMIT.as_secs()),
            not_real,
        ),
    }
}

/// The probe itself, for the child.
pub(crate) fn run() -> Result<(), String> {
    try_guest().map_err(|error| error.to_string())
}

fn try_guest() -> Result<(), KvmError> {
    step("open /dev/kvm");
    let kvm = call("open /dev/kvm", Kvm::new())?;
    for needed in [
        Cap::UserMemory,
        Cap::Irqchip,
        Cap::ImmediateExit,
        Cap::Irqfd,
        Cap::Ioeventfd,
    ] {
        if !kvm.check_extension(needed) {
            return Err(KvmError::Lacks(needed));
        }
    }
    step("create a VM");
    let ram = GuestRam::map(RAM_BYTES)?;
    let vm = call("KVM_CREATE_VM", kvm.create_vm())?;
    fill(&ram)?;
    call("KVM_SET_USER_MEMORY_REGION", ram.attach(&vm))?;
    step("create interrupt controllers");
    call("KVM_SET_TSS_ADDR", vm.set_tss_address(0xFFFB_D000))?;
    call("KVM_CREATE_IRQCHIP", vm.create_irq_chip())?;
    call("KVM_CREATE_PIT2", vm.create_pit2(kvm_pit_config::default()))?;
    step("create a vCPU");
    let mut vcpu = call("KVM_CREATE_VCPU", vm.create_vcpu(0))?;
    let cpuid = call(
        "KVM_GET_SUPPORTED_CPUID",
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
    )?;
    enter_long_mode(&vcpu, &cpuid)?;
    step(STEPS[0]);
    run_guest(&mut vcpu)?;
    step("save and restore of vCPU and VM state");
    round_trip(&vm, &vcpu)
}

/// Page tables, descriptors and code: identity-mapped RAM and device addresses, and one page to remap.
fn fill(ram: &GuestRam) -> Result<(), KvmError> {
    let entry = |table: usize, index: usize, value: u64| ram.store(table + index * 8, &value.to_le_bytes());
    entry(PML4, 0, PDPT as u64 | PRESENT_WRITABLE_USER)?;
    entry(PDPT, 0, LOW_PD as u64 | PRESENT_WRITABLE_USER)?;
    entry(PDPT, 3, HIGH_PD as u64 | PRESENT_WRITABLE_USER)?;
    entry(LOW_PD, 0, LARGE | PRESENT_WRITABLE_USER)?;
    entry(LOW_PD, 1, REMAP_PT as u64 | PRESENT_WRITABLE_USER)?;
    entry(REMAP_PT, 0, REMAPPED_PAGE | PRESENT_WRITABLE_USER)?;
    for (index, base) in (0..512_usize).zip((0xC000_0000_u64..).step_by(2 << 20)) {
        entry(HIGH_PD, index, base | LARGE | UNCACHED | PRESENT_WRITABLE_USER)?;
    }
    let tss = TSS as u64;
    let tss_low = 0x0000_8900_0000_0067 | (tss & 0xFF_FFFF) << 16 | (tss >> 24 & 0xFF) << 56;
    let descriptors = [
        0,
        0x00AF_9B00_0000_FFFF, // 0x08: kernel code
        0x00CF_9300_0000_FFFF, // 0x10: kernel data
        0x00CF_F300_0000_FFFF, // 0x18: user data
        0x00AF_FB00_0000_FFFF, // 0x20: user code
        tss_low,               // 0x28: task state, two entries long
        tss >> 32,
    ];
    for (index, descriptor) in descriptors.into_iter().enumerate() {
        entry(GDT, index, descriptor)?;
    }
    ram.store(GDT_PTR, &table_pointer(7 * 8 - 1, GDT as u64))?;
    ram.store(IDT_PTR, &table_pointer(256 * 16 - 1, IDT))?;
    ram.store(TSS + 4, &STACK.to_le_bytes())?;
    ram.store(CODE, &sys::guest_code())?;
    Ok(())
}

fn table_pointer(limit: u16, base: u64) -> [u8; 10] {
    let mut pointer = [0; 10];
    pointer[..2].copy_from_slice(&limit.to_le_bytes());
    pointer[2..].copy_from_slice(&base.to_le_bytes());
    pointer
}

/// As a VMM starts a 64-bit kernel: paging on, flat segments, interrupts off.
fn enter_long_mode(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), KvmError> {
    call("KVM_SET_CPUID2", vcpu.set_cpuid2(cpuid))?;
    let mut sregs = call("KVM_GET_SREGS", vcpu.get_sregs())?;
    let code = kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector: 0x08,
        type_: 0xB,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment {
        selector: 0x10,
        type_: 0x3,
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt = kvm_dtable {
        base: GDT as u64,
        limit: 7 * 8 - 1,
        ..kvm_dtable::default()
    };
    sregs.cr0 |= 0x8000_0001;
    sregs.cr3 = PML4 as u64;
    sregs.cr4 |= 0x20;
    sregs.efer |= 0x500;
    call("KVM_SET_SREGS", vcpu.set_sregs(&sregs))?;
    let regs = kvm_regs {
        rip: CODE as u64,
        rsp: STACK,
        rflags: 2,
        ..kvm_regs::default()
    };
    call("KVM_SET_REGS", vcpu.set_regs(&regs))
}

fn run_guest(vcpu: &mut VcpuFd) -> Result<(), KvmError> {
    loop {
        match call("KVM_RUN", vcpu.run())? {
            VcpuExit::IoOut(0x10, [number, ..]) => {
                step(
                    STEPS
                        .get(usize::from(*number))
                        .copied()
                        .unwrap_or("a step that does not exist"),
                );
            }
            VcpuExit::IoOut(0x11, _) => return Err(KvmError::WrongResult),
            VcpuExit::IoOut(0x12, _) => return Ok(()),
            VcpuExit::IoOut(0x13, _) => return Err(KvmError::Exception),
            VcpuExit::IoIn(0x14, data) => data.fill(0x5A),
            VcpuExit::MmioRead(MMIO, data) => {
                for (byte, value) in data.iter_mut().zip([0x78, 0x56, 0x34, 0x12]) {
                    *byte = value;
                }
            }
            VcpuExit::MmioWrite(..) | VcpuExit::Intr => {}
            other => return Err(KvmError::Stopped(format!("{other:?}"))),
        }
    }
}

/// What a pause and a wake do with the state of a vCPU and a VM.
fn round_trip(vm: &VmFd, vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mp_state = call("KVM_GET_MP_STATE", vcpu.get_mp_state())?;
    call("KVM_SET_MP_STATE", vcpu.set_mp_state(mp_state))?;
    let regs = call("KVM_GET_REGS", vcpu.get_regs())?;
    call("KVM_SET_REGS", vcpu.set_regs(&regs))?;
    let sregs = call("KVM_GET_SREGS", vcpu.get_sregs())?;
    call("KVM_SET_SREGS", vcpu.set_sregs(&sregs))?;
    let lapic = call("KVM_GET_LAPIC", vcpu.get_lapic())?;
    call("KVM_SET_LAPIC", vcpu.set_lapic(&lapic))?;
    let events = call("KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events())?;
    call("KVM_SET_VCPU_EVENTS", vcpu.set_vcpu_events(&events))?;
    let xcrs = call("KVM_GET_XCRS", vcpu.get_xcrs())?;
    call("KVM_SET_XCRS", vcpu.set_xcrs(&xcrs))?;
    let debug = call("KVM_GET_DEBUGREGS", vcpu.get_debug_regs())?;
    call("KVM_SET_DEBUGREGS", vcpu.set_debug_regs(&debug))?;
    let mut clock = call("KVM_GET_CLOCK", vm.get_clock())?;
    clock.flags = 0;
    call("KVM_SET_CLOCK", vm.set_clock(&clock))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_of_the_guest_has_a_name_and_the_last_one_is_the_last() {
        let source = include_str!("kvm/guest.S");
        let numbers: Vec<usize> = source
            .lines()
            .filter_map(|line| line.trim().strip_prefix("begin "))
            .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
            .collect();
        assert_eq!(numbers, (1..STEPS.len()).collect::<Vec<_>>());
    }

    #[test]
    fn the_guests_code_fits_between_its_tables_and_the_pages_it_remaps() {
        let code = sys::guest_code();
        assert!(code.len() > 500 && CODE + code.len() < usize::try_from(REMAPPED_PAGE).unwrap());
    }
}
