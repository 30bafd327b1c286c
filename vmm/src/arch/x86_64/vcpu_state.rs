//! A vCPU's state, saved and restored.
//!
//! The order of a restore matters: special registers hold the APIC base that the local APIC is set under; the
//! TSC comes before the TSC deadline, and both after the local APIC whose timer they arm.

use super::{ArchError, kvm};
use crate::sys;
use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSRS_PER_CALL: usize = 128;

/// A vCPU between two instructions.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    msrs: Vec<(u32, u64)>,
    tsc_khz: u32,
}

/// Indices of the MSRs that KVM saves.
///
/// # Errors
/// KVM refused.
pub fn msr_indices(host: &Kvm) -> Result<Vec<u32>, ArchError> {
    let list = host.get_msr_index_list().map_err(kvm("list MSRs"))?;
    let mut indices = list.as_slice().to_vec();
    if !indices.contains(&MSR_TSC_DEADLINE) {
        indices.push(MSR_TSC_DEADLINE);
    }
    Ok(indices)
}

/// Save a vCPU that has completed its last instruction.
///
/// # Errors
/// KVM refused.
pub fn save_vcpu(vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<VcpuState, ArchError> {
    // KVM turns a pending INIT or SIPI into the state that get_mp_state reports, so it comes first.
    let mp_state = vcpu.get_mp_state().map_err(kvm("get multiprocessor state"))?;
    Ok(VcpuState {
        mp_state,
        regs: vcpu.get_regs().map_err(kvm("get registers"))?,
        sregs: vcpu.get_sregs().map_err(kvm("get special registers"))?,
        xsave: vcpu.get_xsave().map_err(kvm("get extended state"))?,
        xcrs: vcpu.get_xcrs().map_err(kvm("get extended control registers"))?,
        debug_regs: vcpu.get_debug_regs().map_err(kvm("get debug registers"))?,
        lapic: vcpu.get_lapic().map_err(kvm("get local APIC"))?,
        msrs: read_msrs(vcpu, msr_indices)?,
        events: vcpu.get_vcpu_events().map_err(kvm("get events"))?,
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
    })
}

/// Set a fresh vCPU to a saved state.
///
/// # Errors
/// KVM refused.
pub fn restore_vcpu(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), ArchError> {
    // The same host signature means the same frequency or one that the hardware can scale to.
    if state.tsc_khz != 0 && vcpu.get_tsc_khz().is_ok_and(|khz| khz != state.tsc_khz) {
        vcpu.set_tsc_khz(state.tsc_khz)
            .map_err(kvm("set TSC frequency"))?;
    }
    vcpu.set_mp_state(state.mp_state)
        .map_err(kvm("set multiprocessor state"))?;
    vcpu.set_regs(&state.regs).map_err(kvm("set registers"))?;
    vcpu.set_sregs(&state.sregs)
        .map_err(kvm("set special registers"))?;
    sys::kvm::set_xsave(vcpu, &state.xsave).map_err(kvm("set extended state"))?;
    vcpu.set_xcrs(&state.xcrs)
        .map_err(kvm("set extended control registers"))?;
    vcpu.set_debug_regs(&state.debug_regs)
        .map_err(kvm("set debug registers"))?;
    vcpu.set_lapic(&state.lapic).map_err(kvm("set local APIC"))?;
    write_msrs(vcpu, &in_restore_order(&state.msrs))?;
    vcpu.set_vcpu_events(&state.events).map_err(kvm("set events"))
}

/// The TSC first, its deadline last.
fn in_restore_order(msrs: &[(u32, u64)]) -> Vec<(u32, u64)> {
    let mut ordered = msrs.to_vec();
    ordered.sort_by_key(|(index, _)| match *index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    ordered
}

fn entries(msrs: &[(u32, u64)]) -> Option<Msrs> {
    let entries: Vec<_> = msrs
        .iter()
        .map(|(index, data)| kvm_msr_entry {
            index: *index,
            data: *data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).ok()
}

/// KVM stops at the first MSR that it does not read here; such a one is left out.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, ArchError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk: Vec<_> = rest.iter().take(MSRS_PER_CALL).map(|index| (*index, 0)).collect();
        let Some(mut msrs) = entries(&chunk) else { break };
        let n_read = vcpu
            .get_msrs(&mut msrs)
            .map_err(kvm("get MSRs"))?
            .min(chunk.len());
        values.extend(
            msrs.as_slice()[..n_read]
                .iter()
                .map(|entry| (entry.index, entry.data)),
        );
        let skip = usize::from(n_read < chunk.len());
        rest = &rest[n_read + skip..];
    }
    Ok(values)
}

/// An MSR that can be read and not written back keeps what a fresh vCPU has, which is what it was given at its
/// own start on the same host.
fn write_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), ArchError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_PER_CALL)];
        let Some(list) = entries(chunk) else { break };
        let n_set = vcpu.set_msrs(&list).map_err(kvm("set MSRs"))?.min(chunk.len());
        if n_set < chunk.len() {
            let (index, data) = chunk[n_set];
            tracing::debug!(index, data, "MSR not restored");
        }
        rest = &rest[n_set + usize::from(n_set < chunk.len())..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_is_restored_first_and_its_deadline_last() {
        let msrs = [(MSR_TSC_DEADLINE, 1), (0x174, 2), (MSR_TSC, 3), (0x175, 4)];
        let order: Vec<u32> = in_restore_order(&msrs).iter().map(|m| m.0).collect();
        assert_eq!(order, [MSR_TSC, 0x174, 0x175, MSR_TSC_DEADLINE]);
    }
}
