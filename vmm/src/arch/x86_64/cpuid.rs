//! What the guest is told about its processors, and what an image remembers of the host's.

use super::{ArchError, boot, kvm};
use crate::image::HostSignature;
use kvm_bindings::{CpuId, KVM_CAP_TSC_DEADLINE_TIMER, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd};

const HYPERVISOR_BIT: u32 = 1 << 31;
const TSC_DEADLINE_BIT: u32 = 1 << 24;
/// Nested virtualisation, Intel's and AMD's: its state is in no image, so a guest must not begin to use it.
const VMX_BIT: u32 = 1 << 5;
const SVM_BIT: u32 = 1 << 2;
const KVM_FEATURES: u32 = 0x4000_0001;
/// `KVM_FEATURE_ASYNC_PF`, `_VMEXIT` and `_INT`: a task that waits for such a page when the machine is frozen
/// would wait for ever after a restore, because the host that owes it the page is gone.
const ASYNC_PAGE_FAULT_BITS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// CPUID common to all vCPUs of this process.
#[derive(Debug, Clone)]
pub struct CpuProfile {
    supported: CpuId,
    n_vcpus: u8,
}

/// Ask KVM once what it supports.
///
/// # Errors
/// KVM refused.
pub fn prepare_cpuid(host: &Kvm, n_vcpus: u8) -> Result<CpuProfile, ArchError> {
    let mut supported = host
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm("get supported CPUID"))?;
    let tsc_deadline = host.check_extension_raw(KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0;
    for entry in supported.as_mut_slice() {
        choose_features(entry, tsc_deadline);
    }
    Ok(CpuProfile { supported, n_vcpus })
}

/// What every vCPU is told, beyond or short of what KVM supports.
fn choose_features(entry: &mut kvm_cpuid_entry2, tsc_deadline: bool) {
    match entry.function {
        1 => {
            entry.ecx |= HYPERVISOR_BIT;
            entry.ecx &= !VMX_BIT;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE_BIT;
            }
        }
        0x8000_0001 => entry.ecx &= !SVM_BIT,
        KVM_FEATURES => entry.eax &= !ASYNC_PAGE_FAULT_BITS,
        _ => {}
    }
}

/// Tell a vCPU what it is; before its first run and before any state is set.
///
/// # Errors
/// KVM refused.
pub fn configure_vcpu(vcpu: &VcpuFd, profile: &CpuProfile, id: u8) -> Result<(), ArchError> {
    let mut cpuid = profile.supported.clone();
    for entry in cpuid.as_mut_slice() {
        set_topology(entry, id, profile.n_vcpus);
    }
    vcpu.set_cpuid2(&cpuid).map_err(kvm("set CPUID"))?;
    if let Some(msrs) = boot::firmware_msrs() {
        vcpu.set_msrs(&msrs).map_err(kvm("set MSRs"))?;
    }
    Ok(())
}

/// One package of single-threaded cores, whose APIC IDs are their numbers.
fn set_topology(entry: &mut kvm_cpuid_entry2, id: u8, n_vcpus: u8) {
    let (id, n) = (u32::from(id), u32::from(n_vcpus));
    let id_bits = n.next_power_of_two().trailing_zeros();
    match (entry.function, entry.index) {
        (1, _) => entry.ebx = (entry.ebx & 0xffff) | id << 24 | n << 16,
        // Intel: cores that share a cache, cores in the package.
        (4, _) if entry.eax & 0x1f != 0 => {
            let shared = if entry.eax >> 5 & 7 == 3 { n - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | shared << 14 | (n.next_power_of_two() - 1) << 26;
        }
        (0xb | 0x1f, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 1 << 8, id),
        (0xb | 0x1f, 1) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id_bits, n, 1 | 2 << 8, id),
        (0xb | 0x1f, level) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, level, id),
        // AMD: number of cores and how many bits of the APIC ID count them.
        (0x8000_0008, _) => entry.ecx = (n - 1) | id_bits << 12,
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// What must be the same on a host for it to resume an image: processor, features and kernel.
#[must_use]
pub fn signature(profile: &CpuProfile) -> HostSignature {
    let find = |function, index| {
        let entries = profile.supported.as_slice().iter();
        entries
            .copied()
            .find(|e| e.function == function && e.index == index)
            .unwrap_or_default()
    };
    let mut vendor = Vec::new();
    for register in [find(0, 0).ebx, find(0, 0).edx, find(0, 0).ecx] {
        vendor.extend(register.to_le_bytes());
    }
    let version = find(1, 0).eax;
    let family = (version >> 8 & 0xf)
        + if version >> 8 & 0xf == 0xf {
            version >> 20 & 0xff
        } else {
            0
        };
    let model = (version >> 4 & 0xf) | (version >> 16 & 0xf) << 4;
    // Feature words only: other leaves name the CPU that answered, or the state of the one that asks.
    let words = [
        find(1, 0).ecx,
        find(1, 0).edx,
        find(7, 0).ebx,
        find(7, 0).ecx,
        find(7, 0).edx,
        find(7, 1).eax,
        find(0xd, 0).eax,
        find(0xd, 0).edx,
        find(0xd, 1).eax,
        find(0x8000_0001, 0).ecx,
        find(0x8000_0001, 0).edx,
        find(0x8000_0008, 0).ebx,
        find(KVM_FEATURES, 0).eax,
    ];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    HostSignature::new(
        "x86_64",
        &String::from_utf8_lossy(&vendor),
        family,
        model,
        version & 0xf,
        &bytes,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_guest_is_offered_what_an_image_cannot_hold() {
        let all = |function| {
            let mut entry = kvm_cpuid_entry2 {
                function,
                eax: u32::MAX,
                ecx: u32::MAX,
                ..Default::default()
            };
            choose_features(&mut entry, false);
            entry
        };
        assert_eq!(all(1).ecx, !(1 << 5));
        assert_eq!(all(0x8000_0001).ecx, !(1 << 2));
        assert_eq!(all(KVM_FEATURES).eax & (1 << 4 | 1 << 10 | 1 << 14), 0);
        assert_eq!((all(7).eax, all(7).ecx), (u32::MAX, u32::MAX));
    }

    #[test]
    fn apic_ids_are_distinct_in_every_leaf_that_has_one() {
        for n in 1..=8u8 {
            for id in 0..n {
                let mut one = kvm_cpuid_entry2 {
                    function: 1,
                    ebx: u32::MAX,
                    ..Default::default()
                };
                set_topology(&mut one, id, n);
                assert_eq!(
                    (one.ebx >> 24, one.ebx >> 16 & 0xff),
                    (u32::from(id), u32::from(n))
                );
                let mut topology = kvm_cpuid_entry2 {
                    function: 0xb,
                    index: 1,
                    ..Default::default()
                };
                set_topology(&mut topology, id, n);
                assert_eq!(topology.edx, u32::from(id));
                assert!(1u32 << topology.eax >= u32::from(n));
            }
        }
    }
}
