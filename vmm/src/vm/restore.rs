//! Resuming from a hibernation image.
//!
//! Everything that can be refused is refused before memory or devices are touched. Then the vCPUs take over their
//! state while this thread attaches the devices. KVM writes to the guest's memory when it takes a vCPU's state (the wall clock of
//! kvmclock), so the working set is put in place after that. Nothing waits for the rest: it is filled when it is touched.

use super::build::no_uffd;
use super::{Backing, Files, ImageFiles, MachineState, Prepared, Vm, VmError, micros};
use crate::arch;
use crate::devices::Backends;
use crate::image::{self, Expected, Extent, ImageFile, OpenImage, PageSource};
use crate::layout::PAGE_BYTES;
use crate::memory::Ram;
use crate::memory::lazy::{FailureSink, LazyMemory};
use crate::memory::prefetch::Placement;
use crate::sys::uffd::Uffd;
use crate::vcpu::Vcpu;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::Instant;
use torpor_api::vmm::RestoreTrace;

/// Up to this generation of an image the recorded set says little: it is that of a boot or of the template's guest,
/// which did something else.
const EARLY_GENERATIONS: u64 = 3;
/// After them, one wake in so many is watched, if all is as before.
const WATCHED_ONE_IN: u64 = 8;
/// Most pages of which a set may not know whether they are needed for a wake to go unwatched: windows around some 60 faults.
const MAX_SETTLED_DOUBTS: usize = 256;
/// Most bytes of an image that are mapped ahead although nobody saw that the guest needs them.
const MAX_UNKNOWN_BYTES: u64 = 128 << 20;

/// What a restore is asked for.
#[derive(Debug, Clone, Copy)]
pub struct RestoreRequest {
    /// Largest size of the console log in bytes.
    pub console_limit: u64,
    /// The image's generation that the manifest names.
    pub generation: u64,
    /// The disk's generation that the manifest names.
    pub disk_generation: u64,
    /// The machine becomes another one.
    pub fork: bool,
}

impl Prepared {
    /// Take over state and memory from an image and run.
    ///
    /// `on_memory_failure` is called, and must not return, when a page can't be given to the guest.
    ///
    /// # Errors
    /// The image is refused, or something failed; the process is of no further use.
    pub fn restore(
        self,
        mut files: Files,
        request: RestoreRequest,
        on_memory_failure: FailureSink,
    ) -> Result<(Vm, RestoreTrace), VmError> {
        let started = Instant::now();
        let ImageFiles { image, base } = files.take_image()?;
        let backends = files.take_backends(request.console_limit)?;
        let image = image::open(image, base, &self.expected(request))?;
        let ahead = Ahead::of(&image);
        let OpenImage { file, vmstate, .. } = image;
        let state = decode(vmstate, self.vcpus.len())?;
        let file = Arc::new(file);
        let mut trace = RestoreTrace {
            state_loaded_us: micros(started),
            ..RestoreTrace::default()
        };
        let (lazy, memory) = self.map_lazily(Arc::clone(&file) as Arc<dyn PageSource>, on_memory_failure)?;
        arch::restore_clock(&self.vm_fd, &state.vm)?;
        for (vcpu, state) in self.vcpus.iter().zip(state.vcpus) {
            vcpu.restore(state)?;
        }
        self.attach_checked(&memory, backends, request.disk_generation)?;
        for vcpu in &self.vcpus {
            vcpu.done()?;
        }
        trace.attached_us = micros(started);
        let prefetched = lazy.prefetch(&ahead.extents, ahead.placement, !self.can_pre_fault)?;
        let since =
            |step: Instant| u64::try_from(step.duration_since(started).as_micros()).unwrap_or(u64::MAX);
        trace.prefetched_pages = prefetched.n_pages;
        trace.checked_us = since(prefetched.checked);
        trace.mapped_us = since(prefetched.mapped);
        trace.populated_us = since(prefetched.populated);
        if self.can_pre_fault {
            pre_fault(&self.vcpus, &self.ram, lazy.ahead())?;
        }
        trace.memory_ready_us = micros(started);
        arch::restore_vm(&self.vm_fd, &state.vm)?;
        self.pm1.restore(state.pm1_enable);
        self.devices
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .restore(&state.devices)?;
        if request.fork {
            self.new_generation_id(&memory)?;
        }
        self.release(request.fork)?;
        trace.running_us = micros(started);
        let mut vm = self.into_vm(Backing::Lazy(lazy));
        vm.baseline = Some(Arc::clone(&file));
        vm.restored_from = Some(file);
        Ok((vm, trace))
    }

    fn expected(&self, request: RestoreRequest) -> Expected {
        Expected {
            generation: request.generation,
            disk_generation: request.disk_generation,
            n_vcpus: self.shape.vcpus,
            mem_bytes: self.ram.layout().len_bytes(),
            host: self.host.clone(),
        }
    }

    fn map_lazily(
        &self,
        source: Arc<dyn PageSource>,
        on_failure: FailureSink,
    ) -> Result<(LazyMemory, crate::memory::GuestMemory), VmError> {
        self.ram.map()?;
        let lazy = fill_lazily(&self.ram, &self.uffd, source, on_failure)?;
        Ok((lazy, self.ram.guest_memory()?))
    }

    fn attach_checked(
        &self,
        memory: &crate::memory::GuestMemory,
        backends: Backends,
        wanted: u64,
    ) -> Result<(), VmError> {
        self.attach(memory, backends)?;
        let found = self
            .devices
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .disk_generation();
        if found == wanted {
            Ok(())
        } else {
            Err(VmError::DiskGeneration { found, wanted })
        }
    }

    fn release(&self, fork: bool) -> Result<(), VmError> {
        self.devices
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .resume_after_restore();
        for vcpu in &self.vcpus {
            vcpu.run()?;
        }
        if fork {
            self.generation_event.write(1).map_err(VmError::EventFd)?;
        }
        Ok(())
    }
}

/// Memory that is mapped and empty, filled from the source when it is touched.
pub(super) fn fill_lazily(
    ram: &Arc<Ram>,
    uffd: &Uffd,
    source: Arc<dyn PageSource>,
    on_failure: FailureSink,
) -> Result<LazyMemory, VmError> {
    let uffd = uffd.try_clone().map_err(no_uffd)?;
    Ok(LazyMemory::start(Arc::clone(ram), uffd, source, on_failure)?)
}

/// The second-level page table of these pages: by the first vCPU, because all share it.
pub(super) fn pre_fault(vcpus: &[Vcpu], ram: &Ram, pages: &[Range<u64>]) -> Result<(), VmError> {
    let Some(first) = vcpus.first().filter(|_| !pages.is_empty()) else {
        return Ok(());
    };
    let layout = ram.layout();
    let ranges = pages
        .iter()
        .flat_map(|p| layout.gpa_ranges(p.start * PAGE_BYTES, (p.end - p.start) * PAGE_BYTES));
    first.pre_fault(ranges.collect())?;
    Ok(first.done()?)
}

/// What is put in place before the guest runs from an image, and how.
pub(super) struct Ahead {
    pub(super) extents: Vec<Extent>,
    pub(super) placement: Placement,
}

impl Ahead {
    pub(super) fn of(image: &OpenImage) -> Self {
        let generation = image.header.generation;
        if is_settled(&image.working_set, generation) {
            return Self {
                extents: image.working_set.clone(),
                placement: Placement::Unwatched,
            };
        }
        let mut extents = image::with_probation(&image.working_set, generation / WATCHED_ONE_IN);
        if generation <= EARLY_GENERATIONS || image.working_set.is_empty() {
            extents.extend(everything(&image.file));
        }
        Self {
            extents,
            placement: Placement::Mapped,
        }
    }
}

/// Whether so much is known about what the guest needs that this wake need not be watched.
fn is_settled(set: &[Extent], generation: u64) -> bool {
    let doubted = set.iter().filter(|extent| extent.is_tentative());
    let n_doubted: usize = doubted.map(|extent| extent.pages(u64::MAX).count()).sum();
    generation > EARLY_GENERATIONS
        && !generation.is_multiple_of(WATCHED_ONE_IN)
        && !set.is_empty()
        && n_doubted <= MAX_SETTLED_DOUBTS
}

/// For a guest of which little is known yet: all that its image holds, if it is not too much. What of it the guest
/// takes is its next working set.
fn everything(file: &ImageFile) -> Vec<Extent> {
    match file.data_extents(MAX_UNKNOWN_BYTES / PAGE_BYTES) {
        Ok(extents) => extents.into_iter().flatten().map(Extent::doubted).collect(),
        Err(error) => {
            // Whoever touches a page whose checksum can't be read is told so then.
            tracing::debug!(%error, "image not mapped ahead");
            Vec::new()
        }
    }
}

/// Bytes that were added to the end of the state since there are images.
const ADDED_BYTES: usize = 1;

pub(super) fn decode(mut vmstate: Vec<u8>, n_vcpus: usize) -> Result<MachineState, VmError> {
    // What an older image lacks reads as zero; what is left over is ignored.
    vmstate.resize(vmstate.len() + ADDED_BYTES, 0);
    let state: MachineState = postcard::from_bytes(&vmstate).map_err(VmError::DecodeState)?;
    if state.vcpus.len() != n_vcpus {
        return Err(VmError::StateVcpus {
            found: state.vcpus.len(),
            wanted: n_vcpus,
        });
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_goes_unwatched_if_little_is_in_doubt_and_it_is_not_its_turn() {
        let known = Extent::new(0..4000).unwrap();
        let doubted = |n_pages: u64| Extent::new(5000..5000 + n_pages).unwrap().doubted();
        let settled: Vec<_> = (0..20)
            .filter(|g| is_settled(&[known, doubted(256)], *g))
            .collect();
        assert_eq!(settled, [4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19]);
        assert!(!is_settled(&[known, doubted(257)], 5));
        assert!(!is_settled(&[], 5));
    }
}
